"""What to make of planned times: which way to choose, and what transport host could gain. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from ep_backend.doctor import advice
from ep_backend.planning.model import Model

EP_WEIGHTS = "EP + DP"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One layer, one way. ``sent_bytes``: by one GPU; as many arrive. ``seconds`` None: see ``basis``."""

    way: str
    link: str
    dtype: str
    tokens: int  # per GPU
    sent_bytes: float
    seconds: float | None
    basis: str


def best(model: Model, rows: Sequence[Row], too_large: Collection[str]) -> list[str]:
    """Which way sends its bytes soonest, of those whose weights fit, by numbers of tokens. Ways that are
    about as fast (`advice.equal`) are named together."""
    timed = [row for row in rows if row.seconds is not None]
    if len({row.way for row in timed}) < 2:
        return ["No choice: fewer than two ways have a time here; what each row rests on says why."]
    fit = [row for row in timed if _split(row.way) not in too_large]
    if not fit:
        cure = "More GPUs, a smaller dtype, or more memory."
        return [f"No choice: the weights in {rows[0].dtype} do not fit in any way. {cure}"]
    winners: dict[tuple[str, ...], list[list[Row]]] = {}
    for tokens in dict.fromkeys(row.tokens for row in fit):
        ranking = sorted((row for row in fit if row.tokens == tokens), key=_seconds)
        first, *others = ranking
        near = [row.way for row in others if advice.equal(first.way, _seconds(first), _seconds(row))]
        winners.setdefault((first.way, *near), []).append(ranking)
    return [_choice(model, ways, cases) for ways, cases in winners.items()]


def _choice(model: Model, ways: Sequence[str], cases: Sequence[Sequence[Row]]) -> str:
    """``cases``: rankings, one for each number of tokens at which ``ways`` come first."""
    ranking = max(cases, key=lambda case: _lead(case, len(ways)))
    first = ranking[0]
    where = ", ".join(part for part in (first.link, first.dtype) if part)
    at = f"at {advice.tokens_of([case[0].tokens for case in cases])} per GPU ({where})"
    if len(ways) == 1:
        others = ", ".join(f"{row.way} {_step(model, row)}" for row in ranking[1:]) or "no other way fits"
        return (
            f"Choose {first.way} {at}: at {first.tokens} its communication takes {_step(model, first)} per "
            f"step; {others}."
        )
    every = ", ".join(f"{row.way} {_step(model, row)}" for row in ranking)
    return (
        f"{' or '.join(ways)}, about equal ({advice.apart(first.way)}) {at}: at {first.tokens} communication "
        f"takes per step: {every}."
    )


def _lead(ranking: Sequence[Row], ways: int) -> float:
    """By what factor the first is faster than the fastest that is not among the first ``ways``."""
    return _seconds(ranking[ways]) / _seconds(ranking[0]) if len(ranking) > ways else 0.0


def _split(way: str) -> str:
    """How the weights lie."""
    return EP_WEIGHTS if way.startswith("EP") else way


def _seconds(row: Row) -> float:
    """Of a row that has a time."""
    return row.seconds or 0.0


def _step(model: Model, row: Row) -> str:
    seconds = _seconds(row)
    return f"{seconds * model.moe_layers * 1e3:.2f} ms ({model.moe_layers} x {seconds * 1e6:.1f} us)"
