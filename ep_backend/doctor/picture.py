"""The picture of `ep-backend doctor --plot`: GPUs and the links between them, if any; the expected times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ep_backend.bench import pictures
from ep_backend.checks import Direction
from ep_backend.doctor.findings import gpu_names
from ep_backend.doctor.report import Report
from ep_backend.doctor.text import WAYS
from ep_backend.nvml import Link
from ep_backend.probe import Record

COLOURS = {"NVLink": "tab:green", "PCIe switch": "tab:blue", "root complex": "tab:orange", "NUMA": "tab:gray"}
FAILED = "data check FAILED"
KINDS = {"LOC": "PCIe switch", "PIX": "PCIe switch", "PXB": "PCIe switch", "PHB": "root complex"}
MOST_LABELLED = 4  # GPUs; with more, numbers on the lines could not be read


def write(report: Report, path: Path) -> None:
    """``path``: .png or .svg. Raises OSError."""
    decision = report.decision
    chosen = (
        f"profile {decision.profile or 'none'}, transport {decision.transport}"
        if decision
        else "nothing chosen"
    )
    gpus = len(report.record.gpus)
    made = pictures.figure(f"{gpus} GPU{'s' * (gpus != 1)}, {report.record.cpus} CPUs: {chosen}")
    panels = made.subplots(1, 1 + bool(gpus), squeeze=False)[0]
    if gpus:
        _topology(panels[0], report.record)
    _times(panels[-1], report)
    pictures.write(made, path)


def kind(record: Record, link: Link) -> str:
    """What joins a pair, in the words of the picture; a failed check goes before all."""
    if any(one.broken for one in _directions(record, link)):
        return FAILED
    return "NVLink" if link.nvlink else KINDS.get(link.ancestor, "NUMA")


def rate(record: Record, link: Link) -> float | None:
    """GB/s of stores between the two, in the slower direction; None if one failed or was not measured."""
    directions = _directions(record, link)
    known = [one.store_bytes_per_s / 1e9 for one in directions if one.store_bytes_per_s]
    return min(known) if known and not any(one.broken for one in directions) else None


def _directions(record: Record, link: Link) -> list[Direction]:
    return [one for one in record.directions if {one.source, one.target} == {link.a, link.b}]


def _topology(axes: Any, record: Record) -> None:
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-1.4, 1.4)
    axes.set_ylim(-1.4, 1.4)
    # Neighbours on the circle are of one NUMA node.
    gpus = sorted(record.gpus, key=lambda gpu: -1 if gpu.numa_node is None else gpu.numa_node)
    at = {
        gpu.uuid: (
            math.sin(2 * math.pi * number / len(gpus)),
            math.cos(2 * math.pi * number / len(gpus)),
        )
        for number, gpu in enumerate(gpus)
    }
    by_kind: dict[str, list[float]] = {}
    for link in record.links:
        if link.a not in at or link.b not in at:
            continue
        (x0, y0), (x1, y1) = at[link.a], at[link.b]
        name, speed = kind(record, link), rate(record, link)
        failed = name == FAILED
        new = name not in by_kind
        by_kind.setdefault(name, []).extend([] if speed is None else [speed])
        axes.plot(
            [x0, x1],
            [y0, y1],
            color="tab:red" if failed else COLOURS[name],
            linestyle="--" if failed else "-",
            linewidth=2,
            zorder=1,
            label=name if new else None,
        )
        if speed is not None and len(gpus) <= MOST_LABELLED:
            # Not in the middle, where diagonals cross.
            where = (x0 + (x1 - x0) * 0.4, y0 + (y1 - y0) * 0.4)
            axes.text(*where, f"{speed:.0f}", ha="center", va="center", fontsize=8, backgroundcolor="white")
    names, used = gpu_names(record), set(record.used_gpus())
    for gpu in gpus:
        numa = "" if gpu.numa_node is None else f"\nNUMA {gpu.numa_node}"
        colour = "lightyellow" if gpu.uuid in used else "lightgray"
        box = {"boxstyle": "round", "facecolor": colour, "edgecolor": "black"}
        axes.text(
            *at[gpu.uuid], names[gpu.uuid] + numa, ha="center", va="center", fontsize=9, bbox=box, zorder=3
        )
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        shown = [f"{label}{_range(by_kind[label])}" for label in labels]
        axes.legend(handles, shown, loc="lower center", bbox_to_anchor=(0.5, -0.08), ncols=2, fontsize=8)
    axes.set_title("links; stores of SMs, GB/s")


def _range(rates: list[float]) -> str:
    if not rates:
        return ""
    low, high = min(rates), max(rates)
    return f": {low:.0f} GB/s" if high - low < 1 else f": {low:.0f} to {high:.0f} GB/s"


def _times(axes: Any, report: Report) -> None:
    from matplotlib.ticker import LogFormatter

    curves: dict[str, list[tuple[int, float]]] = {}
    for one in report.expected:
        if one.seconds is not None:
            label = f"{one.shape}, {WAYS.get(one.way, one.way)}, {one.dtype}"
            curves.setdefault(label, []).append((one.tokens, one.seconds * 1e6))
    axes.set_title("expected dispatch + combine (model)")
    if not curves:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing to expect", ha="center", va="center")
        return
    for label, points in curves.items():
        points.sort()
        style = ":" if WAYS["nccl"] in label else "-"
        axes.plot([t for t, _ in points], [us for _, us in points], style, marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_format(LogFormatter(minor_thresholds=(2, 0.5)))  # 200, not a power of ten
    tokens = sorted({one.tokens for one in report.expected})
    axes.set_xticks(tokens, [str(count) for count in tokens], rotation=45)
    axes.set_xlabel("tokens per rank")
    axes.set_ylabel("us per layer")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7)
