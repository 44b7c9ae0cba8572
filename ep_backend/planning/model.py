"""Sizes of a model, from the registry of `bench-engine --shape` or from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ep_backend import env
from ep_backend.bench.engines import models
from ep_backend.doctor.plan import Shape
from ep_backend.errors import EpConfigError

MOST_EXPERTS = 65536  # more would only make the binomial coefficients slow
_LARGEST_FILE = 1 << 20
MLA_KEYS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class Attention(msgspec.Struct, frozen=True, kw_only=True):
    """Elements of one layer's attention: ``heads_share`` is split with TP, ``kv_share`` over at most
    ``kv_heads`` GPUs, ``whole`` (what MLA compresses) is on every GPU."""

    heads: int
    kv_heads: int
    heads_share: int
    kv_share: int
    whole: int = 0


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """Widths are the inner ones of a gated MLP (three matrices); ``shared_width``: of all shared experts
    together, 0 for none. ``moe_layers`` of ``layers`` have experts, ``early_moe_layers`` of the first half,
    which is the larger one if the number of layers is odd."""

    name: str
    hidden: int
    experts: int
    topk: int
    expert_width: int
    shared_width: int
    dense_width: int
    layers: int
    moe_layers: int
    early_moe_layers: int
    attention: Attention
    vocabulary: int
    tied: bool
    note: str = ""

    @property
    def shape(self) -> Shape:
        """What counts for communication."""
        return Shape(
            name=self.name, hidden=self.hidden, experts=self.experts, topk=self.topk, layers=self.moe_layers
        )


def read(text: str) -> Model:
    """``text``: a name of the registry, with ``,layers=N`` if wanted, or config.json, or the folder that has
    it. Raises EpConfigError: neither is there, a key is missing or has no usable value."""
    name = text.partition(",")[0]
    if name in models.ARCHITECTURES:
        return of_registry(text)
    path = Path(text)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(models.ARCHITECTURES)
        near = env.nearest(name, models.ARCHITECTURES)
        raise EpConfigError(
            f"--model {text}: no known model{near} ({known}), and no folder or file with a config.json"
        )
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise EpConfigError(f"{path}: too large for a config.json")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise EpConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise EpConfigError(f"{path}: no JSON object")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return of_config(name or str(path), content, str(path))


def of_registry(text: str, option: str = "--model", fp8: str = "--dtype fp8") -> Model:
    """Of `NAME[,layers=N]`, given with ``option``; ``fp8``: what to do in place of `,fp8`. Raises
    EpConfigError."""
    shape = models.parse(text, option, "layers=N")
    if shape.fp8:
        raise EpConfigError(f"{option} {text}: here fp8 is a dtype: {fp8}")
    model = of_config(text.partition(",")[0], models.config_of(shape), text)
    return msgspec.structs.replace(model, note=shape.architecture.note or model.note)


def of_config(name: str, config: Mapping[str, Any], where: str) -> Model:
    """Of the content of a config.json: Qwen2/3-MoE, Mixtral and DeepSeek-V2/V3, and what has their keys."""
    inner = config.get("text_config")
    if "hidden_size" not in config and isinstance(inner, dict):
        config = inner
    hidden = _number(config, where, "hidden_size")
    experts = _number(config, where, "num_experts", "n_routed_experts", "num_local_experts")
    topk = _number(config, where, "num_experts_per_tok")
    layers = _number(config, where, "num_hidden_layers")
    width = _number(config, where, "moe_intermediate_size", "intermediate_size")
    if experts > MOST_EXPERTS:
        raise EpConfigError(f"{where}: {experts} experts; at most {MOST_EXPERTS} are possible")
    if topk > experts:
        raise EpConfigError(f"{where}: num_experts_per_tok {topk} is more than {experts} experts")
    with_experts = _moe_layers(config, where, layers)
    if not with_experts:
        raise EpConfigError(f"{where}: no layer has experts")
    shared = _number(config, where, "shared_expert_intermediate_size", default=0)
    shared = shared or _number(config, where, "n_shared_experts", default=0) * width
    return Model(
        name=name,
        hidden=hidden,
        experts=experts,
        topk=topk,
        expert_width=width,
        shared_width=shared,
        dense_width=_number(config, where, "intermediate_size") if len(with_experts) < layers else 0,
        layers=layers,
        moe_layers=len(with_experts),
        early_moe_layers=sum(layer < -(-layers // 2) for layer in with_experts),
        attention=_attention(config, where, hidden),
        vocabulary=_number(config, where, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _moe_layers(config: Mapping[str, Any], where: str, layers: int) -> list[int]:
    """Which layers have experts: the first ones may not, or only every so many, or not some by number."""
    first = _number(config, where, "first_k_dense_replace", default=0)
    step = _number(config, where, "decoder_sparse_step", default=1) or 1
    every = _number(config, where, "moe_layer_freq", default=1) or 1
    without = config.get("mlp_only_layers") or []
    if not isinstance(without, list):
        raise EpConfigError(f"{where}: mlp_only_layers must be a list of layers")
    return [
        layer
        for layer in range(layers)
        if layer >= first and (layer + 1) % step == 0 and layer % every == 0 and layer not in without
    ]


def _attention(config: Mapping[str, Any], where: str, hidden: int) -> Attention:
    heads = _number(config, where, "num_attention_heads")
    if config.get("kv_lora_rank"):
        return _compressed(config, where, hidden, heads)
    kv_heads = _number(config, where, "num_key_value_heads", default=heads) or heads
    width = _number(config, where, "head_dim", default=0) or hidden // heads
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        heads_share=2 * hidden * heads * width,
        kv_share=2 * hidden * kv_heads * width,
    )


def _compressed(config: Mapping[str, Any], where: str, hidden: int, heads: int) -> Attention:
    """DeepSeek's MLA: queries through q_lora_rank (if any), keys and values through kv_lora_rank."""
    nope, rope, value = (_number(config, where, key) for key in MLA_KEYS)
    kv = _number(config, where, "kv_lora_rank")
    q = _number(config, where, "q_lora_rank", default=0)
    queries = (q or hidden) * heads * (nope + rope)
    return Attention(
        heads=heads,
        kv_heads=heads,
        heads_share=queries + kv * heads * (nope + value) + heads * value * hidden,
        kv_share=0,
        whole=hidden * q + hidden * (kv + rope),
    )


def _number(config: Mapping[str, Any], where: str, *keys: str, default: int | None = None) -> int:
    """The first of ``keys`` that is there and not null: a whole number, from 1 on if there is no default."""
    least = 1 if default is None else 0
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1e9:
            raise EpConfigError(f"{where}: {key} is {value!r}; a whole number was wanted")
        return value
    if default is None:
        raise EpConfigError(f"{where}: {' or '.join(keys)} is missing")
    return default
