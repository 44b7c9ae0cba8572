"""Models of known shapes for `--shape`: a folder with a config and a tokenizer, and no weights.

The engine fills in random weights (`--load-format dummy`), so nothing is downloaded and any machine with
enough memory can serve the shape. What such a model writes has no meaning.

`qwen3-30b-a3b` and `qwen1.5-moe-a2.7b` have the published sizes of Qwen3-30B-A3B and Qwen1.5-MoE-A2.7B (with
its shared expert). `deepseek-v3` has only DeepSeek-V3's MoE layer (hidden size, number of experts, top-k,
expert width), in a plain attention model: it measures that layer's exchange, not DeepSeek-V3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ep_backend.errors import EpConfigError

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
FP8_BLOCK = 128  # rows and columns of weights that share a scale
OPTIONS = "layers=N, fp8"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What every model of one name shares. `config` is config.json without the number of layers."""

    layers: int
    config: Mapping[str, Any]
    note: str = ""  # how it differs from the model of that name
    unquantised: tuple[str, ...] = ()  # modules of a layer that fp8 leaves alone


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One `--shape`: `text` is what was typed."""

    text: str
    architecture: Architecture = field(repr=False)
    layers: int
    fp8: bool = False


_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    # transformers 5 reads the first, 4 the second.
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "transformers_version": "4.51.0",  # without one, some versions warn about another model's tokenizer
    "use_cache": True,
    "use_sliding_window": False,
}
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
}

ARCHITECTURES = {
    "qwen3-30b-a3b": Architecture(
        layers=48,
        config={
            **_QWEN3_MOE,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_key_value_heads": 4,
            "vocab_size": 151936,
        },
        unquantised=("mlp.gate",),
    ),
    "deepseek-v3": Architecture(
        layers=61,
        config={
            **_QWEN3_MOE,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_attention_heads": 56,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_key_value_heads": 8,
            "vocab_size": 129280,
        },
        note="deepseek-v3 has DeepSeek-V3's MoE layer (hidden size 7168, 256 experts, top-8, expert width "
        "2048) in every layer of a plain attention model: no MLA, no shared expert, no dense layers, softmax "
        "routing.",
        unquantised=("mlp.gate",),
    ),
    "qwen1.5-moe-a2.7b": Architecture(
        layers=24,
        config={
            **_QWEN,
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632,
            "vocab_size": 151936,
        },
        unquantised=("mlp.gate", "mlp.shared_expert_gate"),
    ),
}


def parse(text: str, option: str = "--shape", words: str = OPTIONS) -> Shape:
    """Of `NAME[,layers=N][,fp8]`, given with ``option``. Raises EpConfigError, which names what exists:
    ``words`` after the comma."""
    name, *options = text.split(",")
    if name not in ARCHITECTURES:
        raise EpConfigError(f"{option} {text}: no shape {name!r}; there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    given: dict[str, Any] = {}
    for word in options:
        key, _, value = word.partition("=")
        if key in given:
            raise EpConfigError(f"{option} {text}: {key} is given twice")
        if word == "fp8":
            given["fp8"] = True
        elif key == "layers" and value.isdecimal() and int(value) >= 1:
            given["layers"] = int(value)
        else:
            raise EpConfigError(
                f"{option} {text}: {word!r} is no option; there are {words} (N from 1; {name} has "
                f"{architecture.layers} layers)"
            )
    return Shape(text=text, architecture=architecture, **{"layers": architecture.layers, **given})


def write(shape: Shape, folder: Path) -> None:
    """Make `folder` a model that transformers and engines can load, except for its weights (about 4 MB)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": 0, "do_sample": False})
    _write_json(folder / "tokenizer.json", tokenizer_of(config["vocab_size"]))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    _write_json(folder / "tokenizer_config.json", settings)


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json. fp8 is e4m3 with a scale per block of weights and, as they come, per 1x128 activations."""
    config = {**shape.architecture.config, "num_hidden_layers": shape.layers}
    if shape.fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            # As in published fp8 checkpoints: a router's choice must not depend on quantisation.
            "modules_to_not_convert": [
                "lm_head",
                *(
                    f"model.layers.{layer}.{module}"
                    for layer in range(shape.layers)
                    for module in shape.architecture.unquantised
                ),
            ],
        }
    return config


def tokenizer_of(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json: one word per id, so that text has exactly as many tokens as the ids it was made of.

    vLLM's random prompts are ids from the whole vocabulary, decoded, and encoded again by the server.
    """
    words = [END_OF_TEXT, UNKNOWN, *(f"t{number}" for number in range(2, vocab_size))]
    specials = [
        {
            "id": number,
            "content": words[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number in (0, 1)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": UNKNOWN,
        },
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
