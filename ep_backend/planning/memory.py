"""Weights on one GPU, by how a model is split. Pure. KV cache, activations and norms are left out.

- EP + DP: a part of the experts; everything else whole on every GPU.
- TP W: a W-th of everything; key and value heads are at most as many parts as there are such heads, and what
  MLA compresses is whole.
- TP W/2 x PP 2: a half of the layers, split like TP over W/2; of embedding and head one on each half.
"""

from __future__ import annotations

import msgspec

from ep_backend.bench.engines.models import FP8_BLOCK
from ep_backend.planning.model import Model

SCALE_BYTES = 4  # of a block of FP8_BLOCK x FP8_BLOCK weights


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on the fullest GPU. ``rest``: shared experts, dense layers and routers. ``fits``: None where no
    size of memory was given."""

    way: str
    dtype: str
    experts: float
    attention: float
    embeddings: float
    rest: float
    fits: bool | None = None

    @property
    def total(self) -> float:
        return self.experts + self.attention + self.embeddings + self.rest


def bytes_per_weight(dtype: str) -> float:
    """Of a linear layer; embeddings and routers stay bf16."""
    return 1 + SCALE_BYTES / FP8_BLOCK**2 if dtype == "fp8" else 2.0


def weights(model: Model, gpus: int, dtype: str) -> tuple[float, float, float, float]:
    """Bytes of experts, attention, embeddings and the rest with EP + DP on ``gpus`` GPUs."""
    each = bytes_per_weight(dtype)
    local = -(-model.experts // gpus)
    attention = model.attention.heads_share + model.attention.kv_share + model.attention.whole
    dense = (model.layers - model.moe_layers) * model.dense_width + model.moe_layers * model.shared_width
    return (
        each * model.moe_layers * local * 3 * model.hidden * model.expert_width,
        each * model.layers * attention,
        2.0 * model.vocabulary * model.hidden * (1 if model.tied else 2),
        each * 3 * model.hidden * dense + 2.0 * model.moe_layers * model.hidden * model.experts,
    )


def expert_parallel(model: Model, gpus: int, dtype: str) -> Weights:
    experts, attention, embeddings, rest = weights(model, gpus, dtype)
    return Weights(
        way="EP + DP",
        dtype=dtype,
        experts=experts,
        attention=attention,
        embeddings=embeddings,
        rest=rest,
    )


def tensor_parallel(model: Model, gpus: int, dtype: str, stages: int = 1) -> Weights:
    """On ``gpus`` GPUs in ``stages`` stages (1 or 2), tensor-parallel inside a stage."""
    width = gpus // stages
    experts, _, embeddings, rest = weights(model, 1, dtype)
    of = model.attention
    attention = of.heads_share / width + of.kv_share / min(width, of.kv_heads) + of.whole
    at_one = 1 if model.tied else stages  # a tied matrix is needed at both ends
    return Weights(
        way=f"TP {gpus}" if stages == 1 else f"TP {width} x PP {stages}",
        dtype=dtype,
        experts=experts / gpus,
        attention=bytes_per_weight(dtype) * model.layers * attention / stages,
        embeddings=embeddings / width / at_one,
        rest=rest / gpus,
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
        msgspec.structs.replace(one, fits=None if memory_bytes is None else one.total <= memory_bytes)
        for one in found
    ]


def halves(model: Model, gpus: int) -> bool:
    """Whether TP W/2 x PP 2 is compared: with two GPUs it is a pipeline alone, which reduces nothing."""
    return gpus >= 4 and gpus % 2 == 0 and can_split(model, gpus // 2)
