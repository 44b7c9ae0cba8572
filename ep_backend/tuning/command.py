"""``ep-backend tune``: measure, choose, remember the choice for this machine, and show why."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ep_backend import tuned
from ep_backend.bench import pictures, report
from ep_backend.bench.arguments import list_of, output_file, whole
from ep_backend.bench.exchange import DEFAULTS, DTYPES, ROUTINGS, usable_gpus
from ep_backend.cli.provenance import provenance
from ep_backend.errors import EpConfigError, EpError
from ep_backend.launch import processes
from ep_backend.launch.deadline import Deadline
from ep_backend.probe import Record, probe
from ep_backend.select import decide
from ep_backend.tuning import choice, text

if TYPE_CHECKING:
    from ep_backend.bench.workload import Settings

LAYOUTS = ("rank_major", "expert_major")  # a graph cannot hold exchanges of the other
TOKENS = (8, 128, 1024, 8192)
ITERS = 200
NOTHING_TO_TUNE = 2


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="choose how many SMs and which chunks an exchange of a shape should use on this machine",
        description="Measures exchanges of a model's shape with different numbers of SMs, then with chunks "
        "of different sizes, alone and beside matrix products, chooses one of each, and remembers them in "
        "the user's cache folder: communicators of that shape use them unless they are told otherwise "
        "(docs/tuning.md).",
        epilog="Exit status 1: something is wrong, and one sentence says what. 2: there is nothing to tune.",
    )
    add = parser.add_argument
    default = DEFAULTS["cuda"]
    add("--device", choices=tuple(DEFAULTS), default="cuda")
    add("--ranks", type=whole(1), metavar="N", help="processes, one for each GPU (all GPUs)")
    tokens = f"per rank; the choice holds up to the most of them ({','.join(map(str, TOKENS))})"
    add("--tokens", type=list_of(whole(1)), default=TOKENS, metavar="N[,N...]", help=tokens)
    add("--hidden", type=whole(1), default=default.hidden, metavar="N", help=f"({default.hidden})")
    experts = f"of all ranks together ({default.experts})"
    add("--experts", type=whole(1), default=default.experts, metavar="N", help=experts)
    add("--topk", type=whole(1), default=8, metavar="N", help="experts of a token (8)")
    add("--dtype", choices=DTYPES, default="bf16", help="of dispatched rows; fp8 gets bf16 back")
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of received rows")
    add("--routing", choices=ROUTINGS, default=ROUTINGS[0], help="how tokens choose experts")
    weight = "of what products beside an exchange lose, against the time of the exchange alone, 1 (1)"
    add("--weight", type=_weight, default=1.0, metavar="W", help=weight)
    add("--iters", type=whole(1), default=ITERS, metavar="N", help=f"exchanges of a measurement ({ITERS})")
    add("--json", type=output_file, metavar="FILE", help="write machine, versions, measurements and choice")
    plot = "write time and cost against SMs as .png or .svg (needs matplotlib)"
    add("--plot", type=pictures.plot_file, metavar="FILE", help=plot)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """0, or 2 if there is nothing to tune. Raises EpError."""
    if args.device == "cpu":
        print(
            "ep-backend: there is nothing to tune on CPUs: only exchanges on GPUs use SMs; --device cuda",
            file=sys.stderr,
        )
        return NOTHING_TO_TUNE
    if args.plot is not None:
        pictures.check_matplotlib()
    settings = settings_of(args)
    # What identifies the machine is no matter of peer access.
    record = probe("cuda", checks="never")
    if not record.gpus:
        raise EpConfigError(
            "a choice could not be remembered, as nothing tells this machine's GPUs apart (is the package "
            "nvidia-ml-py installed?)"
        )
    print(text.heading(asdict(settings)), flush=True)
    # No deadline here: each rank has one that every measurement moves on.
    outcomes = processes.run(_rank, (settings, args.weight), count=settings.ranks, speak=True)
    failure = processes.first_failure(outcomes)
    if failure is not None:
        if failure.error != "EpConfigError":
            print(failure.details, file=sys.stderr)
        raise EpError(str(failure))
    _publish(args, settings, record, outcomes[0].value)
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises EpConfigError if something cannot be."""
    from ep_backend.bench.workload import Settings

    gpus = usable_gpus(or_else="")
    if args.ranks is not None and args.ranks > gpus:
        raise EpConfigError(f"--ranks {args.ranks}, but PyTorch finds {gpus} GPUs here; each rank takes one")
    settings = Settings(
        device="cuda",
        ranks=args.ranks or gpus,
        tokens=args.tokens,
        hidden=args.hidden,
        experts=args.experts,
        topk=args.topk,
        dtype=args.dtype,
        layout=args.layout,
        routing=args.routing,
        contenders=(),
        num_sms=None,
        warmup=8,
        iters=args.iters,
        seed=0,
    )
    settings.check()
    return settings


