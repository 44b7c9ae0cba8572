"""The whole report of `ep-backend doctor`, put together from what was found out. Pure, but for `collect`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ep_backend.cli import choice
from ep_backend.cli.provenance import provenance
from ep_backend.doctor import advice, copying, plan, room, software, warmup
from ep_backend.doctor.expect import expect, on_h200
from ep_backend.doctor.findings import Finding, find
from ep_backend.doctor.plan import Expected, Shape
from ep_backend.doctor.warmup import WarmUp
from ep_backend.errors import EpConfigError
from ep_backend.planning import hardware
from ep_backend.planning.model import Model
from ep_backend.probe import Record, probe
from ep_backend.select import AVAILABLE, Conflict, Decision, decide, find_conflicts
from ep_backend.transports import OF_GPUS


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``decision`` None: nothing can be chosen, and a finding says why. ``ranks``: one per GPU in use."""

    record: Record
    software: dict[str, str] = {}
    ranks: int
    decision: Decision | None
    conflicts: tuple[Conflict, ...] = ()
    environ: dict[str, str] = {}
    warm_up: WarmUp
    copy_bytes_per_s: float | None = None
    expected: tuple[Expected, ...] = ()
    comparisons: tuple[advice.Comparison, ...] = ()
    advice: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def status(self) -> int:
        """Exit status: 1 if something is wrong."""
        return int(any(finding.wrong for finding in self.findings))


def collect(
    shapes: Sequence[Shape | Model],
    tokens: Sequence[int],
    ranks: int | None,
    cpu_ranks: int,
    deadline_s: float,
    note: Callable[[str], None],
) -> Report:
    """Find everything out. ``ranks``: how many GPUs to use, None for all; without GPUs processes on the CPU,
    None for ``cpu_ranks``. ``note`` is told what takes time. Raises EpConfigError: not so many GPUs."""
    note("looking at the machine and checking peer access")
    record = limited(probe(checks="fresh"), ranks)
    chosen, undecided = choose(record, choice.available())
    used = len(record.used_gpus()) or ranks or cpu_ranks
    skipped = warmup.skip(record) or undecided
    if skipped:
        warm_up = WarmUp(outcome="skipped", why=skipped)
    else:
        assert chosen is not None
        note(f"warming NCCL up on {used} GPUs, at most {deadline_s:g} s")
        environment = warmup.environment(record, chosen, os.environ)
        warm_up = warmup.run(used, environment, deadline_s=deadline_s)
    on_cpus = chosen is not None and chosen.transport == "cpu"
    return examine(
        record,
        chosen,
        undecided,
        warm_up,
        shapes,
        tokens,
        used,
        environ=os.environ,
        copy_bytes_per_s=copying.copy_rate(min(record.cpus or 1, used)) if on_cpus else None,
        versions=software.versions(),
        kernels="peer" in choice.available(),
    )


def limited(record: Record, ranks: int | None) -> Record:
    """``record`` as if only the first ``ranks`` of its GPUs were visible."""
    if ranks is None or not record.visible:
        return record
    if ranks > len(record.visible):
        raise EpConfigError(
            f"--ranks {ranks}, but {len(record.visible)} GPUs can be used here; a rank takes one"
        )
    return msgspec.structs.replace(record, visible=record.visible[:ranks])


def choose(record: Record, available: frozenset[str] = AVAILABLE) -> tuple[Decision | None, str]:
    """The decision, or why there is none."""
    try:
        return decide([record], available=available), ""
    except EpConfigError as error:
        return None, " ".join(str(error).split())


def examine(
    record: Record,
    decision: Decision | None,
    undecided: str,
    warm_up: WarmUp,
    shapes: Sequence[Shape | Model],
    tokens: Sequence[int],
    ranks: int,
    *,
    environ: Mapping[str, str],
    copy_bytes_per_s: float | None = None,
    versions: Mapping[str, str] | None = None,
    kernels: bool = True,
) -> Report:
    """The report about a machine of which everything is known. Pure.

    ``shapes``: of a `Model` more is known than its shape, so that ways that cannot be here are left out.
    """
    times: list[Expected] = []
    comparisons: list[advice.Comparison] = []
    words = (
        advice.of_engines(record, decision, ranks, warm_up.outcome in ("ok", "skipped")) if decision else []
    )
    foreign = decision is not None and decision.transport == "host" and not on_h200(record)
    all_reduces = warm_up.times(ranks)
    rooms = [room.of(one, ranks, record) for one in shapes]
    for one, fits in zip(shapes, rooms, strict=True):
        if decision is None or ranks < 2:
            break
        shape = one.shape if isinstance(one, Model) else one
        for dtype in plan.DTYPES:
            times += expect(record, decision, warm_up, shape, tokens, ranks, dtype, copy_bytes_per_s)
        words += fits.words
        if all_reduces is not None and fits.ep:
            way = decision.transport if decision.transport in OF_GPUS else "nccl"
            ours = [time for time in times if (time.shape, time.dtype, time.way) == (shape.name, "bf16", way)]
            name = advice.OVER_NCCL if way == "nccl" else "EP"
            in_halves = warm_up.times(ranks // 2) if fits.halves else None
            found = advice.compare(shape, ranks, ours, all_reduces, in_halves, name)
            if foreign and found and not comparisons:
                words.append(f"{hardware.UNSURE}. Measure before you choose: ep-backend bench.")
            comparisons += found
            said = advice.sentences(found, fits.impossible)
            words += advice.if_host(said, name) if foreign else said
    if ranks > 1 and not comparisons:
        if all_reduces is None:
            what = "no all-reduce was measured here"
        elif any(fits.ep for fits in rooms):
            what = "EP has no expected time here"
        else:
            what = "no model fits with EP"
        words.append(f"EP was not compared with TP: {what}.")
    return Report(
        record=record,
        software=dict(versions or {}),
        ranks=ranks,
        decision=decision,
        conflicts=find_conflicts(decision, environ) if decision else (),
        environ=_relevant(decision, environ),
        warm_up=warm_up,
        copy_bytes_per_s=copy_bytes_per_s,
        expected=tuple(times),
        comparisons=tuple(comparisons),
        advice=tuple(words),
        findings=find(record, decision, warm_up, environ, kernels=kernels, undecided=undecided),
    )


def as_json(report: Report) -> dict[str, Any]:
    """One object of plain data, with the command and the date."""
    decision = report.decision
    return {
        "status": report.status,
        "machine": msgspec.to_builtins(report.record),
        "software": report.software,
        "ranks": report.ranks,
        "choice": choice.as_json(decision, report.conflicts, report.environ) if decision else None,
        "warm_up": msgspec.to_builtins(report.warm_up),
        "copy_bytes_per_s": report.copy_bytes_per_s,
        "expected": msgspec.to_builtins(report.expected),
        "comparisons": msgspec.to_builtins(report.comparisons),
        "advice": list(report.advice),
        "findings": msgspec.to_builtins(report.findings),
        **provenance(),
    }


def _relevant(decision: Decision | None, environ: Mapping[str, str]) -> dict[str, str]:
    names = [item.name for item in decision.env] if decision else []
    return {name: environ[name] for name in names if name in environ}
