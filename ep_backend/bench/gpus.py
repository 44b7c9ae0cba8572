"""Exchanges on GPUs, timed with the GPU's clock: round trips in CUDA graphs, their phases in single calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend.bench import report
from ep_backend.bench.contenders import Contender
from ep_backend.bench.meter import BURST, INPUT_SETS, Step, Times, divide
from ep_backend.bench.workload import Inputs, LeastBytes, Settings
from ep_backend.errors import EpConfigError

ALIGN_CYCLES = 1_000_000  # the GPU sleeps while the host queues a graph
QUEUE_CYCLES = 4_000_000  # and while it queues single calls; doubled when that was too short
MOST_QUEUE_CYCLES = 64_000_000
COPY_BYTES = 256 << 20  # of windows that a GPU writes, in all its peers together
COPIES = 4  # of them in a round, or the ranks' different starts would count
COPY_ROUNDS = 5


def exchanges_in_a_graph(tokens: int) -> int:
    return 20 if tokens < 1000 else 4


class Gpus:
    """The meter for GPUs; the limit is how fast each GPU writes into its peers while all of them do."""

    def __init__(self) -> None:
        self._gpus = rendezvous.gather(None, torch.cuda.get_device_name())
        self._write_rate = peer_write_rate()

    def machine(self) -> dict[str, Any]:
        rate = self._write_rate
        return {"gpus": self._gpus, "peer_write_bytes_per_s": None if rate is None else round(rate)}

    def case(
        self,
        settings: Settings,
        contenders: Sequence[Contender],
        inputs: Sequence[Inputs],
        least: LeastBytes,
        step: Step,
    ) -> tuple[list[Times], float | None]:
        runners = [Runner(contender, inputs, settings) for contender in contenders]
        graph_size = exchanges_in_a_graph(inputs[0].tokens)
        warmup, replays = divide(settings.warmup, graph_size), divide(settings.iters, graph_size)
        bursts = divide(settings.iters, BURST)
        turns = warmup + replays + bursts
        for turn in range(turns):
            for runner in runners:
                if turn >= warmup + replays:
                    runner.burst()
                elif runner.graph is not None:
                    runner.replay(timed=turn >= warmup)
            step((turn + 1) / turns)
        return [runner.times for runner in runners], self._write_rate


class Runner:
    """A contender with its captured graph and its times."""

    def __init__(self, contender: Contender, inputs: Sequence[Inputs], settings: Settings) -> None:
        self.times = Times()
        self._contender = contender
        # One for each input set, and one for exchanges that are not timed.
        self._outs = [
            torch.empty_like(given.expected, dtype=settings.result_dtype) for given in [*inputs, inputs[0]]
        ]
        self._graph_size = exchanges_in_a_graph(inputs[0].tokens)
        self._queue_cycles = QUEUE_CYCLES
        self.graph = self._capture() if contender.capturable else None
        if self.graph is not None:
            self.times.details["exchanges_per_graph"] = self._graph_size

    def _exchange(self, number: int, out: int | None = None) -> None:
        number %= INPUT_SETS
        self._contender.dispatch(number)
        self._contender.combine(self._outs[number if out is None else out])

    def untimed(self) -> None:
        """The ranks are aligned by an exchange that is not timed."""
        self._exchange(0, out=INPUT_SETS)

    def _capture(self) -> torch.cuda.CUDAGraph:
        self.untimed()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(self._graph_size):
                self._exchange(number)
        return graph

    def launch(self) -> None:
        """Queue all exchanges of the graph on the current stream."""
        assert self.graph is not None
        self.graph.replay()

    def replay(self, *, timed: bool) -> None:
        """One sample of the round trip: the graph's time by the exchanges in it."""
        self.forget()
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(ALIGN_CYCLES)
        self.untimed()
        start.record()
        self.launch()
        end.record()
        end.synchronize()
        self.check()
        if timed:
            self.times.seconds["round_trip"].append(start.elapsed_time(end) / 1e3 / self._graph_size)

    def burst(self) -> None:
        """BURST samples of the phases; of the round trip too, if there is no graph."""
        marks = self._queue()
        # On all ranks together: one that waited for its host has kept the others waiting.
        while anywhere(marks is None):
            self._queue_cycles *= 2
            marks = self._queue()
        assert marks is not None
        self.check()
        for start, between, end in marks:
            phases = (start, between), (between, end), (start, end)
            for phase, (since, until) in zip(report.PHASES, phases, strict=True):
                if self.graph is None or phase != "round_trip":
                    self.times.seconds[phase].append(since.elapsed_time(until) / 1e3)

    def _queue(self) -> list[list[torch.cuda.Event]] | None:
        """Events before, in the middle and after each of BURST exchanges; None if the GPU had to wait for the
        host, which would be counted."""
        self.forget()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(BURST)]
        dist.barrier()
        torch.cuda._sleep(self._queue_cycles)
        self.untimed()
        for number, (start, between, end) in enumerate(marks):
            start.record()
            self._contender.dispatch(number % INPUT_SETS)
            between.record()
            self._contender.combine(self._outs[number % INPUT_SETS])
            end.record()
        late = marks[0][0].query()
        marks[-1][-1].synchronize()
        # What cannot be captured waits for the host anyway.
        may_be_late = not self._contender.capturable or self._queue_cycles >= MOST_QUEUE_CYCLES
        return None if late and not may_be_late else marks

    def forget(self) -> None:
        """Nothing that stands in the results may pass for what comes."""
        for out in self._outs:
            out.fill_(torch.nan)

    def check(self) -> None:
        """Look at the results of both input sets, after the GPU has ended."""
        for number, out in enumerate(self._outs[:INPUT_SETS]):
            self.times.correct &= self._contender.accepts(number, out)


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank. Collective."""
    found = torch.tensor(int(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def peer_write_rate() -> float | None:
    """Bytes per second that a GPU writes into its peers' memory, to all of them at the same time and all GPUs
    at the same time; of the slowest GPU, in the best of some rounds. None with one GPU, or if memory cannot
    be mapped."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return None
    from torch.distributed import _symmetric_memory as symmetric

    size = COPY_BYTES // (world - 1) // 4096 * 4096
    try:
        window, _ = rendezvous.together(
            None, lambda: symmetric.empty(size * world, dtype=torch.uint8, device=_device())
        )
        mapping, _ = rendezvous.together(
            None, lambda: symmetric.rendezvous(window, dist.distributed_c10d._get_default_group())
        )
    except EpConfigError:
        return None
    source = torch.zeros(size, dtype=torch.uint8, device=_device())
    # Not all start with the same peer.
    peers = [(rank + distance) % world for distance in range(1, world)]
    targets = [mapping.get_buffer(peer, (size,), torch.uint8, rank * size) for peer in peers]
    streams = [torch.cuda.Stream() for _ in peers]
    rates = torch.zeros(COPY_ROUNDS, dtype=torch.float64)
    for round_ in range(COPY_ROUNDS):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(ALIGN_CYCLES)
        start.record()
        for stream, target in zip(streams, targets, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(COPIES):
                    target.copy_(source, non_blocking=True)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        end.synchronize()
        rates[round_] = COPIES * len(peers) * size / (start.elapsed_time(end) / 1e3)
    dist.all_reduce(rates, op=dist.ReduceOp.MIN)  # also: nobody gives memory back that others write
    return float(rates.max())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