def _rank(note: processes.Note, settings: Settings, weight: float) -> dict[str, Any]:
    """What a rank does; what it returns is the same on all of them."""
    import torch
    import torch.distributed as dist

    from ep_backend import rendezvous
    from ep_backend.transports.gpu import sms
    from ep_backend.tuning import measure

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.ranks))
    torch.cuda.set_device(dist.get_rank())
    # In this process alone: the default is measured, not what somebody has tuned or set before.
    os.environ["EP_BACKEND_NUM_SMS"] = "0"
    deadline = Deadline(DEFAULTS["cuda"].stall_s)

    def tell(line: str) -> None:
        deadline.extend()
        note(line)
        if dist.get_rank() == 0:
            print(line, flush=True)

    transport = measure.transport_of(settings)
    most = min(rendezvous.gather(None, sms(torch.device("cuda", dist.get_rank()))))
    samples = choice.search(measure.Measurement(settings, transport, tell), most, weight)
    deadline.cancel()
    return {
        "transport": transport,
        "sms": most,
        "gpus": rendezvous.gather(None, torch.cuda.get_device_name()),
        "samples": samples,
    }


def _publish(args: argparse.Namespace, settings: Settings, record: Record, measured: dict[str, Any]) -> None:
    """Choose from what was measured, remember it, and show it."""
    samples: list[choice.Sample] = measured["samples"]
    chosen = choice.final(samples, args.weight)
    transport = measured["transport"]
    entry = tuned.Entry(
        shape=tuned.Shape.of(settings.config(transport), settings.ranks),
        transport=transport,
        num_sms=chosen.num_sms,
        chunk_scale=chosen.chunk_scale,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    file = tuned.store(entry, record.gpus, record.driver, os.environ)
    document = {
        "machine": {**report.machine("cuda"), "gpus": measured["gpus"], "sms": measured["sms"]},
        "versions": {**record.versions, "python": report.python_version(), "driver": record.driver},
        **provenance(),
        "settings": asdict(settings),
        "transport": transport,
        "objective": {"formula": choice.FORMULA, "weight": args.weight, "slower_at_most": choice.SLOWER},
        "chosen": asdict(chosen),
        "candidates": [asdict(one) for one in choice.candidates(samples, args.weight)],
        "samples": [asdict(sample) for sample in samples],
        "stored": str(file),
    }
    print(text.table(document))
    print(text.chosen(document))
    if first := _goes_first(record):
        print(first)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n")
        print(f"wrote {args.json}")
    if args.plot is not None:
        text.draw(document, args.plot)
        print(f"wrote {args.plot}")


def _goes_first(record: Record) -> str:
    """A sentence where something here goes before what was tuned; else an empty text."""
    limit = record.environment.get("EP_BACKEND_NUM_SMS", "").strip()
    if limit:
        return f"EP_BACKEND_NUM_SMS={limit} is set here and goes before it."
    named = record.environment.get("EP_BACKEND_PROFILE", "auto")
    if named.strip() != "auto" and (budget := decide([record]).sms) is not None:
        return f"EP_BACKEND_PROFILE={named} has a budget of {budget} SMs, which goes before it."
    return ""


def _weight(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number from 0 to 1000")
    return value
