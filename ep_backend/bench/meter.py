"""What the clocks of CPUs (cpus.py) and of GPUs (gpus.py) have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ep_backend.bench import report
from ep_backend.bench.contenders import Contender
from ep_backend.bench.workload import Inputs, LeastBytes, Settings

INPUT_SETS = 2  # consecutive exchanges must differ, or old rows in a window would pass for new ones
BURST = 4  # timed exchanges of a contender before the next one's turn
Step = Callable[[float], None]
"""Is told the share of the work that is done."""


@dataclass
class Times:
    """What one contender took on this rank, and whether every timed result was right."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in report.PHASES})
    correct: bool = True
    bytes_per_s: float | None = None
    """Of `LeastBytes`, that the machine can move on the way that the contender takes; None: not known."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a reader of the results should know about how it was timed."""


class Meter(Protocol):
    """Times the contenders of a case in turns. All methods are collective over the default group."""

    def machine(self) -> dict[str, Any]:
        """What was found out about the machine beside the exchanges."""

    def case(
        self,
        settings: Settings,
        contenders: Sequence[Contender],
        inputs: Sequence[Inputs],
        least: LeastBytes,
        step: Step,
    ) -> list[Times]:
        """Of each contender. They have been verified."""


def divide(count: int, size: int) -> int:
    """How many groups of ``size`` it takes for ``count``."""
    return -(-count // size)
