"""Benchmarks: ``ep-backend bench`` (exchange.py) and ``ep-backend bench-engine`` (engine.py)."""

from __future__ import annotations

from typing import Any


def add_parser(subparsers: Any) -> None:
    """The parser of ``ep-backend bench``."""
    # Here, not above: bench-engine is in this package too and needs none of it.
    from ep_backend.bench import exchange

    exchange.add_parser(subparsers)
