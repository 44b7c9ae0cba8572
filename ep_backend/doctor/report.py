"""The whole report of `ep-backend doctor`, put together from what was found out. Pure, but for `collect`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ep_backend.cli import choice
from ep_backend.doctor import advice, copying, plan, software, warmup
from ep_backend.doctor.findings import Finding, find, used_directions
from ep_backend.doctor.plan import Expected, Shape
from ep_backend.doctor.warmup import WarmUp
from ep_backend.errors import EpConfigError
from ep_backend.probe import Record, probe
from ep_backend.select import AVAILABLE, Conflict, Decision, decide, find_conflicts

MODEL = "model, not measured"
FROM_NCCL = f"model of all-gather + reduce-scatter, from the all-reduces measured just now; {plan.NCCL_ERROR}"


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
    shapes: Sequence[Shape],
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
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    ranks: int,
    *,
    environ: Mapping[str, str],
    copy_bytes_per_s: float | None = None,
    versions: Mapping[str, str] | None = None,
    kernels: bool = True,
) -> Report:
    """The report about a machine of which everything is known. Pure."""
    times: list[Expected] = []
    comparisons: list[advice.Comparison] = []
    words = advice.of_engines(record, decision, ranks) if decision else []
    all_reduces = warm_up.times(ranks)
    for shape in shapes:
        if decision is None or ranks < 2:
            break
        for dtype in plan.DTYPES:
            times += expect(record, decision, warm_up, shape, tokens, ranks, dtype, copy_bytes_per_s)
        way = "peer" if decision.transport == "peer" else "nccl"
        ours = [one for one in times if (one.shape, one.dtype, one.way) == (shape.name, "bf16", way)]
        if all_reduces is not None:
            name = "EP" if way == "peer" else "EP over NCCL"
            found = advice.compare(shape, ranks, ours, all_reduces, warm_up.times(ranks // 2), name)
            comparisons += found
            words += advice.sentences(found)
    if all_reduces is None and ranks > 1:
        words.append("EP was not compared with TP: no all-reduce was measured here.")
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


def expect(
    record: Record,
    decision: Decision,
    warm_up: WarmUp,
    shape: Shape,
    tokens: Sequence[int],
    ranks: int,
    dtype: str,
    copy_bytes_per_s: float | None,
) -> list[Expected]:
    """Times of the transport chosen and, where NCCL was measured, of what engines do by themselves."""
    found: list[tuple[str, Callable[[int], float] | None, str]] = []
    on_h200 = _on_h200(record)
    if decision.transport == "peer":
        rate, latency = _slowest_link(record)
        if rate is None or latency is None:
            found.append(("peer", None, "no expectation: the links were not measured"))
        else:
            found.append(
                (
                    "peer",
                    lambda t: plan.peer_s(
                        shape, ranks, t, dtype, bytes_per_s=rate, latency_s=latency, sms=decision.sms
                    ),
                    MODEL,
                )
            )
    elif decision.transport == "cpu" and copy_bytes_per_s is not None:
        found.append(
            (
                "cpu",
                lambda t: plan.cpu_s(
                    shape, ranks, t, dtype, copy_bytes_per_s=copy_bytes_per_s, cpus=record.cpus or 1
                ),
                f"{MODEL}: fitted to 2 and 4 ranks on 2 cores, with this machine's copy rate",
            )
        )
    elif not record.used_gpus() or decision.transport != "collective":
        found.append(
            (decision.transport, None, f"no expectation: there is no formula for {decision.transport}")
        )
    all_reduces = warm_up.times(ranks)
    if all_reduces is not None:
        slower = (
            "" if decision.transport == "peer" else "; transport collective is slower, it packs on the CPU"
        )
        found.append(("nccl", lambda t: plan.nccl_s(shape, ranks, t, dtype, all_reduces), FROM_NCCL + slower))
    elif record.used_gpus() and decision.transport == "collective":
        found.append(("nccl", None, "no expectation: no all-reduce was measured"))
    return [
        Expected(
            shape=shape.name,
            tokens=count,
            dtype=dtype,
            way=way,
            seconds=None if formula is None else formula(count),
            basis=plan.CHECKED
            if way == "peer" and formula and on_h200 and plan.checked(shape, ranks, count)
            else basis,
        )
        for way, formula, basis in found
        for count in tokens
    ]


def as_json(report: Report) -> dict[str, Any]:
    """One object of plain data."""
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
    }


def _slowest_link(record: Record) -> tuple[float | None, float | None]:
    """Least store rate and longest latency between GPUs that are used; None if one was not measured."""
    directions = used_directions(record)
    rates = [one.store_bytes_per_s for one in directions if one.store_bytes_per_s]
    latencies = [one.latency_s for one in directions if one.latency_s]
    pairs = len(record.used_gpus()) * (len(record.used_gpus()) - 1)
    if not pairs or len(rates) < pairs or len(latencies) < pairs:
        return None, None
    return min(rates), max(latencies)


def _on_h200(record: Record) -> bool:
    """Whether this is the kind of machine that the constants were measured on; nothing is decided by it."""
    used = set(record.used_gpus())
    gpus = [gpu for gpu in record.gpus if gpu.uuid in used]
    return all("H200" in gpu.name and gpu.nvlinks for gpu in gpus)


def _relevant(decision: Decision | None, environ: Mapping[str, str]) -> dict[str, str]:
    names = [item.name for item in decision.env] if decision else []
    return {name: environ[name] for name in names if name in environ}
