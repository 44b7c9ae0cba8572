"""What an exchange must give, in plain torch, for all ranks at once; tests and the bench compare with it.

Nothing here is fast. Everything is exact in the stated numerics, so that results may be compared bit by bit:
sums in float32 in order of k and then of rank, products and sums fused into one rounding, one rounding to the
wire's format and one to the result's, and the one formula for fp8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ep_backend.config import SCALE_BLOCK, EpConfig
from ep_backend.places import fma
from ep_backend.transports.base import Received

E4M3_MAX = 448.0
MIN_AMAX = 1e-10


@dataclass(frozen=True)
class Call:
    """What one rank gives to ``dispatch``; shapes as ``Communicator.dispatch`` says."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    scales: torch.Tensor | None = None


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [..., n] and float32 scales [..., n / 128] of ``x``, float [..., n].

    scale = max(amax, 1e-10) / 448 in float32, q = x / scale rounded to nearest even. NaN stays NaN and does
    not count for amax. A block with an infinity has an infinite scale: its infinities become NaN, the rest 0.
    """
    blocks = x.float().unflatten(-1, (-1, SCALE_BLOCK))
    amax = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)
    scales = torch.maximum(amax, torch.tensor(MIN_AMAX)) / torch.tensor(E4M3_MAX)
    q = (blocks / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return q.flatten(-2).to(torch.float8_e4m3fn), scales


def dispatch(config: EpConfig, calls: Sequence[Call], tokens_per_rank: int | None = None) -> list[Received]:
    """What each rank receives. ``calls``: of all ranks; ``tokens_per_rank``: T, None for the most.

    Rows that may hold anything hold zeros.
    """
    slots = config.max_tokens_per_rank if tokens_per_rank is None else tokens_per_rank
    encoded = [_encode(config, call) for call in calls]
    return [_receive(config, calls, encoded, slots, rank) for rank in range(len(calls))]


def combine(
    config: EpConfig,
    calls: Sequence[Call],
    results: Sequence[torch.Tensor],
    tokens_per_rank: int | None = None,
    nodes: Sequence[Sequence[int]] | None = None,
) -> list[torch.Tensor]:
    """What ``combine`` returns on each rank. ``results``: every rank's y for ``Communicator.combine``.
    ``nodes``: the ranks of each node, for transport hier; None for those that add up over ranks alone."""
    slots = config.max_tokens_per_rank if tokens_per_rank is None else tokens_per_rank
    totals = _zeros(config, calls)
    for ranks in nodes or [[rank] for rank in range(len(calls))]:
        sums = _zeros(config, calls)
        for rank in ranks:
            for source, token, partial in _partials(config, calls, slots, rank, results[rank]):
                sums[source][token] += partial.to(config.sum_dtype).float()
        for total, node in zip(totals, sums, strict=True):
            total += node.to(config.sum_dtype).float()
    return [total.to(config.result_dtype) for total in totals]


def _zeros(config: EpConfig, calls: Sequence[Call]) -> list[torch.Tensor]:
    return [torch.zeros(len(call.x), config.hidden_size) for call in calls]


def first_difference(config: EpConfig, got: Received, want: Received) -> str | None:
    """Where two results of a dispatch differ in what must agree, in words; None if nowhere."""
    for name in ("tokens_per_source", "rows_per_expert", "topk_ids", "topk_weights"):
        if text := difference(name, getattr(got, name), getattr(want, name)):
            return text
    chosen = defined_rows(config, want)
    for name in ("rows", "scales"):
        if text := difference(name, getattr(got, name), getattr(want, name), among=chosen):
            return text
    return None


def defined_rows(config: EpConfig, received: Received) -> torch.Tensor:
    """Which rows hold something: bool, [R] or [local experts, world * T]."""
    if config.layout == "expert_major":
        assert received.rows_per_expert is not None
        return torch.arange(received.rows.shape[1])[None, :] < received.rows_per_expert[:, None]
    if config.layout == "compact":
        return torch.ones(len(received.rows), dtype=torch.bool)
    assert received.topk_ids is not None
    return (received.topk_ids != config.pad_id).any(1)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape, dtype and bytes. NaN equals NaN of the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def difference(
    name: str,
    got: torch.Tensor | None,
    want: torch.Tensor | None,
    *,
    among: torch.Tensor | None = None,
) -> str | None:
    """Where two tensors differ in a bit, in words: the first cell, its values and bits, and how many differ;
    None if nowhere. ``among``: bool, of the leading dimensions of ``want``; what else there is may differ."""
    if got is None or want is None:
        return None if got is want else f"{name}: {'None' if got is None else 'a tensor'} was not wanted"
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{name}: {list(got.shape)} {got.dtype} instead of {list(want.shape)} {want.dtype}"
    size = want.dtype.itemsize
    ours, theirs = (t.contiguous().flatten().view(torch.uint8).view(-1, size) for t in (got, want))
    cells = (ours != theirs).any(1).view(want.shape)
    if among is not None:
        cells &= among.view(*among.shape, *(1,) * (cells.dim() - among.dim()))
    wrong = cells.nonzero()
    if not len(wrong):
        return None
    cell = tuple(wrong[0].tolist())
    count = int(want.numel() if among is None else among.sum() * (want.numel() // among.numel()))
    values = f"{_value(got[cell])} instead of {_value(want[cell])}"
    return f"{name}{list(cell)}: {values}; {len(wrong)} of {count} cells differ"


def _value(cell: torch.Tensor) -> str:
    """A number with its bits: two NaNs differ in nothing else."""
    bits = bytes(cell.reshape(1).view(torch.uint8).tolist())[::-1].hex()
    number = f"{cell.float().item():.7g}" if cell.dtype.is_floating_point else str(cell.item())
    return f"{number} (0x{bits})"


def _encode(config: EpConfig, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    if config.quantization:
        return quantize_fp8(call.x)
    return call.x, call.scales


def _arrivals(
    config: EpConfig, calls: Sequence[Call], rank: int
) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(source, token, [(k, local expert)]) of all tokens that have an expert on this rank, in order."""
    expert_ranks = config.expert_ranks(len(calls))
    local = {e: i for i, e in enumerate(e for e, r in enumerate(expert_ranks) if r == rank)}
    found = []
    for source, call in enumerate(calls):
        for token, ids in enumerate(call.topk_ids.tolist()):
            if mine := [(k, local[e]) for k, e in enumerate(ids) if e in local]:
                found.append((source, token, mine))
    return found


