"""What a GPU does in a decode step, read from the traces of PyTorch's profiler.

A step is one replay of a CUDA graph: only engines that decode in full graphs can be read.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from ep_backend.errors import EpError

COMMUNICATION = ("nccl", "ep::cuda::")
"""What the names of kernels that communicate hold: NCCL's and ours."""


def read(folder: Path) -> dict[str, Any]:
    """Medians over the ranks whose traces are in ``folder``: see `read_rank`. EpError if there are none."""
    files = sorted(folder.glob("**/*.json.gz"))
    ranks = [found for file in files if (found := read_rank(_events(file))) is not None]
    if not ranks:
        raise EpError(f"{folder} has no trace with at least two replayed graphs, in {len(files)} files")
    return {name: median(rank[name] for rank in ranks) for name in ranks[0]} | {"ranks": len(ranks)}


def read_rank(events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Of one rank's trace, per step: kernels, those that communicate, and times in microseconds.

    ``busy_us`` is the time in which any kernel runs, ``communication_us`` that in which one runs that
    communicates, waiting for peers included. None if the trace has fewer than two steps.
    """
    kernels, steps = [], 0
    for event in events:
        if event.get("ph") != "X":
            continue
        if event.get("cat") == "kernel":
            kernels.append((float(event["ts"]), float(event["dur"]), str(event["name"])))
        elif event.get("name") == "cudaGraphLaunch":
            steps += 1
    if steps < 2 or not kernels:
        return None
    communication = [kernel for kernel in kernels if any(part in kernel[2] for part in COMMUNICATION)]
    return {
        "steps": steps,
        "kernels": len(kernels) / steps,
        "communication_kernels": len(communication) / steps,
        "busy_us": covered(kernels) / steps,
        "communication_us": covered(communication) / steps,
    }


def covered(kernels: Iterable[tuple[float, float, str]]) -> float:
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
