"""Two micro-batches: while one computes, the rows of the other are on their way. Measured, and traced.

    python examples/overlap/two_micro_batches.py --trace traces
    python examples/overlap/two_micro_batches.py --device cuda --streams 2 --trace traces

The same layers are run without overlap (each micro-batch dispatches, computes and combines before anything
else happens) and with it (a channel for each micro-batch; on one stream exchanges in halves with the other
one's computation between them, on two streams whole ones beside it). Both must return the same bits.
README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import linear, rms_norm, silu
from torch.profiler import ProfilerActivity, profile, record_function

from ep_backend import Communicator, EpConfig, Handle
from ep_backend.bench.arguments import whole
from ep_backend.bench.engines.base import gpus
from ep_backend.bench.engines.trace import COMMUNICATION, covered
from ep_backend.bench.report import machine, median, python_version, slowest
from ep_backend.cli.provenance import provenance
from ep_backend.launch import processes

COMPUTING = ("dense", "experts")
EXCHANGING = ("dispatch", "combine", "dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
NAMES = ("A", "B")  # of the micro-batches; each has the channel of its place
MODES = ("without overlap", "overlapped")
TRACED = 3  # passes of each mode in the trace
ENOUGH = 8  # timed passes from which their middle half says something


@dataclass(frozen=True)
class Options:
    """``tokens``: of a micro-batch on each rank. ``width``: of an expert's hidden layer. ``streams``: on a
    GPU, 1: exchanges and computation on one stream; 2: on a stream each."""

    device: str
    ranks: int
    tokens: int
    hidden: int
    width: int
    experts: int
    topk: int
    layers: int
    passes: int
    streams: int = 1
    num_sms: int | None = None
    trace: Path | None = None


SHAPES = {
    "cpu": {"tokens": 128, "hidden": 256, "width": 256, "layers": 2, "passes": 20},
    "cuda": {"tokens": 2048, "hidden": 7168, "width": 1024, "layers": 4, "passes": 20},
}


def order(layers: int, mode: str, streams: int) -> Iterator[tuple[str, int]]:
    """What happens, in order: actions, and the number of the micro-batch that each is for."""
    a, b = 0, 1
    for layer in range(layers):
        if mode == MODES[0]:
            for batch in (a, b):
                yield from ((action, batch) for action in ("dense", "dispatch", "experts", "combine"))
            continue
        if streams == 2:  # whole exchanges run beside the computation that is called next
            for first, second in (("dense", "dispatch"), ("experts", "combine")):
                for batch in (a, b):
                    yield from ((first, batch), (second, batch))
            continue
        yield "dense", a  # on their way: B's results of the layer before
        if layer:
            yield "combine_recv", b
        yield "dispatch_send", a
        yield "dense", b  # A's rows
        yield "dispatch_recv", a
        yield "dispatch_send", b
        yield "experts", a  # B's rows
        yield "combine_send", a
        yield "dispatch_recv", b
        yield "experts", b  # A's results
        yield "combine_recv", a
        yield "combine_send", b
    if mode == MODES[1] and streams == 1:
        yield "combine_recv", b


class Weights:
    """Of one layer: what is no expert, ``dense`` [hidden, hidden], and this rank's experts, ``up`` [local,
    hidden, width] and ``down`` [local, width, hidden]."""

    def __init__(self, options: Options, layer: int, local: tuple[int, ...], dtype: torch.dtype) -> None:
        def made(seed: int, *shape: int) -> torch.Tensor:
            g = torch.Generator().manual_seed(1000 * layer + seed)
            return (torch.randn(*shape, generator=g) * shape[-2] ** -0.5).to(options.device, dtype)

        hidden, width = options.hidden, options.width
        self.dense = made(0, hidden, hidden)
        self.up = torch.stack([made(1 + 2 * e, hidden, width) for e in local])
        self.down = torch.stack([made(2 + 2 * e, width, hidden) for e in local])


class MicroBatch:
    """Tokens of one rank on their way through the layers. Each action is a method.

    Everything that crosses from a stream to the other lives until the same micro-batch makes it again.
    """

    def __init__(self, options: Options, communicator: Communicator, number: int) -> None:
        config, device = communicator.config, communicator.device
        g = torch.Generator().manual_seed(100 * communicator.rank + number)
        shape = (options.tokens, options.hidden)
        self.start = torch.randn(shape, generator=g).to(device, config.payload)
        chosen = torch.rand(options.layers, options.tokens, options.experts, generator=g)
        self.ids = chosen.topk(options.topk, dim=-1).indices.int().to(device)
        self.weights = torch.rand(options.layers, options.tokens, options.topk, generator=g).to(device)
        slots = communicator.world_size * options.tokens
        received = (len(communicator.local_experts), slots, options.hidden)
        self.rows = torch.zeros(received, dtype=config.payload, device=device)
        self.out = torch.zeros(shape, dtype=config.payload, device=device)
        self._communicator, self._channel = communicator, number
        self._ready = torch.cuda.Event() if device.type == "cuda" else None

    def begin(self) -> None:
        self.x, self.layer = self.start, -1
        self.out.zero_()

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Behind what this micro-batch did last, on whichever stream; not behind what the other one does."""
        if stream is None or self._ready is None:
            yield
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            yield
            self._ready.record(stream)

    def dense(self, layers: list[Weights]) -> None:
        """Stands for attention; the end of the layer before, too."""
        self.layer += 1
        x = self.x + self.out
        self.x = x + linear(rms_norm(x, x.shape[-1:]), layers[self.layer].dense)
        self.sent = rms_norm(self.x, x.shape[-1:])

    def experts(self, layers: list[Weights]) -> None:
        # Slots without a row are computed too: a size that depends on the tokens would wait for the GPU.
        weights = layers[self.layer]
        self.y = torch.bmm(silu(torch.bmm(self.rows, weights.up)), weights.down)

    def dispatch_send(self) -> None:
        self.handle: Handle = self._communicator.dispatch_send(
            self.sent, self.ids[self.layer], self.weights[self.layer], channel=self._channel
        )

    def dispatch_recv(self) -> None:
        self._communicator.dispatch_recv(self.handle, rows=self.rows)

    def dispatch(self) -> None:
        received, self.handle = self._communicator.dispatch(
            self.sent, self.ids[self.layer], self.weights[self.layer], channel=self._channel
        )
        self.rows = received.rows

    def combine_send(self) -> None:
        self._communicator.combine_send(self.y, self.handle)

    def combine_recv(self) -> None:
        self._communicator.combine_recv(self.handle, out=self.out)

    def combine(self) -> None:
        self._communicator.combine(self.y, self.handle, out=self.out)

    def result(self) -> torch.Tensor:
        return self.x + self.out


