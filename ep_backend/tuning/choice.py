"""From measured times to a number of SMs and a scale of chunks: what to measure in which order, and what is
best. Pure.

With E(n, T) the time of an exchange of T tokens per rank on at most n SMs, L(n, T) the time that matrix
products lose by an exchange beside them, and w a weight, relative to the default, which is no limit and the
kernels' own chunks:

    cost(n) = geometric mean over T of  (E(n, T) + w L(n, T)) / (E(default, T) + w L(default, T))

The lowest cost wins among the numbers with which no exchange takes more than 3% longer than by default. What
is within 1% of the lowest counts as equal, and of equals the fewest SMs win. With that number, chunks of
another scale win if they cost less by more than 3%, under the same condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

FORMULA = "geometric mean over tokens of (exchange + weight * lost) / (the same by default)"
SLOWER = 1.03  # the most that an exchange may take, by default 1; and what other chunks must gain
EQUAL = 1.01
COARSE = (4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192)
SCALES = (0.25, 0.5, 2.0, 4.0)  # of chunks, against the kernels' own
GAP = 4  # SMs: nothing is looked for between numbers that are closer
ROUNDS = 3  # of the default and of what is to be chosen: one measurement may be luck
MOST_CHECKED = 3  # numbers of SMs

Sms = int | None
"""At most so many; None: no limit, the default."""


@dataclass(frozen=True)
class Sample:
    """Microseconds of one measurement: an exchange alone, and what products beside it lose by it."""

    num_sms: Sms
    tokens: int
    exchange_us: float
    lost_us: float
    chunk_scale: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """What all samples of a number of SMs and a scale of chunks mean: medians over rounds, against the
    default's."""

    num_sms: Sms
    cost: float
    slowest: float
    """Time of an exchange against the default's, for the number of tokens where it is worst."""
    rounds: int
    chunk_scale: float = 1.0

    @property
    def is_default(self) -> bool:
        return self.num_sms is None and self.chunk_scale == 1

    @property
    def allowed(self) -> bool:
        return self.slowest <= SLOWER


Measure = Callable[[Sms, float], Sequence[Sample]]
"""One round with a number of SMs and a scale of chunks: a sample for each number of tokens, always the same
ones."""


def candidates(samples: Iterable[Sample], weight: float) -> list[Candidate]:
    """All that were measured, the fewest SMs first, then the smallest chunks; with the default among them."""
    times: dict[tuple[Sms, float], dict[int, list[Sample]]] = {}
    for sample in samples:
        key = sample.num_sms, sample.chunk_scale
        times.setdefault(key, {}).setdefault(sample.tokens, []).append(sample)
    default = times[None, 1.0]
    found = []
    for (num_sms, chunk_scale), by_tokens in times.items():
        pairs = [(by_tokens[tokens], default[tokens]) for tokens in default]
        costs = [_cost(mine, weight) / _cost(theirs, weight) for mine, theirs in pairs]
        found.append(
            Candidate(
                num_sms,
                math.exp(sum(map(math.log, costs)) / len(costs)),
                max(_exchange(mine) / _exchange(theirs) for mine, theirs in pairs),
                min(len(mine) for mine, _ in pairs),
                chunk_scale,
            )
        )
    return sorted(found, key=lambda one: (_size(one), one.chunk_scale))


def choose(found: Sequence[Candidate]) -> Candidate:
    """The best number of SMs in ``found``, which holds the default, with the kernels' own chunks."""
    allowed = [one for one in found if one.allowed and one.chunk_scale == 1]
    best = min(one.cost for one in allowed)
    return min((one for one in allowed if one.cost <= best * EQUAL), key=_size)


def choose_chunks(found: Sequence[Candidate], own: Candidate) -> Candidate:
    """``own``, or what is clearly better with as many SMs and chunks of another scale."""
    better = [
        one for one in found if one.num_sms == own.num_sms and one.allowed and one.cost * SLOWER < own.cost
    ]
    return min(better, key=lambda one: one.cost, default=own)


def search(measure: Measure, most: int, weight: float) -> list[Sample]:
    """Measure in stages on GPUs of ``most`` SMs: numbers far apart; those around the best; the best and the
    default again, in turns; with the best number, chunks of other scales; and the best of these again, in
    turns with the kernels' own and the default. `final` says what they mean."""
    samples: list[Sample] = []

    def take(*numbers: Sms, chunk_scale: float = 1.0) -> None:
        for number in numbers:
            samples.extend(measure(number, chunk_scale))

    take(None, *(number for number in COARSE if number < most))
    take(*_around(candidates(samples, weight), most))
    checked: set[Sms] = set()
    while len(checked) < MOST_CHECKED:
        best = choose(candidates(samples, weight)).num_sms
        if best is None or best in checked:
            break
        checked.add(best)
        for _ in range(ROUNDS - 1):
            take(None, best)

    own = final(samples, weight)
    for scale in SCALES:
        take(own.num_sms, chunk_scale=scale)
    other = choose_chunks(candidates(samples, weight), own)
    if other is not own:
        for _ in range(ROUNDS - 1):
            take(*dict.fromkeys((None, own.num_sms)))
            take(own.num_sms, chunk_scale=other.chunk_scale)
    return samples


def final(samples: Sequence[Sample], weight: float) -> Candidate:
    """What to use after `search`: the best of what was measured often enough, else the default."""
    found = [one for one in candidates(samples, weight) if one.is_default or one.rounds >= ROUNDS]
    return choose_chunks(found, choose(found))


def _around(found: Sequence[Candidate], most: int) -> list[int]:
    """Numbers half-way between the best and its neighbours; ``found`` has no chunks of other scales yet."""
    numbers = [most if one.num_sms is None else one.num_sms for one in found]
    place = found.index(choose(found))
    neighbours = [(numbers[i], numbers[i + 1]) for i in (place - 1, place) if 0 <= i < len(numbers) - 1]
    return [(low + high) // 2 for low, high in neighbours if high - low > GAP]


def _cost(samples: Sequence[Sample], weight: float) -> float:
    # Noise can make products beside an exchange look faster than alone.
    return _exchange(samples) + weight * max(0.0, median(sample.lost_us for sample in samples))


def _exchange(samples: Sequence[Sample]) -> float:
    return median(sample.exchange_us for sample in samples)


def _size(candidate: Candidate) -> float:
    return math.inf if candidate.num_sms is None else candidate.num_sms
