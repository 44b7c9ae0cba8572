"""The picture of `--plot`: bars of median TPOT and of output tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ep_backend.bench import pictures
from ep_backend.bench.engines.summary import Summary
from ep_backend.bench.pictures import check_matplotlib, plot_file

__all__ = ["check_matplotlib", "plot_file", "write"]
PANELS = (("tpot_median_ms", "median TPOT, ms"), ("output_tokens_per_s", "output tokens/s"))
WIDTH = 0.8  # of all bars of one concurrency; 1 would leave no gap to the next


def write(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Bars are medians over rounds, error bars go from the least to the most."""
    concurrencies = list(dict.fromkeys(summary.concurrency for summary in summaries))
    backends = list(dict.fromkeys(summary.backend for summary in summaries))
    width = WIDTH / len(backends)
    figure = pictures.figure(title)
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
    pictures.save(figure, len(backends), path)
