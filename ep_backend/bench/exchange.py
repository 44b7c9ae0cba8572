"""``ep-backend bench``: the time of dispatch + combine of every transport, beside plain collectives."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ep_backend.bench import report
from ep_backend.bench.arguments import list_of, output_file, whole
from ep_backend.bench.terminable import terminable
from ep_backend.env import nearest
from ep_backend.errors import EpConfigError, EpError

if TYPE_CHECKING:
    from ep_backend.bench.workload import Settings

# Not from workload.py: --help needs no torch.
DTYPES = ("bf16", "fp16", "fp32", "fp8")
LAYOUTS = ("rank_major", "compact", "expert_major")
ROUTINGS = ("uniform", "zipf", "one_rank")
DEFAULT_RANKS = 4
END_GRACE_S = 5.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure dispatch and combine beside the baselines",
        description="Starts the ranks by itself, or joins those of torchrun; times dispatch + combine of "
        "every transport in turn with all-gather + reduce-scatter, and checks every result.",
        epilog="Exit status 1: a result was wrong, or something else was, and one sentence says what.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu",), default="cpu")
    add("--ranks", type=whole(1), metavar="N", help=f"processes ({DEFAULT_RANKS}; those of torchrun)")
    add("--tokens", type=list_of(whole(1)), default=(1, 8, 64, 512), metavar="N[,N...]", help="per rank")
    add("--hidden", type=whole(1), default=2048, metavar="N", help="elements of a row")
    add("--experts", type=whole(1), default=64, metavar="N", help="of all ranks together")
    add("--topk", type=whole(1), default=8, metavar="N", help="experts of a token")
    add("--dtype", choices=DTYPES, default="bf16", help="of dispatched rows; fp8 gets bf16 back")
    add("--layout", choices=LAYOUTS, default="rank_major", help="of received rows")
    add("--transports", type=list_of(str), metavar="A[,B...]", help="what to measure (all that works here)")
    add("--routing", choices=ROUTINGS, default="uniform", help="how tokens choose experts")
    add("--warmup", type=whole(0), default=8, metavar="N", help="exchanges before the timed ones")
    add("--iters", type=whole(1), default=100, metavar="N", help="timed exchanges of each case")
    add("--seed", type=whole(0), default=0, metavar="N")
    add("--json", type=output_file, metavar="FILE", help="write machine, versions, command and results")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 if a result was wrong. Raises EpError."""
    joins = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    settings = settings_of(args, int(os.environ["WORLD_SIZE"]) if joins else None)
    explicit = args.transports is not None
    measured = _join(settings, explicit) if joins else _spawn(settings, explicit)
    if not joins or os.environ["RANK"] == "0":
        _publish(measured, args.json)
    return 0 if all(result["correct"] for result in measured["results"]) else 1


def settings_of(args: argparse.Namespace, world: int | None) -> Settings:
    """``world``: the number of ranks that are there already. Raises EpConfigError if something cannot be."""
    from ep_backend.bench.contenders import MAKERS
    from ep_backend.bench.workload import Settings

    if world is not None and args.ranks not in (None, world):
        raise EpConfigError(f"--ranks {args.ranks}, but {world} ranks have been started")
    contenders = args.transports or tuple(MAKERS)
    for name in contenders:
        if name not in MAKERS:
            raise EpConfigError(
                f"--transports: {name!r} is none of {', '.join(MAKERS)}{nearest(name, MAKERS)}"
            )
    settings = Settings(
        device=args.device,
        ranks=world or args.ranks or DEFAULT_RANKS,
        tokens=args.tokens,
        hidden=args.hidden,
        experts=args.experts,
        topk=args.topk,
        dtype=args.dtype,
        layout=args.layout,
        routing=args.routing,
        contenders=contenders,
        warmup=args.warmup,
        iters=args.iters,
        seed=args.seed,
    )
    settings.check()
    return settings


def _join(settings: Settings, explicit: bool) -> dict[str, Any]:
    """Be a rank of a group that somebody else starts, as torchrun says it in the environment."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return _rank(settings, explicit)
    finally:
        dist.destroy_process_group()


def _spawn(settings: Settings, explicit: bool) -> dict[str, Any]:
    """Start the ranks, wait for them, end those that are left."""
    import torch.multiprocessing as mp

    console = Console()
    console.print(
        f"starting {settings.ranks} ranks on {settings.device}: hidden {settings.hidden}, {settings.experts} "
        f"experts, top-{settings.topk}, {settings.dtype}, {settings.layout}, {settings.routing} routing",
        highlight=False,
    )
    with tempfile.TemporaryDirectory(prefix="ep-backend-bench-") as folder, terminable():
        context = mp.start_processes(
            _spawned,
            (settings, explicit, folder),
            settings.ranks,
            join=False,
            daemon=True,
            start_method="spawn",
        )
        try:
            while not context.join():
                pass
        except mp.ProcessRaisedException as error:
            lines = str(error).strip().splitlines()
            if "EpConfigError" not in lines[-1]:
                print(error, file=sys.stderr)
            raise EpError(lines[-1]) from None
        except mp.ProcessExitedException as error:
            raise EpError(f"a rank ended before its time: {error}") from None
        finally:
            for process in context.processes:
                process.terminate()
            for process in context.processes:
                process.join(END_GRACE_S)
                process.kill()
        measured: dict[str, Any] = json.loads((Path(folder) / "measured.json").read_text())
        return measured


def _spawned(rank: int, settings: Settings, explicit: bool, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=settings.ranks
    )
    measured = _rank(settings, explicit)
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(measured))
    dist.barrier()  # nobody closes its sockets while others still use them
    dist.destroy_process_group()


def _rank(settings: Settings, explicit: bool) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from ep_backend.bench import timing

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.ranks))
    if dist.get_rank() != 0:
        return timing.measure(settings, explicit=explicit, note=lambda text: None, step=lambda share: None)
    console = Console()
    columns = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    # Off a terminal the notes alone show how far it is.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=1.0)
        return timing.measure(
            settings,
            explicit=explicit,
            note=lambda text: console.print(text, highlight=False),
            step=lambda share: progress.update(task, completed=share),
        )


def _publish(measured: dict[str, Any], file: Path | None) -> None:
    from ep_backend.bench.contenders import BASELINE

    document = {
        "machine": measured["machine"],
        "versions": measured["versions"],
        "command": shlex.join(["ep-backend", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": measured["settings"],
        "results": measured["results"],
    }
    wrong = report.problems(document)
    if wrong:
        raise EpError(f"the results do not keep to their own schema: {wrong[0]}")
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(report.table(document, BASELINE))
    for line in report.remarks(document):
        console.print(line, highlight=False)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"wrote {file}", highlight=False)
