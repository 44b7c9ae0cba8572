"""What ranks dispatch and what their experts answer, made from a seed: each rank can make all ranks'."""

from __future__ import annotations

import torch

from ep_backend import EpConfig, Received, reference
from ep_backend.config import SCALE_BLOCK
from ep_backend.reference import Call

ROUTINGS = ("uniform", "skew", "one_rank", "sparse", "none")


def make_call(config: EpConfig, world: int, rank: int, *, seed: int, count: int, routing: str) -> Call:
    """What ``rank`` dispatches: ``count`` tokens.

    ``routing``: "uniform"; "skew", a few experts are popular; "one_rank", all tokens to the experts of one
    rank, which the seed chooses; "sparse", half of the choices are none; "none", all of them.
    """
    g = torch.Generator().manual_seed(seed * 1009 + rank)
    ids = torch.full((count, config.top_k), -1, dtype=torch.int64)
    weights = torch.randn(count, config.top_k, generator=g)
    weights[torch.rand(weights.shape, generator=g) < 0.1] = 0.0
    chance = torch.ones(config.num_experts)
    if routing == "skew":
        chance = 1.0 / (1.0 + torch.arange(config.num_experts)) ** 2
    elif routing == "one_rank":
        owners = config.expert_ranks(world)
        chance = torch.tensor([float(owner == owners[seed % config.num_experts]) for owner in owners])
    chosen = min(config.top_k, int(chance.count_nonzero()))
    if count and routing != "none":
        ids[:, :chosen] = torch.multinomial(chance.expand(count, -1), chosen, generator=g)
    if routing == "sparse":
        ids[torch.rand(ids.shape, generator=g) < 0.5] = -1
    x, scales = _rows(config, count, g)
    return Call(x, ids, weights, scales)


def make_results(
    config: EpConfig, rank: int, received: Received, *, seed: int, dtype: torch.dtype
) -> torch.Tensor:
    """The y of ``rank``, on the CPU: values of all magnitudes; NaN in every row that must not be read."""
    g = torch.Generator().manual_seed(seed * 1009 + rank + 500)
    shape = (*received.rows.shape[:-1], config.hidden_size)
    y = torch.randn(shape, generator=g) * 10.0 ** torch.randint(-3, 3, (*shape[:-1], 1), generator=g)
    y[~reference.defined_rows(config, received)] = torch.nan
    return y.to(dtype)


def _bits(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Any bit pattern: rows that are not quantised travel as bytes."""
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=g, dtype=torch.uint8)
    return raw.view(dtype)


def _rows(config: EpConfig, count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    if config.quantization:
        blocks = (count, config.hidden_size // SCALE_BLOCK)
        magnitude = 10.0 ** torch.randint(-4, 4, (*blocks, 1), generator=g)
        x = torch.randn(*blocks, SCALE_BLOCK, generator=g) * magnitude
        x[torch.rand(blocks, generator=g) < 0.1] = 0.0
        return x.flatten(1).to(config.payload), None
    scales = None
    if config.payload == torch.float8_e4m3fn:
        scales = _bits((count, config.hidden_size // SCALE_BLOCK), torch.float32, g)
    elif config.scale_bytes:
        scales = _bits((count, config.scale_bytes), torch.uint8, g)
    return _bits((count, config.row_width), config.payload, g), scales
