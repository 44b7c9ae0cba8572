"""Where received rows stand in the layout expert-major, and the sums of what the experts made of them there.

A row's place is ``expert * N + i``: it is the i-th row of this rank's ``expert``, in order of source and
token; N is the number of slots, ranks * T. -1: the slot's choice is none of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ep_backend._native import ops

LAYOUT_BLOCKS_PER_SM = 8
"""Of kernels that copy rows, which need many loads under way: as many as there is room for."""


def local_numbers(expert_ranks: Sequence[int], rank: int) -> torch.Tensor:
    """[experts of all ranks] int16: for each its number among those of ``rank``, in order of global id; -1:
    of another rank. ``expert_ranks``: the rank of each expert."""
    numbers = torch.full((len(expert_ranks),), -1, dtype=torch.int16)
    mine = [expert for expert, owner in enumerate(expert_ranks) if owner == rank]
    numbers[mine] = torch.arange(len(mine), dtype=torch.int16)
    return numbers


def find_places(ids: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """[N, top_k] int32. ``ids``: [N, top_k] int32, global, -1: none, no expert twice in a slot. ``local``: on
    the CPU, as `local_numbers` gives it."""
    lists = int(local.max()) + 1
    experts = torch.where(ids < 0, -1, local.to(ids.device)[ids.long()]).long()
    chosen = torch.zeros(len(ids), lists + 1, dtype=torch.long, device=ids.device)
    chosen.scatter_(1, torch.where(experts < 0, lists, experts), 1)
    before = chosen.cumsum(0) - chosen  # of each expert, rows of the slots ahead
    rows = before.gather(1, experts.clamp(min=0)) + experts * len(ids)
    return torch.where(experts < 0, -1, rows).int()


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of float32 tensors, rounded once.

    The product is exact in float64. The sum there is rounded to odd, so that rounding it to float32 is right:
    S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57 (2008).
    """
    p, q = torch.broadcast_tensors(a.double() * b.double(), c.double())
    s = p + q
    back = s - p
    lost = (p - (s - back)) + (q - back)  # exact: p + q = s + lost
    bits = s.view(torch.int64)
    inexact_and_even = (lost != 0) & lost.isfinite() & (bits & 1 == 0)
    outwards = (lost > 0) == (s > 0)
    odd = torch.where(outwards, bits + 1, bits - 1)
    return torch.where(inexact_and_even, odd, bits).view(torch.float64).float()


def weighted_sums(
    y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[N, hidden] of ``dtype``: for each slot the sum of its experts' results, in order of k, fused multiply
    and add in float32, rounded once. A slot without a place holds anything.

    ``y``: [local experts, N, hidden], contiguous; rows without a place are not read. ``places``: [N, top_k]
    int32. ``weights``: [N, top_k] float32.
    """
    if y.is_cuda:
        sums = torch.empty(len(places), y.shape[-1], dtype=dtype, device=y.device)
        sms = torch.cuda.get_device_properties(y.device).multi_processor_count
        ops.cuda_return_rows(y, places, weights, LAYOUT_BLOCKS_PER_SM * sms, sums)
        return sums
    rows, total = y.flatten(0, 1), torch.zeros(len(places), y.shape[-1], dtype=torch.float32)
    for places_of_k, weights_of_k in zip(places.unbind(1), weights.unbind(1), strict=True):
        slots = (places_of_k >= 0).nonzero().squeeze(1)
        total[slots] = fma(rows[places_of_k[slots].long()].float(), weights_of_k[slots, None], total[slots])
    return total.to(dtype)
