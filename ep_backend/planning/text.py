"""The plan for a person, and as plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ep_backend.doctor import advice
from ep_backend.planning import hardware
from ep_backend.planning.hardware import LINKS, PLACES, Link, Number
from ep_backend.planning.memory import Weights
from ep_backend.planning.predict import Plan
from ep_backend.planning.words import Row

WIDTH = 110
NOTES = (
    "Only what MoE layers send is timed. Computation, KV cache, the hand-over of a pipeline, all-reduces of "
    "layers without experts, all-reduces faster than NCCL's, and overlap are left out: docs/planning.md. So "
    "a step may be shorter with TP although it sends for longer; ep-backend bench-engine --backends "
    "ep_backend,tensor_parallel measures it."
)


def lines(plan: Plan) -> list[str]:
    """All of it."""
    model = plan.model
    found = _wrap(
        f"model        {model.name}: hidden {model.hidden}, {model.experts} experts, top-{model.topk}, "
        f"{model.moe_layers} of {model.layers} layers with experts",
        13,
    )
    found += _wrap(f"note         {model.note}", 13) if model.note else []
    found += [f"GPUs         {plan.gpus}, profile {plan.profile}"]
    found += _wrap(f"which link   {_which(plan)}", 13) if any(one.staging for one in plan.links) else []
    for link in plan.links:
        found += _wrap(f"link         {link.name}: {_link(link)}", 13)
    for link in plan.links:
        found += _wrap(f"note         {link.name}: {link.unsure}", 13) if link.unsure else []
    for note in plan.notes:
        found += _wrap(f"note         {note}", 13)
    found += ["", *_weights(plan), "", *_volumes(plan)]
    for name in dict.fromkeys(row.link for row in plan.rows):
        rows = [row for row in plan.rows if row.link == name]
        found += ["", *_times(rows, name, model.moe_layers)]
    found += ["", "What each row rests on:"]
    for line in (*_bases(plan), *plan.left_out):
        found += _wrap(f"  {line}", 4)
    found += ["", "Advice:"]
    found += [line for one in plan.advice for line in _wrap(f"  - {one}", 4)]
    return [*found, "", *_wrap(NOTES, 0)]


def as_json(plan: Plan) -> dict[str, Any]:
    """One object of plain data: bytes, seconds, and the numbers of the links with their sources."""
    found: dict[str, Any] = msgspec.to_builtins(plan)
    for weights, one in zip(found["weights"], plan.weights, strict=True):
        weights.update(total=one.total, fits=one.fits)
    for row in found["rows"]:
        of_layer = row["seconds"]
        row["step_seconds"] = None if of_layer is None else of_layer * plan.model.moe_layers
    return found


def _which(plan: Plan) -> str:
    """How the owner of a machine without peer access tells which link it has."""
    size = 64 << 20
    times = {name: hardware.all_reduces_of(LINKS[name], 2)(size) for name in PLACES[plan.profile].links}
    known = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in times.items())
    return f"yours is told by 2 GPUs' all-reduce of 64 MiB in ep-backend doctor, ms: {known} (--link NAME)"


def _link(link: Link) -> str:
    parts = [link.title, f"one way {_rate(link.one_way)}"]
    parts += [f"stores of SMs {_rate(link.stores)}"] if link.stores else []
    if link.staging:
        two, more = link.staging
        parts += [f"host memory, both ways at once, {_rate(two)}, with more than two GPUs {_rate(more)}"]
    parts += [f"a flag {link.flag.value * 1e6:.2f} us ({link.flag.kind})"]
    parts += [f"NCCL's all-reduces: {link.all_reduces_kind}, {link.all_reduces_source}"]
    return "; ".join(parts)


def _rate(number: Number) -> str:
    digits = 0 if number.value >= 1e11 else 1
    return f"{number.value / 1e9:.{digits}f} GB/s ({number.kind})"


def _weights(plan: Plan) -> list[str]:
    parts = ("experts", "attention", "embeddings", "rest", "total")
    labels = [f"{one.way}, {one.dtype}" for one in plan.weights]
    width = max(map(len, labels))
    found = ["Weights on one GPU, GB (10^9 bytes), without KV cache and activations:"]
    found += [f"  {'':<{width}}" + "".join(f"{part:>12}" for part in parts)]
    for label, one in zip(labels, plan.weights, strict=True):
        cells = "".join(f"{getattr(one, part) / 1e9:>12.2f}" for part in parts)
        found += [f"  {label:<{width}}{cells}{_room(one)}"]
    return found


def _room(weights: Weights) -> str:
    if weights.left is None:
        return ""
    size = f"{abs(weights.left) / 1e9:.1f}"
    return f"  fits, {size} left" if weights.fits else f"  DOES NOT FIT, {size} short"


def _bases(plan: Plan) -> list[str]:
    """What each way rests on; with the links and the numbers of tokens where it is not the same for all."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in plan.rows:
        cases.setdefault((row.way, row.basis), []).append(row)
    found = []
    for (way, basis), rows in cases.items():
        of_way = [row for row in plan.rows if row.way == way]
        parts = [
            ", ".join(dict.fromkeys(row.link for row in rows))
            if {row.link for row in rows} < {row.link for row in of_way}
            else "",
            advice.tokens_of(list(dict.fromkeys(row.tokens for row in rows)))
            if {row.tokens for row in rows} < {row.tokens for row in of_way}
            else "",
        ]
        where = "; ".join(part for part in parts if part)
        found.append(f"{way} ({where}): {basis}" if where else f"{way}: {basis}")
    return found


def _volumes(plan: Plan) -> list[str]:
    first = plan.rows[0].link
    rows = [row for row in plan.rows if row.link == first]
    title = "One GPU sends in one layer, MB (as much arrives), by tokens per GPU:"
    return _table(title, rows, lambda row: row.sent_bytes / 1e6, 3)


def _times(rows: Sequence[Row], link: str, layers: int) -> list[str]:
    over = f" over {link}" if link else ""
    title = f"Communication of one layer{over}, us, by tokens per GPU:"
    timed = [row for row in rows if row.seconds is not None]
    found = _table(title, timed or rows, lambda row: _scaled(row.seconds, 1e6), 1)
    title = f"The same for one step, ms ({layers} layers with experts):"
    if timed:
        found += _table(title, timed, lambda row: _scaled(row.seconds, 1e3 * layers), 2)
    return found


def _scaled(seconds: float | None, factor: float) -> float | None:
    return None if seconds is None else seconds * factor


def _table(title: str, rows: Sequence[Row], value: Callable[[Row], float | None], digits: int) -> list[str]:
    """One line for each way and dtype, one column for each number of tokens."""
    tokens = list(dict.fromkeys(row.tokens for row in rows))
    found: dict[str, dict[int, float | None]] = {}
    for row in rows:
        found.setdefault(f"{row.way}, {row.dtype}", {})[row.tokens] = value(row)
    width = max(map(len, found))
    shown = [title, f"  {'':<{width}}" + "".join(f"{count:>11}" for count in tokens)]
    for label, cells in found.items():
        texts = ["-" if cell is None else f"{cell:,.{digits}f}" for cell in map(cells.__getitem__, tokens)]
        shown.append(f"  {label:<{width}}" + "".join(f"{cell:>11}" for cell in texts))
    return shown


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
