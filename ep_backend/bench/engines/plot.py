"""The picture of `--plot`: bars of median TPOT and of output tokens per second."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ep_backend.bench.arguments import output_file
from ep_backend.bench.engines.summary import Summary
from ep_backend.errors import EpConfigError

SUFFIXES = (".png", ".svg")
PANELS = (("tpot_median_ms", "median TPOT, ms"), ("output_tokens_per_s", "output tokens/s"))
WIDTH = 0.8  # of all bars of one concurrency; 1 would leave no gap to the next


def plot_file(text: str) -> Path:
    """The type of `--plot`: a file whose suffix says which format to write."""
    path = output_file(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(SUFFIXES)}")
    return path


def check_matplotlib() -> None:
    """EpConfigError if this Python has no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EpConfigError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")


def write(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Bars are medians over rounds, error bars go from the least to the most."""
    # Not pyplot: it would choose a window system.
    from matplotlib.figure import Figure

    concurrencies = list(dict.fromkeys(summary.concurrency for summary in summaries))
    backends = list(dict.fromkeys(summary.backend for summary in summaries))
    width = WIDTH / len(backends)
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axes, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, backend in enumerate(backends):
            mine = [summary for summary in summaries if summary.backend == backend]
            shift = (number - (len(backends) - 1) / 2) * width
            axes.bar(
                [concurrencies.index(summary.concurrency) + shift for summary in mine],
                [summary.median[metric] for summary in mine],
                width,
                yerr=[
                    [summary.median[metric] - summary.least[metric] for summary in mine],
                    [summary.most[metric] - summary.median[metric] for summary in mine],
                ],
                capsize=3,
                label=backend,
            )
        axes.set_xticks(range(len(concurrencies)), [str(concurrency) for concurrency in concurrencies])
        axes.set_xlabel("requests at a time")
        axes.set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(backends))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
