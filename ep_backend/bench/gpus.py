"""Exchanges on GPUs, timed with the GPU's clock: round trips in CUDA graphs, their phases in single calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ep_backend import env, rendezvous
from ep_backend.bench import report
from ep_backend.bench.contenders import Contender
from ep_backend.bench.meter import BURST, INPUT_SETS, Step, Times, divide
from ep_backend.bench.workload import Inputs, LeastBytes, Settings
from ep_backend.errors import EpConfigError
from ep_backend.facts import islands, nodes
from ep_backend.probe import Record
from ep_backend.transports.hier import HierTransport
from ep_backend.transports.host import HostTransport, share_windows
from ep_backend.transports.mixed import MixedTransport

T = TypeVar("T")
ALIGN_CYCLES = 1_000_000  # the GPU sleeps while the host queues a graph
QUEUE_CYCLES = 4_000_000  # and while it queues single calls; both are doubled when that was too short
MOST_QUEUE_CYCLES = 64_000_000
COPY_BYTES = 256 << 20  # of windows that a GPU writes, in all its peers together
HOST_COPY_BYTES = 64 << 20  # that a GPU copies each way, as benchmarks/host_memory.cu does
COPIES = 4  # of them in a round, or the ranks' different starts would count
COPY_ROUNDS = 5


def exchanges_in_a_graph(tokens: int) -> int:
    return 20 if tokens < 1000 else 4


class Gpus:
    """The meter for GPUs; the limit is how fast each GPU writes into its peers while all of them do, and for
    transport host how fast each copies to and from the host's memory.

    ``records``: of all ranks; ``names``: of the contenders. GPUs that do not all reach each other's memory
    are not told to write there: some machines hang. What goes over several nodes has no limit, nor has mixed,
    which goes both ways.
    """

    def __init__(self, records: Sequence[Record], names: Collection[str]) -> None:
        self._gpus = rendezvous.gather(None, torch.cuda.get_device_name())
        one_node = len(nodes(records)) == 1
        self._peer_rate = peer_write_rate() if one_node and len(islands(records)) == 1 else None
        self._host_rate = host_copy_rate() if one_node and HostTransport.name in names else None

    def machine(self) -> dict[str, Any]:
        rates = {"peer_write_bytes_per_s": self._peer_rate, "host_copy_bytes_per_s": self._host_rate}
        return {
            "gpus": self._gpus,
            **{name: None if rate is None else round(rate) for name, rate in rates.items()},
        }

    def rate_of(self, name: str) -> float | None:
        """Bytes per second that the machine can move on the way that contender ``name`` takes."""
        others = {HostTransport.name: self._host_rate, MixedTransport.name: None, HierTransport.name: None}
        return others.get(name, self._peer_rate)

    def case(
        self,
        settings: Settings,
        contenders: Sequence[Contender],
        inputs: Sequence[Inputs],
        least: LeastBytes,
        step: Step,
    ) -> list[Times]:
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
        for runner, contender in zip(runners, contenders, strict=True):
            runner.times.bytes_per_s = self.rate_of(contender.name)
        return [runner.times for runner in runners]


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
        self._align_cycles, self._queue_cycles = ALIGN_CYCLES, QUEUE_CYCLES
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
        seconds, self._align_cycles = in_time(self._replayed, self._align_cycles)
        self.check()
        if timed:
            self.times.seconds["round_trip"].append(seconds / self._graph_size)

    def _replayed(self, cycles: int) -> float | None:
        """Seconds of the graph; None if the GPU had to wait for the host, which would be counted."""
        self.forget()
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        self.untimed()
        start.record()
        self.launch()
        late = start.query()
        end.record()
        end.synchronize()
        # What lets the GPU wait between its exchanges cannot be queued in time.
        if late and cycles < MOST_QUEUE_CYCLES:
            return None
        return float(start.elapsed_time(end)) / 1e3

    def burst(self) -> None:
        """BURST samples of the phases; of the round trip too, if there is no graph."""
        marks, self._queue_cycles = in_time(self._queue, self._queue_cycles)
        self.check()
        for start, between, end in marks:
            phases = (start, between), (between, end), (start, end)
            for phase, (since, until) in zip(report.PHASES, phases, strict=True):
                if self.graph is None or phase != "round_trip":
                    self.times.seconds[phase].append(since.elapsed_time(until) / 1e3)

    def _queue(self, cycles: int) -> list[list[torch.cuda.Event]] | None:
        """Events before, in the middle and after each of BURST exchanges; None if the GPU had to wait for the
        host, which would be counted."""
        self.forget()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(BURST)]
        dist.barrier()
        torch.cuda._sleep(cycles)
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
        may_be_late = not self._contender.capturable or cycles >= MOST_QUEUE_CYCLES
        return None if late and not may_be_late else marks

    def forget(self) -> None:
        """Nothing that stands in the results may pass for what comes."""
        for out in self._outs:
            out.fill_(torch.nan)

    def check(self) -> None:
        """Look at the results of both input sets, after the GPU has ended."""
        for number, out in enumerate(self._outs[:INPUT_SETS]):
            self.times.correct &= self._contender.accepts(number, out)


def in_time(sample: Callable[[int], T | None], cycles: int) -> tuple[T, int]:
    """What ``sample`` gives when the GPU has slept for so many cycles, and how many it took; None from it: on
    this rank they were too few. Collective: a rank that waited for its host has kept the others waiting."""
    late = 0
    while True:
        taken = sample(cycles)
        if not anywhere(taken is None):
            assert taken is not None
            return taken, cycles
        late += 1
        if late % 2 == 0:  # not just a hiccup
            cycles *= 2


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank. Collective."""
    found = torch.tensor(int(flag))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def peer_write_rate() -> float | None:
    """Bytes per second that a GPU writes into its peers' memory, to all of them at the same time and all GPUs
    at the same time; of the slowest GPU, in the best of some rounds. None with one GPU, or if memory cannot
    be mapped. Only for GPUs that reach each other: what is written elsewhere may never arrive."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return None
    from torch.distributed import _symmetric_memory as symmetric

    size = _part(COPY_BYTES, world)
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
    targets = [mapping.get_buffer(peer, (size,), torch.uint8, rank * size) for peer in _peers(rank, world)]
    return _rate([(target, source) for target in targets], size * (world - 1))


def host_copy_rate() -> float | None:
    """Bytes per second that a GPU copies each way at once, through its peers' windows in pinned memory of the
    host and out of its own, while all GPUs do; of the slowest GPU, in the best of some rounds. None with one
    GPU, or if memory cannot be shared or pinned."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return None
    # Each window has a half that the peers write, a part each, and one that its own GPU reads.
    part = _part(HOST_COPY_BYTES, world)
    half = part * (world - 1)
    timeout_s = env.get("EP_BACKEND_TIMEOUT_S")
    try:
        windows = share_windows(None, range(world), _device(), 2 * half, timeout_s)
    except EpConfigError:
        return None
    memory = torch.zeros(2 * half, dtype=torch.uint8, device=_device())
    copies = [(memory[:half], windows.memory[rank][half:])]
    for number, peer in enumerate(_peers(rank, world)):
        start = (rank - peer - 1) % world * part  # in the order of the ranks after the peer
        source = memory[half + number * part :][:part]
        copies.append((windows.memory[peer][start:][:part], source))
    rate = _rate(copies, half)
    windows.release()
    return rate


def _part(size: int, world: int) -> int:
    """What one of a rank's peers gets of ``size`` bytes, in whole pages."""
    return size // (world - 1) // 4096 * 4096


def _peers(rank: int, world: int) -> list[int]:
    """The other ranks: not all ranks start with the same one."""
    return [(rank + distance) % world for distance in range(1, world)]


def _rate(copies: Sequence[tuple[torch.Tensor, torch.Tensor]], size: int) -> float:
    """Bytes per second, where ``size`` of them count, with which all ``copies`` (to, from) are made at the
    same time, on all ranks at the same time; of the slowest rank, in the best of some rounds. Collective."""
    streams = [torch.cuda.Stream() for _ in copies]
    rates = torch.zeros(COPY_ROUNDS, dtype=torch.float64)
    for round_ in range(COPY_ROUNDS):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(ALIGN_CYCLES)
        start.record()
        for stream, (target, source) in zip(streams, copies, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(COPIES):
                    target.copy_(source, non_blocking=True)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        end.synchronize()
        rates[round_] = COPIES * size / (start.elapsed_time(end) / 1e3)
    dist.all_reduce(rates, op=dist.ReduceOp.MIN)  # also: nobody gives memory back that others write
    return float(rates.max())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
