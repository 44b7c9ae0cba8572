"""`ep-backend bench-engine`: serve a model through an engine, once per all-to-all backend, and measure it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from ep_backend.bench import report
from ep_backend.bench.arguments import list_of, output_file, port, whole
from ep_backend.bench.engines import base, models, plot, sglang, summary, vllm
from ep_backend.cli.provenance import provenance
from ep_backend.errors import EpConfigError, EpError
from ep_backend.launch.terminable import terminable

ENGINES: dict[str, Any] = {"vllm": vllm, "sglang": sglang}  # modules with the same functions
SHOWN_COMPLETIONS = 3
COMPLETION_TOKENS = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Default amount of work, small enough for the machine."""

    concurrency: tuple[int, ...]
    prompts_per_client: int
    input_len: int
    output_len: int


SIZES = {
    "cpu": Size(concurrency=(4,), prompts_per_client=4, input_len=32, output_len=32),
    "cuda": Size(concurrency=(4, 64), prompts_per_client=4, input_len=64, output_len=128),
}


def _backend(text: str) -> str:
    """A name for ``--backends``: ours are spelt rightly, all others are the engine's to know."""
    ours = (summary.OURS, *base.WITHOUT_EXPERT_PARALLELISM)
    meant = text.lower().replace("-", "_")
    if meant in ours and meant != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no backend; did you mean {meant}?")
    if text.split() != [text]:
        raise argparse.ArgumentTypeError(f"{text!r} is no backend")
    return text


