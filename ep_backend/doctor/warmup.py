"""NCCL's warm-up before an engine does it: all-reduces over all GPUs, in processes with a deadline.

NCCL can hang for ever in its first collective, for example where GPUs under different root complexes are said
to reach each other and do not. Engines run into that while they start and then say nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from ep_backend.doctor.plan import AllReduces
from ep_backend.launch.server import ServerError, Session
from ep_backend.launch.terminable import terminable
from ep_backend.probe import Record
from ep_backend.select import Decision, apply_env

DEADLINE_S = 60.0
COMMAND = (sys.executable, "-m", "ep_backend.doctor.warmup_ranks")
LOG_LINES = 12


class AllReduce(msgspec.Struct, frozen=True, kw_only=True):
    """Median time on the slowest rank. ``ranks`` below all of them: in both halves at the same time."""

    ranks: int
    bytes: int  # of every rank
    seconds: float


class WarmUp(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. ``why`` is one sentence; ``log`` the end of what the ranks and NCCL said."""

    outcome: Literal["ok", "skipped", "hang", "crash", "wrong"]
    why: str = ""
    ranks: int = 0
    took_s: float | None = None
    all_reduces: tuple[AllReduce, ...] = ()
    log: tuple[str, ...] = ()

    def times(self, ranks: int) -> AllReduces | None:
        """All-reduces over ``ranks`` GPUs, or None if they were not measured."""
        measured = [(one.bytes, one.seconds) for one in self.all_reduces if one.ranks == ranks]
        return AllReduces(measured) if measured else None


def skip(record: Record) -> str:
    """Why there is nothing to warm up, in a sentence, or an empty text."""
    gpus = record.used_gpus()
    if not gpus:
        return "no GPUs are used, and NCCL needs them"
    if len(gpus) == 1:
        return "only one GPU is used, and there is nobody to sum with"
    if any(gpu.startswith("MIG-") for gpu in gpus):
        return "MIG slices are used, of which a process can have only one"
    if not all(gpu.startswith("GPU-") for gpu in gpus):
        return "the driver does not say which GPUs there are"
    if "torch" not in record.versions:
        return "PyTorch is not installed here"
    return ""


def environment(record: Record, decision: Decision, environ: Mapping[str, str]) -> dict[str, str]:
    """What the ranks get: as in an engine, the decision's variables where nothing is set yet."""
    mine = dict(environ)
    apply_env(decision, mine)
    # By UUID, in one order for all ranks: CUDA numbers GPUs otherwise than NVML.
    mine["CUDA_VISIBLE_DEVICES"] = ",".join(record.used_gpus())
    mine.setdefault("NCCL_DEBUG", "WARN")
    return mine


def run(
    ranks: int,
    environ: Mapping[str, str],
    *,
    deadline_s: float = DEADLINE_S,
    command: Sequence[str] = COMMAND,
) -> WarmUp:
    """Warm up ``ranks`` processes; never longer than ``deadline_s`` and the time it takes to end them.

    ``command`` gets a folder, the number of ranks and the deadline as arguments.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ep-backend-warmup-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        session = Session([*command, name, str(ranks), str(deadline_s)], environ, folder / "log")
        left = ""
        status: int | None = None
        log: tuple[str, ...] = ()
        try:
            with terminable(), session:
                while (status := session.returncode()) is None and time.monotonic() - begin < deadline_s:
                    time.sleep(0.05)
                log = tuple(session.tail(LOG_LINES).splitlines())
        except ServerError as error:  # in a driver that hangs; the kernel ends them when it returns
            left = f" Processes are left that do not end: {str(error).splitlines()[0]}."
        took = round(time.monotonic() - begin, 3)
        if status is None:
            why = f"no end after {deadline_s:g} s. {_stages(folder, ranks)}.{left}"
            return WarmUp(outcome="hang", why=why, ranks=ranks, took_s=took, log=log)
        return _outcome(folder, ranks, status, took, log)


def _outcome(folder: Path, ranks: int, status: int, took: float, log: tuple[str, ...]) -> WarmUp:
    found = [_left_by(folder, rank) for rank in range(ranks)]
    told = [one["wrong"] for one in found if one is not None and one["wrong"]]
    if told:
        return WarmUp(outcome="wrong", why=f"{told[0]}.", ranks=ranks, took_s=took, log=log)
    measured = [one["seconds"] for one in found if one is not None]
    if status or len(measured) < ranks:
        why = f"a rank ended with an error. {_stages(folder, ranks)}."
        return WarmUp(outcome="crash", why=why, ranks=ranks, took_s=took, log=log)
    slowest: dict[tuple[int, int], float] = {}
    for one in (one for of_rank in measured for one in of_rank):
        key = one["ranks"], one["bytes"]
        slowest[key] = max(slowest.get(key, 0.0), one["seconds"])
    return WarmUp(
        outcome="ok",
        ranks=ranks,
        took_s=took,
        all_reduces=tuple(AllReduce(ranks=r, bytes=b, seconds=s) for (r, b), s in slowest.items()),
    )


def _left_by(folder: Path, rank: int) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    except FileNotFoundError:
        return None
    return found


def _stages(folder: Path, ranks: int) -> str:
    """Where the ranks are, in words."""
    at: dict[str, list[str]] = {}
    for rank in range(ranks):
        file = folder / f"rank-{rank}.stage"
        at.setdefault(file.read_text() if file.exists() else "not started", []).append(str(rank))
    return "; ".join(f"rank {', '.join(who)}: {words}" for words, who in at.items())
