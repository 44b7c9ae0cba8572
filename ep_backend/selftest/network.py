"""The phase network: ranks that torchrun has started, on one machine or several."""

from __future__ import annotations

import datetime
import os
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch.distributed as dist

from ep_backend import facts, rendezvous
from ep_backend.errors import EpError
from ep_backend.launch.deadline import Deadline
from ep_backend.launch.processes import GRACE_S, Outcome, raised
from ep_backend.launch.terminable import terminable
from ep_backend.probe import probe
from ep_backend.selftest import exchanges, phases, plan
from ep_backend.selftest.phases import Failure, Group, Options, Report, Run


def started_by_others() -> bool:
    """Whether this process is a rank that torchrun, or who sets the same variables, has started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def how_to_start(options: Options) -> str:
    """The command to type on each machine."""
    return (
        f"torchrun --nnodes 2 --nproc-per-node {options.ranks} --node-rank RANK --master-addr HOST "
        f"-m ep_backend.cli selftest --phase network --device {options.device}"
    )


@contextmanager
def meeting(options: Options) -> Iterator[Meeting]:
    """Join the ranks of this run. On leaving, all wait until rank 0 has spoken: a rank that ends with a
    failure has all others ended by torchrun. Raises EpError if the ranks do not come together."""
    patience = datetime.timedelta(seconds=options.deadline_s)
    with terminable():
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=patience))
            # Shorter than the deadline of a rank that gets no further, so that it can say why.
            own = dist.PrefixStore("group", store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=world, timeout=patience / 2)
        except (RuntimeError, ValueError) as error:
            raise EpError(f"the ranks of torchrun did not come together: {error}") from error
        words = dist.PrefixStore("selftest", store)
        try:
            yield Meeting(options, words)
        finally:
            with suppress(RuntimeError):  # the others may be gone, and the store with them
                if rank == 0:
                    words.set("spoken", "yes")
                words.wait(["spoken"], patience)
            with suppress(RuntimeError):
                dist.destroy_process_group()


class Meeting:
    """The ranks' words, in a store that lives as long as torchrun does: a broken group cannot carry them."""

    def __init__(self, options: Options, store: dist.Store) -> None:
        self._options, self._store = options, store
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.at = "start"
        """What this rank is doing."""

    def run(self) -> Report:
        """The phase; the report of rank 0 is the whole one. Collective."""
        options = self._options
        records = rendezvous.gather(None, probe("cpu"))
        hosts, nodes = len(set(map(facts.machine, records))), len(facts.nodes(records))
        return phases.conclude("network", options, self.world, self._found(), hosts, nodes)

    def _found(self) -> Iterable[tuple[str, Group | Failure]]:
        options = self._options
        task = options.task(cases=plan.group_cases(self.world))
        deadline = Deadline(options.deadline_s)
        try:
            yield from phases.all_transports(options, task, partial(self._group, deadline), options.transport)
        finally:
            deadline.cancel()

    def _group(self, deadline: Deadline, run: Run) -> Group | Failure:
        def note(text: str) -> None:
            self.at = text
            deadline.extend()

        try:
            outcome = Outcome(self.rank, "done", value=exchanges.run(note, run.task))
        except Exception as error:
            outcome = raised(self.rank, error, self.at)
        return phases.judge(run.name, self._tell(run, outcome))

    def _tell(self, run: Run, mine: Outcome) -> list[Outcome]:
        """What became of all ranks."""
        self._store.set(f"{run.name}/{self.rank}", pickle.dumps(mine).hex())
        # Others stop for the same reason, each at its own deadline.
        limit = time.monotonic() + run.task.timeout_s + GRACE_S
        told = []
        for rank in range(self.world):
            key = f"{run.name}/{rank}"
            try:
                left = max(0.1, limit - time.monotonic())
                self._store.wait([key], datetime.timedelta(seconds=left))
                told.append(pickle.loads(bytes.fromhex(self._store.get(key).decode())))
            except RuntimeError:
                told.append(Outcome(rank, "late", text="gave no answer"))
        return told
