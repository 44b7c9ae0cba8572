"""The report for a person: lines of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence

from ep_backend.checks import Direction
from ep_backend.cli import choice
from ep_backend.doctor.findings import Finding, gpu_names
from ep_backend.doctor.report import Report
from ep_backend.doctor.warmup import WarmUp
from ep_backend.facts import order_rates
from ep_backend.nvml import Gpu, Link
from ep_backend.probe import Record

WIDTH = 110
WAYS = {"nccl": "NCCL all-gather + reduce-scatter"}


def lines(report: Report) -> list[str]:
    """All of it."""
    record = report.record
    found = [*_machine(report), *_gpus(record), *_links(record), *_peer_access(record), ""]
    if report.decision is None:
        found += ["profile      none: nothing can be chosen, see below"]
    else:
        chosen = [_named(line, record) for line in choice.chosen(report.decision)]
        found += [wrapped for line in chosen for wrapped in _wrap(line, 13)]
        settings = "\n".join(choice.settings(report.decision, report.conflicts, report.environ)).splitlines()
        found += [""]
        for line in settings:
            found += _wrap(line, len(line) - len(line.lstrip()))
    found += ["", *_warm_up(report.warm_up), *_expected(report), *_advice(report)]
    return [line.rstrip() for line in (*found, *_findings(report))]


def _machine(report: Report) -> list[str]:
    record = report.record
    place = [record.host or "?", f"{record.cpus} CPUs"]
    place += [f"container ({record.container})"] if record.container else []
    place += [f"IOMMU {record.iommu}"] if record.iommu else []
    size = record.shared_memory_bytes
    found = [
        f"machine      {', '.join(place)}",
        f"/dev/shm     {'unknown' if size is None else _bytes(size)}",
        f"network      {', '.join(record.hcas) or 'no active InfiniBand or RoCE port'}",
        *_wrap(f"versions     {choice.versions(record, report.software)}", 13),
    ]
    found += [f"fabric       {_fabric(record)}"] if record.gpus else []
    if report.copy_bytes_per_s is not None:
        found += [f"memory       all cores together copy {report.copy_bytes_per_s / 1e9:.1f} GB/s"]
    return found + [
        wrapped
        for problem in record.problems
        for wrapped in _wrap(f"note         {_named(problem, record)}", 13)
    ]


def _fabric(record: Record) -> str:
    clusters = sorted({(gpu.fabric_cluster, gpu.fabric_clique) for gpu in record.gpus if gpu.fabric_cluster})
    states = sorted({gpu.fabric_state for gpu in record.gpus if gpu.fabric_state})
    works = {None: "not tried", True: "works", False: "FAILED"}[record.fabric_works]
    if not clusters:
        return "no NVLink across machines" + (f" (state: {', '.join(states)})" if states else "")
    names = ", ".join(f"cluster {cluster} clique {clique}" for cluster, clique in clusters)
    return f"{names} (state: {', '.join(states) or 'unknown'}); exchange of a handle: {works}"


def _gpus(record: Record) -> list[str]:
    if not record.gpus:
        return ["GPUs         none"]
    names, used = gpu_names(record), set(record.used_gpus())
    found = []
    for gpu in record.gpus:
        unused = "" if gpu.uuid in used else " (not used)"
        found += [
            f"{names[gpu.uuid]:<12} {gpu.name or 'GPU'}, {gpu.uuid}, {gpu.bus_id or 'no bus id'}{unused}"
        ]
        found += _wrap(f"{'':<12} {', '.join(_properties(gpu)) or 'nothing more is known'}", 13)
    slices = [name for name in record.visible if name.startswith("MIG-")]
    return found + ([f"MIG slices   {', '.join(slices)}"] if slices else [])


def _properties(gpu: Gpu) -> Iterable[str]:
    if gpu.memory_bytes:
        yield f"{_bytes(gpu.memory_bytes)} of memory"
    if gpu.bar1_bytes:
        yield f"BAR1 {_bytes(gpu.bar1_bytes)}"
    if gpu.pcie_generation and gpu.lanes:
        of = f" of x{gpu.pcie_width}" if gpu.pcie_width and gpu.lanes < gpu.pcie_width else ""
        yield f"PCIe {gpu.pcie_generation}.0 x{gpu.lanes}{of}"
    if gpu.numa_node is not None:
        yield f"NUMA node {gpu.numa_node}"
    if gpu.nvlinks:
        to = {"switch": " to NVSwitches", "gpu": " to other GPUs"}.get(gpu.nvlink_peer, "")
        yield f"{gpu.nvlinks} NVLinks{to}"
    if gpu.mig is not None:
        yield f"MIG {'on' if gpu.mig else 'off'}"
    if gpu.virtualization:
        yield f"virtualisation: {gpu.virtualization}"


def _links(record: Record) -> list[str]:
    if len(record.gpus) < 2:
        return []
    by_pair = {frozenset((link.a, link.b)): link for link in record.links}
    return [
        "",
        "Links (NVL: NVLink; PIX, PXB: PCIe switches; PHB: one root complex; NODE: one NUMA node; SYS: "
        "between them):",
        *_matrix(
            [gpu.uuid for gpu in record.gpus], record, lambda a, b: _kind(by_pair.get(frozenset((a, b))))
        ),
    ]


def _kind(link: Link | None) -> str:
    if link is None:
        return "?"
    return "NVL" if link.nvlink else link.ancestor or "?"


def _peer_access(record: Record) -> list[str]:
    used = [gpu.uuid for gpu in record.gpus if gpu.uuid in set(record.used_gpus())]
    if len(used) < 2:
        return []
    found = {(one.source, one.target): one for one in record.directions}

    def of(show: Callable[[Direction], str]) -> Callable[[str, str], str]:
        return lambda a, b: show(found[a, b]) if (a, b) in found else "not tried"

    heading = "Peer access, from the GPU of the row into the memory of that of the column"
    shown = ["", f"{heading}; data check:"]
    shown += _matrix(used, record, of(_check))
    if not any(one.works for one in found.values()):
        return shown
    numbers: tuple[tuple[str, Callable[[Direction], str]], ...] = (
        ("stores of SMs, GB/s", lambda one: _scaled(one.store_bytes_per_s, 1e-9)),
        ("copy engine, GB/s", lambda one: _scaled(one.copy_bytes_per_s, 1e-9)),
        ("latency of a flag one way, us", lambda one: _scaled(one.latency_s, 1e6, 2)),
    )
    for title, show in numbers:
        shown += [f"{title}:", *_matrix(used, record, of(show))]
    for rates in order_rates([record]):
        together, staggered = rates.together_bytes_per_s, rates.staggered_bytes_per_s
        shown += [
            f"All at the same time, GB/s of each: {_scaled(together, 1e-9)} to all in turn (together), "
            f"{_scaled(staggered, 1e-9)} GPU after GPU (staggered)"
        ]
    atomics = [one.atomics for one in found.values() if one.atomics is not None]
    if atomics:
        pairs = "all pairs" if all(atomics) else "some pairs" if any(atomics) else "no pair"
        shown += [f"Native atomics between GPUs: {pairs} (recorded only; ep_backend never needs them)"]
    return shown


def _check(direction: Direction) -> str:
    if direction.access is False:
        return "no access"
    return "FAILED" if direction.broken else "ok" if direction.works else "not tried"


def _matrix(uuids: Sequence[str], record: Record, cell: Callable[[str, str], str]) -> list[str]:
    names = gpu_names(record)
    rows = [["", *(names[uuid] for uuid in uuids)]]
    rows += [[names[a], *("-" if a == b else cell(a, b) for b in uuids)] for a in uuids]
    width = max(len(text) for row in rows for text in row) + 2
    return ["  " + f"{row[0]:<7}" + "".join(f"{text:>{width}}" for text in row[1:]) for row in rows]


def _warm_up(warm_up: WarmUp) -> list[str]:
    title = "NCCL warm-up"
    if warm_up.outcome == "skipped":
        return _wrap(f"{title}: skipped, because {warm_up.why}.", 2)
    if warm_up.outcome != "ok":
        found = _wrap(f"{title} over {warm_up.ranks} GPUs: FAILED. {warm_up.why}", 2)
        return found + [f"  | {line[: WIDTH - 4]}" for line in warm_up.log]
    found = [
        f"{title} over {warm_up.ranks} GPUs: ok, {warm_up.took_s:.1f} s, all sums right. An all-reduce takes:"
    ]
    for ranks in dict.fromkeys(one.ranks for one in warm_up.all_reduces):
        of_group = [one for one in warm_up.all_reduces if one.ranks == ranks]
        where = "" if ranks == warm_up.ranks else " in each half, both at the same time"
        times = ", ".join(f"{_bytes(one.bytes)} {_microseconds(one.seconds)} us" for one in of_group)
        found += _wrap(f"  {ranks} GPUs{where}: {times}", 4)
    return found


def _expected(report: Report) -> list[str]:
    if not report.expected:
        missing = "nothing is chosen" if report.decision is None else "one rank alone sends nothing"
        return ["", f"Expected dispatch + combine: none, since {missing}."]
    found = ["", f"Expected dispatch + combine of one layer on {report.ranks} ranks, us, by tokens per rank:"]
    tokens = list(dict.fromkeys(one.tokens for one in report.expected))
    cases = list(dict.fromkeys((one.shape, one.way, one.dtype) for one in report.expected))
    labels = {case: f"{case[0]}, {WAYS.get(case[1], case[1])}, {case[2]}" for case in cases}
    label_width = max(map(len, labels.values()))
    times = {
        ((one.shape, one.way, one.dtype), one.tokens): _expected_time(one.seconds) for one in report.expected
    }
    width = max(9, 2 + max(map(len, times.values())))
    found += [f"  {'':<{label_width}}" + "".join(f"{count:>{width}}" for count in tokens)]
    for case in cases:
        shown = "".join(f"{times[case, count]:>{width}}" for count in tokens)
        found += [f"  {labels[case]:<{label_width}}{shown}"]
    for way, basis in dict.fromkeys((one.way, one.basis) for one in report.expected):
        found += _wrap(f"  {WAYS.get(way, way)}: {basis}", 4)
    return found


def _expected_time(seconds: float | None) -> str:
    return "-" if seconds is None else _microseconds(seconds)


def _advice(report: Report) -> list[str]:
    return (
        ["", "Advice:", *(line for one in report.advice for line in _wrap(f"  - {one}", 4))]
        if report.advice
        else []
    )


def _findings(report: Report) -> list[str]:
    wrong = sum(finding.wrong for finding in report.findings)
    worth = len(report.findings) - wrong
    found = ["", "Findings:"] if report.findings else [""]
    for finding in report.findings:
        found += _finding(finding, report.record)
    verdict = "Nothing is wrong." if not wrong else f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong."
    return [*found, verdict + (f" {worth} more worth knowing." if worth else "")]


def _finding(finding: Finding, record: Record) -> list[str]:
    mark = "WRONG" if finding.wrong else "note"
    return [
        *_wrap(f"  {mark}: {_ended(_named(finding.what, record))}", 4),
        *_wrap(f"    why: {_ended(finding.why)}", 6),
        *_wrap(f"    next: {finding.next}", 6),
    ]


def _named(words: str, record: Record) -> str:
    """``words`` with the names of the tables in place of the UUIDs of GPUs."""
    for uuid, name in gpu_names(record).items():
        words = words.replace(uuid, name)
    return words


def _ended(words: str) -> str:
    """``words`` as a sentence: some end as one already, for example with the nearest name."""
    return words if words.endswith((".", "?", "!")) else f"{words}."


def _wrap(text: str, indent: int) -> list[str]:
    """``text`` in lines of WIDTH; an address that is longer stays whole, and an empty line a line."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _scaled(value: float | None, factor: float, digits: int = 0) -> str:
    return "-" if value is None else f"{value * factor:.{digits if value * factor >= 10 or digits else 1}f}"


def _microseconds(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def _bytes(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return (
                f"{size / factor:.0f} {unit}"
                if size >= 10 * factor or size % factor == 0
                else f"{size / factor:.1f} {unit}"
            )
    return f"{size} bytes"
