"""Replacing an engine's functions."""

from __future__ import annotations

import sys
from collections.abc import Callable


def replace_everywhere(original: Callable, new: Callable) -> int:
    """Put ``new`` in the place of ``original`` in every module that holds it, under whatever name.

    Functions are imported by value. Returns in how many places it was.
    """
    places = 0
    for module in list(sys.modules.values()):
        held = getattr(module, "__dict__", None)
        if not isinstance(held, dict):
            continue
        for name in [name for name, value in held.items() if value is original]:
            setattr(module, name, new)
            places += 1
    return places
