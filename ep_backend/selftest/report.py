"""What ``ep-backend selftest`` prints: lines for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from ep_backend.cli.provenance import provenance
from ep_backend.errors import EpConfigError
from ep_backend.probe import Record
from ep_backend.selftest.phases import Group, Options, Report, decision

MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped", "not run": "not run"}


def heading(record: Record, options: Options) -> list[str]:
    """What is tested."""
    gpus = ", ".join(gpu.name or "GPU" for gpu in record.gpus) or "no GPU"
    versions = ", ".join(f"{name} {text}" for name, text in sorted(record.versions.items()))
    transport = "" if options.transport == "auto" else f", transport {options.transport} only"
    lines = [f"{record.host}: {record.cpus} CPUs, {gpus}; {versions}"]
    lines += [f"note: {problem}" for problem in record.problems]
    return [*lines, f"on {options.device}, {options.ranks} rank{'s' * (options.ranks != 1)}{transport}"]


def lines(report: Report) -> list[str]:
    """A phase: one line, more after a failure. The first begins with the phase's name."""
    mark, seconds = MARKS[report.status], f"{report.seconds:.1f} s" if report.seconds else ""
    head = f"{report.phase:8} {mark:7} {seconds:>7}  "
    if report.failure is None:
        what = [report.why] if report.why else [_ranks(report), *map(_group, report.groups)]
        return [head + "; ".join(what)]
    found = [head + str(report.failure)]
    found += [f"  also: {other}" for other in report.failure.others]
    if report.groups:
        found.append(f"  before: {'; '.join(map(_group, report.groups))}")
    return found + [f"  next {number}: {step}" for number, step in enumerate(report.next, 1)]


def last_line(reports: Sequence[Report]) -> str:
    """What all of it means, in a sentence."""
    failed = [report.phase for report in reports if report.status == "failed"]
    if failed:
        return f"FAILED: phase {failed[0]}"
    passed = [report.phase for report in reports if report.status == "passed"]
    if not passed:
        return f"nothing was tested: {', '.join(report.phase for report in reports)} cannot run here"
    return f"passed: {', '.join(passed)}; every bit as the reference has it"


def document(reports: Sequence[Report], record: Record, options: Options) -> dict[str, Any]:
    """What ``--json`` prints."""
    status = "failed" if any(report.status == "failed" for report in reports) else "passed"
    if status == "passed" and not any(report.status == "passed" for report in reports):
        status = "skipped"
    return {
        "status": status,
        "phases": [_phase(report) for report in reports],
        "device": options.device,
        "ranks": options.ranks,
        "transport": options.transport,
        "decision": _decision(options),
        "versions": {**record.versions, "python": sys.version.split()[0]},
        "machine": msgspec.to_builtins(record),
        **provenance(),
    }


def _decision(options: Options) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = msgspec.to_builtins(decision(options))
    except EpConfigError as error:
        return {"error": str(error)}
    return plain


def _phase(report: Report) -> dict[str, Any]:
    plain = dataclasses.asdict(report)
    plain["seconds"] = round(report.seconds, 2)
    plain["groups"] = [
        {"name": group.name, "chosen": group.chosen, **_result(group)} for group in report.groups
    ]
    return plain


def _result(group: Group) -> dict[str, Any]:
    result = dataclasses.asdict(group.result)
    del result["wrong"]  # of a group that passed there is none
    return result


def _ranks(report: Report) -> str:
    text = "1 rank" if report.ranks == 1 else f"{report.ranks} ranks"
    if report.phase != "network":
        return text
    if report.hosts > 1:
        return f"{text} on {report.hosts} hosts"
    return f"{text} on {report.nodes} nodes of one host" if report.nodes > 1 else f"{text}, all on one host"


def _group(group: Group) -> str:
    result, chosen = group.result, " (chosen here)" if group.chosen else ""
    if result.left_out:
        return f"without {group.name}: {result.left_out}"
    return f"{group.name}{chosen} {result.exchanges} exchanges, {result.cells:,} values"
