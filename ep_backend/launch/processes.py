"""A group of rank processes for one job: started, waited for with a deadline, and ended however it ends.

    outcomes = processes.run(job, (7,), count=4, deadline_s=60.0)  # job(note, 7) on every rank
    failure = processes.first_failure(outcomes)

``job`` is a function at the top of a module; what it gets and returns is pickled. The default process group
is there when it runs (gloo). ``note(text)`` says what the rank is about to do: that is told of a rank which
dies or hangs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from ep_backend.errors import EpError
from ep_backend.launch.terminable import terminable

Note = Callable[[str], None]
Job = Callable[..., Any]

GRACE_S = 3.0  # for the others' words once one has failed: they may know more than the first
END_GRACE_S = 5.0
STACK_S = 1.0  # for all ranks without an answer to say where they are
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Outcome:
    """What became of a rank."""

    rank: int
    end: str
    """"done", "raised", "died" (ended without an answer), "late" (the deadline passed), "cut" (it was ended
    because another had failed)."""
    value: Any = None
    """What the job returned, if it is done."""
    text: str = ""
    """What is wrong, in a sentence without the rank's number."""
    error: str = ""
    """Name of the exception's class, if it raised."""
    details: str = ""
    """The traceback, or where each of its threads was."""
    at: str = ""
    """What it noted last."""
    after_s: float = 0.0
    """Seconds from the start until this was known."""

    @property
    def words(self) -> str:
        """What is wrong and what it was doing, without the rank's number."""
        return self.text + (f" (at: {self.at})" if self.at else "")

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.words}"


def run(
    job: Job,
    arguments: Sequence[Any] = (),
    *,
    count: int,
    deadline_s: float | None = None,
    speak: bool = False,
) -> list[Outcome]:
    """``job(note, *arguments)`` on ``count`` new ranks; what became of each, in order of rank.

    ``deadline_s``: for all of it, from the start of the processes; None where the job has a deadline of its
    own. After a failure the others have a few seconds left. No process is left when this returns or raises,
    which it does for Ctrl-C, SIGTERM and SIGHUP too. ``speak``: what ranks print stands on standard output,
    not on standard error, where libraries' words do no harm.
    """
    with tempfile.TemporaryDirectory(prefix="ep-backend-ranks-") as folder, terminable():
        begin, started = time.monotonic(), list[_Rank]()
        try:
            for rank in range(count):
                started.append(_Rank(rank, count, folder, speak, job, arguments))
            outcomes = _outcomes(started, begin, deadline_s)
            if all(outcome.end == "done" for outcome in outcomes):
                for one in started:
                    one.let_go()
            return outcomes
        finally:
            for one in started:
                one.process.terminate()
            for one in started:
                one.process.join(END_GRACE_S)
                one.process.kill()
                one.process.join(END_GRACE_S)


def raised(rank: int, error: BaseException, at: str = "") -> Outcome:
    """What became of ``rank``, in the handler of ``error``."""
    text, name = " ".join(str(error).split()) or "no reason given", type(error).__name__
    words = text if isinstance(error, EpError) else f"{name}: {text}"
    return Outcome(rank, "raised", text=words, error=name, details=traceback.format_exc(), at=at)


def first_failure(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The one to name: a rank that died, else one that raised, else one that gave no answer, each the first
    in time: others fail because they lost it. None if all are done."""
    order = ("died", "raised", "late")
    failed = [outcome for outcome in outcomes if outcome.end in order]
    return min(failed, key=lambda outcome: (order.index(outcome.end), outcome.after_s), default=None)


class _Rank:
    """A process and the pipe to it."""

    def __init__(
        self, rank: int, count: int, folder: str, speak: bool, job: Job, arguments: Sequence[Any]
    ) -> None:
        self.rank, self.at = rank, ""
        self._stacks = Path(folder, f"stacks-{rank}")
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(os.getpid(), rank, count, folder, speak, theirs, job, tuple(arguments)),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def hear(self) -> Outcome | None:
        """One message, or the end of the process; None if the rank is still at work."""
        try:
            kind, *words = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(END_GRACE_S)
            return Outcome(self.rank, "died", text=_ended(self.process.exitcode), at=self.at)
        if kind == "at":
            self.at = words[0]
            return None
        if kind == "done":
            return Outcome(self.rank, "done", value=words[0])
        outcome: Outcome = replace(words[0], at=self.at)
        return outcome

    def ask_for_stacks(self) -> None:
        """Have it write where its threads are."""
        with suppress(ProcessLookupError, TypeError):
            os.kill(self.process.pid, signal.SIGUSR1)  # type: ignore[arg-type]

    def has_stacks(self) -> bool:
        return self._stacks.exists() and self._stacks.stat().st_size > 0

    def stacks(self) -> str:
        """What it has written; empty if it does not say that either."""
        return self._stacks.read_text() if self.has_stacks() else ""

    def let_go(self) -> None:
        """Nobody closes its sockets while others still use them; now all are done."""
        with suppress(OSError):
            self.pipe.send("end")
        self.process.join(END_GRACE_S)


def _outcomes(started: Sequence[_Rank], begin: float, deadline_s: float | None) -> list[Outcome]:
    limit = None if deadline_s is None else begin + deadline_s
    cut = f"was ended after {deadline_s:g} s without an answer" if deadline_s is not None else ""
    end, found = "late", dict[int, Outcome]()
    at_work = {one.pipe: one for one in started}
    while at_work:
        left = None if limit is None else max(0.0, limit - time.monotonic())
        ready = connection.wait(list(at_work), left)
        for pipe in ready:
            outcome = at_work[pipe].hear()  # type: ignore[index]
            if outcome is None:
                continue
            found[outcome.rank] = replace(outcome, after_s=time.monotonic() - begin)
            del at_work[pipe]  # type: ignore[arg-type]
            soon = time.monotonic() + GRACE_S
            if outcome.end != "done" and end == "late" and (limit is None or soon < limit):
                limit, end = soon, "cut"
                cut = f"was ended {GRACE_S:g} s after rank {outcome.rank} had failed"
        if not ready or left == 0:  # one last look: ranks that talk without end have no more time
            break
    silent = list(at_work.values())
    for one in silent:
        one.ask_for_stacks()
    patience = time.monotonic() + STACK_S
    while time.monotonic() < patience and not all(one.has_stacks() for one in silent):
        time.sleep(0.05)
    for one in silent:
        found[one.rank] = Outcome(one.rank, end, text=cut, details=one.stacks(), at=one.at)
    return [found[one.rank] for one in started]


def _ended(status: int | None) -> str:
    if status is None:
        return "closed its pipe and does not end"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status} before it was done"


def _serve(
    starter: int,
    rank: int,
    count: int,
    folder: str,
    speak: bool,
    pipe: connection.Connection,
    job: Job,
    arguments: tuple[Any, ...],
) -> None:
    """The process. ``starter``: the one that it must not outlive."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != starter:
        os._exit(1)
    if not speak:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Over what a launcher of the command has left there.
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that started us acts
    with open(f"{folder}/stacks-{rank}", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        try:
            import torch.distributed as dist

            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
            pipe.send(("done", job(lambda text: pipe.send(("at", text)), *arguments)))
        except BaseException as error:
            pipe.send(("raised", raised(rank, error)))
        # Until all are done. After a failure nobody says so, and this process is ended: what hangs in a
        # broken group would hang at its exit too.
        pipe.recv()
        dist.destroy_process_group()
