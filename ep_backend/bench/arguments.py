"""Types of command-line arguments: what is wrong is said before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number from `least` to `most`, or from `least` on."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least or (most is not None and int(text) > most):
            upto = "on" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} {upto}")
        return int(text)

    return parse


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse


def list_of(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Items separated by commas, each once."""
    return lambda text: tuple(dict.fromkeys(item(part.strip()) for part in text.split(",")))


def output_file(text: str) -> Path:
    """A file to write; folders that are missing will be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; a file was wanted")
    return path


def port(text: str) -> int:
    """A TCP port; "auto" is 0."""
    if text == "auto":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a port from 1 to 65535 nor auto")
    return int(text)
