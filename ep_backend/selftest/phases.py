"""The phases that start their own ranks, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from ep_backend.communicator import available
from ep_backend.errors import EpConfigError
from ep_backend.launch import processes
from ep_backend.launch.processes import Outcome
from ep_backend.probe import probe
from ep_backend.select import Decision, decide, ranks_in_words
from ep_backend.selftest import exchanges, graphs, plan
from ep_backend.selftest.advice import advise
from ep_backend.selftest.exchanges import Result, Task
from ep_backend.transports.hier import HierTransport

WAITS = 3  # a wait for a peer takes this part of the deadline at most: there is time to say who did not come


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for, and what is here."""

    device: str
    """"cpu" or "cuda"."""
    ranks: int
    """Of the phases node and graph."""
    transport: str
    """What all phases must use; "auto": each what suits it."""
    asked_by: str = "--transport"
    """Who wants that transport: this option or a variable."""
    deadline_s: float
    """For each group of ranks, from its start."""
    timeout_s: float
    """That a wait for a peer may last, at most."""

    def task(self, **more: object) -> Task:
        timeout_s = min(self.timeout_s, self.deadline_s / WAITS)
        return replace(
            Task(device=self.device, transport=self.transport, timeout_s=timeout_s),
            **more,  # type: ignore[arg-type]
        )


class Run(NamedTuple):
    """A task for one group of ranks."""

    name: str
    transport: str
    """That is expected to be used."""
    task: Task


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one group of ranks did."""

    name: str
    """Of the transport, with the GPU where that matters."""
    result: Result
    chosen: bool = False
    """Whether it is what this machine chooses by itself."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a phase failed."""

    group: str
    rank: int
    kind: str
    """"wrong" (another result than the reference's), or the end of the rank: "raised", "died", "late"."""
    text: str
    error: str = ""
    """Name of the exception's class, if the rank raised."""
    details: str = ""
    """Tracebacks, and where ranks without an answer were."""
    others: tuple[str, ...] = ()
    """What became of the other ranks, where that is worth a sentence; one for all of the same fate."""

    def __str__(self) -> str:
        return f"{self.group}, rank {self.rank}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A phase: "passed", "failed", "skipped" (it says why) or "not run" (an earlier one failed)."""

    phase: str
    status: str
    why: str = ""
    seconds: float = 0.0
    ranks: int = 0
    hosts: int = 1
    nodes: int = 1
    """Sets of ranks that share memory; containers of one host may be several."""
    groups: tuple[Group, ...] = ()
    failure: Failure | None = None
    next: tuple[str, ...] = ()
    """What to do after a failure."""


Start = Callable[..., list[Outcome]]


def local(options: Options, start: Start = processes.run) -> Report:
    """The kernels on one device: every GPU in turn, in a process of its own."""
    kernels = "cpu" if options.device == "cpu" else "peer"
    if options.transport == "auto" and kernels not in available(torch.device(options.device)):
        return _no_kernels("local")
    transport = kernels if options.transport == "auto" else options.transport
    task = options.task(transport=transport, cases=plan.local_cases(options.device))
    if options.device == "cpu":
        runs = [Run(transport, transport, task)]
    else:
        # All of them, also where fewer ranks are wanted: this is how a sick one is found.
        runs = [
            Run(f"{transport} on GPU {gpu}", transport, replace(task, gpu=gpu))
            for gpu in range(torch.cuda.device_count())
        ]
    act = partial(_group, options, 1, exchanges.run, start)
    return conclude("local", options, 1, ((run.transport, act(run)) for run in runs))


def node(options: Options, start: Start = processes.run) -> Report:
    """All ranks of the machine; what is chosen here first, then whatever else can be used."""
    first = expected(options)
    task = options.task(cases=_group_cases(first, options))
    act = partial(_group, options, options.ranks, exchanges.run, start)
    return conclude("node", options, options.ranks, all_transports(options, task, act, first))


def graph(options: Options, start: Start = processes.run) -> Report:
    """Replays of a captured exchange on all GPUs."""
    if options.device == "cpu":
        return skipped("graph", "CUDA graphs need a GPU")
    if "peer" not in available(torch.device(options.device)):
        return _no_kernels("graph")
    run = Run("graphs", expected(options), options.task())
    act = partial(_group, options, options.ranks, graphs.run, start)
    return conclude("graph", options, options.ranks, ((run.transport, act(run)) for run in [run]))


