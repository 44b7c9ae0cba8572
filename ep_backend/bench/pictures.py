"""What the pictures of `--plot` have in common; the rest is beside what they show."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from ep_backend.bench.arguments import output_file
from ep_backend.errors import EpConfigError

SUFFIXES = (".png", ".svg")


def plot_file(text: str) -> Path:
    """The type of `--plot`: a file whose suffix says which format to write."""
    path = output_file(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(SUFFIXES)}")
    return path


def check_matplotlib() -> None:
    """EpConfigError if this Python has no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EpConfigError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")


def figure(title: str) -> Any:
    """An empty matplotlib Figure for panels side by side."""
    # Not pyplot: it would choose a window system.
    from matplotlib.figure import Figure

    made = Figure(figsize=(10, 4), layout="constrained")
    made.suptitle(title)
    return made


def save(made: Any, columns: int, path: Path) -> None:
    """Write ``made`` with one legend, that of its last panel, in ``columns`` below all."""
    handles = made.axes[-1].get_legend_handles_labels()
    made.legend(*handles, loc="outside lower center", ncols=columns)
    write(made, path)


def write(made: Any, path: Path) -> None:
    """Write ``made`` as it is; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)
