"""The measurement itself, run by every rank: contenders take turns, and every result is checked."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ep_backend.bench import report, workload
from ep_backend.bench.contenders import BASELINE, MAKERS, Contender
from ep_backend.bench.workload import Inputs, LeastBytes, Settings
from ep_backend.errors import EpConfigError
from ep_backend.probe import probe

INPUT_SETS = 2  # consecutive exchanges must differ, or old rows in a window would pass for new ones
BURST = 4  # timed exchanges of a contender before the next one's turn
COPY_SECONDS = 0.15
LARGE_COPY_BYTES = 64 << 20
Note = Callable[[str], None]
Step = Callable[[float], None]


def measure(settings: Settings, *, explicit: bool, note: Note, step: Step) -> dict[str, Any]:
    """The document without its command, the same on all ranks. Collective over the default group.

    ``explicit``: contenders that cannot start are an error, not left out. ``note`` is told what happens,
    ``step`` the share of the work that is done; both matter on rank 0 only.
    """
    contenders = _start(settings, explicit, note)
    large_copy_rate = copy_rate(LARGE_COPY_BYTES)
    for contender in contenders:
        if contender.window_bytes is not None:
            note(f"{contender.name}: windows of {contender.window_bytes:,} bytes per rank")
    results: list[dict[str, Any]] = []
    for number, tokens in enumerate(settings.tokens):
        step_of_case = partial(_step, step, number, len(settings.tokens))
        results += _case(settings, tokens, contenders, step_of_case)
        trips = [r for r in results if r["tokens"] == tokens and r["phase"] == "round_trip"]
        note(f"{tokens} tokens: " + ", ".join(f"{r['transport']} {r['median_us']:,.0f} us" for r in trips))
    for contender in contenders:
        contender.destroy()
    machine = {
        **report.machine(settings.device),
        "copy_bytes_per_s": round(large_copy_rate),
        "load_average": [round(load, 2) for load in report.load_average()],
    }
    return {
        "machine": machine,
        "versions": {**probe(settings.device).versions, "python": report.python_version()},
        "settings": asdict(settings),
        "results": results,
    }


def _step(step: Step, case: int, cases: int, share: float) -> None:
    step((case + share) / cases)


def _start(settings: Settings, explicit: bool, note: Note) -> list[Contender]:
    contenders = []
    for name in settings.contenders:
        try:
            contenders.append(MAKERS[name](name, settings))
        except EpConfigError as error:  # on all ranks together
            if explicit:
                raise
            note(f"{name} cannot be used here: {error}")
    return contenders


def _case(
    settings: Settings, tokens: int, contenders: Sequence[Contender], step: Step
) -> list[dict[str, Any]]:
    """All contenders with one number of tokens, in turns: a machine that slows down slows all of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs = [workload.make(settings, rank, tokens, number) for number in range(INPUT_SETS)]
    least = workload.least_bytes(settings, tokens, 0)
    seconds: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
    correct = {}
    for contender in contenders:
        contender.prepare(inputs)
        correct[contender.name] = contender.verify()
    rates = [copy_rate(least.round_trip // 2 // world)]
    warmup, turns = -(-settings.warmup // BURST), -(-settings.iters // BURST)
    for turn in range(warmup + turns):
        for contender in contenders:
            times, right = _burst(contender, inputs, settings)
            correct[contender.name] &= right
            if turn >= warmup:
                seconds[contender.name] += times
        step((turn + 1) / (warmup + turns))
    rates.append(copy_rate(least.round_trip // 2 // world))
    for contender in contenders:
        correct[contender.name] &= contender.verify()

    results = []
    for contender in contenders:
        results += _results(
            settings,
            tokens,
            contender,
            seconds[contender.name][: settings.iters],
            _everywhere(correct[contender.name]),
        )
    _compare(results, least, max(rates))
    return results


def _burst(
    contender: Contender, inputs: Sequence[Inputs], settings: Settings
) -> tuple[list[list[float]], bool]:
    """[dispatch, combine, round trip] seconds of this rank for BURST exchanges, and whether all were right.

    One exchange more comes first: it brings the ranks closer together than a barrier over sockets does.
    """
    shape = (BURST + 1, inputs[0].tokens, settings.hidden)
    outs = torch.full(shape, float("nan"), dtype=settings.result_dtype)
    times = []
    dist.barrier()
    for number in range(BURST + 1):
        start = time.perf_counter()
        contender.dispatch(number % INPUT_SETS)
        between = time.perf_counter()
        contender.combine(outs[number])
        end = time.perf_counter()
        times.append([between - start, end - between, end - start])
    right = all(inputs[number % INPUT_SETS].accepts(out) for number, out in enumerate(outs))
    return times[1:], right


def _results(
    settings: Settings, tokens: int, contender: Contender, seconds: list[list[float]], correct: bool
) -> list[dict[str, Any]]:
    mine = torch.tensor(seconds, dtype=torch.float64)  # [iters, phases]
    of_ranks = [torch.empty_like(mine) for _ in range(settings.ranks)]
    dist.all_gather(of_ranks, mine)
    results = []
    for column, phase in enumerate(report.PHASES):
        microseconds = [t * 1e6 for t in report.slowest([one[:, column].tolist() for one in of_ranks])]
        results.append(
            {
                "transport": contender.name,
                "tokens": tokens,
                "phase": phase,
                "dtype": settings.dtype,
                "median_us": round(report.median(microseconds), 2),
                "p99_us": round(report.percentile(microseconds, 0.99), 2),
                "min_us": round(min(microseconds), 2),
                "correct": correct,
                "iters": len(microseconds),
                **contender.details(),
            }
        )
    return results


def _compare(results: list[dict[str, Any]], least: LeastBytes, rate: float) -> None:
    """Add what the results mean: against the baseline, and against copying the least bytes at ``rate``,
    the copied bytes per second of all ranks at once (a copied byte is read and written)."""
    baseline = {r["phase"]: r["median_us"] for r in results if r["transport"] == BASELINE}
    sizes: Mapping[str, int] = {
        "dispatch": least.dispatch,
        "combine": least.combine,
        "round_trip": least.round_trip,
    }
    for result in results:
        size = sizes[result["phase"]]
        limit_us = size / (2 * rate) * 1e6
        result["least_bytes"] = size
        result["gb_per_s"] = round(size / result["median_us"] / 1e3, 3)
        result["limit_us"] = round(limit_us, 2)
        result["of_limit"] = round(limit_us / result["median_us"], 4)
        if result["transport"] != BASELINE and baseline:
            result["vs_baseline"] = round(baseline[result["phase"]] / result["median_us"], 3)


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


def _everywhere(correct: bool) -> bool:
    flag = torch.tensor(int(correct))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
