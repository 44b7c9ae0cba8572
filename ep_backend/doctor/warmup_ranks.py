"""What the processes of the NCCL warm-up do: `python -m ep_backend.doctor.warmup_ranks FOLDER RANKS SECONDS`.

Started so, it starts one process per GPU and waits for them; with a fourth argument it is that rank. A
rank leaves ``rank-N.stage`` in the folder, what it is about to do in words, and at its end ``rank-N.json``.
Nothing here stops a process that hangs in time: that is for whoever started all of them
(`ep_backend.doctor.warmup`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_backend.bench.report import median
from ep_backend.launch.deadline import Deadline

if TYPE_CHECKING:
    import torch

SIZES = tuple(4096 << (2 * step) for step in range(8))  # bytes: 4 KiB, 16 KiB, ... 64 MiB
LARGE = 1 << 20
ROUNDS = 5
# About 2 ms, in which the host queues all calls that are timed together: the GPU must not wait for it.
SLEEP_CYCLES = 4_000_000
GRACE_S = 15.0  # after which a rank ends itself, should nobody be left to end it

Clock = Callable[[Callable[[], Any], int], float]
"""Seconds of one of so many calls, back to back, after one that is not timed."""


def main(arguments: list[str]) -> int:
    folder, ranks, deadline_s = Path(arguments[0]), int(arguments[1]), float(arguments[2])
    if len(arguments) == 4:
        return rank_main(folder, ranks, int(arguments[3]), deadline_s, "cuda", gpu_clock)
    name = "ep_backend.doctor.warmup_ranks"
    started = [subprocess.Popen([sys.executable, "-m", name, *arguments, str(rank)]) for rank in range(ranks)]
    while True:
        codes = [process.poll() for process in started]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return 1 if failed else 0  # those that are left are ended with this session
        time.sleep(0.05)


def rank_main(folder: Path, ranks: int, rank: int, deadline_s: float, device: str, clock: Clock) -> int:
    """Be one rank. ``device`` and ``clock`` are others in tests: CPUs sum with gloo."""
    Deadline(deadline_s + GRACE_S)
    stage = _Stages(folder / f"rank-{rank}.stage")
    stage("loading PyTorch")
    import torch
    import torch.distributed as dist

    on = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    stage("connecting the ranks")
    dist.init_process_group(
        "nccl" if on.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=deadline_s + GRACE_S),
    )
    buffer = torch.zeros(max(SIZES) // 2, dtype=torch.bfloat16, device=on)
    groups: list[tuple[Any, list[int]]] = [(dist.group.WORLD, list(range(ranks)))]
    if ranks >= 4 and ranks % 2 == 0:  # as for tensor parallelism in halves, joined by a pipeline
        halves = [list(range(ranks // 2)), list(range(ranks // 2, ranks))]
        made = [(dist.new_group(members), members) for members in halves]
        groups.append(made[rank // (ranks // 2)])
    seconds = []
    for group, members in groups:
        for size in SIZES:
            stage(f"an all-reduce of {size} bytes over {len(members)} GPUs")
            wrong = _wrong_sum(buffer[: size // 2], group, members, rank)
            if wrong:
                _leave(
                    folder,
                    rank,
                    {"wrong": f"an all-reduce of {size} bytes over {len(members)} GPUs: {wrong}"},
                )
                return 1  # others may have seen nothing, and would wait for this rank
            seconds.append(
                {"ranks": len(members), "bytes": size, "seconds": _time(buffer, size, group, clock)}
            )
    _leave(folder, rank, {"wrong": "", "seconds": seconds})
    stage("leaving the group")
    dist.destroy_process_group()
    stage("ended")
    return 0


def gpu_clock(call: Callable[[], Any], calls: int) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _wrong_sum(buffer: torch.Tensor, group: Any, members: list[int], rank: int) -> str:
    """Sum whole numbers that bf16 holds exactly, for up to 32 ranks; what is wrong with the sum."""
    import torch
    import torch.distributed as dist

    pattern = torch.arange(buffer.numel(), device=buffer.device) % 3 + 1
    buffer.copy_(pattern * (rank % 4 + 1))
    dist.all_reduce(buffer, group=group)
    wanted = (pattern * sum(member % 4 + 1 for member in members)).to(buffer.dtype)
    wrong = int((buffer != wanted).sum())
    return f"{wrong} of {buffer.numel()} sums are wrong on rank {rank}" if wrong else ""


def _time(buffer: torch.Tensor, size: int, group: Any, clock: Clock) -> float:
    import torch.distributed as dist

    part = buffer[: size // 2].zero_()  # sums of sums would overflow
    calls = 4 if size > LARGE else 20
    return median([clock(lambda: dist.all_reduce(part, group=group), calls) for _ in range(ROUNDS)])


def _leave(folder: Path, rank: int, found: dict[str, Any]) -> None:
    unfinished = folder / f"rank-{rank}.unfinished"
    unfinished.write_text(json.dumps(found))
    unfinished.rename(folder / f"rank-{rank}.json")


class _Stages:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, words: str) -> None:
        self._file.write_text(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
