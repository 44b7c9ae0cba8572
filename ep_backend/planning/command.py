"""``ep-backend plan``: what a model would send and hold on hardware that is not at hand, EP against TP."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from ep_backend import env, profiles
from ep_backend.bench.arguments import list_of, one_of, whole
from ep_backend.bench.engines import models
from ep_backend.doctor.plan import DTYPES
from ep_backend.errors import EpConfigError
from ep_backend.planning import model, predict, text
from ep_backend.planning.hardware import LINKS, PLACES, Link
from ep_backend.profiles import Profile

USAGE = 2
BATCH = (1, 8, 32, 128, 512, 4096)
MOST_GPUS = 1024


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="compare EP with TP on hardware that is not at hand",
        description="Says, from formulas and a table of links (docs/planning.md), how many bytes a model's "
        "layers send and how long that takes with expert parallelism over each transport, with TP and with "
        "TP x PP, and what the weights take on each GPU. Looks at no machine.",
        epilog="Exit status: 0 done, 1 something went wrong, 2 wrong usage.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|DIR|FILE",
        help=f"{', '.join(models.ARCHITECTURES)} (NAME,layers=N for another number of layers), or a Hugging "
        "Face config.json, or the folder that has it",
    )
    parser.add_argument(
        "--gpus",
        required=True,
        type=whole(2),
        metavar="N",
        help=f"GPUs, at most {MOST_GPUS}; times only for those of one machine (8) or NVLink domain (72)",
    )
    parser.add_argument(
        "--profile", required=True, metavar="NAME", help="hardware profile (ep-backend profiles list)"
    )
    parser.add_argument(
        "--link",
        type=list_of(one_of(list(LINKS))),
        metavar="NAME[,NAME...]",
        help=f"in place of the profile's usual one (--json: ones): {', '.join(LINKS)}",
    )
    parser.add_argument(
        "--batch",
        type=list_of(whole(1)),
        default=BATCH,
        metavar="N[,N...]",
        help="tokens per GPU in one step; in decode, requests per GPU "
        f"({','.join(map(str, BATCH))}). TP works on all GPUs' tokens together",
    )
    parser.add_argument(
        "--dtype",
        type=list_of(one_of(DTYPES)),
        default=("bf16",),
        metavar="DTYPE[,DTYPE]",
        help="of weights and of dispatched rows: bf16, fp8 (bf16)",
    )
    parser.add_argument(
        "--memory", type=_gigabytes, metavar="GB", help="of one GPU, 10^9 bytes: which ways fit"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    try:
        if args.gpus > MOST_GPUS:
            raise EpConfigError(f"--gpus {args.gpus}; at most {MOST_GPUS} are possible")
        if args.profile == "auto":
            raise EpConfigError(
                "--profile auto would look at a machine, as ep-backend doctor does; here a profile is named: "
                + ", ".join(PLACES)
            )
        if profiles.is_path(args.profile):
            raise EpConfigError(
                f"--profile {args.profile}: a file is not taken here, since links are known for the shipped "
                f"profiles only: {', '.join(PLACES)}"
            )
        profile = profiles.find(args.profile, profiles.shipped())
        links = chosen(profile, args.gpus, args.link)
        if args.link is None and not args.json:
            links = links[:1]  # a person reads about one, and is told of the others
        size = None if args.memory is None else args.memory * 1e9
        found = predict.make(model.read(args.model), profile, links, args.gpus, args.batch, args.dtype, size)
    except EpConfigError as error:
        print(f"ep-backend plan: {error}", file=sys.stderr)
        return USAGE
    print(json.dumps(text.as_json(found), indent=2) if args.json else "\n".join(text.lines(found)))
    return 0


def chosen(profile: Profile, gpus: int, names: tuple[str, ...] | None) -> tuple[Link, ...]:
    """The links to plan for: none where the table has none. Raises EpConfigError for those that the profile
    cannot have."""
    place = PLACES[profile.name]
    for name in names or ():
        if name not in place.links:
            can = ", ".join(place.links) or "none"
            raise EpConfigError(
                f"--link {name}: profile {profile.name} has {can}{env.nearest(name, place.links)}"
            )
    if gpus > place.most_gpus:
        return ()
    return tuple(LINKS[name] for name in names or place.links[: place.usual])


def _gigabytes(words: str) -> float:
    try:
        found = float(words)
    except ValueError:
        found = math.nan
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"{words!r} is no number of gigabytes above 0")
    return found
