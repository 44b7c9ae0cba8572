"""Transport ``collective`` for rows on GPUs: kernels pack and unpack, torch.distributed carries.

The kernels of transport ``peer`` write what is for others into a *staging* window in this GPU's own memory. It has
the layout of every window; what is for rank d stands where d would be the source. From there each region's block goes
to the window of d, where the receiving kernels find rows and flags as if this rank had written them.

A whole block, T slots, goes to every rank: nobody has to wait for counts, and a CUDA graph can hold it. Where that
would carry many slots that hold no row, ids go first and tell both sides which rows there are, and only these follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import NamedTuple

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend._native import ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpArgumentError, EpError, EpTimeoutError
from ep_backend.transports import wires
from ep_backend.transports.base import DispatchCall, Received, opened
from ep_backend.transports.collective import CollectiveTransport, Traffic
from ep_backend.transports.gpu import FLAGS_PER_SOURCE, GpuTransport, Windows

WORTH_COUNTING = 4 << 20
"""Bytes that a rank must expect to save, both ways together, before it waits for ids: finding the rows takes the host
two waits for the GPU and some ten launches, in which a 100 Gb/s link would have carried as much. Argued, not measured."""

CACHED_SIZES = 64  # numbers of slots whose blocks are kept as tensors


class Blocks(NamedTuple):
    """What every rank but this one has of a channel in one exchange: field for field WindowLayout::Blocks
    (csrc/common/layout.h), each in this rank's window and in the staging one."""

    dispatch_flags: wires.Piece
    headers: wires.Piece
    ids: wires.Piece
    weights: wires.Piece
    scales: wires.Piece
    rows: wires.Piece
    combine_flags: wires.Piece
    combine_rows: wires.Piece


@dataclass
class Places:
    """The slots that hold rows, in order: those for others, and those of others. ``sent`` and ``received``: [n] int64,
    number rank * T + token; how many of each rank stands in the other two."""

    sent: torch.Tensor
    received: torch.Tensor
    sent_rows: list[int]
    received_rows: list[int]


@dataclass
class _Open:
    """The exchange that a channel has open. ``wait``: for what is under way. ``kept``: memory that it uses, and where
    its parts belong: (rows, places, what came)."""

    slots: int
    captured: bool
    wait: wires.Wait | None = None
    places: Places | None = None
    kept: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = ()
    received: bool = False
    returned: bool = False  # this rank's combine, or its closing, is under way


class GpuCollectiveTransport(GpuTransport):
    """Calls wait on the host until everything has come, but for those that a CUDA graph holds. All ranks capture the
    same calls, and give ``num_tokens`` in the same ones. A failure is final: there is no recovery."""

    name = CollectiveTransport.name
    recoverable = False

    def __init__(self, group: dist.ProcessGroup | None, config: EpConfig, device: torch.device) -> None:
        self.traffic = Traffic()
        self._open: list[_Open | None] = [None] * config.num_channels
        self._failure: EpTimeoutError | None = None
        self._timeout_s = config.timeout()
        super().__init__(group, config, device)
        self.window_bytes *= 2  # with the staging window
        self._wire = wires.choose(group, device)
        self.capturable = self._wire.capturable
        self._blocks = lru_cache(CACHED_SIZES)(self._make_blocks)
        owners = [*config.expert_ranks(self._world), -1]
        self._owners = torch.tensor(owners, dtype=torch.int32, device=device)
        row = config.row_bytes + config.row_scale_bytes + config.wire_row_bytes
        empty = (1 - 1 / self._world) ** config.top_k  # of the slots for a rank, if experts are chosen alike
        self._saved_per_slot = (self._world - 1) * row * empty
        # What torch.distributed makes when it is first used must not be made while a graph is captured.
        rendezvous.together(group, self._first_use)

    def _first_use(self) -> None:
        wait = self._start([self._blocks(0, 1).headers])
        if wait is not None:
            wait(self._timeout_s)

    def _share_windows(self, group: dist.ProcessGroup | None, shape: list[int]) -> Windows:
        def make() -> torch.Tensor:
            both = torch.zeros(2, self.window_bytes, dtype=torch.uint8, device=self._device)
            torch.cuda.synchronize(self._device)
            return both

        (own, self._staging), _ = rendezvous.together(group, make)
        self._window = own
        addresses = [(own if r == self._rank else self._staging).data_ptr() for r in range(self._world)]
        return Windows(addresses, own, staged=True, keep=self._staging)

    def dispatch(self, call: DispatchCall) -> Received:
        self.dispatch_send(call)
        return self.dispatch_recv(call.channel, call.slots)

    def combine(self, channel: int, y: torch.Tensor, out: torch.Tensor) -> None:
        self.combine_send(channel, y)
        self.combine_recv(channel, out)

    def dispatch_send(self, call: DispatchCall) -> None:
        """Waits for the others' ids where they go first, else for nothing."""
        captured = self._is_capturing()
        self.close_exchange(call.channel)
        super().dispatch_send(call)
        blocks = self._blocks(call.channel, call.slots)
        exchange = _Open(call.slots, captured)
        metadata = [blocks.dispatch_flags, blocks.headers, blocks.ids, blocks.weights]
        rows = [blocks.scales, blocks.rows] if self._config.row_scale_bytes else [blocks.rows]
        may_wait = not captured and call.num_tokens is None
        if may_wait and call.slots * self._saved_per_slot >= WORTH_COUNTING:
            exchange.wait = self._start(metadata)
            self._finish(exchange, "dispatch", call.channel)
            exchange.places = self._find_places(call)
            self.traffic.dispatched_rows += len(exchange.places.sent)
            self._start_rows(exchange, rows, exchange.places.sent, exchange.places.received)
        else:
            self.traffic.dispatched_rows += (self._world - 1) * call.slots
            exchange.wait = self._start(metadata + rows)
        self._open[call.channel] = exchange
