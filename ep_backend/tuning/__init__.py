"""``ep-backend tune`` (command.py): how many SMs, and which chunks, an exchange of a shape should use on this
machine.
"""

from __future__ import annotations

from typing import Any


def add_parser(subparsers: Any) -> None:
    """The parser of ``ep-backend tune``."""
    # Here, not above: choice.py is used without the command.
    from ep_backend.tuning import command

    command.add_parser(subparsers)
