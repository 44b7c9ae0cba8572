"""``ep-backend bench``: the time of dispatch + combine of every transport, beside plain collectives."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ep_backend import env
from ep_backend.bench import curves, pictures, report
from ep_backend.bench.arguments import list_of, one_of, output_file, whole
from ep_backend.cli.choice import MAX_RANKS
from ep_backend.cli.provenance import provenance
from ep_backend.env import nearest
from ep_backend.errors import EpConfigError, EpError
from ep_backend.launch import processes
from ep_backend.launch.deadline import Deadline
from ep_backend.transports import OF_GPUS

if TYPE_CHECKING:
    from ep_backend.bench.workload import Settings

# Not from workload.py: --help needs no torch.
DTYPES = ("bf16", "fp16", "fp32", "fp8")
LAYOUTS = ("rank_major", "compact", "expert_major")
ROUTINGS = ("uniform", "zipf", "one_rank")
CPU_RANKS = 4


class Defaults(NamedTuple):
    """A case worth measuring, and how long a rank may make no progress."""

    tokens: tuple[int, ...]
    hidden: int
    experts: int
    iters: int
    stall_s: float


DEFAULTS = {
    "cpu": Defaults((1, 8, 64, 512), hidden=2048, experts=64, iters=100, stall_s=600.0),
    "cuda": Defaults(
        (1, 8, 32, 64, 128, 256, 512, 1024, 4096), hidden=7168, experts=256, iters=400, stall_s=180.0
    ),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure dispatch and combine beside the baselines",
        description="Starts the ranks by itself, or joins those of torchrun; times dispatch + combine of "
        "every transport in turn with its peers, as all-gather + reduce-scatter, and checks every result.",
        epilog="Exit status 1: a result was wrong, or something else was, and one sentence says what.",
    )
    add = parser.add_argument
    cpu, cuda = DEFAULTS["cpu"], DEFAULTS["cuda"]
    some, few = (",".join(map(str, defaults.tokens)) for defaults in (cuda, cpu))
    add("--device", choices=tuple(DEFAULTS), default="cpu")
    ranks = f"processes ({CPU_RANKS}, on cuda one for each GPU; those of torchrun)"
    add("--ranks", type=whole(1, MAX_RANKS), metavar="N", help=ranks)
    add("--tokens", type=list_of(whole(1)), metavar="N[,N...]", help=f"per rank ({few}; on cuda {some})")
    hidden = f"elements of a row ({cpu.hidden}; on cuda {cuda.hidden})"
    add("--hidden", type=whole(1), metavar="N", help=hidden)
    experts = f"of all ranks together ({cpu.experts}; on cuda {cuda.experts})"
    add("--experts", type=whole(1), metavar="N", help=experts)
    add("--topk", type=whole(1), default=8, metavar="N", help="experts of a token")
    dtypes = f"of dispatched rows: {', '.join(DTYPES)}; fp8 gets bf16 back"
    add("--dtype", type=list_of(one_of(DTYPES)), default=("bf16",), metavar="A[,B...]", help=dtypes)
    add("--layout", choices=LAYOUTS, default="rank_major", help="of received rows")
    transports = "what to measure (EP_BACKEND_TRANSPORT if that is set, or what is usual here)"
    add("--transports", type=list_of(str), metavar="A[,B...]", help=transports)
    peers = "what others do, to compare with (nccl, on cpu gloo); also nccl_all_to_all, on cpu "
    peers += "gloo_all_to_all; on cuda flashinfer; or none"
    add("--peers", type=list_of(str), metavar="A[,B...]", help=peers)
    sms = "SMs that peer, mixed and host may use (as a communicator chooses); each number is measured"
    add("--num-sms", type=list_of(whole(1)), metavar="N[,N...]", help=sms)
    add("--routing", choices=ROUTINGS, default="uniform", help="how tokens choose experts")
    add("--warmup", type=whole(0), default=8, metavar="N", help="exchanges before the timed ones")
    iters = f"timed exchanges of each case ({cpu.iters}; on cuda {cuda.iters})"
    add("--iters", type=whole(1), metavar="N", help=iters)
    add("--seed", type=whole(0), default=0, metavar="N")
    add("--json", type=output_file, metavar="FILE", help="write machine, versions, command and results")
    plot = "write latency against tokens as .png or .svg (needs matplotlib)"
    add("--plot", type=pictures.plot_file, metavar="FILE", help=plot)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 if a result was wrong. Raises EpError."""
    joins = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if args.plot is not None:
        pictures.check_matplotlib()
    runs = settings_of(args, int(os.environ["WORLD_SIZE"]) if joins else None)
    explicit = frozenset([*asked_transports(args)[0], *(args.peers or ())])
    measured = _join(runs, explicit) if joins else _spawn(runs, explicit)
    if not joins or os.environ["RANK"] == "0":
        _publish(measured, args.json, args.plot)
    return 0 if all(result["correct"] for result in measured["results"]) else 1