def decision(options: Options) -> Decision:
    """What the ranks of this machine will choose, as far as this process can tell. Raises EpConfigError."""
    record = probe("cpu" if options.device == "cpu" else None)
    records = [record] * options.ranks
    if options.device == "cuda" and len(record.visible) >= options.ranks:
        records = [msgspec.structs.replace(record, device=uuid) for uuid in record.visible[: options.ranks]]
    return decide(
        records,
        options.transport,
        transport_asked_by=options.asked_by,
        available=available(torch.device(options.device)),
    )


def expected(options: Options) -> str:
    """The transport that is named if the ranks do not get so far as to say theirs."""
    try:
        return decision(options).transport
    except EpConfigError:
        return options.transport


def all_transports(
    options: Options, task: Task, act: Callable[[Run], Group | Failure], first: str
) -> Iterator[tuple[str, Group | Failure]]:
    """What ``act`` finds out with each transport: the one that is chosen or asked for, then what else there
    is. ``first``: what will probably be chosen."""
    group = act(Run(first, first, task))
    if isinstance(group, Failure):
        yield first, group
        return
    used = group.result.transport
    yield used, replace(group, name=used, chosen=options.transport == "auto")
    for run in _others(used, task, options):
        yield run.transport, act(run)


def _others(first: str, task: Task, options: Options) -> list[Run]:
    """What can be used beside the transport that has been tried; nothing where one was asked for."""
    runs = []
    if options.transport == "auto":
        # On one machine hier is cpu, with copies.
        for other in sorted(available(torch.device(options.device)) - {first, HierTransport.name}):
            cases = _group_cases(other, options)
            more = replace(task, transport=other, optional=True, cases=cases)
            runs.append(Run(other, other, more))
    return runs


def _group_cases(transport: str, options: Options) -> tuple[plan.Case, ...]:
    return plan.group_cases(options.ranks, bulk=transport == "peer")


def judge(name: str, outcomes: Sequence[Outcome]) -> Group | Failure:
    """What the ranks of a group found out, together."""
    failed = processes.first_failure(outcomes)
    if failed is not None:
        others = [outcome for outcome in outcomes if outcome.rank != failed.rank and outcome.end != "done"]
        return Failure(
            group=name,
            rank=failed.rank,
            kind=failed.end,
            text=failed.words,
            error=failed.error,
            details="\n".join(f"rank {o.rank}:\n{o.details}" for o in (failed, *others) if o.details),
            others=_gathered((outcome.rank, outcome.words) for outcome in others),
        )
    result: Result = outcomes[0].value
    if result.wrong:
        (rank, text), *rest = result.wrong
        return Failure(
            group=name,
            rank=rank,
            kind="wrong",
            text=text,
            others=_gathered(rest),
        )
    return Group(name=name, result=result)


def _gathered(found: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """A sentence for every rank; ranks of which the same is said share one."""
    ranks: dict[str, list[int]] = {}
    for rank, words in found:
        ranks.setdefault(words, []).append(rank)
    return tuple(f"{ranks_in_words(of)}{', each' * (len(of) > 1)}: {words}" for words, of in ranks.items())


def conclude(
    phase: str,
    options: Options,
    ranks: int,
    found: Iterable[tuple[str, Group | Failure]],
    hosts: int = 1,
    nodes: int = 1,
) -> Report:
    """The report on a phase from what its groups found, up to the first failure."""
    begin = time.monotonic()
    report = Report(phase=phase, status="passed", ranks=ranks, hosts=hosts, nodes=nodes)
    for transport, group in found:
        if isinstance(group, Failure):
            steps = advise(phase, group.kind, transport, options.device, group.error)
            report = replace(report, status="failed", failure=group, next=steps)
            break
        report = replace(report, groups=(*report.groups, group))
    done = sum(group.result.exchanges for group in report.groups)
    if report.status == "passed" and report.groups and not done:
        report = replace(report, status="skipped", why=report.groups[0].result.left_out)
    return replace(report, seconds=time.monotonic() - begin)


def _group(options: Options, ranks: int, job: processes.Job, start: Start, run: Run) -> Group | Failure:
    """What new ranks find out in ``run``."""
    outcomes = start(job, (run.task,), count=ranks, deadline_s=options.deadline_s)
    return judge(run.name, outcomes)


def _no_kernels(phase: str) -> Report:
    why = "this build of ep_backend has no CUDA kernels; EP_BACKEND_CUDA=1 pip install . makes one that has"
    return skipped(phase, why)


def skipped(phase: str, why: str) -> Report:
    return Report(phase=phase, status="skipped", why=why)
