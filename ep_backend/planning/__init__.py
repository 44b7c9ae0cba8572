"""``ep-backend plan`` (command.py): expected communication and memory on hardware that is not at hand."""

from __future__ import annotations

from typing import Any


def add_parser(subparsers: Any) -> None:
    """The parser of ``ep-backend plan``."""
    # Here, not above: model.py is used without the command.
    from ep_backend.planning import command

    command.add_parser(subparsers)
