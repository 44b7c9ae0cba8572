"""What a GPU does in a decode step, read from the traces of PyTorch's profiler.

A step is one replay of a CUDA graph: only engines that decode in full graphs can be read. What an engine
launches beside its graph, such as sampling, is not counted.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from ep_backend.errors import EpError

COMMUNICATION = ("nccl", "ep::cuda::", "cross_device_reduce")
"""What the names of kernels that communicate hold: NCCL's, ours, those of vLLM's custom all-reduce."""


Kernel = tuple[float, float, str]  # start and duration in microseconds, name


def read(folder: Path) -> dict[str, Any]:
    """Medians over the ranks whose traces are in ``folder``: see `read_rank`. EpError if there are none."""
    files = sorted(folder.glob("**/*.json.gz"))
    ranks = [found for file in files if (found := read_rank(_events(file))) is not None]
    if not ranks:
        raise EpError(f"{folder} has no trace with at least two replayed graphs, in {len(files)} files")
    return {name: median(rank[name] for rank in ranks) for name in ranks[0]} | {"ranks": len(ranks)}


def read_rank(events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Of one rank's trace, medians over its steps: kernels, those that communicate, and microseconds.

    ``busy_us`` is the time in which any kernel runs, ``communication_us`` that in which one runs that
    communicates, waiting for peers included. ``first_us`` is the part of a step's first such kernel: it waits
    for the rank that is the last to begin the step. None if the trace has fewer than two steps.
    """
    kernels: dict[int, list[Kernel]] = {}
    launched: list[int] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        if event.get("cat") == "kernel":
            kernel = (float(event["ts"]), float(event["dur"]), str(event["name"]))
            kernels.setdefault(event["args"]["correlation"], []).append(kernel)
        elif event.get("name") == "cudaGraphLaunch":
            launched.append(event["args"]["correlation"])
    steps = [_step(kernels[launch]) for launch in launched if launch in kernels]
    if len(steps) < 2:
        return None
    return {name: median(step[name] for step in steps) for name in steps[0]} | {"steps": len(steps)}


def _step(kernels: list[Kernel]) -> dict[str, float]:
    communication = sorted(kernel for kernel in kernels if any(part in kernel[2] for part in COMMUNICATION))
    return {
        "kernels": len(kernels),
        "communication_kernels": len(communication),
        "busy_us": covered(kernels),
        "communication_us": covered(communication),
        "first_us": communication[0][1] if communication else 0.0,
    }


def covered(kernels: Iterable[Kernel]) -> float:
    """Length of the union of (start, duration, name)."""
    total, end = 0.0, float("-inf")
    for start, duration, _ in sorted(kernels):
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def _events(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") as trace:
        events: list[dict[str, Any]] = json.load(trace)["traceEvents"]
    return events
