"""What the measurements of several backends and rounds say together: medians, spreads, ratios, the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

OURS = "ep_backend"
BASELINES = ("allgather_reducescatter", "none")  # what vLLM and SGLang choose by themselves
METRICS = ("ttft_median_ms", "tpot_median_ms", "tpot_p99_ms", "itl_median_ms", "output_tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One backend at one concurrency: for each of METRICS its median, least and most over the rounds."""

    concurrency: int
    backend: str
    rounds: int
    median: dict[str, float]
    least: dict[str, float]
    most: dict[str, float]


def summarise(results: Sequence[dict[str, Any]]) -> list[Summary]:
    """By concurrency, then by backend, each in the order in which they were measured; without those that a
    run was interrupted before."""
    concurrencies = dict.fromkeys(result["concurrency"] for result in results)
    backends = dict.fromkeys(result["backend"] for result in results)
    summaries = []
    for concurrency in concurrencies:
        for backend in backends:
            rounds = [r for r in results if (r["concurrency"], r["backend"]) == (concurrency, backend)]
            if not rounds:
                continue
            values = {metric: [r[metric] for r in rounds] for metric in METRICS}
            summaries.append(
                Summary(
                    concurrency=concurrency,
                    backend=backend,
                    rounds=len(rounds),
                    median={metric: median(each) for metric, each in values.items()},
                    least={metric: min(each) for metric, each in values.items()},
                    most={metric: max(each) for metric, each in values.items()},
                )
            )
    return summaries


def baseline_of(backends: Sequence[str]) -> str | None:
    """The backend that others are compared with; None if there is only ours."""
    others = [backend for backend in backends if backend != OURS]
    return next((name for name in BASELINES if name in others), others[0] if others else None)


def ratios(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Of medians, each backend's divided by the baseline's: below 1, TPOT is shorter; above 1, more tokens/s.

    A ratio is None where the baseline's median is 0: answers of one token have no time per output token.
    There is none where the baseline was not measured.
    """
    baseline = baseline_of([summary.backend for summary in summaries])
    base = {summary.concurrency: summary for summary in summaries if summary.backend == baseline}
    return [
        {
            "concurrency": summary.concurrency,
            "backend": summary.backend,
            "baseline": baseline,
            "tpot_median_ratio": _ratio("tpot_median_ms", summary, base[summary.concurrency]),
            "output_tokens_ratio": _ratio("output_tokens_per_s", summary, base[summary.concurrency]),
        }
        for summary in summaries
        if summary.backend != baseline and summary.concurrency in base
    ]


def _ratio(metric: str, summary: Summary, base: Summary) -> float | None:
    return summary.median[metric] / base.median[metric] if base.median[metric] else None


def _table(title: str, headers: Sequence[str]) -> Table:
    """With a column of backends, then ``headers``. Fits 80 columns."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    shown.add_column("backend", no_wrap=True)
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)
    return shown


def trace_table(traces: Sequence[dict[str, Any]], title: str) -> Table:
    """What a GPU does in a decode step; see `trace.read_rank`."""
    headers = ("at\nonce", "kernels", "communi-\ncating", "busy\nms", "communi-\ncation\nms", "first\nms")
    shown = _table(f"{title}: a decode step of a GPU", headers)
    for step in traces:
        shown.add_row(
            step["backend"],
            str(step["concurrency"]),
            f"{step['kernels']:.0f}",
            f"{step['communication_kernels']:.1f}",
            f"{step['busy_us'] / 1000:.2f}",
            f"{step['communication_us'] / 1000:.2f}",
            f"{step['first_us'] / 1000:.2f}",
        )
    return shown


def table(summaries: Sequence[Summary], title: str) -> Table:
    """Medians over rounds; with several rounds, also the least and the most TPOT."""
    baseline = baseline_of([summary.backend for summary in summaries])
    spread = any(summary.rounds > 1 for summary in summaries)
    found = {(r["concurrency"], r["backend"]): r["tpot_median_ratio"] for r in ratios(summaries)}
    headers = ["at\nonce", "TTFT\nms", "TPOT\nms", "TPOT\np99", "ITL\nms", "tokens\n/s"]
    headers += ["TPOT\nmin-max"] if spread else []
    headers += ["TPOT\nratio"] if baseline is not None else []
    shown = _table(title, headers)
    if baseline is not None:
        shown.caption = f"TPOT ratio: to {baseline}"
    for summary in summaries:
        cells = [summary.backend, str(summary.concurrency)]
        cells += [
            f"{summary.median[metric]:.0f}" if "token" in metric else f"{summary.median[metric]:.1f}"
            for metric in METRICS
        ]
        if spread:
            cells.append(f"{summary.least['tpot_median_ms']:.1f}-{summary.most['tpot_median_ms']:.1f}")
        if baseline is not None:
            ratio = found.get((summary.concurrency, summary.backend))
            if summary.backend == baseline:
                ratio = 1.0
            cells.append("-" if ratio is None else f"{ratio:.2f}")
        shown.add_row(*cells)
    return shown
