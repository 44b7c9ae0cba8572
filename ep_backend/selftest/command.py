"""The command: which phases run with what, in order, up to the first that fails."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from ep_backend import env, profiles
from ep_backend.bench.arguments import whole
from ep_backend.cli.choice import MAX_RANKS, cpu_ranks
from ep_backend.errors import EpConfigError

if TYPE_CHECKING:
    from ep_backend.selftest.network import Meeting
    from ep_backend.selftest.phases import Options, Report

# Not from phases.py: --help needs no torch.
PHASES = ("local", "node", "graph", "network")
FAILED, USAGE = 1, 2
DEADLINE_S = 120
LEAST_DEADLINE_S = 5  # starting a rank takes some seconds


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "selftest",
        help="check that this machine exchanges rows rightly, phase by phase",
        description="Exchanges rows in four phases and compares every bit with the reference: local (the "
        "kernels on one device), node (all ranks of this machine), graph (CUDA graphs) and network (several "
        "machines, under torchrun). Stops at the first phase that fails and says what to do.",
        epilog="Exit status: 0 all that ran passed, 1 something failed or nothing could run, 2 wrong usage.",
    )
    add = parser.add_argument
    add("--phase", choices=PHASES, help="only this one (all, in order)")
    ranks = "of node and graph (one for each GPU; on cpu 2, or 4)"
    add("--ranks", type=whole(1, MAX_RANKS), metavar="N", help=ranks)
    add("--device", choices=("cpu", "cuda"), help="what computes (cuda where PyTorch finds a GPU)")
    transports = ("auto", *profiles.TRANSPORTS)
    add("--transport", choices=transports, help="use this one only (EP_BACKEND_TRANSPORT, else all)")
    add("--json", action="store_true", help="print one JSON object")
    deadline = f"for each group of ranks that is started ({DEADLINE_S})"
    add("--deadline", type=whole(LEAST_DEADLINE_S), default=DEADLINE_S, metavar="SECONDS", help=deadline)
    parser.set_defaults(func=run)


class _UsageError(Exception):
    """What was asked for makes no sense here."""


def run(args: argparse.Namespace) -> int:
    """0, 1 or 2. Raises EpError if something outside the phases is wrong."""
    from ep_backend.selftest import network, phases

    joined = network.started_by_others()
    try:
        _check_environment()
        options = _options(args, joined)
        _check_choice(args, options, joined)
    except EpConfigError:
        if joined and int(os.environ.get("LOCAL_RANK", "0")):
            return FAILED  # the first rank of the machine finds the same, and says so
        raise
    except _UsageError as error:
        print(f"ep-backend selftest: {error}", file=sys.stderr)
        return USAGE
    if not joined:
        alone = [partial(phase, options) for phase in (phases.local, phases.node, phases.graph)]
        why = f"needs several machines; type on each of them: {network.how_to_start(options)}"
        return _print(args, options, [*alone, partial(phases.skipped, "network", why)], sys.stdout)
    with _own_output() as own, network.meeting(options) as meeting:
        if meeting.rank != 0:
            return 0 if meeting.run().status == "passed" else FAILED
        why = "starts its own ranks: run ep-backend selftest without torchrun"
        others = [partial(phases.skipped, phase, why) for phase in PHASES[:-1]]
        return _print(args, options, [*others, partial(_network, meeting)], own)


def _check_environment() -> None:
    """Raise EpConfigError if a variable of ours has a wrong value, or a name that means nothing."""
    wrong = [*env.wrong_values(), *env.misspelt()]
    if wrong:
        raise EpConfigError("; ".join(wrong))


def _check_choice(args: argparse.Namespace, options: Options, joined: bool) -> None:
    """Raise EpConfigError if nothing can be chosen here, before ranks find that out one by one."""
    from ep_backend.selftest import phases

    # What other machines bring along is for the phases to find, and one rank needs no other.
    ranks = 1 if joined or args.phase in ("local", "network") else options.ranks
    try:
        phases.decision(replace(options, ranks=ranks))
    except EpConfigError as error:
        profile = env.get("EP_BACKEND_PROFILE")
        if profile == "auto":
            raise
        raise EpConfigError(f"nothing can be chosen with EP_BACKEND_PROFILE={profile}: {error}") from error


def _options(args: argparse.Namespace, joined: bool) -> Options:
    import torch

    from ep_backend.selftest.phases import Options

    gpus = torch.cuda.device_count()
    device = args.device or ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        raise EpConfigError(f"--device cuda, but PyTorch {torch.__version__} finds no GPU here")
    if joined:
        world = int(os.environ["WORLD_SIZE"])
        if args.ranks not in (None, world):
            raise _UsageError(f"--ranks {args.ranks}, but {world} ranks have been started")
        if args.phase not in (None, "network"):
            raise _UsageError(f"phase {args.phase} starts its own ranks: run it without torchrun")
        ranks = world
    else:
        ranks = args.ranks or (gpus if device == "cuda" else cpu_ranks())
        if device == "cuda" and ranks > gpus:
            raise _UsageError(f"--ranks {ranks}, but PyTorch finds {gpus} GPUs here; each rank takes one")
    return Options(
        device=device,
        ranks=ranks,
        transport=args.transport or env.get("EP_BACKEND_TRANSPORT"),
        asked_by="--transport" if args.transport else "EP_BACKEND_TRANSPORT",
        deadline_s=float(args.deadline),
        timeout_s=float(env.get("EP_BACKEND_TIMEOUT_S")),
    )


@contextmanager
def _own_output() -> Iterator[TextIO]:
    """Standard output for us alone: what libraries print in this process goes to standard error."""
    sys.stdout.flush()
    saved = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        with os.fdopen(os.dup(saved), "w") as own:
            yield own
    finally:
        os.dup2(saved, sys.stdout.fileno())
        os.close(saved)


def _network(meeting: Meeting) -> Report:
    try:
        return meeting.run()
    except KeyboardInterrupt:
        where = f"phase network was ended from outside, at: {meeting.at}"
        print(f"ep-backend: {where}; torchrun says which rank ended first", file=sys.stderr)
        raise


def _print(
    args: argparse.Namespace, options: Options, acts: Sequence[Callable[[], Report]], out: TextIO
) -> int:
    """Run the phases that are wanted, say on ``out`` what became of them; the exit status. ``acts``: of
    PHASES."""
    from ep_backend.probe import probe
    from ep_backend.selftest import phases, report

    record = probe("cpu" if options.device == "cpu" else None)
    if not args.json:
        print("\n".join(report.heading(record, options)), file=out, flush=True)
    reports: list[Report] = []
    for phase, act in zip(PHASES, acts, strict=True):
        if args.phase not in (None, phase):
            continue
        if any(before.status == "failed" for before in reports):
            reports.append(phases.Report(phase=phase, status="not run", why="an earlier phase failed"))
        else:
            if not args.json and out.isatty():
                print(f"{phase:8} ...", end="\r", file=out, flush=True)
            reports.append(act())
        if not args.json:
            print("\n".join(report.lines(reports[-1])), file=out, flush=True)
    if args.json:
        print(json.dumps(report.document(reports, record, options), indent=2), file=out, flush=True)
    else:
        print(report.last_line(reports), file=out, flush=True)
    statuses = {one.status for one in reports}
    return 0 if "passed" in statuses and "failed" not in statuses else FAILED