def settings_of(args: argparse.Namespace, world: int | None) -> tuple[Settings, ...]:
    """One for each dtype and number of SMs. ``world``: the number of ranks that are there already.

    Raises EpConfigError if something cannot be.
    """
    from ep_backend.bench import contenders
    from ep_backend.bench.workload import Settings

    if world is not None and args.ranks not in (None, world):
        raise EpConfigError(f"--ranks {args.ranks}, but {world} ranks have been started")
    ranks = world or args.ranks
    if args.device == "cuda":
        gpus = usable_gpus()
        if world is None and ranks is not None and ranks > gpus:
            raise EpConfigError(f"--ranks {ranks}, but PyTorch finds {gpus} GPUs here; each rank takes one")
        ranks = ranks or gpus
    known, default = contenders.names(args.device), DEFAULTS[args.device]
    asked, asked_by = asked_transports(args)
    for name in asked:
        if name not in known:
            raise EpConfigError(f"{asked_by}: {name!r} is none of {', '.join(known)}{nearest(name, known)}")
    if args.device == "cuda" and not asked and "peer" not in known:
        raise EpConfigError(
            "this build of ep_backend has no CUDA kernels, so transport peer is not there; build it with "
            f"EP_BACKEND_CUDA=1, or choose with --transports from {', '.join(known)}"
        )
    several = world is not None and world > int(os.environ.get("LOCAL_WORLD_SIZE", world))
    chosen = asked or contenders.defaults(args.device, several_machines=several)
    peers = _peers(args.peers, contenders.PEERS[args.device])
    if args.num_sms is not None and not OF_GPUS & set(chosen):
        raise EpConfigError("--num-sms is for transports peer, mixed and host, which are not to be measured")
    common = Settings(
        device=args.device,
        ranks=ranks or CPU_RANKS,
        tokens=args.tokens or default.tokens,
        hidden=args.hidden or default.hidden,
        experts=args.experts or default.experts,
        topk=args.topk,
        dtype=args.dtype[0],
        layout=args.layout,
        routing=args.routing,
        contenders=(*chosen, *peers),
        num_sms=None,
        warmup=args.warmup,
        iters=args.iters or default.iters,
        seed=args.seed,
    )
    runs = []
    for dtype in args.dtype:
        for number, num_sms in enumerate(args.num_sms or (None,)):
            # The others do not depend on it. One run each, as communicators share out a GPU's SMs.
            names = common.contenders if number == 0 else tuple(name for name in chosen if name in OF_GPUS)
            runs.append(dataclasses.replace(common, dtype=dtype, num_sms=num_sms, contenders=names))
            runs[-1].check()
    return tuple(runs)


def asked_transports(args: argparse.Namespace) -> tuple[tuple[str, ...], str]:
    """Those of our transports that the caller names, none if nobody does, and how."""
    if args.transports is not None:
        return args.transports, "--transports"
    wish = env.get("EP_BACKEND_TRANSPORT")
    return () if wish == "auto" else (wish,), "EP_BACKEND_TRANSPORT"


