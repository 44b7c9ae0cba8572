"""``ep-backend doctor`` (command.py): what a machine is, what will be used, what is wrong with it."""

from __future__ import annotations

from typing import Any


def add_parser(subparsers: Any) -> None:
    """The parser of ``ep-backend doctor``."""
    # Here, not above: plan.py and others are used without the command.
    from ep_backend.doctor import command

    command.add_parser(subparsers)
