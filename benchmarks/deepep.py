"""The calls of DeepEP's tests on ep_backend's `Buffer` and, where DeepEP is installed, beside it on its own.

    python benchmarks/deepep.py --device cuda --json FILE
    python benchmarks/deepep.py --device cpu --ranks 2 --hidden 512 --experts 8 --topk 2 --tokens 64 \\
        --low-latency-tokens 1,16

What is called is what deepseek-ai/DeepEP's tests time: tests/test_intranode.py (normal mode, with the handle
of an earlier dispatch) and tests/test_low_latency.py, bf16 and fp8. It is timed, and every result is checked,
as by `ep-backend bench` (docs/benchmarking.md): libraries take turns, a time is that of the slowest rank.
Low-latency round trips are in CUDA graphs, normal mode is not. Exit status 1: a result was wrong.

Not yet run beside DeepEP itself.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend.bench import report, timing, workload
from ep_backend.bench.arguments import list_of, output_file, whole
from ep_backend.bench.workload import Settings
from ep_backend.cli.provenance import provenance
from ep_backend.errors import EpConfigError, EpError
from ep_backend.launch import processes
from ep_backend.launch.deadline import Deadline

OURS, THEIRS = "ep_backend", "deep_ep"
MODES = {"rank_major": "normal", "expert_major": "low latency"}
NVL_BYTES = int(2e9)  # as test_intranode.py; ours allocates nothing of it
FP8_DIFF = 9e-4  # of low-latency rows, which each library quantises itself: test_low_latency.py
STALL_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Case(Settings):
    """One mode with one dtype: of ``layout`` rank_major it is normal mode, of expert_major low latency."""

    @property
    def quantizes(self):
        """Low-latency dispatches quantise, on CPUs too; normal ones are given rows in fp8."""
        return self.dtype == "fp8" and self.layout == "expert_major"


def library(name):
    """The module. Raises EpConfigError on all ranks if it is not there."""
    module = "ep_backend.compat.deep_ep" if name == OURS else THEIRS
    if importlib.util.find_spec(module) is None:
        raise EpConfigError("it is not installed")
    return importlib.import_module(module)


def start(name, settings):
    loaded, _ = rendezvous.together(None, lambda: library(name))
    kind = Normal if MODES[settings.layout] == "normal" else LowLatency
    return kind(name, loaded, settings)


class Normal:
    """Dispatch with the handle of an earlier one, and combine."""

    capturable = False  # DeepEP's test does not
    window_bytes = None

    def __init__(self, name, module, settings):
        self.name, self._module, self._settings = name, module, settings
        module.Buffer.set_num_sms(settings.num_sms)
        self._rank, self._received = dist.get_rank(), 0
        self._buffer = None

    def make_buffer(self, tokens):
        return self._module.Buffer(dist.group.WORLD, NVL_BYTES, explicitly_destroy=True)

    def prepare(self, inputs):
        self.destroy()
        self._buffer = self.make_buffer(inputs[0].tokens)
        self._inputs = inputs
        self._ids = [given.ids.to(self._module.topk_idx_t) for given in inputs]
        self._seen, self._returned = {}, {}
        of_rank = self._settings.experts // self._settings.ranks
        self._experts = tuple(range(self._rank * of_rank, (self._rank + 1) * of_rank))
        factors = workload.expert_factors(self._settings.experts, self._settings.hidden, self._settings.seed)
        self._factors = factors.to(self._settings.device)

    def verify(self):
        self._handles, self._wanted, self._results = [], [], []
        correct = True
        for number, (given, ids) in enumerate(zip(self._inputs, self._ids, strict=True)):
            per_rank, per_rdma_rank, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(
                ids, self._settings.experts
            )
            rows, local, weights, _, handle, _ = self._buffer.dispatch(
                self._sent(number),
                topk_idx=ids,
                topk_weights=given.weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )
            plain, scales = rows if isinstance(rows, tuple) else (rows, None)
            self._handles.append(handle)
            self._wanted.append(plain.view(torch.uint8))
            self._results.append(
                workload.weighted_sums(plain, scales, local, weights, self._experts, self._settings)
            )
            correct &= given.accepts(self._buffer.combine(self._results[-1], handle)[0])
        self._received = len(plain)
        return correct

    def dispatch(self, number):
        self._number = number
        self._seen[number] = self._buffer.dispatch(self._sent(number), handle=self._handles[number])[0]

    def combine(self, out):
        # Into memory of the library's own: a copy to ``out`` would be timed, too.
        handle = self._handles[self._number]
        self._returned[out.data_ptr()] = self._buffer.combine(self._results[self._number], handle)[0]

    def accepts(self, number, out):
        rows = self._seen[number]
        rows = rows[0] if isinstance(rows, tuple) else rows
        returned = self._returned.pop(out.data_ptr(), out)
        same = torch.equal(rows.view(torch.uint8), self._wanted[number])
        return same and self._inputs[number].accepts(returned)

    def details(self):
        row = self._settings.config("auto")
        size = self._received * (row.row_bytes + row.row_scale_bytes)
        mode = MODES[self._settings.layout]
        return {"mode": mode, "num_sms": self._settings.num_sms, "received_bytes": size}

    def destroy(self):
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None

    def _sent(self, number):
        given = self._inputs[number]
        return given.x if given.scales is None else (given.x, given.scales)


class LowLatency(Normal):
    """Low-latency dispatch and combine. DeepEP's rows come in another order each time: in timed exchanges all
    rows that an expert sends back are therefore alike, and their weighted sum is known."""

    capturable = True

    def make_buffer(self, tokens):
        settings, kind = self._settings, self._module.Buffer
        size = kind.get_low_latency_rdma_size_hint(tokens, settings.hidden, settings.ranks, settings.experts)
        return kind(
            dist.group.WORLD,
            num_rdma_bytes=size,
            low_latency_mode=True,
            num_qps_per_rank=settings.experts // settings.ranks,
            explicitly_destroy=True,
        )

    def prepare(self, inputs):
        super().prepare(inputs)
        settings = self._settings
        rows = self._factors[list(self._experts)].bfloat16()
        self._alike = rows[:, None].repeat(1, settings.ranks * inputs[0].tokens, 1)
        self._sums = []
        for given in inputs:
            terms = given.weights[..., None] * self._factors.bfloat16().float()[given.ids.long()]
            # Rounded as `workload.make` says; all terms are positive.
            tolerance = terms.sum(1) * (settings.ranks + 3) * torch.finfo(torch.bfloat16).eps / 2
            self._sums.append(replace(given, expected=terms.sum(1), tolerance=tolerance))

    def verify(self):
        self._wanted, correct = [], True
        for number, given in enumerate(self._inputs):
            self.dispatch(number)
            rows, counts, handle = self._seen[number]
            plain, scales = rows if isinstance(rows, tuple) else (rows, None)
            results = torch.zeros_like(plain, dtype=torch.bfloat16)
            for expert, count in enumerate(counts.tolist()):
                part = None if scales is None else scales[expert, :count]
                values = workload.dequantize(plain[expert, :count], part)
                results[expert, :count] = values * self._factors[self._experts[expert]]
            out = torch.empty_like(given.expected, dtype=torch.bfloat16)
            self._buffer.low_latency_combine(results, self._ids[number], given.weights, handle, out=out)
            correct &= diff(out, given.expected) < FP8_DIFF if scales is not None else given.accepts(out)
            self._wanted.append(self._summary(number))
            self._received = int(counts.sum())
        return correct

    def dispatch(self, number):
        self._number, given = number, self._inputs[number]
        experts, use_fp8 = self._settings.experts, self._settings.dtype == "fp8"
        rows, counts, handle, _, _ = self._buffer.low_latency_dispatch(
            given.x, self._ids[number], given.tokens, experts, use_fp8=use_fp8
        )
        self._seen[number] = rows, counts, handle

    def combine(self, out):
        number = self._number
        weights, handle = self._inputs[number].weights, self._seen[number][2]
        self._buffer.low_latency_combine(self._alike, self._ids[number], weights, handle, out=out)

    def accepts(self, number, out):
        return self._summary(number) == self._wanted[number] and self._sums[number].accepts(out)

    def _summary(self, number):
        """Of each expert the rows that came, and the sum of their bytes, whatever their order."""
        rows, counts, _ = self._seen[number]
        plain = (rows[0] if isinstance(rows, tuple) else rows).view(torch.uint8)
        return [(n, int(plain[e, :n].sum(dtype=torch.int64))) for e, n in enumerate(counts.tolist())]


def diff(x, y):
    """DeepEP's measure of how far two tensors are apart."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def cases(args, ranks):
    common = {
        "device": args.device,
        "ranks": ranks,
        "hidden": args.hidden,
        "experts": args.experts,
        "topk": args.topk,
        "routing": "uniform",
        "contenders": (OURS, THEIRS) if args.device == "cuda" else (OURS,),
        "num_sms": args.num_sms,
        "warmup": 8,
        "iters": args.iters,
        "seed": 0,
    }
    shapes = {"rank_major": args.tokens, "expert_major": args.low_latency_tokens}
    return [
        Case(layout=layout, tokens=tokens, dtype=dtype, **common)
        for layout, tokens in shapes.items()
        for dtype in ("bf16", "fp8")
    ]


