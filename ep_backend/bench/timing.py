"""The measurement itself, run by every rank: contenders take turns, and every result is checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist

from ep_backend.bench import contenders as contenders_
from ep_backend.bench import report, workload
from ep_backend.bench.contenders import BASELINE, Contender
from ep_backend.bench.cpus import Cpus
from ep_backend.bench.gpus import Gpus
from ep_backend.bench.meter import INPUT_SETS, Meter, Step, Times
from ep_backend.bench.workload import LeastBytes, Settings
from ep_backend.cli.provenance import set_variables
from ep_backend.communicator import prepare_nccl
from ep_backend.errors import EpConfigError
from ep_backend.probe import probe

Note = Callable[[str], None]
Start = Callable[[str, Settings], Contender]


def measure(
    runs: Sequence[Settings],
    *,
    explicit: Collection[str],
    note: Note,
    step: Step,
    start: Start = contenders_.start,
) -> dict[str, Any]:
    """The document without its command, the same on all ranks. Collective over the default group.

    ``runs``: one for each dtype and number of SMs, otherwise alike. ``explicit``: names of contenders that
    are an error if they cannot start; others are left out. ``note`` is told what happens, ``step`` the share
    of the work that is done; what they show matters on rank 0 only. ``start``: makes a contender; collective,
    raises EpConfigError on all ranks.
    """
    device = runs[0].device
    meter = _meter(device, runs[0].contenders)
    results: list[dict[str, Any]] = []
    cases = sum(len(settings.tokens) for settings in runs)
    done = 0
    for settings in runs:
        contenders = _start(settings, explicit, note, start)
        for contender in contenders:
            if contender.window_bytes is not None:
                note(f"{_name(contender)}: windows of {contender.window_bytes:,} bytes per rank")
        for tokens in settings.tokens:
            found = _case(settings, tokens, contenders, meter, partial(_step, step, done, cases))
            done += 1
            results += found
            trips = [r for r in found if r["phase"] == "round_trip"]
            shown = (f"{report.label(r)} {report.microseconds(r['median_us'])} us" for r in trips)
            note(f"{tokens} tokens, {settings.dtype}: " + ", ".join(shown))
        for contender in contenders:
            contender.destroy()
    _compare(results)
    machine = {
        **report.machine(device),
        **meter.machine(),
        "load_average": [round(load, 2) for load in report.load_average()],
    }
    return {
        "machine": machine,
        "environment": set_variables(),
        "versions": {**probe(device).versions, "python": report.python_version()},
        "settings": {
            **asdict(runs[0]),
            "dtype": ",".join(dict.fromkeys(settings.dtype for settings in runs)),
            "num_sms": list(dict.fromkeys(settings.num_sms for settings in runs)),
        },
        "results": results,
    }


def _meter(device: str, names: Collection[str]) -> Meter:
    if device == "cpu":
        return Cpus()
    # NCCL starts with the settings that an engine would give it.
    records = prepare_nccl(None, torch.device("cuda", torch.cuda.current_device()))
    return Gpus(records, names)


def _step(step: Step, case: int, cases: int, share: float) -> None:
    step((case + share) / cases)


def _start(settings: Settings, explicit: Collection[str], note: Note, start: Start) -> list[Contender]:
    started: list[Contender] = []
    for name in settings.contenders:
        try:
            started.append(start(name, settings))
        except EpConfigError as error:  # on all ranks together
            if name in explicit:
                raise
            note(f"{name} cannot be used here: {error}")
    return started


def _name(contender: Contender) -> str:
    return report.label({"transport": contender.name, **contender.details()})


def _case(
    settings: Settings, tokens: int, contenders: Sequence[Contender], meter: Meter, step: Step
) -> list[dict[str, Any]]:
    """All contenders with one number of tokens, in turns: a machine that slows down slows all of them."""
    inputs = [workload.make(settings, dist.get_rank(), tokens, number) for number in range(INPUT_SETS)]
    least = workload.least_bytes(settings, tokens, 0)
    correct = []
    for contender in contenders:
        contender.prepare(inputs)
        correct.append(contender.verify())
    step(0.0)
    times = meter.case(settings, contenders, inputs, least, step)
    results: list[dict[str, Any]] = []
    for contender, taken, right in zip(contenders, times, correct, strict=True):
        taken.correct &= right
        taken.correct &= contender.verify()
        found = _results(settings, tokens, contender, taken)
        _limit(found, least, taken.bytes_per_s)
        results += found
    return results


def _results(settings: Settings, tokens: int, contender: Contender, taken: Times) -> list[dict[str, Any]]:
    correct = _everywhere(taken.correct)
    results = []
    for phase in report.PHASES:
        mine = torch.tensor(taken.seconds[phase], dtype=torch.float64)
        of_ranks = [torch.empty_like(mine) for _ in range(settings.ranks)]
        dist.all_gather(of_ranks, mine)
        microseconds = [t * 1e6 for t in report.slowest([one.tolist() for one in of_ranks])]
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
                **(taken.details if phase == "round_trip" else {}),
                **contender.details(),
            }
        )
    return results


def _limit(results: list[dict[str, Any]], least: LeastBytes, bytes_per_s: float | None) -> None:
    """Add what the times of a contender mean against moving the least bytes at ``bytes_per_s``."""
    sizes: Mapping[str, int] = {
        "dispatch": least.dispatch,
        "combine": least.combine,
        "round_trip": least.round_trip,
    }
    for result in results:
        size = sizes[result["phase"]]
        result["least_bytes"] = size
        result["gb_per_s"] = round(size / result["median_us"] / 1e3, 3)
        if bytes_per_s is not None:
            limit_us = size / bytes_per_s * 1e6
            result["limit_us"] = round(limit_us, 2)
            result["of_limit"] = round(limit_us / result["median_us"], 4)


def _compare(results: list[dict[str, Any]]) -> None:
    """Add what all times mean against the baseline's of the same case.

    Its round trip counts as dispatch + combine where that is shorter: NCCL may be faster in single calls than
    in a graph.
    """
    case = itemgetter("tokens", "dtype", "phase")
    theirs = BASELINE.values()
    baseline = {case(r): r["median_us"] for r in results if r["transport"] in theirs}
    for tokens, dtype, phase in [key for key in baseline if key[2] == "round_trip"]:
        halves = baseline[tokens, dtype, "dispatch"] + baseline[tokens, dtype, "combine"]
        baseline[tokens, dtype, phase] = min(baseline[tokens, dtype, phase], halves)
    for result in results:
        if result["transport"] not in theirs and case(result) in baseline:
            result["vs_baseline"] = round(baseline[case(result)] / result["median_us"], 3)


def _everywhere(correct: bool) -> bool:
    flag = torch.tensor(int(correct))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
