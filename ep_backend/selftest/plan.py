"""Which exchanges each phase makes. Pure: all ranks know all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ep_backend import EpConfig

LAYOUTS = ("rank_major", "compact", "expert_major")
PAYLOADS: dict[str, dict[str, Any]] = {
    "bf16": {"payload": torch.bfloat16},
    "fp16": {"payload": torch.float16},
    "fp32": {"payload": torch.float32},
    "fp8 made by dispatch": {"payload": torch.bfloat16, "quantization": "fp8_block128"},
    "fp8 given": {"payload": torch.float8_e4m3fn},
    "opaque bytes": {"payload": torch.uint8, "payload_bytes": 272, "scale_bytes": 20},
}
HIDDEN = 256
TOP_K = 3
EXPERTS_PER_RANK = 4  # and one more in all: ranks with different numbers of them
# csrc/kernels/cuda/exchange.cu: other kernels are used from 20 MB of results on; odd: the last chunk is
# short. Few such exchanges: the reference takes a second for each.
BULK_TOKENS, BULK_HIDDEN = 2451, 4096
MANY_TOKENS = 301  # of CPUs, which have one kind of kernels
BULK_TWICE = ("bf16", "fp8 made by dispatch")  # the others once, by one rank alone


@dataclass(frozen=True)
class Step:
    """One exchange."""

    slots: int
    """T, the same on all ranks."""
    tokens: tuple[int, ...]
    """Of each rank, at most T."""
    seed: int
    routing: str = "uniform"
    halves: bool = False
    """By send and receive halves, not in one call each."""
    exact: bool = False
    """The experts' results are float32, whatever the rows are."""

    def __str__(self) -> str:
        calls = ", in halves" if self.halves else ""
        return f"T = {self.slots}, tokens {_short(self.tokens)}, {self.routing} routing{calls}"


@dataclass(frozen=True)
class Case:
    """One communicator and its exchanges, one after another in the same windows."""

    payload: str
    layout: str
    steps: tuple[Step, ...]

    def config(self, world: int, transport: str, timeout_s: float) -> EpConfig:
        most = max(step.slots for step in self.steps)
        return EpConfig(
            num_experts=EXPERTS_PER_RANK * world + 1,
            top_k=TOP_K,
            hidden_size=BULK_HIDDEN if most >= BULK_TOKENS else HIDDEN,
            max_tokens_per_rank=most,
            layout=self.layout,
            transport=transport,
            timeout_s=timeout_s,
            **PAYLOADS[self.payload],
        )

    def __str__(self) -> str:
        return f"layout {self.layout}, payload {self.payload}"


def local_cases(device: str) -> tuple[Case, ...]:
    """One rank: every layout and payload; one token, odd numbers, and many: on GPUs as many as other kernels
    are for, of each payload and in each layout."""

    def steps(payload: str, layout: str, seed: int) -> tuple[Step, ...]:
        bulk = device == "cuda" and (layout == LAYOUTS[0] or payload == BULK_TWICE[0])
        return _alone(BULK_TOKENS if bulk else MANY_TOKENS, payload in BULK_TWICE, seed)

    return _cases(steps)


def group_cases(world: int, *, bulk: bool = False) -> tuple[Case, ...]:
    """Several ranks: every layout and payload, ragged and empty ranks, routing to one rank. ``bulk``:
    rank-major with as many tokens as other kernels are for, too."""

    def steps(payload: str, layout: str, seed: int) -> tuple[Step, ...]:
        many = bulk and layout == LAYOUTS[0] and payload in BULK_TWICE
        return _together(world, seed, BULK_TOKENS if many else None)

    return _cases(steps)


def graph_steps(world: int, slots: int, replays: int) -> tuple[Step, ...]:
    """What replays of a graph exchange, one after another: other tokens, and other numbers of them."""
    return tuple(
        Step(slots, tuple((number * 7 + rank * 5) % (slots + 1) for rank in range(world)), seed=number + 1)
        for number in range(replays)
    )


def _cases(steps: Callable[[str, str, int], tuple[Step, ...]]) -> tuple[Case, ...]:
    return tuple(
        # Seeds far apart: no two exchanges have the same rows.
        Case(payload, layout, steps(payload, layout, 1000 * (number * len(LAYOUTS) + at) + 1))
        for number, payload in enumerate(PAYLOADS)
        for at, layout in enumerate(LAYOUTS)
    )


def _alone(most: int, twice: bool, seed: int) -> tuple[Step, ...]:
    again = (Step(most, (most - 2,), seed + 5, halves=True),) if twice else ()
    return (
        Step(1, (1,), seed),
        Step(37, (37,), seed + 1),
        Step(37, (37,), seed + 2, "sparse", halves=True),  # what stood there must not be taken for new
        Step(37, (0,), seed + 3),
        Step(most, (most,), seed + 4, exact=True),
        *again,
        Step(37, (36,), seed + 6, "skew"),
    )


def _together(world: int, seed: int, bulk: int | None) -> tuple[Step, ...]:
    def ragged(slots: int, number: int) -> tuple[int, ...]:
        return tuple(slots - (number * 5 + rank * 3) % (slots + 1) for rank in range(world))

    steps = [
        Step(1, (1,) * world, seed),
        Step(37, ragged(37, 1), seed + 1, halves=True),
        Step(37, (*ragged(37, 2)[:-1], 0), seed + 2),
        Step(37, ragged(37, 3), seed + 3, "one_rank", halves=True),
        Step(37, (37,) * world, seed + 4, "one_rank", exact=True),
        Step(37, ragged(37, 4), seed + 5, "sparse"),
        Step(64, (64,) * world, seed + 6, "skew", exact=True, halves=True),
        Step(37, (0,) * world, seed + 7),
    ]
    if bulk is not None:
        steps += [Step(bulk, (bulk,) * world, seed + 8), Step(bulk, ragged(bulk, 5), seed + 9, halves=True)]
    return (*steps, Step(37, ragged(37, 6), seed + 10))


def _short(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:8]))
    return text if len(numbers) <= 8 else f"{text}, ..."
