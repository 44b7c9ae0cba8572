"""``ep-backend selftest``: does this machine exchange rows rightly? Compared with `ep_backend.reference`."""

from __future__ import annotations

from typing import Any


def add_parser(subparsers: Any) -> None:
    """The parser of ``ep-backend selftest``."""
    from ep_backend.selftest import command

    command.add_parser(subparsers)
