"""Transport ``collective``: packed buffers through torch.distributed's all-to-all, wherever that reaches.

The rows end in a private window, so everything behind the transport is the same code as for windows that
peers write. This is for rows on CPUs, which cross over gloo; ``collective_gpu`` is for those on GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend._native import LAYOUTS, ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpError, EpTimeoutError
from ep_backend.transports.base import DispatchCall, NativeExchange, Received, Transport, opened
from ep_backend.transports.shm import anonymous

PACKED_FLAG_BYTES = 16  # csrc/kernels/cpu/exchange.h
COUNT_BYTES = 24  # of what a rank tells another before a dispatch: records, tokens, T


@dataclass
class Traffic:
    """What a rank has sent to other ranks so far, without what torch.distributed adds."""

    dispatched_rows: int = 0
    combined_rows: int = 0
    bytes: int = 0


class _Work(NamedTuple):
    """What is under way, and since when."""

    work: dist.Work
    started: float


@dataclass
class _Open:
    """The exchange that a channel has open: rows per rank in each direction, and what is under way."""

    sent_rows: list[int]
    received_rows: list[int]
    counts: torch.Tensor
    records: torch.Tensor
    sent: torch.Tensor  # kept alive until the work is done
    work: _Work
    received: bool = False
    returned: bool = False  # this rank's combine, or its closing, is under way


class CollectiveTransport(Transport):
    """All-to-all of the group's own backend. A failed operation leaves the group unusable, so there is no
    recovery.

    ``ranks``: those of the group that exchange with this one, itself included, over gloo; None for all. Every
    rank of the group must be in exactly one such part.
    """

    name = "collective"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._group = group
        self._config = config
        self._timeout_s = config.timeout()
        self._names = range(dist.get_world_size(group)) if ranks is None else ranks
        self._rank, self._world = self._names.index(dist.get_rank(group)), len(self._names)
        self.traffic = Traffic()
        self.window_bytes = int(ops.window_layout(config.window_shape(self._world))[0])

        def make() -> NativeExchange:
            own = torch.frombuffer(anonymous(self.window_bytes), dtype=torch.uint8)
            windows = [own.data_ptr() if r == self._rank else 0 for r in range(self._world)]
            return NativeExchange(config, self._rank, self._world, own, windows, self._names)

        self._exchange, _ = rendezvous.together(group, make)
        self._part: Any = None if ranks is None else rendezvous.part(group, ranks, self._timeout_s)
        self._record_bytes = int(ops.dispatch_record_bytes(self._exchange.handle))
        self._open: list[_Open | None] = [None] * config.num_channels
        self._failure: EpTimeoutError | None = None

    def dispatch_send(self, call: DispatchCall) -> None:
        """Packs and starts to send; waits for the peers' counts only."""
        self.check()
        self.check_ids(call.ids)
        self.close_exchange(call.channel)
        arguments = (
            self._exchange.handle,
            call.channel,
            call.x,
            call.scales,
            call.ids,
            call.weights,
            call.slots,
        )
        rows = torch.empty(self._world, dtype=torch.int64)
        self._exchange.raise_for(ops.pack_count(*arguments, rows), call.ids)
        sent_rows: list[int] = rows.tolist()
        sent = torch.empty(sum(sent_rows) * self._record_bytes, dtype=torch.uint8)
        ops.pack_dispatch(*arguments, sent)

        tokens = torch.full((self._world,), call.x.shape[0])
        mine = torch.stack([rows, tokens, torch.full((self._world,), call.slots)], dim=1)
        counts = torch.empty_like(mine)
        self._wait(self._start(counts, mine), "dispatch", call.channel)
        received_rows: list[int] = counts[:, 0].tolist()
        records = sent.new_empty(sum(received_rows) * self._record_bytes)
        work = self._start(records, sent, self._record_sizes(received_rows), self._record_sizes(sent_rows))
        to_others = sum(sent_rows) - sent_rows[self._rank]
        self.traffic.dispatched_rows += to_others
        self.traffic.bytes += COUNT_BYTES * (self._world - 1) + self._record_bytes * to_others
        self._open[call.channel] = _Open(sent_rows, received_rows, counts, records, sent, work)

    def dispatch_recv(self, channel: int, slots: int, rows: torch.Tensor | None = None) -> Received:
        self.check()
        self._receive(channel)
        return self._exchange.received(channel, slots, rows)

    def received_places(self, channel: int, slots: int) -> torch.Tensor:
        return self._exchange.received_places(channel, slots)

    def combine_send(self, channel: int, y: torch.Tensor) -> None:
        self.check()
        sent = self._combine_buffer(channel)
        layout = LAYOUTS[self._config.layout]
        self._exchange.raise_for(ops.pack_combine(self._exchange.handle, channel, layout, y, sent))
        self._start_combine(channel, sent)

    def combine_recv(self, channel: int, out: torch.Tensor) -> None:
        self.check()
        exchange = opened(self._open, channel)
        self._wait(exchange.work, "combine", channel)
        self._open[channel] = None
        self._exchange.raise_for(ops.unpack_combine(self._exchange.handle, channel, exchange.records, out))

    def close_exchange(self, channel: int) -> None:
        """Answers the peers with closing flags and empty rows: they may have sent a combine, and all-to-all
        takes all."""
        self.check()
        exchange = self._open[channel]
        if exchange is None:
            return
        if not exchange.received:
            self._receive(channel)
        if not exchange.returned:
            sent = self._combine_buffer(channel)
            rows = torch.tensor(exchange.received_rows)
            self._exchange.raise_for(ops.pack_close(self._exchange.handle, channel, rows, sent))
            self._start_combine(channel, sent)
        self._wait(exchange.work, "combine", channel)
        self._open[channel] = None

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._exchange.check()

    def check_ids(self, ids: torch.Tensor) -> None:
        """Raise EpArgumentError for expert ids that a dispatch would refuse."""
        self._exchange.check_ids(ids)

    @property
    def status(self) -> int:
        """Why the exchange has stopped; OK if it has not, or torch.distributed has failed."""
        return self._exchange.status

    def recover(self) -> None:
        raise EpError(
            "the collective transport cannot recover: torch.distributed keeps no group usable after a failure"
        )

    def set_timeout(self, seconds: float) -> None:
        self._timeout_s = seconds

    def destroy(self) -> None:
        self._exchange.destroy()
        self._part = None

    def _receive(self, channel: int) -> None:
        exchange = opened(self._open, channel)
        self._wait(exchange.work, "dispatch", channel)
        status = ops.unpack_dispatch(self._exchange.handle, channel, exchange.records, exchange.counts)
        self._exchange.raise_for(status)
        exchange.received = True

    def _record_sizes(self, rows: list[int]) -> list[int]:
        return [n * self._record_bytes for n in rows]

    def _combine_sizes(self, rows: list[int]) -> list[int]:
        return [PACKED_FLAG_BYTES + n * self._config.wire_row_bytes for n in rows]

    def _combine_buffer(self, channel: int) -> torch.Tensor:
        return torch.empty(
            sum(self._combine_sizes(opened(self._open, channel).received_rows)), dtype=torch.uint8
        )

    def _start_combine(self, channel: int, sent: torch.Tensor) -> None:
        exchange = opened(self._open, channel)
        into, out_of = self._combine_sizes(exchange.sent_rows), self._combine_sizes(exchange.received_rows)
        exchange.records, exchange.sent = sent.new_empty(sum(into)), sent
        exchange.work = self._start(exchange.records, sent, into, out_of)
        exchange.returned = True
        self.traffic.combined_rows += sum(exchange.received_rows) - exchange.received_rows[self._rank]
        self.traffic.bytes += sum(out_of) - out_of[self._rank]

    def _start(self, into: torch.Tensor, sent: torch.Tensor, *sizes: Sequence[int]) -> _Work:
        started = monotonic()
        work = rendezvous.all_to_all(self._part or self._group, into, sent, *sizes, timeout_s=self._timeout_s)
        return _Work(work, started)

    def _wait(self, under_way: _Work, phase: str, channel: int) -> None:
        try:
            under_way.work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            self._failure = failure(
                self._names, self._rank, phase, channel, under_way.started, self._timeout_s, error
            )
            raise self._failure from error


def failure(
    names: Sequence[int],
    rank: int,
    phase: str,
    channel: int,
    started: float,
    timeout_s: float,
    error: RuntimeError,
) -> EpTimeoutError:
    """What ``error`` of torch.distributed means for the rank at place ``rank`` of ``names``, in an operation
    that began at ``started`` of the monotonic clock."""
    waited_s = monotonic() - started
    return EpTimeoutError(
        rank=names[rank],
        peer=names[1 - rank] if len(names) == 2 else -1,  # torch does not say
        phase=phase,
        channel=channel,
        waited_s=waited_s,
        lost=waited_s < 0.99 * timeout_s,
        detail=str(error),
    )
