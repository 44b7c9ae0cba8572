"""What `ep-backend tune` shows: lines, a table, and the picture of ``--plot``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep_backend import tuned
from ep_backend.bench import curves, pictures
from ep_backend.bench.report import median, microseconds


def heading(settings: Mapping[str, Any]) -> str:
    tokens = ", ".join(map(str, settings["tokens"]))
    title = curves.title({"settings": settings})
    return f"tuning {title}, {settings['dtype']}, {settings['layout']}; tokens {tokens}"


def table(document: Mapping[str, Any]) -> str:
    """A line for each number of SMs and scale of chunks: us of an exchange + what products lose, by number of
    tokens; cost."""
    times = _times(document)
    tokens = sorted({tokens for *_, tokens in times})
    rows = [["SMs", *(f"T={t}" for t in tokens), "cost", "slowest", "rounds"]]
    for one in document["candidates"]:
        pairs = [times[one["num_sms"], one["chunk_scale"], t] for t in tokens]
        rows.append(
            [
                tuned.choice(one["num_sms"], one["chunk_scale"]),
                *(f"{microseconds(exchange)} + {microseconds(lost)}" for exchange, lost in pairs),
                f"{one['cost']:.3f}",
                f"{one['slowest']:.3f}",
                str(one["rounds"]),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        ["", *lines, "", "T: us of an exchange + us that products beside it lose; docs/tuning.md"]
    )


def chosen(document: Mapping[str, Any]) -> str:
    one = document["chosen"]
    what = tuned.choice(one["num_sms"], one["chunk_scale"])
    if one["num_sms"] is None and one["chunk_scale"] == 1:
        why = "nothing that was measured is better than the default"
    else:
        why = (
            f"cost {one['cost']:.3f} of the default's; an exchange takes at most {one['slowest']:.3f} times "
            "as long as by default"
        )
    return f"chosen: {what} ({why}); stored in {document['stored']}"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Times and cost against SMs, a curve for each number of tokens; no limit stands at all SMs. Costs of
    other chunks have their scale beside them."""
    times, most = _times(document), document["machine"]["sms"]
    made = pictures.figure(f"{curves.title(document)}, {document['transport']}")
    exchange, lost, cost = made.subplots(1, 3)
    for axes, title, which in ((exchange, "exchange alone", 0), (lost, "lost by products beside it", 1)):
        for tokens in sorted({tokens for *_, tokens in times}):
            points = sorted(
                (n or most, pair[which]) for (n, s, t), pair in times.items() if s == 1 and t == tokens
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{tokens} tokens")
        axes.set_title(title)
        axes.set_ylabel("us")
    exchange.set_yscale("log")
    for one in document["candidates"]:
        at, scale = one["num_sms"] or most, one["chunk_scale"]
        allowed = one["slowest"] <= document["objective"]["slower_at_most"]
        cost.plot(at, one["cost"], "o" if allowed else "x", color="black" if scale == 1 else "tab:gray")
        if scale != 1:
            cost.annotate(f" x {scale:g}", (at, one["cost"]))
    cost.axvline(document["chosen"]["num_sms"] or most, color="tab:green")
    cost.set_title("cost; x: an exchange is too slow")
    for axes in made.axes:
        axes.set_xlabel("SMs")
        axes.grid(visible=True, alpha=0.3)
    handles = exchange.get_legend_handles_labels()
    made.legend(*handles, loc="outside lower center", ncols=4)
    pictures.write(made, path)


def _times(document: Mapping[str, Any]) -> dict[tuple[int | None, float, int], tuple[float, float]]:
    """By number of SMs, scale of chunks and number of tokens, medians over rounds: exchange, lost."""
    rounds: dict[tuple[int | None, float, int], list[tuple[float, float]]] = {}
    for sample in document["samples"]:
        key = sample["num_sms"], sample["chunk_scale"], sample["tokens"]
        rounds.setdefault(key, []).append((sample["exchange_us"], sample["lost_us"]))
    return {
        key: (median([exchange for exchange, _ in some]), median([lost for _, lost in some]))
        for key, some in rounds.items()
    }
