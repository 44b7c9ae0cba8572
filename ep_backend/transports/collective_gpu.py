"""Transport ``collective`` for rows on GPUs: kernels pack and unpack, torch.distributed carries.

The kernels of transport ``peer`` write what is for others into a *staging* window in this GPU's own memory.
It has the layout of every window; what is for rank d stands where d would be the source. From there each
region's block goes to the window of d, where the receiving kernels find rows and flags as if this rank had
written them.

A whole block, T slots, goes to every rank: nobody has to wait for counts, and a CUDA graph can hold it. Where
that would carry many slots that hold no row, ids go first and tell both sides which rows there are, and only
these follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import NamedTuple

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend._native import ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpArgumentError, EpTimeoutError
from ep_backend.transports import wires
from ep_backend.transports.base import DispatchCall, Received, Transport, opened
from ep_backend.transports.collective import CollectiveTransport, Traffic, failure
from ep_backend.transports.gpu import FLAGS_PER_SOURCE, GpuTransport, Windows

WORTH_COUNTING = 4 << 20
"""Bytes that a rank must expect to save, both ways together, before it waits for ids. Argued, not measured:
the host waits for the GPU three times and launches some twenty small kernels, about 0.3 ms, in which a link
of 100 Gb/s carries as much."""

CACHED_SIZES = 64  # numbers of slots whose blocks are kept as tensors


class Region(NamedTuple):
    """A region of a channel. ``piece``: what every rank but this one has of it in one exchange; ``here`` and
    ``staged``: all of it, as bytes, in this rank's window and in the staging one."""

    piece: wires.Piece
    here: torch.Tensor
    staged: torch.Tensor


class Regions(NamedTuple):
    """Field for field WindowLayout::Blocks (csrc/common/layout.h)."""

    dispatch_flags: Region
    headers: Region
    ids: Region
    weights: Region
    scales: Region
    rows: Region
    combine_flags: Region
    combine_rows: Region


class Places(NamedTuple):
    """Slots that hold rows, [n] int64 in order, and how many there are of each rank. A slot is number
    rank * T + token."""

    slots: torch.Tensor
    of_rank: list[int]


@dataclass
class _Open:
    """The exchange that a channel has open. ``wait``: for what is under way, since ``started``. ``came``:
    where rows belong that do not come to their places: (region, slots in it, rows). ``sent``, ``received``:
    which rows there are, if that was asked."""

    channel: int
    slots: int
    captured: bool
    phase: str = "dispatch"
    wait: wires.Wait | None = None
    started: float = 0.0
    came: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = ()
    sent: Places | None = None
    received: Places | None = None
    arrived: bool = False
    returned: bool = False  # this rank's combine, or its closing, is under way


