"""The trained tiny model, made wide by zeros: it says the same, and kernels that want wide rows take it.

What random weights say hangs on near ties. A trained model is sure of most tokens: sums that are rounded in
another order leave them, and a wrong exchange does not.
"""

import json
import shutil
from pathlib import Path

import random_models
import torch

from ep_backend.bench.engines import models

TINY = Path(__file__).parents[1] / "examples" / "tiny_moe"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# Twice as many as it has, without values: so q, k and v are whole blocks of fp8, too.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
EXPERTS = 1024
"""Width of an expert that every version of DeepGEMM's kernels takes."""


def write(folder, *, hidden=2048, experts=EXPERTS, fp8=False):
    """Write the model and its tokenizer; returns the folder.

    ``hidden``: 128 times a power of 4. A norm's mean is over so many more elements, so its weights shrink by
    a power of two, exactly. ``experts``: width of each. ``fp8``: weights with a scale per 128x128.
    """
    from safetensors.torch import load_file, save_file  # tests are collected where it is missing, too

    config = json.loads((TINY / "config.json").read_text())
    shrink = config["hidden_size"] / hidden
    assert (1 / shrink**0.5).is_integer()
    config |= {"hidden_size": hidden, "moe_intermediate_size": experts, **HEADS}
    config["rms_norm_eps"] *= shrink
    if fp8:
        like = models.Shape(
            text="tiny",
            architecture=models.ARCHITECTURES["qwen3-30b-a3b"],
            layers=config["num_hidden_layers"],
            fp8=True,
        )
        config["quantization_config"] = models.config_of(like)["quantization_config"]
    sizes, tensors = dict(random_models.sizes_of(config)), {}
    for name, weight in load_file(TINY / "model.safetensors").items():
        wide = torch.zeros(sizes[name], dtype=weight.dtype)
        wide[tuple(map(slice, weight.shape))] = weight
        if len(wide) == hidden and wide.dim() == 1:
            wide *= shrink**0.5
        tensors[name] = wide
        if fp8 and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = random_models.quantised(
                wide.float(), models.FP8_BLOCK, models.FP8_BLOCK
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER:
        shutil.copy(TINY / file, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts():
    return [line for line in (TINY / "prompts.txt").read_text().splitlines() if line.strip()]
