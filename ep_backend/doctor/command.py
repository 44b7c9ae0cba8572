"""``ep-backend doctor``: what this machine is, what will be used, what is wrong, what to type next."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ep_backend.bench import pictures
from ep_backend.bench.arguments import output_file, whole
from ep_backend.cli.choice import MAX_RANKS, cpu_ranks
from ep_backend.doctor import picture, report, shapes, text, warmup
from ep_backend.errors import EpConfigError

USAGE = 2
STDOUT = Path("-")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine is, what will be used, and what is wrong",
        description="Looks at the machine, checks peer access between all GPUs, warms NCCL up under the "
        "settings that would be used, and says what is chosen and why, what is wrong and what to type next. "
        "Looks at one machine. Nothing is changed.",
        epilog="Exit status: 0 all is well, 1 something is wrong, 2 wrong usage.",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        type=lambda name: STDOUT if name == "-" else output_file(name),
        const=STDOUT,
        metavar="FILE",
        help="one JSON object to FILE beside the text, or alone to standard output",
    )
    ranks = f"GPUs to use (all that this process may); without GPUs, processes ({cpu_ranks()})"
    parser.add_argument("--ranks", type=whole(1, MAX_RANKS), metavar="N", help=ranks)
    parser.add_argument(
        "--plot",
        type=pictures.plot_file,
        metavar="FILE",
        help="draw GPUs, links and expected times as .png or .svg (needs matplotlib)",
    )
    parser.add_argument(
        "--deadline",
        type=whole(1),
        default=int(warmup.DEADLINE_S),
        metavar="SECONDS",
        help="for NCCL's warm-up (%(default)s)",
    )
    shapes.add_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    try:
        wanted = shapes.chosen(args)
        if args.plot is not None:
            pictures.check_matplotlib()
            _check_writable("--plot", args.plot)
        if args.json not in (None, STDOUT):
            _check_writable("--json", args.json)
        found = report.collect(wanted, args.tokens, args.ranks, cpu_ranks(), args.deadline, _note)
    except EpConfigError as error:
        print(f"ep-backend doctor: {error}", file=sys.stderr)
        return USAGE
    document = json.dumps(report.as_json(found), indent=2)
    if args.json == STDOUT:
        print(document)
    else:
        print("\n".join(text.lines(found)))
    if args.json not in (None, STDOUT):
        _write(args.json, document + "\n")
    if args.plot is not None:
        picture.write(found, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    return found.status


def _check_writable(option: str, path: Path) -> None:
    """Before anything that takes long. Leaves no file that was not there. Raises EpConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or path.is_dir():  # a pipe would lose its reader
            path.open("ab").close()
        elif not os.path.lexists(path):
            path.touch()
            path.unlink()
    except OSError as error:
        raise EpConfigError(f"{option} {path} cannot be written: {error.strerror}") from error


def _write(path: Path, content: str) -> None:
    path.write_text(content)
    print(f"wrote {path}", file=sys.stderr)


def _note(words: str) -> None:
    print(f"ep-backend doctor: {words}", file=sys.stderr)
