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
EXPERTS = 1024
"""Width of an expert that every version of DeepGEMM's kernels takes."""
HEAD = 128
"""Elements of a head; SGLang has no kernel for the 32 of the tiny model."""
IN_HEADS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "q_norm": 0, "k_norm": 0}
"""The axis of a module's weights that is heads."""


def write(folder, *, hidden=2048, experts=EXPERTS, fp8=False):
    """Write the model and its tokenizer; returns the folder.

    ``hidden``: 128 times a power of 4. ``experts``: width of each. ``fp8``: weights with a scale per 128x128.
    A norm's mean is over more elements, so its weights shrink, by a power of two. Pairs of elements that are
    turned together are half a head apart, so a head's two halves are widened each for itself, and the base
    of the angles grows.
    """
    from safetensors.torch import load_file, save_file  # tests are collected where it is missing, too

    config = json.loads((TINY / "config.json").read_text())
    head, was = config["head_dim"], config["hidden_size"]
    widths = {"hidden_size": hidden, "moe_intermediate_size": experts, "head_dim": HEAD}
    theta = config["rope_theta"] ** (HEAD / head)
    config |= {**widths, "rope_theta": theta, "rms_norm_eps": config["rms_norm_eps"] * was / hidden}
    config["rope_parameters"]["rope_theta"] = theta
    config["tie_word_embeddings"] = False  # SGLang's Qwen3-MoE knows no such thing
    if fp8:
        like = models.Shape(
            text="tiny",
            architecture=models.ARCHITECTURES["qwen3-30b-a3b"],
            layers=config["num_hidden_layers"],
            fp8=True,
        )
        config["quantization_config"] = models.config_of(like)["quantization_config"]
    # q_norm's would shrink as k_norm's, but attention divides by the root of HEAD, too.
    factors = {
        "input_layernorm": (was / hidden) ** 0.5,
        "post_attention_layernorm": (was / hidden) ** 0.5,
        "norm": (was / hidden) ** 0.5,
        "k_norm": (head / HEAD) ** 0.5,
    }
    sizes, tensors = dict(random_models.sizes_of(config)), {}
    for name, weight in load_file(TINY / "model.safetensors").items():
        module = name.split(".")[-2]
        places = [torch.arange(size) for size in weight.shape]
        if module in IN_HEADS:
            places[IN_HEADS[module]] = _in_heads(weight.shape[IN_HEADS[module]], head)
        wide = torch.zeros(sizes[name], dtype=weight.dtype)
        wide[torch.meshgrid(places, indexing="ij")] = weight * factors.get(module, 1.0)
        tensors[name] = wide
        if fp8 and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = random_models.quantised(
                wide.float(), models.FP8_BLOCK, models.FP8_BLOCK
            )
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER:
        shutil.copy(TINY / file, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts():
    return [line for line in (TINY / "prompts.txt").read_text().splitlines() if line.strip()]


def _in_heads(size, head):
    """Where ``size`` elements of heads go."""
    half = torch.arange(head // 2)
    one = torch.cat([half, HEAD // 2 + half])
    return (torch.arange(size // head)[:, None] * HEAD + one).flatten()