class Rank:
    """One rank's part of a pass."""

    def __init__(self, options: Options, communicator: Communicator) -> None:
        dtype, local = communicator.config.payload, communicator.local_experts
        self._options, self._gpu = options, communicator.device.type == "cuda"
        self._layers = [Weights(options, layer, local, dtype) for layer in range(options.layers)]
        self._batches = [MicroBatch(options, communicator, number) for number in range(len(NAMES))]
        self._streams: dict[str, torch.cuda.Stream] = {}
        if self._gpu:
            computing = torch.cuda.current_stream()
            exchanging = torch.cuda.Stream() if options.streams == 2 else computing
            self._streams = dict.fromkeys(COMPUTING, computing) | dict.fromkeys(EXCHANGING, exchanging)

    def wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()

    def run(self, mode: str) -> None:
        """One pass through all layers, with a range of the profiler around each action."""
        for batch in self._batches:
            with batch.on(self._streams.get(COMPUTING[0])):
                batch.begin()
        for action, number in order(self._options.layers, mode, self._options.streams):
            batch = self._batches[number]
            arguments = (self._layers,) if action in COMPUTING else ()
            # On a stream of their own, A's exchanges would overlap with B's computation in any order.
            stream = self._streams.get(action if mode == MODES[1] else COMPUTING[0])
            with record_function(f"{action} {NAMES[number]}"), batch.on(stream):
                getattr(batch, action)(*arguments)

    def timed(self, mode: str) -> float:
        """Seconds of a pass: from an idle device to an idle device."""
        self.wait()
        dist.barrier()
        start = time.perf_counter()
        self.run(mode)
        self.wait()
        return time.perf_counter() - start

    def results(self) -> list[torch.Tensor]:
        self.wait()
        return [batch.result().cpu() for batch in self._batches]

    def traced(self, file: Path) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
        with profile(activities=activities) as profiler:
            for mode in MODES:
                self.wait()
                dist.barrier()
                with record_function(mode):
                    for _ in range(TRACED):
                        self.run(mode)
                    self.wait()
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))