def _defaults(name: str) -> str:
    values = {device: getattr(size, name) for device, size in SIZES.items()}
    return "; ".join(
        f"{','.join(map(str, value)) if isinstance(value, tuple) else value} on {device}"
        for device, value in values.items()
    )


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench-engine",
        help="serve a model through an engine and measure it",
        description="Starts the engine once per backend and round, prints a few completions, drives it with "
        "the engine's own benchmark client, and stops everything it started.",
    )
    parser.add_argument("--engine", choices=tuple(ENGINES), default="vllm")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="folder with weights and tokenizer")
    model.add_argument(
        "--shape",
        metavar="NAME[,layers=N][,fp8]",
        help=f"random weights in a known shape: {', '.join(models.ARCHITECTURES)}",
    )
    parser.add_argument(
        "--backends",
        default=summary.OURS,
        type=list_of(_backend),
        metavar="A[,B...]",
        help="all-to-all backends to compare (%(default)s); and, without expert parallelism, "
        f"{' and '.join(base.WITHOUT_EXPERT_PARALLELISM)}",
    )
    parser.add_argument(
        "--concurrency",
        type=list_of(whole(1)),
        metavar="N[,N...]",
        help=f"requests in flight ({_defaults('concurrency')})",
    )
    for name, what in (("input_len", "of a prompt"), ("output_len", "of an answer")):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole(1),
            metavar="TOKENS",
            help=f"length {what} ({_defaults(name)})",
        )
    parser.add_argument(
        "--num-prompts", type=whole(1), metavar="N", help="requests per measurement (4 per client)"
    )
    parser.add_argument(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="requests per second (all at once)",
    )
    parser.add_argument(
        "--rounds",
        type=whole(1),
        default=1,
        metavar="N",
        help="times each backend is served, in turn (%(default)s)",
    )
    parser.add_argument(
        "--data-parallel-size",
        type=whole(1),
        default=2,
        metavar="N",
        help="copies, or stages of pipeline_parallel (%(default)s)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=whole(1),
        default=1,
        metavar="N",
        help="ranks in each of them (%(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--port", type=port, default=0, metavar="PORT", help="port of 127.0.0.1 to serve on")
    parser.add_argument("--max-model-len", type=whole(1), metavar="TOKENS")
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a server may take to be ready (%(default)g)",
    )
    parser.add_argument(
        "--engine-args", type=shlex.split, default=[], metavar="'ARGS'", help="more engine arguments"
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="where engine logs go (a new temporary folder)"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write machine, versions, command and results"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="after measuring, read from a profile of decode steps what GPUs spend on communication",
    )
    parser.add_argument(
        "--plot", type=plot.plot_file, metavar="FILE", help="write bars as .png or .svg (needs matplotlib)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """0: measured; 1: a server or a client failed: the end of its log is shown. What was measured before is
    published all the same, and if the run is interrupted. Raises EpConfigError."""
    console = Console()
    shape = models.parse(args.shape) if args.shape is not None else None
    if shape is None and not (args.model / "config.json").is_file():
        raise EpConfigError(f"--model {args.model} has no config.json: give the folder of a model")
    if args.trace and args.device == "cpu":
        raise EpConfigError("--trace reads what GPUs do; this is a run on the CPU")
    if args.plot is not None:
        plot.check_matplotlib()
    engine = ENGINES[args.engine]
    if args.engine == "sglang" and args.device == "cpu":
        raise EpConfigError("SGLang is measured on GPUs; use --engine vllm on a CPU")
    engine.check_environment()
    device = args.device
    if device == "auto":
        device = engine.choose_device(args.data_parallel_size, args.tensor_parallel_size)
    bench = Bench(args, shape, device, console)
    status = 0
    try:
        with terminable():
            for number in range(args.rounds):
                for backend in bench.backends:
                    bench.serve_and_measure(backend, number)
    except EpError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        status = 1
    finally:  # also of a run that is interrupted
        if bench.results:
            _publish(bench, args, console)
    return status


def _publish(bench: Bench, args: argparse.Namespace, console: Console) -> None:
    summaries, title = summary.summarise(bench.results), bench.title()
    console.print(summary.table(summaries, title))
    if bench.traces:
        console.print(summary.trace_table(bench.traces, title))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(bench.document(), indent=2) + "\n")
        console.print(f"wrote {args.json}", highlight=False)
    if args.plot is not None:
        plot.write(summaries, title, args.plot)
        console.print(f"wrote {args.plot}", highlight=False)


class Bench:
    """One command's servers, in turn, and what was measured."""

    def __init__(
        self, args: argparse.Namespace, shape: models.Shape | None, device: str, console: Console
    ) -> None:
        self.backends = {
            name: base.parallelism(name, args.data_parallel_size, args.tensor_parallel_size)
            for name in args.backends
        }
        self.results: list[dict[str, Any]] = []
        self.completions: dict[str, list[dict[str, str]]] = {}
        self.traces: list[dict[str, Any]] = []
        self._args, self._device, self._console = args, device, console
        self._engine = ENGINES[args.engine]
        self._loads = _loads(args, SIZES[device])
        self._logs = args.log_dir or Path(tempfile.mkdtemp(prefix="ep-backend-bench-"))
        self._shape = shape
        self._model = args.model if shape is None else self._logs / "model"
        if shape is not None:
            models.write(shape, self._model)
            self._say(f"random weights in the shape {shape.text}; config and tokenizer: {self._model}")
            if shape.architecture.note:
                self._say(shape.architecture.note)

    def serve_and_measure(self, backend: str, number: int) -> None:
        """Start the engine with `backend`, print completions the first time, measure every load, stop it."""
        if self._args.rounds > 1:
            self._say(f"round {number + 1} of {self._args.rounds}")
        folder = self._logs / f"round{number}-{backend}"
        with self._engine.Server(self._serving(backend, folder), folder, self._say) as server:
            # Random weights have nothing to say.
            if self._shape is None and backend not in self.completions:
                self.completions[backend] = _complete(server, _prompts(self._model))
                _show_completions(self._console, self.completions[backend])
            for load in self._loads:
                self._say(f"  measuring {load.num_prompts} requests, {load.concurrency} at a time")
                measured = server.measure(dataclasses.replace(load, seed=number))
                self.results.append(_result(self._args.engine, backend, number, load, measured))
            for load in self._loads if self._args.trace else ():
                self._say(f"  tracing {load.concurrency} requests")
                step = server.trace(dataclasses.replace(load, num_prompts=load.concurrency, seed=number))
                self.traces.append(
                    {"backend": backend, "round": number, "concurrency": load.concurrency, **step}
                )
        self._say("  stopped")

    def title(self) -> str:
        name = self._model.resolve().name if self._shape is None else self._shape.text
        data, tensor = self._args.data_parallel_size, self._args.tensor_parallel_size
        return f"{name} on {data if tensor == 1 else f'{data} x {tensor}'} {self._device} ranks"

    def document(self) -> dict[str, Any]:
        """What --json writes."""
        return {
            "machine": {**report.machine(self._device), "gpus": base.gpus(self._device)},
            "engine": self._args.engine,
            "versions": base.versions(self._engine.DISTRIBUTIONS),
            **provenance(),
            "shape": None if self._shape is None else self._shape.text,
            "data_parallel_size": self._args.data_parallel_size,
            "tensor_parallel_size": self._args.tensor_parallel_size,
            "results": self.results,
            "traces": self.traces,
            "ratios": summary.ratios(summary.summarise(self.results)),
            "completions": self.completions,
        }

    def _serving(self, backend: str, folder: Path) -> base.Serving:
        args = self._args
        return base.Serving(
            model=self._model,
            backend=backend,
            device=self._device,
            **self.backends[backend],
            dummy_weights=self._shape is not None,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            # One rank may get all requests for a moment.
            max_num_seqs=max(load.concurrency for load in self._loads),
            port=args.port,
            extra=tuple(args.engine_args),
            start_timeout_s=args.start_timeout,
            trace_folder=folder / "traces" if args.trace else None,
        )

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _loads(args: argparse.Namespace, size: Size) -> list[base.Load]:
    return [
        base.Load(
            concurrency=concurrency,
            num_prompts=args.num_prompts or concurrency * size.prompts_per_client,
            input_len=args.input_len or size.input_len,
            output_len=args.output_len or size.output_len,
            request_rate=args.request_rate,
        )
        for concurrency in args.concurrency or size.concurrency
    ]


def _prompts(model: Path) -> list[str]:
    """The model's own prompts, one per line of prompts.txt, or one that any language model can continue."""
    file = model / "prompts.txt"
    lines = file.read_text().splitlines() if file.is_file() else ["The"]
    return [line for line in lines if line.strip()][:SHOWN_COMPLETIONS]


def _complete(server: base.Server, prompts: list[str]) -> list[dict[str, str]]:
    choices = server.complete(prompts, COMPLETION_TOKENS)
    return [
        {"prompt": prompt, "text": choice["text"]} for prompt, choice in zip(prompts, choices, strict=True)
    ]


def _show_completions(console: Console, completions: list[dict[str, str]]) -> None:
    for completion in completions:
        console.print("  > ", end="")
        console.print(completion["prompt"], style="bold", end="", markup=False, highlight=False)
        console.print(completion["text"].replace("\n", "\n    "), markup=False, highlight=False)


def _result(
    engine: str, backend: str, number: int, load: base.Load, measured: dict[str, Any]
) -> dict[str, Any]:
    sent = dataclasses.asdict(load)
    sent.pop("seed")
    if sent["request_rate"] == float("inf"):
        sent["request_rate"] = None  # all at once; JSON has no infinity
    return {"engine": engine, "backend": backend, "round": number, **sent, **measured}
