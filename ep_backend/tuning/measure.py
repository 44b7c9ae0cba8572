"""The times that `ep-backend tune` chooses from, taken by every rank: exchanges in CUDA graphs as by
`ep-backend bench`, and matrix products beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from ep_backend import Communicator, rendezvous, tuned
from ep_backend.bench import contenders, report, workload
from ep_backend.bench.contenders import Contender
from ep_backend.bench.gpus import QUEUE_CYCLES, Runner, anywhere, exchanges_in_a_graph
from ep_backend.bench.meter import INPUT_SETS, divide
from ep_backend.bench.workload import Settings
from ep_backend.errors import EpConfigError, EpError
from ep_backend.transports import OF_GPUS
from ep_backend.tuning.choice import Sample, Sms

PRODUCT = 4096  # rows and columns of a product; hidden is in between
TURNS = 9  # products alone, and beside exchanges
SLOWED = 3  # times as long as alone that exchanges beside products may take without another try
MOST_PRODUCTS = 1 << 14

Note = Callable[[str], None]


def transport_of(settings: Settings) -> str:
    """What a communicator of this shape uses here. Collective. Raises EpConfigError if there is nothing to
    tune."""
    with Communicator(None, settings.config("auto"), device=settings.device) as communicator:
        if communicator.transport not in OF_GPUS:
            raise EpConfigError(
                f"transport {communicator.transport} is used here, which has no number of SMs to choose: "
                f"{communicator.decision.reason}"
            )
        return communicator.transport


class Measurement:
    """Takes one round of times for a number of SMs and a scale of chunks. Collective over the default
    group."""

    def __init__(self, settings: Settings, transport: str, note: Note) -> None:
        self._settings, self._transport, self._note = settings, transport, note
        self._products = _Products(settings.hidden)
        # The same for each number of SMs, and made on the host.
        self._inputs = {
            tokens: [workload.make(settings, dist.get_rank(), tokens, number) for number in range(INPUT_SETS)]
            for tokens in settings.tokens
        }

    def __call__(self, num_sms: Sms, chunk_scale: float) -> list[Sample]:
        """Equal on all ranks: times of the slowest. Raises EpError if a result is wrong."""
        settings = replace(self._settings, num_sms=num_sms, chunk_scale=chunk_scale)
        contender = contenders.start(self._transport, settings)
        try:
            return [self._sample(settings, contender, tokens) for tokens in settings.tokens]
        finally:
            contender.destroy()

    def _sample(self, settings: Settings, contender: Contender, tokens: int) -> Sample:
        inputs, num_sms, scale = self._inputs[tokens], settings.num_sms, settings.chunk_scale
        assert scale is not None
        what = f"SMs: {tuned.choice(num_sms, scale)}"
        contender.prepare(inputs)
        correct = contender.verify()
        runner = Runner(contender, inputs, settings)
        size = exchanges_in_a_graph(tokens)
        warmup = divide(settings.warmup, size)
        for turn in range(warmup + divide(settings.iters, size)):
            runner.replay(timed=turn >= warmup)
        exchange_s = _of_slowest(runner.times.seconds["round_trip"])
        lost_s = self._products.lost(runner, size, exchange_s)
        if anywhere(not (correct and runner.times.correct)):
            raise EpError(f"transport {self._transport}: a result was wrong, {what}")
        sample = Sample(num_sms, tokens, exchange_s * 1e6, lost_s * 1e6, scale)
        self._note(
            f"{what}, {tokens} tokens: exchange "
            f"{report.microseconds(sample.exchange_us)} us, products lose "
            f"{report.microseconds(sample.lost_us)} us"
        )
        return sample


class _Products:
    """Matrix products [4096, hidden] x [hidden, 4096] in bf16, and what they lose by exchanges."""

    def __init__(self, hidden: int) -> None:
        a, b = (torch.randn(shape, device="cuda") for shape in ((PRODUCT, hidden), (hidden, PRODUCT)))
        self._a, self._b = a.bfloat16(), b.bfloat16()
        self._out = torch.empty(PRODUCT, PRODUCT, dtype=torch.bfloat16, device="cuda")
        self._side = torch.cuda.Stream()
        self._multiply(8)
        # Of the fastest GPU: all ranks must make the same turns.
        self._each_s = min(rendezvous.gather(None, self._time(8, None)[0] / 8))

    def lost(self, runner: Runner, exchanges: int, exchange_s: float) -> float:
        """Seconds that products lose by each of a graph's ``exchanges``, on another stream; of the slowest
        rank, the median over turns that take each other's place. Collective."""
        count = divide(round(SLOWED * exchanges * exchange_s * 1e9), round(self._each_s * 1e9))
        losses: list[float] = []
        while len(losses) < TURNS:
            alone, _ = self._time(count, None)
            beside, covered = self._time(count, runner)
            if anywhere(not covered) and count < MOST_PRODUCTS:
                count, losses = 2 * count, []  # exchanges went on when the products had ended
                continue
            losses.append((beside - alone) / exchanges)
        return _of_slowest(losses)

    def _time(self, count: int, runner: Runner | None) -> tuple[float, bool]:
        """Seconds of ``count`` products, and whether a replay of the graph beside them ended before they
        did. The ranks begin together if there is a graph."""
        stream, start, end, done = torch.cuda.current_stream(), *_events(3)
        dist.barrier()
        torch.cuda._sleep(QUEUE_CYCLES)  # while the host queues the rest
        if runner is not None:
            runner.forget()
            runner.untimed()
        self._side.wait_stream(stream)
        start.record()
        if runner is not None:
            with torch.cuda.stream(self._side):
                runner.launch()
        done.record(self._side)
        self._multiply(count)
        end.record()
        stream.wait_stream(self._side)
        torch.cuda.synchronize()
        if runner is not None:
            runner.check()
        return start.elapsed_time(end) / 1e3, done.elapsed_time(end) >= 0

    def _multiply(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._a, self._b, out=self._out)


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def _of_slowest(seconds: list[float]) -> float:
    """The median over turns of the slowest rank's time. Collective."""
    return median(report.slowest(rendezvous.gather(None, seconds)))
