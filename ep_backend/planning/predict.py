"""Bytes and times of every way to run a model's layers on a link. Pure; words.py makes sentences of them.

The times are those of `ep_backend.doctor.plan`, which doctor uses too, and the comparison with TP is
doctor's (`ep_backend.doctor.advice`); only where the link's numbers come from is different.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ep_backend.doctor import advice, plan
from ep_backend.doctor.plan import AllReduces, Expected, Shape
from ep_backend.planning import hardware, memory
from ep_backend.planning import words as words_of
from ep_backend.planning.hardware import PLACES, Link
from ep_backend.planning.memory import Weights
from ep_backend.planning.model import Model
from ep_backend.planning.words import Row
from ep_backend.profiles import Profile
from ep_backend.transports import OF_GPUS

MODEL = "model, not measured on such hardware with this shape"
NO_NCCL = "EP over NCCL and TP left out: NCCL needs GPUs"
SHARED = f"each of more than two GPUs gets {hardware.HOST_SHARED:.2f} of the rate of host memory"
UNSURE = "measure EP over host before you choose it; it may be much slower than planned, see the link."
NOT_WEIGHED = (
    "Whether the weights fit was not looked at: with --memory GB, what one GPU has, ways that do not fit are "
    "not chosen."
)
NO_COLLECTIVE = f"no time, because {plan.COLLECTIVE}"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """``notes``: what the table of links leaves out. ``left_out``: ways that are not compared, and why.
    ``comparisons``: of EP with TP. ``advice``: sentences with numbers."""

    model: Model
    profile: str
    gpus: int
    links: tuple[Link, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    weights: tuple[Weights, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[advice.Comparison, ...]
    advice: tuple[str, ...]


def make(
    model: Model,
    profile: Profile,
    links: Sequence[Link],
    gpus: int,
    tokens: Sequence[int],
    dtypes: Sequence[str],
    memory_bytes: float | None = None,
) -> Plan:
    """Everything about ``gpus`` GPUs (at least 2) of one machine joined by each of ``links``; no links: only
    memory and bytes, or with profile cpu its own formula."""
    held = [one for dtype in dtypes for one in memory.all_ways(model, gpus, dtype, memory_bytes)]
    rows: list[Row] = []
    comparisons: list[advice.Comparison] = []
    words: list[str] = []
    each: Sequence[Link | None] = links or (None,)
    for dtype in dtypes:
        too_large = {one.way for one in held if one.dtype == dtype and one.fits is False}
        impossible = too_large | (set() if memory.can_split(model, gpus) else {f"TP {gpus}"})
        for link in each:
            found = of_link(model, profile, link, gpus, tokens, dtype)
            rows += found
            said = words_of.best(model, found, too_large)
            if link is not None:
                compared = compare(model, link, gpus, found)
                comparisons += compared
                if words_of.EP_WEIGHTS not in too_large:
                    said += advice.sentences(compared, impossible)
                    if link.unsure:
                        said = [f"{link.name}: {UNSURE}", *advice.if_host(said, "EP over host")]
            words += said
    if memory_bytes is None and any(row.seconds is not None for row in rows):
        words.append(NOT_WEIGHED)
    return Plan(
        model=model,
        profile=profile.name,
        gpus=gpus,
        links=tuple(links),
        notes=(PLACES[profile.name].note,) if links and PLACES[profile.name].note else (),
        left_out=tuple(memory.left_out(model, gpus) if profile.name != "cpu" else [NO_NCCL]),
        weights=tuple(held),
        rows=tuple(rows),
        comparisons=tuple(comparisons),
        advice=tuple(dict.fromkeys(words)),  # what does not fit does not fit on any link
    )


def of_link(
    model: Model, profile: Profile, link: Link | None, gpus: int, tokens: Sequence[int], dtype: str
) -> list[Row]:
    """All ways at all numbers of tokens."""
    return [row for count in tokens for row in _ways(model, profile, link, gpus, count, dtype)]


def _ways(model: Model, profile: Profile, link: Link | None, gpus: int, tokens: int, dtype: str) -> list[Row]:
    shape = model.shape
    away, _ = plan.rows_per_token(shape, gpus)
    there, back = plan.row_bytes(shape.hidden, dtype)
    direct = tokens * away * (there + back)
    gathered = (gpus - 1) * tokens * (there + back)
    found: list[Row] = []

    def add(way: str, sent: float, seconds: float | None, basis: str) -> None:
        found.append(
            Row(
                way=way,
                link=link.name if link else "",
                dtype=dtype,
                tokens=tokens,
                sent_bytes=sent,
                seconds=seconds,
                basis=basis,
            )
        )

    place = PLACES[profile.name]
    one_machine = gpus <= place.most_gpus and bool(place.links or profile.name == "cpu")
    transports = profile.transport.inside if one_machine else profile.transport.across
    for name in transports:
        if name == "mixed":
            continue  # no formula: planned as if no pair reached each other, which the place's note says
        if name == "hier":
            continue  # not for GPUs in this version
        if name == "host" and link is not None and link.staging is None:
            continue  # peers reach each other; host is what the profile falls back on if they do not
        # On GPUs collective sends whole blocks, T slots to every rank.
        sent = gathered if name == "collective" and profile.name != "cpu" else direct
        add(f"EP over {name}", sent, *_transport(name, shape, profile, link, gpus, tokens, dtype))
    if profile.name == "cpu":
        return found
    all_reduces = None if link is None else hardware.all_reduces_of(link, gpus)
    unknown = place.why or "no number for a network between machines is known here"
    basis = unknown if link is None else f"model from all-reduces of two GPUs ({link.all_reduces_kind})"
    if link is not None and gpus > 2 and link.all_reduces_shared < 1:
        basis += f"; {SHARED}"
    add(
        advice.OVER_NCCL,
        gathered,
        None if all_reduces is None else plan.nccl_s(shape, gpus, tokens, dtype, all_reduces),
        basis if link is None else f"{basis}; {plan.NCCL_ERROR}",
    )
    if memory.can_split(model, gpus):
        add(f"TP {gpus}", *_tensor(model, link, gpus, gpus, gpus * tokens), basis)
    if memory.halves(model, gpus):
        half = gpus // 2
        add(f"TP {half} x PP 2", *_tensor(model, link, half, gpus, gpus * tokens / 2), basis)
    return found


def _transport(
    name: str, shape: Shape, profile: Profile, link: Link | None, gpus: int, tokens: int, dtype: str
) -> tuple[float | None, str]:
    """Seconds of a round trip and what they rest on, or None and why not."""
    if name == "cpu":
        rate = gpus * hardware.CORE_COPY.value
        seconds = plan.cpu_s(shape, gpus, tokens, dtype, copy_bytes_per_s=rate, cpus=gpus)
        return seconds, f"{MODEL}; a core per rank that copies 10 GB/s"
    if name == "collective":
        return None, "no time, because it has no formula" if profile.name == "cpu" else NO_COLLECTIVE
    number = None
    if link is not None:
        number = link.stores if name == "peer" else hardware.host_rate(link, gpus)
    if link is None or number is None:
        return None, "no numbers for so many GPUs or for this link"
    numbers = {"bytes_per_s": number.value, "latency_s": link.flag.value}
    if name == "peer":
        sms = profile.sm_budget.sms if profile.sm_budget else None
        seconds = plan.peer_s(shape, gpus, tokens, dtype, **numbers, sms=sms)
    else:
        seconds = plan.host_s(shape, gpus, tokens, dtype, **numbers)
    if number.kind == "measured" and plan.checked(name, shape, gpus, tokens):
        return seconds, plan.CHECKED
    return seconds, f"{MODEL}; {SHARED}" if name == "host" and gpus > 2 else MODEL


def _tensor(
    model: Model, link: Link | None, width: int, busy: int, tokens: float
) -> tuple[float, float | None]:
    """Bytes that a GPU sends in rings, and seconds: two all-reduces of ``tokens`` rows, ``width`` GPUs of
    ``busy``."""
    _, row = plan.row_bytes(model.hidden, "bf16")
    sent = 2 * tokens * row * 2 * (width - 1) / width
    if link is None:
        return sent, None
    return sent, advice.tensor_s(model.shape, tokens, hardware.all_reduces_of(link, width, busy))


def compare(model: Model, link: Link, gpus: int, rows: Sequence[Row]) -> list[advice.Comparison]:
    """Doctor's comparison of EP over our transport, or over NCCL where that has no time, with TP."""
    ways = {f"EP over {name}" for name in OF_GPUS}
    ours = [row for row in rows if row.way in ways and row.seconds is not None]
    ours = ours or [row for row in rows if row.way == advice.OVER_NCCL]
    expected = [
        Expected(
            shape=model.name,
            tokens=row.tokens,
            dtype=row.dtype,
            way=row.way,
            seconds=row.seconds,
            basis=row.basis,
        )
        for row in ours
    ]
    in_halves: AllReduces | None = None
    if memory.halves(model, gpus):
        in_halves = hardware.all_reduces_of(link, gpus // 2, gpus)
    name = f"{ours[0].way} ({link.name}, {ours[0].dtype})" if ours else "EP"
    all_reduces = hardware.all_reduces_of(link, gpus)
    return advice.compare(model.shape, gpus, expected, all_reduces, in_halves, name)
