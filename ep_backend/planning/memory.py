"""Weights on one GPU, by how a model is split. Pure. KV cache, activations and norms are left out.

- EP + DP: a part of the experts; everything else whole on every GPU.
- TP W: a W-th of everything; key and value heads are at most as many parts as there are such heads, and what
  MLA compresses is whole.
- TP W/2 x PP 2: the fuller half of the layers, split like TP over W/2; on each half embedding or head.
"""

from __future__ import annotations

import msgspec

from ep_backend.bench.engines.models import FP8_BLOCK
from ep_backend.planning.model import Model

SCALE_BYTES = 4  # of a block of FP8_BLOCK x FP8_BLOCK weights


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on the fullest GPU. ``rest``: shared experts, dense layers and routers. ``left``: of its memory,
    below 0 if they do not fit; None where no size of memory was given."""

    way: str
    dtype: str
    experts: float
    attention: float
    embeddings: float
    rest: float
    left: float | None = None

    @property
    def total(self) -> float:
        return self.experts + self.attention + self.embeddings + self.rest

    @property
    def fits(self) -> bool | None:
        return None if self.left is None else self.left >= 0


def bytes_per_weight(dtype: str) -> float:
    """Of a linear layer; embeddings and routers stay bf16."""
    return 1 + SCALE_BYTES / FP8_BLOCK**2 if dtype == "fp8" else 2.0


def expert_parallel(model: Model, gpus: int, dtype: str) -> Weights:
    of = model.attention
    local = -(-model.experts // gpus)
    return Weights(
        way="EP + DP",
        dtype=dtype,
        experts=_experts(model, dtype, model.moe_layers, local),
        attention=bytes_per_weight(dtype) * model.layers * (of.heads_share + of.kv_share + of.whole),
        embeddings=_embeddings(model),
        rest=_rest(model, dtype, model.layers, model.moe_layers),
    )


def tensor_parallel(model: Model, gpus: int, dtype: str, stages: int = 1) -> Weights:
    """On ``gpus`` GPUs in ``stages`` stages (1 or 2), tensor-parallel inside a stage. Of an odd number of
    layers the first stage has one more, as in engines."""
    width = gpus // stages
    early = -(-model.layers // 2)
    layers = [(model.layers, model.moe_layers)]
    if stages == 2:
        late_moe = model.moe_layers - model.early_moe_layers
        layers = [(early, model.early_moe_layers), (model.layers - early, late_moe)]
    of = model.attention
    attention = of.heads_share / width + of.kv_share / min(width, of.kv_heads) + of.whole
    at_one = 1 if model.tied else stages  # a tied matrix is needed at both ends
    found = [
        Weights(
            way=f"TP {gpus}" if stages == 1 else f"TP {width} x PP {stages}",
            dtype=dtype,
            experts=_experts(model, dtype, moe, model.experts) / width,
            attention=bytes_per_weight(dtype) * here * attention,
            embeddings=_embeddings(model) / width / at_one,
            rest=_rest(model, dtype, here, moe) / width,
        )
        for here, moe in layers
    ]
    return max(found, key=lambda one: one.total)


def _experts(model: Model, dtype: str, moe_layers: int, local: int) -> float:
    return bytes_per_weight(dtype) * moe_layers * local * 3 * model.hidden * model.expert_width


def _embeddings(model: Model) -> float:
    return 2.0 * model.vocabulary * model.hidden * (1 if model.tied else 2)


def _rest(model: Model, dtype: str, layers: int, moe_layers: int) -> float:
    width = (layers - moe_layers) * model.dense_width + moe_layers * model.shared_width
    return (
        bytes_per_weight(dtype) * 3 * model.hidden * width + 2.0 * moe_layers * model.hidden * model.experts
    )


def can_split(model: Model, width: int) -> bool:
    """Engines give every GPU of a TP group the same number of attention heads."""
    return model.attention.heads % width == 0


def all_ways(model: Model, gpus: int, dtype: str, memory_bytes: float | None) -> list[Weights]:
    """Every way that can be."""
    found = [expert_parallel(model, gpus, dtype)]
    found += [tensor_parallel(model, gpus, dtype)] if can_split(model, gpus) else []
    if halves(model, gpus):
        found.append(tensor_parallel(model, gpus, dtype, stages=2))
    return [
        msgspec.structs.replace(one, left=None if memory_bytes is None else memory_bytes - one.total)
        for one in found
    ]


def halves(model: Model, gpus: int) -> bool:
    """Whether TP W/2 x PP 2 is compared: with two GPUs it is a pipeline alone, which reduces nothing."""
    return gpus >= 4 and gpus % 2 == 0 and can_split(model, gpus // 2)


def left_out(model: Model, gpus: int) -> list[str]:
    """The ways of TP that are not in `all_ways`, and why."""
    heads = model.attention.heads
    found = []
    if not can_split(model, gpus):
        found.append(f"TP {gpus} left out: {heads} attention heads cannot be split evenly over {gpus} GPUs")
    if gpus % 2:
        found.append(f"TP x PP 2 left out: {gpus} GPUs have no two equal halves")
    elif gpus == 2:
        found.append("TP 1 x PP 2 left out: a pipeline alone, which reduces nothing")
    elif not halves(model, gpus):
        half = gpus // 2
        found.append(f"TP {half} x PP 2 left out: {heads} attention heads cannot be split evenly over {half}")
    return found