def exposed(events: Iterable[dict[str, Any]], mode: str, kernels: bool) -> tuple[float, float]:
    """Of the passes of ``mode`` in a trace: microseconds in which the rank exchanges rows, waiting included,
    and those of them in which it computes nothing.

    ``kernels``: a GPU's kernels count, else the ranges of the actions.
    """
    events = [event for event in events if event.get("ph") == "X"]
    around = next(e for e in events if e["name"] == mode and e.get("cat") == "user_annotation")
    exchanging, computing = [], []
    for event in events:
        name, start, length = event["name"], float(event["ts"]), float(event["dur"])
        if not around["ts"] <= start <= around["ts"] + around["dur"]:
            continue
        if kernels and event.get("cat") == "kernel":
            exchanges = any(part in name for part in COMMUNICATION)
            (exchanging if exchanges else computing).append((start, length, name))
        elif not kernels and event.get("cat") == "user_annotation":
            action = name.split()[0]
            for actions, found in ((EXCHANGING, exchanging), (COMPUTING, computing)):
                if action in actions:
                    found.append((start, length, name))
    return covered(exchanging), covered(exchanging + computing) - covered(computing)


def measure(note: processes.Note, options: Options) -> dict[str, Any]:
    """The job of a rank; what it returns is the same on all of them."""
    torch.set_num_threads(max(1, torch.get_num_threads() // options.ranks))
    gpu = options.device == "cuda"
    if gpu:
        torch.cuda.set_device(dist.get_rank())
    config = EpConfig(
        num_experts=options.experts,
        top_k=options.topk,
        hidden_size=options.hidden,
        max_tokens_per_rank=options.tokens,
        payload=torch.bfloat16 if gpu else torch.float32,
        layout="expert_major",
        num_channels=len(NAMES),
        num_sms=options.num_sms,
    )
    with torch.inference_mode(), Communicator(None, config, device=options.device) as communicator:
        rank, found = Rank(options, communicator), []
        note("first passes")
        for mode in MODES:
            rank.run(mode)
            found.append(rank.results())
        equal = all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        for number in range(options.passes):
            note(f"timed pass {number + 1}")
            for mode in MODES:  # in turns: a machine that slows down slows both
                seconds[mode].append(rank.timed(mode))
                equal &= all(torch.equal(a, b) for a, b in zip(rank.results(), found[0], strict=True))
        traced = {}
        if options.trace is not None:
            note("trace")
            file = options.trace / f"rank-{communicator.rank}.json"
            rank.traced(file)
            events = json.loads(file.read_text())["traceEvents"]
            traced = {mode: exposed(events, mode, gpu) for mode in MODES}
        gathered: list[Any] = [None] * options.ranks
        dist.all_gather_object(gathered, (equal, seconds, traced))
        communicator.check()
        return summary(options, communicator.transport, gathered)


def summary(options: Options, transport: str, of_ranks: list[Any]) -> dict[str, Any]:
    """What all ranks together found: milliseconds of a pass, and whether all results were equal."""
    modes = []
    for mode in MODES:
        passes = [1e3 * s for s in slowest([seconds[mode] for _, seconds, _ in of_ranks])]
        quarter = len(passes) // 4
        entry = {
            "mode": mode,
            "median_ms": median(passes),
            "middle_half_ms": [sorted(passes)[quarter], sorted(passes)[-1 - quarter]],
        }
        if options.trace is not None:
            totals = [sum(traced[mode][i] for *_, traced in of_ranks) for i in range(2)]
            per_pass = [total / 1e3 / TRACED / options.ranks for total in totals]
            entry |= {"communication_ms": per_pass[0], "exposed_ms": per_pass[1]}
        modes.append(entry)
    return {
        "options": {**asdict(options), "trace": None if options.trace is None else str(options.trace)},
        "transport": transport,
        "equal": all(equal for equal, *_ in of_ranks),
        "modes": modes,
    }


def report(found: dict[str, Any]) -> str:
    """The table, and what may be said from it."""
    of, (plain, overlapped) = found["options"], found["modes"]
    streams = f" on {of['streams']} stream{'s' * (of['streams'] > 1)}" if of["device"] == "cuda" else ""
    lines = [
        f"{of['ranks']} ranks, {of['device']}{streams}, transport {found['transport']}: 2 micro-batches of "
        f"{of['tokens']} tokens, hidden {of['hidden']}, {of['layers']} layers, {of['passes']} passes each",
        "results: equal bit by bit" if found["equal"] else "results: DIFFERENT",
    ]
    with_trace = "exposed_ms" in plain
    heads = ["ms for a pass", "median", "middle half", *(["communication", "exposed"] * with_trace)]
    rows = [heads]
    for mode in found["modes"]:
        low, high = mode["middle_half_ms"]
        row = [mode["mode"], f"{mode['median_ms']:.2f}", f"{low:.2f} to {high:.2f}"]
        rows.append(row + [f"{mode[key]:.2f}" for key in ("communication_ms", "exposed_ms") if with_trace])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if with_trace:
        before, after = plain["exposed_ms"], overlapped["exposed_ms"]
        share = f"{100 * (1 - after / before):.0f} %" if after < before else "nothing"
        lines.append(f"hidden by overlap, in {TRACED} traced passes: {share} of the exposed communication")
    ratio = plain["median_ms"] / overlapped["median_ms"]
    (low, high), (other_low, other_high) = plain["middle_half_ms"], overlapped["middle_half_ms"]
    sure = of["passes"] >= ENOUGH and (low > other_high or other_low > high)
    noise = "" if sure else "; within what passes differ by, so no gain or loss is shown"
    lines.append(f"a pass is {ratio:.2f} times as fast as without overlap{noise}")
    return "\n".join(lines)


def main() -> int:
    """0; 1 if the results differ or a rank failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, number = parser.add_argument, partial(parser.add_argument, type=whole(1), metavar="N")
    cpu, cuda = SHAPES["cpu"], SHAPES["cuda"]
    add("--device", default="cpu", choices=tuple(SHAPES))
    number("--ranks", default=2, help="processes, on cuda one for each GPU [2]")
    number("--experts", default=8, help="of all ranks together [8]")
    number("--topk", default=4, help="experts of a token [4]")
    number("--num-sms", help="SMs that an exchange may use [as without this example]")
    words = {
        "tokens": "of a micro-batch, per rank",
        "hidden": "elements of a row",
        "width": "of an expert's hidden layer",
        "layers": "of a pass",
        "passes": "timed, of each kind",
    }
    for name, text in words.items():
        number(f"--{name}", help=f"{text} [{cpu[name]}; on cuda {cuda[name]}]")
    add("--streams", type=int, default=1, choices=(1, 2), help="cuda: one for all, or one for exchanges [1]")
    add(
        "--trace", type=Path, metavar="FOLDER", help="write rank-N.json there, as Chrome and Perfetto read it"
    )
    add("--json", type=Path, metavar="FILE", help="write what was measured")
    given = vars(parser.parse_args())
    file = given.pop("json")
    shape = {
        name: value if given[name] is None else given[name] for name, value in SHAPES[given["device"]].items()
    }
    options = Options(**{**given, **shape})
    outcomes = processes.run(measure, (options,), count=options.ranks, deadline_s=600.0)
    if failure := processes.first_failure(outcomes):
        print(failure, failure.details, sep="\n", file=sys.stderr)
        return 1
    found = outcomes[0].value
    print(report(found))
    if file is not None:
        made = {**provenance(), "command": shlex.join(["python", *sys.argv])}
        made["machine"] = {**machine(options.device), "gpus": gpus(options.device)}
        made["versions"] = {"torch": torch.__version__, "python": python_version()}
        file.write_text(json.dumps({**made, **found}, indent=2) + "\n")
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
