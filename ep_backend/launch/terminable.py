"""Commands that start processes must stop them however they end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """A signal that ends us as Ctrl-C does. ``status``: what a shell shows of a process that it kills."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and a lost terminal end us as Ctrl-C does: through every `with` that stops something."""

    def interrupt(number: int, frame: Any) -> None:
        raise Terminated(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
