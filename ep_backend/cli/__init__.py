"""The console command ``ep-backend``.

Each subcommand lives in its own module with ``add_parser(subparsers)``, which adds one parser and sets its
default ``func`` (called with the parsed arguments; returns the exit status). Only the module of the command
that was given is imported, so that ``ep-backend env`` needs no torch and a broken optional dependency breaks
only its own command.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ep_backend import __version__
from ep_backend.env import nearest
from ep_backend.errors import EpError
from ep_backend.launch.terminable import Terminated

OK, FAILED, USAGE = 0, 1, 2


class Command(NamedTuple):
    name: str
    module: str
    help: str


COMMANDS = (
    Command("doctor", "ep_backend.doctor", "say what this machine is, what will be used, and what is wrong"),
    Command("env", "ep_backend.cli.env", "show what is chosen here and why, and the variables that matter"),
    Command("plan", "ep_backend.planning", "compare EP with TP on hardware that is not at hand"),
    Command("profiles", "ep_backend.cli.profiles", "list, show and check hardware profiles"),
    Command("selftest", "ep_backend.selftest", "check that this machine exchanges rows rightly"),
    Command("bench", "ep_backend.bench", "measure dispatch and combine beside the baselines"),
    Command(
        "tune",
        "ep_backend.tuning",
        "choose how many SMs and which chunks an exchange should use on this machine",
    ),
    Command("bench-engine", "ep_backend.bench.engine", "serve a model through an engine and measure it"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns 0: done; 1: something is wrong, said in one sentence; 2: wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    status = OK
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as end:  # argparse: --help, --version, wrong usage
        return end.code if isinstance(end.code, int) else USAGE
    except BrokenPipeError:
        # The reader (head, less) has gone, which is no error; the interpreter must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    except (EpError, OSError) as error:
        print(f"ep-backend: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except Terminated as end:
        return end.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="ep-backend",
        description="Expert-parallel dispatch and combine for every machine.",
        epilog="Exit status: 0 done, 1 something is wrong (one sentence says what), 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"ep-backend {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    given = next((argument for argument in arguments if not argument.startswith("-")), None)
    for command in COMMANDS:
        if command.name == given:
            try:
                add_parser = importlib.import_module(command.module).add_parser
            except (ImportError, AttributeError) as error:
                print(f"ep-backend: the command {given!r} cannot start: {error}", file=sys.stderr)
                return FAILED
            add_parser(subparsers)
        else:
            subparsers.add_parser(command.name, help=command.help)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        of_command = subparsers.choices[args.command]
        hint = nearest(unknown[0], of_command._option_string_actions)
        of_command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return int(args.func(args) or OK)