class GpuCollectiveTransport(GpuTransport):
    """Calls wait on the host until everything has come, but for those that a CUDA graph holds. All ranks
    capture the same calls, and give ``num_tokens`` in the same ones. A failure is final: there is no
    recovery."""

    name = CollectiveTransport.name
    recoverable = False
    dispatch, combine = Transport.dispatch, Transport.combine  # one half after the other
    exchange_sums = Transport.exchange_sums

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        device: torch.device,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.traffic = Traffic()
        self._open: list[_Open | None] = [None] * config.num_channels
        self._failure: EpTimeoutError | None = None
        self._timeout_s = config.timeout()
        super().__init__(group, config, device, ranks)
        self.window_bytes *= 2  # with the staging window
        self._shape = config.window_shape(self._world, FLAGS_PER_SOURCE)
        self._regions = lru_cache(CACHED_SIZES)(self._find_regions)
        owners = [*config.expert_ranks(self._world), -1]
        self._owners = torch.tensor(owners, dtype=torch.int32, device=device)
        bytes_of_row = config.row_bytes + config.row_scale_bytes + config.wire_row_bytes
        empty = (1 - 1 / self._world) ** config.top_k  # of the slots for a rank, if experts are chosen alike
        self._saved_per_slot = (self._world - 1) * bytes_of_row * empty
        self._wire = wires.choose(group, self._names, device, self._timeout_s)
        self.capturable = self._wire.capturable
        # What torch.distributed makes when it is first used must not be made while a graph is captured.
        rendezvous.together(group, lambda: self._first_use(group))

    def _first_use(self, group: dist.ProcessGroup | None) -> None:
        first = _Open(channel=0, slots=1, captured=False)
        pieces = [self._regions(0, 1).headers.piece]
        # A rank that has failed waits in `together`, and must find the others there.
        patience = rendezvous.patience(group) / 2
        rendezvous.within(patience, lambda: self._move(first, pieces), "the first all-to-all")
        self._finish(first)

    def _share_windows(self, group: dist.ProcessGroup | None, shape: list[int]) -> Windows:
        def make() -> torch.Tensor:
            both = torch.zeros(2, self.window_bytes, dtype=torch.uint8, device=self._device)
            torch.cuda.synchronize(self._device)
            return both

        self._memory = rendezvous.together(group, make)[0]
        own, staging = self._memory
        addresses = [(own if r == self._rank else staging).data_ptr() for r in range(self._world)]
        return Windows(addresses, own, staged=True, keep=self._memory)

    def dispatch_send(self, call: DispatchCall) -> None:
        """Waits for the others' ids where they go first."""
        self._refuse_capture()
        self.close_exchange(call.channel)
        super().dispatch_send(call)
        regions, config = self._regions(call.channel, call.slots), self._config
        exchange = _Open(call.channel, call.slots, self.is_capturing())
        metadata = [r.piece for r in (regions.dispatch_flags, regions.headers, regions.ids, regions.weights)]
        with_scales = [regions.scales] if config.row_scale_bytes else []
        may_wait = call.num_tokens is None and not exchange.captured
        if may_wait and call.slots * self._saved_per_slot >= WORTH_COUNTING:
            self._move(exchange, metadata)
            self._finish(exchange)
            sent, received = self._find_places(call, regions)
            sizes = [config.row_scale_bytes] * len(with_scales) + [config.row_bytes]
            rows = [*with_scales, regions.rows]
            self._move_rows(exchange, rows, sizes, sent, received)
            exchange.sent, exchange.received = sent, received
            self.traffic.dispatched_rows += sum(sent.of_rank)
        else:
            self._move(exchange, metadata + [r.piece for r in (*with_scales, regions.rows)])
            self.traffic.dispatched_rows += (self._world - 1) * call.slots
        self._open[call.channel] = exchange

    def dispatch_recv(self, channel: int, slots: int, rows: torch.Tensor | None = None) -> Received:
        exchange = self._opened(channel)
        self._finish(exchange)
        exchange.arrived = True
        return super().dispatch_recv(channel, slots, rows)

    def combine_send(self, channel: int, y: torch.Tensor) -> None:
        exchange = self._opened(channel)
        super().combine_send(channel, y)
        self._return_rows(exchange)

    def combine_recv(self, channel: int, out: torch.Tensor) -> None:
        self._finish(self._opened(channel))
        self._open[channel] = None
        super().combine_recv(channel, out)

    def close_exchange(self, channel: int) -> None:
        """Answers the others with closing flags and rows that hold anything: they may have sent a combine,
        and all-to-all takes all."""
        self.check()
        exchange = self._open[channel]
        if exchange is None:
            return
        if self.is_capturing():
            self._opened(channel)
        if not exchange.arrived:
            self._finish(exchange)
        if not exchange.returned:
            ops.cuda_close(self._exchange, channel, True)
            self._return_rows(exchange)
        self._finish(exchange)
        ops.cuda_close(self._exchange, channel, False)
        self._open[channel] = None

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        super().check()

    def set_timeout(self, seconds: float) -> None:
        self._timeout_s = seconds
        super().set_timeout(seconds)

    def destroy(self) -> None:
        super().destroy()
        self._regions.cache_clear()
        if self._failure is None:
            self._wire.close()

    def _refuse_capture(self) -> None:
        super()._refuse_capture()
        if not self._wire.capturable and self.is_capturing():
            raise EpArgumentError(
                "dispatch was called while a CUDA graph is captured, but without NCCL the host must wait for "
                "rows"
            )

    def _opened(self, channel: int) -> _Open:
        """The exchange that a channel has open, if a graph holds all of it or nothing."""
        self.check()
        exchange = opened(self._open, channel)
        if exchange.captured != self.is_capturing():
            raise EpArgumentError(
                "a CUDA graph must hold an exchange from dispatch to combine: finish or release what is open "
                "before the capture begins, and what it begins before it ends"
            )
        return exchange

    def _return_rows(self, exchange: _Open) -> None:
        exchange.phase = "combine"
        regions = self._regions(exchange.channel, exchange.slots)
        flags = regions.combine_flags.piece
        if exchange.sent is not None and exchange.received is not None:
            # These rows do not stand rank * T + token apart: their place does not depend on T.
            apart = self._config.max_tokens_per_rank - exchange.slots
            back, home = (
                Places(p.slots + p.slots // exchange.slots * apart, p.of_rank)
                for p in (exchange.received, exchange.sent)
            )
            sizes = [self._config.wire_row_bytes]
            rows = [regions.combine_rows]
            self._move_rows(exchange, rows, sizes, back, home, flags)
            self.traffic.combined_rows += sum(back.of_rank)
        else:
            self._move(exchange, [flags, regions.combine_rows.piece])
            self.traffic.combined_rows += (self._world - 1) * exchange.slots
        exchange.returned = True

    def _move_rows(
        self,
        exchange: _Open,
        regions: Sequence[Region],
        row_bytes: Sequence[int],
        sent: Places,
        received: Places,
        *more: wires.Piece,
    ) -> None:
        """Only the rows in the slots that are named."""
        pieces, came = list(more), []
        for region, size in zip(regions, row_bytes, strict=True):
            here, staged = (t.view(torch.int32).view(-1, size // 4) for t in (region.here, region.staged))
            out_of = staged.index_select(0, sent.slots)
            into = here.new_empty(len(received.slots), size // 4)
            pieces.append((_parts(into, received.of_rank), _parts(out_of, sent.of_rank)))
            came.append((here, received.slots, into))
        self._move(exchange, pieces)
        exchange.came = came

    def _move(self, exchange: _Open, pieces: Sequence[wires.Piece]) -> None:
        """Start it. There is nothing to wait for if one rank is alone, or a graph holds it."""
        exchange.wait, exchange.started = None, monotonic()
        if self._world == 1:
            return
        self.traffic.bytes += sum(block.numel() for _, out_of in pieces for block in out_of)
        with self._watched(exchange):
            wait = self._wire.start(pieces, self._timeout_s)
        exchange.wait = None if self.is_capturing() else wait

    def _finish(self, exchange: _Open) -> None:
        if exchange.wait is None:
            return
        with self._watched(exchange):
            exchange.wait(self._timeout_s)
        for region, slots, rows in exchange.came:
            region.index_copy_(0, slots, rows)
        exchange.wait, exchange.came = None, ()

    @contextmanager
    def _watched(self, exchange: _Open) -> Iterator[None]:
        """Around what fails for good: after a deadline, or because a rank is gone."""
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # RuntimeErrors, too, but this rank's own
        except RuntimeError as error:
            self._failure = failure(
                self._names,
                self._rank,
                exchange.phase,
                exchange.channel,
                exchange.started,
                self._timeout_s,
                error,
            )
            self._wire.abort()
            raise self._failure from error

    def _find_places(self, call: DispatchCall, regions: Regions) -> tuple[Places, Places]:
        ids = regions.ids.here.view(torch.int32).view(self._world, call.slots, -1)
        # tokens is the first word of a header, which has a line for itself
        tokens = regions.headers.here.view(torch.int32).view(self._world, -1)[:, 0]
        return find_places(self._owners_of(call.ids), self._owners_of(ids), tokens, self._rank)

    def _owners_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The ranks of experts; -1 for ids of none."""
        nobody = self._config.num_experts
        return self._owners[ids.long().masked_fill((ids < 0) | (ids >= nobody), nobody)]

    def _find_regions(self, channel: int, slots: int) -> Regions:
        chunks = ops.cuda_plan_chunks(self._exchange, [slots, *self._plan])
        numbers = iter(ops.window_blocks(self._shape, channel, slots, chunks))
        own, staging = self._memory

        def region(at: int, pitch: int, size: int) -> Region:
            def parts(window: torch.Tensor) -> list[torch.Tensor]:
                ends = (size if r != self._rank else 0 for r in range(self._world))
                return [window[at + r * pitch :][:end] for r, end in enumerate(ends)]

            end = at + self._world * pitch
            return Region((parts(own), parts(staging)), own[at:end], staging[at:end])

        return Regions(*(region(*block) for block in zip(numbers, numbers, numbers, strict=True)))


def find_places(
    dispatched: torch.Tensor, arrived: torch.Tensor, tokens: torch.Tensor, rank: int
) -> tuple[Places, Places]:
    """Which slots hold rows for others, and which hold rows of others for ``rank``. Waits for the GPU.

    ``dispatched``: [M, top_k], the ranks of the experts of this rank's tokens; ``arrived``: [world, T,
    top_k], those of the tokens of all ranks, of which the first ``tokens`` ([world]) count.
    """
    world, slots, _ = arrived.shape
    ranks = torch.arange(world, device=arrived.device)
    goes = arrived.new_zeros(world, slots, dtype=torch.bool)
    goes[:, : len(dispatched)] = (dispatched == ranks[:, None, None]).any(-1)
    counts = torch.arange(slots, device=arrived.device) < tokens[:, None]
    comes = (arrived == rank).any(-1) & counts
    both = torch.stack([goes, comes]) & (ranks != rank)[:, None]
    to_rank, of_rank = both.sum(-1).tolist()
    sent, received = (side.flatten().nonzero().flatten() for side in both)
    return Places(sent, to_rank), Places(received, of_rank)


def _parts(rows: torch.Tensor, of_rank: Sequence[int]) -> list[torch.Tensor]:
    """The bytes of each rank's rows."""
    row_bytes = rows.shape[1] * rows.itemsize
    return list(rows.flatten().view(torch.uint8).split([n * row_bytes for n in of_rank]))