def _receive(
    config: EpConfig,
    calls: Sequence[Call],
    encoded: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    slots: int,
    rank: int,
) -> Received:
    world, arrivals = len(calls), _arrivals(config, calls, rank)
    expert_ranks = config.expert_ranks(world)
    num_local = expert_ranks.count(rank)
    per_expert = torch.zeros(num_local, dtype=torch.int32)
    lead = {
        "rank_major": [world * slots],
        "compact": [len(arrivals)],
        "expert_major": [num_local, world * slots],
    }[config.layout]
    rows = torch.zeros(*lead, config.row_width, dtype=config.received_dtype)
    scales = None
    if config.row_scale_bytes:
        dtype = torch.float32 if config.is_fp8 else torch.uint8
        scales = torch.zeros(*lead, config.row_scale_bytes // dtype.itemsize, dtype=dtype)
    ids = torch.full((lead[0], config.top_k), config.pad_id, dtype=torch.int32)
    weights = torch.zeros(lead[0], config.top_k)
    for number, (source, token, mine) in enumerate(arrivals):
        places: list[tuple[int, ...]] = []
        if config.layout == "expert_major":
            places = [(e, int(per_expert[e])) for _, e in mine]
        else:
            at = source * slots + token if config.layout == "rank_major" else number
            places = [(at,)]
            routed = enumerate(calls[source].topk_ids[token].tolist())
            kept = mine if config.expert_ids == "local" else [(k, e) for k, e in routed if e >= 0]
            for k, e in kept:
                ids[at, k] = e
                weights[at, k] = calls[source].topk_weights[token, k]
        for _, e in mine:
            per_expert[e] += 1
        row, row_scales = encoded[source]
        for place in places:
            rows[place] = row[token]
            if scales is not None and row_scales is not None:
                scales[place] = row_scales[token]
    tokens = torch.tensor([len(call.x) for call in calls], dtype=torch.int32)
    has_ids = config.layout != "expert_major"
    return Received(rows, scales, ids if has_ids else None, weights if has_ids else None, tokens, per_expert)


def _partials(
    config: EpConfig, calls: Sequence[Call], slots: int, rank: int, y: torch.Tensor
) -> list[tuple[int, int, torch.Tensor]]:
    """(source, token, this rank's sum in float32 or as given) of all rows that travel back from ``rank``."""
    partials = []
    filled: dict[int, int] = {}
    for number, (source, token, mine) in enumerate(_arrivals(config, calls, rank)):
        if config.layout == "expert_major":
            total = torch.zeros(config.hidden_size)
            for k, e in mine:
                at = filled.get(e, 0)
                filled[e] = at + 1
                total = fma(calls[source].topk_weights[token, k], y[e, at].float(), total)
        else:
            total = y[source * slots + token if config.layout == "rank_major" else number]
        partials.append((source, token, total))
    return partials
