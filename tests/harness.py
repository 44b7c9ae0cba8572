"""Groups of rank processes that are started once and run one job after another.

    from harness import ranks

    def job(rank, group, seed):  # a plain function at the top of a file; ``group`` is the whole gloo group
        ...
        return something_picklable

    results = ranks(4).run(job, 7, timeout=60)  # one result per rank

``ranks(n)`` keeps one group of n processes for the test session, and one more for each set of variables. A
job that raises on any rank fails the run with every rank's traceback, and the group is thrown away, because
its ranks may be out of step. Tests that kill or stop ranks take a group of their own:

    with fresh_ranks(3) as group:
        group.start(job)
        os.kill(group.pids[1], signal.SIGKILL)
        outcomes = group.outcomes(timeout=20)

Every wait has a deadline. The processes die with the process that started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import inspect
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

GRACE_S = 5.0  # that the other ranks have to finish once one has failed
START_S = 60.0
GROUP_TIMEOUT_S = 60.0  # of the gloo groups of the ranks

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "ep_backend"])


@dataclass(frozen=True)
class Outcome:
    """What a rank made of a job: a value, an error's traceback, an exit, or nothing (it never answered)."""

    rank: int
    value: Any = None
    error: str | None = None
    exitcode: int | None = None
    answered: bool = True

    @property
    def ok(self) -> bool:
        return self.answered and self.error is None and self.exitcode is None

    def __str__(self) -> str:
        if self.exitcode is not None:
            return f"rank {self.rank} ended with exit code {self.exitcode}"
        if not self.answered:
            return f"rank {self.rank} did not answer; it is at\n{self.error}"
        return f"rank {self.rank} " + (f"raised\n{self.error}" if self.error else "succeeded")


class RanksError(AssertionError):
    """A job failed. ``outcomes``: of all ranks."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        super().__init__("\n".join(str(outcome) for outcome in outcomes if not outcome.ok))


class Ranks:
    """``world`` processes with a gloo group. ``environ``: environment variables of theirs, in whose values
    {rank} stands for the number of each."""

    def __init__(self, world: int, environ: dict[str, str] | None = None) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory(prefix="ep-ranks-")
        self._pipes: list[connection.Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = _context.Pipe()
            arguments = (rank, world, self._folder.name, theirs, environ or {}, os.getpid())
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        started = self.outcomes(START_S)
        if not all(outcome.ok for outcome in started):
            self.kill()
            raise RanksError(started)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """``function(rank, group, *args)`` on every rank; the results by rank. Raises RanksError."""
        self.start(function, *args)
        outcomes = self.outcomes(timeout, give_up_early=True)
        if not all(outcome.ok for outcome in outcomes):
            self.kill()
            raise RanksError(outcomes)
        return [outcome.value for outcome in outcomes]

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a job; ``outcomes`` must be called before the next one."""
        message = pickle.dumps((inspect.getfile(function), function.__qualname__, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)

    def outcomes(
        self, timeout: float, *, give_up_early: bool = False, stopped: Collection[int] = ()
    ) -> list[Outcome]:
        """What became of the job, in order of rank, after ``timeout`` seconds at most.

        ``give_up_early``: once a rank has failed, the others get only a few seconds more. ``stopped``: ranks
        that nobody waits for once the others have answered.
        """
        deadline = time.monotonic() + timeout
        found: dict[int, Outcome] = {}
        while set(range(self.world)) - set(found) - set(stopped):
            waiting = {self._pipes[r]: r for r in range(self.world) if r not in found}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]
                found[rank] = self._answer(rank)
                if give_up_early and not found[rank].ok:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in set(range(self.world)) - set(found):
            found[rank] = Outcome(rank, error=self._stack(rank), answered=False)
        return [found[rank] for rank in range(self.world)]

    def kill(self) -> None:
        """End all processes at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._folder.cleanup()

    def _answer(self, rank: int) -> Outcome:
        try:
            value, error = _unpack(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(10)
            return Outcome(rank, exitcode=self._processes[rank].exitcode)
        return Outcome(rank, value=value, error=error)

    def _stack(self, rank: int) -> str:
        """Where a process is; it writes its stacks to a file when it gets a signal."""
        file = Path(self._folder.name) / f"stack-{rank}"
        with contextlib.suppress(OSError):
            os.kill(self.pids[rank], signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.05)
            if file.exists() and file.stat().st_size:
                break
        return file.read_text() if file.exists() else "(no stack)"


_pools: dict[tuple[int, frozenset[tuple[str, str]]], Ranks] = {}


def ranks(world: int, environ: dict[str, str] | None = None) -> Ranks:
    """The session's group of ``world`` processes with ``environ``: started when first asked for, again after
    a failure."""
    name = world, frozenset((environ or {}).items())
    pool = _pools.get(name)
    if pool is None or not pool.alive:
        if pool is not None:
            pool.kill()
        pool = _pools[name] = Ranks(world, environ)
    return pool


@contextlib.contextmanager
def fresh_ranks(world: int, environ: dict[str, str] | None = None) -> Iterator[Ranks]:
    """A group for one test that may damage it."""
    group = Ranks(world, environ)
    try:
        yield group
    finally:
        group.kill()


def stop_all() -> None:
    """End the session's groups."""
    for pool in _pools.values():
        pool.kill()
    _pools.clear()


# ---- in the rank processes ----


def _serve(
    rank: int, world: int, folder: str, pipe: connection.Connection, environ: dict[str, str], starter: int
) -> None:
    _die_with_parent()
    os.environ.update({name: value.replace("{rank}", str(rank)) for name, value in environ.items()})
    stacks = open(f"{folder}/stack-{rank}", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store", world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
        _reply(pipe, None, None)
    except Exception:
        _reply(pipe, None, traceback.format_exc())
        return
    while True:
        try:
            file, name, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)  # the tests are over
        try:
            value, error = _function(file, name)(rank, dist.group.WORLD, *args), None
        except BaseException:
            value, error = None, traceback.format_exc()
        try:
            _reply(pipe, value, error)
        except (BrokenPipeError, ConnectionError):
            os._exit(0)


def _reply(pipe: connection.Connection, value: Any, error: str | None) -> None:
    try:
        message = _pack((value, error))
    except Exception:
        message = _pack((None, f"the result cannot be pickled\n{traceback.format_exc()}"))
    pipe.send_bytes(message)


def _pack(answer: Any) -> bytes:
    """As torch.save does it: plain pickle cannot take back float8 tensors."""
    import torch

    buffer = io.BytesIO()
    torch.save(answer, buffer)
    return buffer.getvalue()


def _unpack(message: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(message), weights_only=False)


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


_modules: dict[str, Any] = {}


def _function(file: str, name: str) -> Callable[..., Any]:
    """Test modules have no importable name, so they are loaded from their files, once."""
    if file not in _modules:
        module_name = f"job_{len(_modules)}_{Path(file).stem}"
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        _modules[file] = module
    found = _modules[file]
    for part in name.split("."):
        found = getattr(found, part)
    return found
