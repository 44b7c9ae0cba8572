"""The model shapes that a report is about: those of `bench-engine --shape`, or one made of its sizes."""

from __future__ import annotations

import argparse
from typing import Any

from ep_backend.bench.arguments import list_of, whole
from ep_backend.bench.engines import models
from ep_backend.doctor.plan import Shape
from ep_backend.errors import EpConfigError
from ep_backend.planning.model import MOST_EXPERTS, Model, of_registry

DEFAULT = ("qwen3-30b-a3b", "deepseek-v3")
BOTH = "leave it out, times of bf16 and of fp8 are always shown"
TOKENS = (1, 8, 32, 128, 512, 4096)


def add_options(parser: Any) -> None:
    group = parser.add_argument_group("model shape, for the expected times")
    names = ", ".join(models.ARCHITECTURES)
    group.add_argument(
        "--shape",
        action="append",
        metavar="NAME[,layers=N]",
        help=f"one of {names}; may be given several times ({' and '.join(DEFAULT)})",
    )
    group.add_argument("--hidden", type=whole(1), metavar="N", help="elements of a row, in place of --shape")
    group.add_argument("--experts", type=whole(1), metavar="N", help="experts of all ranks together")
    group.add_argument("--topk", type=whole(1), metavar="N", help="experts of a token")
    group.add_argument("--layers", type=whole(1), metavar="N", help="MoE layers (1)")
    group.add_argument(
        "--tokens",
        type=list_of(whole(1)),
        default=TOKENS,
        metavar="N[,N...]",
        help=f"per rank ({','.join(map(str, TOKENS))})",
    )


def chosen(args: argparse.Namespace) -> tuple[Shape | Model, ...]:
    """Models of the registry, or one shape. Raises EpConfigError if the options do not go together."""
    sizes = {name: getattr(args, name) for name in ("hidden", "experts", "topk")}
    if all(size is None for size in sizes.values()):
        if args.layers is not None:
            raise EpConfigError("--layers goes with --hidden, --experts and --topk; or --shape NAME,layers=N")
        return tuple(of_registry(text, "--shape", BOTH) for text in args.shape or DEFAULT)
    if args.shape:
        raise EpConfigError("give either --shape or --hidden, --experts and --topk")
    missing = [f"--{name}" for name, size in sizes.items() if size is None]
    if missing:
        raise EpConfigError(f"a shape needs {' and '.join(missing)}, too")
    if sizes["experts"] > MOST_EXPERTS:
        raise EpConfigError(f"--experts {sizes['experts']}; at most {MOST_EXPERTS} are possible")
    if sizes["topk"] > sizes["experts"]:
        raise EpConfigError(f"--topk {sizes['topk']} is more than --experts {sizes['experts']}")
    name = f"hidden {sizes['hidden']}, {sizes['experts']} experts, top-{sizes['topk']}"
    return (Shape(name=name, layers=args.layers or 1, **sizes),)
