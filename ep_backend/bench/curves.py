"""The picture of `ep-backend bench --plot`: latency against tokens, a curve for each transport."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep_backend.bench import pictures, report

PHASE_NAMES = {"dispatch": "dispatch", "combine": "combine", "round_trip": "round trip"}


def title(document: Mapping[str, Any]) -> str:
    of = document["settings"]
    return (
        f"{of['ranks']} {of['device']} rank{'s' * (of['ranks'] != 1)}, hidden {of['hidden']}, "
        f"{of['experts']} experts, top-{of['topk']}, {of['routing']} routing"
    )


def write(document: Mapping[str, Any], path: Path) -> None:
    """Medians of the slowest rank, both axes logarithmic, one panel for each phase."""
    from matplotlib.ticker import LogFormatter

    label = report.labels(document["results"])
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for result in document["results"]:
        curve = curves.setdefault(label(result), {phase: {} for phase in PHASE_NAMES})
        curve[result["phase"]][result["tokens"]] = result["median_us"]
    tokens = sorted({result["tokens"] for result in document["results"]})
    made = pictures.figure(title(document))
    for axes, (phase, name) in zip(made.subplots(1, 3, sharey=True), PHASE_NAMES.items(), strict=True):
        for text, curve in curves.items():
            points = sorted(curve[phase].items())
            axes.plot([t for t, _ in points], [us for _, us in points], marker="o", label=text)
        axes.set_title(name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens, [str(t) for t in tokens], rotation=45)
        axes.set_xlabel("tokens per rank")
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format(LogFormatter(minor_thresholds=(2, 0.5)))  # 200, not a power of ten
        axes.grid(visible=True, alpha=0.3)
    made.axes[0].set_ylabel("median, us")
    pictures.save(made, min(len(curves), 4), path)