def _peers(asked: tuple[str, ...] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """What others do that is measured too; the first that is known, unless asked for."""
    if asked is None:
        return known[:1]
    for name in asked:
        if name not in (*known, "none"):
            choices = (*known, "none")
            raise EpConfigError(f"--peers: {name!r} is none of {', '.join(choices)}{nearest(name, choices)}")
    if "none" in asked and len(asked) > 1:
        raise EpConfigError(f"--peers {','.join(asked)}: none, or some")
    return () if asked == ("none",) else asked


def usable_gpus(or_else: str = "; --device cpu measures CPUs") -> int:
    """How many GPUs this process can use, at least one. Raises EpConfigError, which ends with ``or_else``."""
    import torch

    found = torch.cuda.device_count()
    if not found:
        raise EpConfigError(f"--device cuda, but PyTorch {torch.__version__} finds no GPU here{or_else}")
    return found


def _join(runs: Sequence[Settings], explicit: frozenset[str]) -> dict[str, Any]:
    """Be a rank of a group that somebody else starts, as torchrun says it in the environment."""
    import torch.distributed as dist

    gpu = None
    if runs[0].device == "cuda":
        gpu = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if gpu >= (gpus := usable_gpus()):
            raise EpConfigError(f"local rank {gpu}, but PyTorch finds {gpus} GPUs here; each rank takes one")
    dist.init_process_group("gloo")
    try:
        return _rank(runs, explicit, gpu)
    finally:
        dist.destroy_process_group()


def _spawn(runs: Sequence[Settings], explicit: frozenset[str]) -> dict[str, Any]:
    """Start the ranks, wait for them, end those that are left."""
    console, settings = Console(), runs[0]
    dtypes = ", ".join(dict.fromkeys(run.dtype for run in runs))
    console.print(
        f"starting {settings.ranks} rank{'s' * (settings.ranks != 1)} on {settings.device}: "
        f"hidden {settings.hidden}, {settings.experts} experts, "
        f"top-{settings.topk}, {dtypes}, {settings.layout}, {settings.routing} routing",
        highlight=False,
    )
    # No deadline here: each rank has one that every sign of progress moves on.
    outcomes = processes.run(_spawned, (runs, explicit), count=settings.ranks, speak=True)
    failure = processes.first_failure(outcomes)
    if failure is not None:
        if failure.error != "EpConfigError":
            print(failure.details, file=sys.stderr)
        raise EpError(str(failure))
    measured: dict[str, Any] = outcomes[0].value
    return measured


def _spawned(note: processes.Note, runs: Sequence[Settings], explicit: frozenset[str]) -> dict[str, Any]:
    import torch.distributed as dist

    return _rank(runs, explicit, dist.get_rank() if runs[0].device == "cuda" else None)


def _rank(runs: Sequence[Settings], explicit: frozenset[str], gpu: int | None) -> dict[str, Any]:
    """``gpu``: number of the one that this rank uses."""
    import torch
    import torch.distributed as dist

    from ep_backend.bench import timing

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // runs[0].ranks))
    if gpu is not None:
        torch.cuda.set_device(gpu)
    console, speaks = Console(), dist.get_rank() == 0
    deadline = Deadline(DEFAULTS[runs[0].device].stall_s)
    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    # Off a terminal the notes alone show how far it is.
    quiet = not speaks or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("measuring", total=1.0)

        def note(text: str) -> None:
            deadline.extend()
            if speaks:
                console.print(text, highlight=False, soft_wrap=True)

        def step(share: float) -> None:
            deadline.extend()
            progress.update(task, completed=share)

        try:
            return timing.measure(runs, explicit=explicit, note=note, step=step)
        finally:
            deadline.cancel()


def _publish(measured: dict[str, Any], file: Path | None, picture: Path | None) -> None:
    from ep_backend.bench.contenders import BASELINE

    document = {
        "machine": measured["machine"],
        "versions": measured["versions"],
        **provenance(),
        "environment": measured["environment"],
        "settings": measured["settings"],
        "results": measured["results"],
    }
    wrong = report.problems(document)
    if wrong:
        raise EpError(f"the results do not keep to their own schema: {wrong[0]}")
    console = Console()
    if not console.is_terminal:
        console.width = 110
    console.print(report.table(document, BASELINE[document["settings"]["device"]]))
    for line in report.remarks(document):
        console.print(line, highlight=False)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"wrote {file}", highlight=False)
    if picture is not None:
        curves.write(document, picture)
        console.print(f"wrote {picture}", highlight=False)
