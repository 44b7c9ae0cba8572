"""Which ways to split a model can be on the machine's GPUs, by heads and by the weights' size. Pure."""

from __future__ import annotations

import msgspec

from ep_backend.doctor.plan import DTYPES, Shape
from ep_backend.planning import memory
from ep_backend.planning.model import Model
from ep_backend.planning.words import EP_WEIGHTS
from ep_backend.probe import Record


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """``ep``: the weights fit with EP. ``halves``: TP W/2 x PP 2 can be. ``impossible``: the ways of TP that
    cannot be, or whose weights do not fit. ``words``: sentences about what cannot be."""

    ep: bool = True
    halves: bool = True
    impossible: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()


def of(model: Model | Shape, ranks: int, record: Record) -> Room:
    """Of a shape alone nothing is known, and so everything can be; nor is anything said without GPUs.

    Weights fit if those of one dtype do, or if the GPUs' memory is not known. KV cache and activations are
    left out, so that what fits here may still be too large.
    """
    if not isinstance(model, Model) or not record.used_gpus() or ranks < 2:
        return Room()
    memory_bytes = _smallest_memory(record)
    weights = [one for dtype in DTYPES for one in memory.all_ways(model, ranks, dtype, memory_bytes)]
    possible = {one.way for one in weights if one.fits is not False}
    tensor = {f"TP {ranks}", f"TP {ranks // 2} x PP 2"}
    words = [f"{model.name}: {line}." for line in memory.left_out(model, ranks) if ranks > 2]
    of_ep = {one.dtype: one for one in weights if one.way == EP_WEIGHTS}
    if memory_bytes is not None and of_ep["bf16"].fits is False:
        sizes = " and ".join(f"{one.total / 1e9:.1f} GB in {dtype}" for dtype, one in of_ep.items())
        verdict, instead = "fits here with EP in fp8 only", ""
        if not of_ep["fp8"].fits:
            others = " and ".join(sorted(possible & tensor))
            verdict = "does not fit here with EP"
            instead = f" It fits with {others}." if others else " No way of TP fits either."
        words.append(
            f"{model.name} {verdict}: on each GPU weights alone take {sizes}, and it has "
            f"{memory_bytes / 1e9:.1f} GB (10^9 bytes).{instead}"
        )
    return Room(
        ep=EP_WEIGHTS in possible,
        halves=memory.halves(model, ranks),
        impossible=frozenset(tensor - possible),
        words=tuple(words),
    )


def _smallest_memory(record: Record) -> float | None:
    """Bytes of memory of the smallest GPU in use; None where one is not known."""
    used = set(record.used_gpus())
    sizes = [gpu.memory_bytes for gpu in record.gpus if gpu.uuid in used]
    if len(sizes) < len(used) or None in sizes:
        return None
    return min((float(size) for size in sizes if size is not None), default=None)