def measure(note, args):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    deadline = Deadline(STALL_S)

    def told(text):
        deadline.extend()
        note(text)
        if rank == 0:
            print(text, flush=True)

    runs = cases(args, world)
    try:
        measured = timing.measure(
            runs, explicit={OURS}, note=told, step=lambda share: deadline.extend(), start=start
        )
    finally:
        deadline.cancel()
    if importlib.util.find_spec(THEIRS) is not None:
        measured["versions"][THEIRS] = importlib.metadata.version(THEIRS)
    return measured


def show(results):
    header = f"{'mode':>12} {'rows':>5} {'tokens':>6} {'library':>10} {'dispatch us':>12} {'GB/s':>7}"
    print(f"{header} {'combine us':>11} {'round trip us':>14}")
    for three in zip(*[iter(results)] * len(report.PHASES), strict=True):
        dispatch, combine, trip = (result["median_us"] for result in three)
        one = three[0]
        print(
            f"{one['mode']:>12} {one['dtype']:>5} {one['tokens']:>6} {one['transport']:>10} {dispatch:>12} "
            f"{one['received_bytes'] / dispatch / 1e3:>7.1f} {combine:>11} {trip:>14}"
        )
    print(
        "medians; GB/s as DeepEP counts them: rows that rank 0 received, its own too, by the time of dispatch"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--ranks", type=whole(1), help="processes (one for each GPU; 2 on cpu)")
    add("--tokens", type=list_of(whole(1)), default=(4096,), help="per rank, of normal mode (4096)")
    add(
        "--low-latency-tokens", type=list_of(whole(1)), default=(1, 8, 32, 64, 128, 256), help="(1,8,...,256)"
    )
    add("--hidden", type=whole(1), default=7168, help="(%(default)s)")
    add("--experts", type=whole(1), default=256, help="of all ranks together (%(default)s)")
    add("--topk", type=whole(1), default=8, help="(%(default)s)")
    add("--num-sms", type=whole(1), default=24, help="of normal mode (%(default)s)")
    add("--iters", type=whole(1), default=100, help="timed exchanges of each case (%(default)s)")
    add("--json", type=output_file, metavar="FILE")
    args = parser.parse_args()
    ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    if args.device == "cuda" and not 0 < ranks <= torch.cuda.device_count():
        raise EpConfigError(f"{torch.cuda.device_count()} GPUs are here; one for each rank was wanted")
    outcomes = processes.run(measure, (args,), count=ranks, speak=True)
    failure = processes.first_failure(outcomes)
    if failure is not None:
        raise EpError(f"{failure}\n{failure.details}")
    measured = outcomes[0].value
    for name in ("tokens", "layout", "dtype"):  # they stand in each result
        del measured["settings"][name]
    document = {**provenance(), **measured, "command": shlex.join(["python", *sys.argv])}
    show(document["results"])
    if args.json:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(result["correct"] for result in document["results"]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EpError as error:
        sys.exit(f"deepep.py: {error}")
