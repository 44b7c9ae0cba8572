"""Exchanges on CPUs, timed with the host's clock."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ep_backend.bench import report
from ep_backend.bench.contenders import Contender
from ep_backend.bench.meter import BURST, INPUT_SETS, Step, Times, divide
from ep_backend.bench.workload import Inputs, LeastBytes, Settings

COPY_SECONDS = 0.15
LARGE_COPY_BYTES = 64 << 20


class Cpus:
    """The meter for CPUs; the limit is how fast all ranks together copy memory."""

    def __init__(self) -> None:
        self._large_copy_rate = copy_rate(LARGE_COPY_BYTES)

    def machine(self) -> dict[str, Any]:
        return {"copy_bytes_per_s": round(self._large_copy_rate)}

    def case(
        self,
        settings: Settings,
        contenders: Sequence[Contender],
        inputs: Sequence[Inputs],
        least: LeastBytes,
        step: Step,
    ) -> list[Times]:
        size = least.round_trip // 2 // settings.ranks
        times = [Times() for _ in contenders]
        rates = [copy_rate(size)]
        warmup, turns = divide(settings.warmup, BURST), divide(settings.iters, BURST)
        for turn in range(warmup + turns):
            for contender, taken in zip(contenders, times, strict=True):
                of_phases, right = _burst(contender, inputs, settings)
                taken.correct &= right
                if turn >= warmup:
                    for phase, seconds in zip(report.PHASES, of_phases, strict=True):
                        taken.seconds[phase] += seconds
            step((turn + 1) / (warmup + turns))
        rates.append(copy_rate(size))
        for taken in times:
            taken.bytes_per_s = 2 * max(rates)  # a copied byte is read and written
            for seconds in taken.seconds.values():
                del seconds[settings.iters :]
        return times


def _burst(
    contender: Contender, inputs: Sequence[Inputs], settings: Settings
) -> tuple[list[list[float]], bool]:
    """For dispatch, combine and round trip this rank's seconds in BURST exchanges; whether all were right.

    One exchange more comes first: it brings the ranks closer together than a barrier over sockets does.
    """
    shape = (BURST + 1, inputs[0].tokens, settings.hidden)
    outs = torch.full(shape, float("nan"), dtype=settings.result_dtype)
    times: list[list[float]] = [[], [], []]
    dist.barrier()
    for number in range(BURST + 1):
        start = time.perf_counter()
        contender.dispatch(number % INPUT_SETS)
        between = time.perf_counter()
        contender.combine(outs[number])
        end = time.perf_counter()
        for phase, seconds in zip(times, (between - start, end - between, end - start), strict=True):
            phase.append(seconds)
    right = all(contender.accepts(number % INPUT_SETS, out) for number, out in enumerate(outs))
    return [phase[1:] for phase in times], right


def copy_rate(size: int) -> float:
    """Bytes per second that all ranks together copy, at the same time, each ``size`` bytes again and again
    between two buffers of its own; small sizes are raised to what a call of memcpy is worth."""
    size = max(size, 1 << 16)
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    copies = 0
    dist.barrier()
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < COPY_SECONDS:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
        copies += 1
    total = torch.tensor(copies * size / elapsed, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
