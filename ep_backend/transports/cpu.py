"""Transport ``cpu``: windows in memory that the processes of one machine share; the protocol of
docs/protocol.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend._native import LAYOUTS, ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpError
from ep_backend.transports.base import DispatchCall, NativeExchange, Received, Transport
from ep_backend.transports.shm import WindowShare


class CpuTransport(Transport):
    """One window per rank, mapped by all. Raises EpConfigError on all ranks if any cannot map them.

    ``ranks``: those of the group that exchange with this one, itself included; None for all. Every rank of
    the group must be in exactly one such part.
    """

    name = "cpu"
    recoverable = True

    def __init__(
        self, group: dist.ProcessGroup | None, config: EpConfig, ranks: Sequence[int] | None = None
    ) -> None:
        self._timeout_s = config.timeout()
        ranks = range(dist.get_world_size(group)) if ranks is None else ranks
        rank, world = ranks.index(dist.get_rank(group)), len(ranks)
        self.window_bytes = int(ops.window_layout(config.window_shape(world))[0])
        share, addresses = rendezvous.together(
            group,
            lambda: WindowShare(self.window_bytes, rank, world, self._timeout_s),
            lambda share: share.address,
        )

        def join() -> tuple[list[torch.Tensor], NativeExchange]:
            mapped = share.map_peers([addresses[r] for r in ranks])
            windows = [torch.frombuffer(window, dtype=torch.uint8) for window in mapped]
            own, pointers = windows[rank], [window.data_ptr() for window in windows]
            return windows, NativeExchange(config, rank, world, own, pointers, ranks)

        (self._windows, self._exchange), _ = rendezvous.together(group, join)

    def dispatch_send(self, call: DispatchCall) -> None:
        arguments = (call.channel, call.x, call.scales, call.ids, call.weights, call.slots)
        self._exchange.until_done(lambda: ops.dispatch_send(self._exchange.handle, *arguments), call.ids)

    def dispatch_recv(self, channel: int, slots: int, rows: torch.Tensor | None = None) -> Received:
        self._exchange.until_done(lambda: ops.dispatch_wait(self._exchange.handle, channel))
        return self._exchange.received(channel, slots, rows)

    def received_places(self, channel: int, slots: int) -> torch.Tensor:
        return self._exchange.received_places(channel, slots)

    def combine_send(self, channel: int, y: torch.Tensor) -> None:
        layout = LAYOUTS[self._exchange.config.layout]
        self._exchange.raise_for(ops.combine_send(self._exchange.handle, channel, layout, y))

    def combine_recv(self, channel: int, out: torch.Tensor) -> None:
        self._exchange.until_done(lambda: ops.combine_recv(self._exchange.handle, channel, out))

    def close_exchange(self, channel: int) -> None:
        self._exchange.until_done(lambda: ops.exchange_close(self._exchange.handle, channel))

    def check(self) -> None:
        self._exchange.check()

    def stop(self, channel: int, status: int) -> None:
        """Stop, and tell the peers: what brings rows here from elsewhere has failed with ``status``."""
        ops.exchange_stop(self._exchange.handle, channel, status)

    def recover(self) -> None:
        self.meet(ops.exchange_max_epoch(self._exchange.handle))

    def meet(self, epoch: int) -> int:
        """All ranks that are not masked meet, so none writes any more; then all go on behind the highest
        epoch that one gave, which is returned. Nothing is cleared. Raises EpError."""
        absent = ops.exchange_recover(self._exchange.handle, round(self._timeout_s * 1e6), epoch)
        if absent:
            names = ", ".join(str(self._exchange.names[r]) for r in absent)
            raise EpError(
                f"rank {names} did not come to recover() within {self._timeout_s:g} s; "
                "this rank stays stopped: call recover() again on all ranks, or make a new communicator "
                "without the dead"
            )
        return int(ops.exchange_max_epoch(self._exchange.handle))

    def mask_ranks(self, ranks: Sequence[int]) -> list[int]:
        return list(ops.exchange_mask_ranks(self._exchange.handle, ranks))

    def set_timeout(self, seconds: float) -> None:
        self._timeout_s = seconds
        ops.exchange_set_timeout(self._exchange.handle, round(seconds * 1e6))

    def destroy(self) -> None:
        """Received views stay readable for as long as they live."""
        self._exchange.destroy()
        self._windows = []
