"""What the transports for GPUs share: the protocol of docs/protocol.md in CUDA kernels. Where the windows are
is each transport's own matter.

Dispatch and combine are one kernel each, or two where the halves are called, and nothing waits for the GPU,
so both can be captured in a CUDA graph. A failure on the GPU is raised by the next call on the host and by
``check``.

Rows arrive rank-major. For the other layouts more kernels copy them to their places, and combine may need
one that brings the results back (docs/architecture.md). The compact layout gives exactly the rows that came,
so its dispatch waits for the GPU to know how many, and cannot be captured.
"""

from __future__ import annotations

import itertools
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_backend import _native, rendezvous
from ep_backend._native import ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpArgumentError, EpConfigError, EpError, EpProtocolError
from ep_backend.places import LAYOUT_BLOCKS_PER_SM, local_numbers
from ep_backend.transports.base import DispatchCall, Received, Transport, WindowViews, error_for
from ep_backend.transports.cpu import CpuTransport

FLAGS_PER_SOURCE = 1024  # chunks that a call is divided into at most
MAX_TILES = 256  # csrc/kernels/cuda/layouts.h
BLOCKS_PER_SM = 2  # of dispatch and combine, as registers allow (csrc/kernels/cuda/types.h)
_shares = itertools.count(1)
_share: ContextVar[int] = ContextVar("ep_backend_share", default=0)


class Share:
    """Places on a GPU that several communicators of this process take in turns: of their exchanges never
    more are under way at once than the one with the most channels has. Those made ``with`` one share them."""

    def __init__(self) -> None:
        self._number = next(_shares)

    def __enter__(self) -> None:
        self._before = _share.set(self._number)

    def __exit__(self, *error: object) -> None:
        _share.reset(self._before)


@dataclass(frozen=True)
class Windows:
    """All ranks' windows as this rank's GPU sees them, and the memory behind its own, as bytes: its window,
    or its copies if windows are in host memory. ``direct``: with other windows in host memory, the ranks
    whose windows are in GPU memory, itself among them; ``own`` is a whole window then. ``staged``: those of
    others are a staging window of this GPU (csrc/kernels/cuda/types.h). ``keep``: what must live as long;
    ``release``: called once, when no kernel uses the windows any more."""

    addresses: Sequence[int]
    own: torch.Tensor
    copies: bool = False
    direct: Sequence[int] = ()
    staged: bool = False
    keep: Any = None
    release: Callable[[], Any] = lambda: None


class GpuTransport(Transport):
    """Raises EpConfigError on all ranks if any GPU cannot use its peers' windows, or its kernels would not
    fit.

    ``ranks``: those of the group that exchange with this one, itself included; None for all. Every rank of
    the group must be in exactly one such part. A part cannot recover.
    """

    capturable = True
    recoverable = True
    _recovering = False  # not all ranks have come to recover() yet
    _plan: tuple[int, ...] = ()  # how a call's tokens are divided among blocks: chosen for each call
    _stagger = 0  # ranks of a group in the staggered order; 0: each row to all its ranks in turn

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        device: torch.device,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._config, self._device = config, device
        self._names = range(dist.get_world_size(group)) if ranks is None else ranks
        self._rank, self._world = self._names.index(dist.get_rank(group)), len(self._names)
        self.window_bytes = window_bytes(config, self._world)
        _, sms = rendezvous.together(group, self._check_config, lambda sms: sms)
        # Where ranks meet to recover: windows in host memory, which also work when a GPU's queue does not.
        self._meeting: CpuTransport | None = None
        if self.recoverable and ranks is None:
            self._meeting = CpuTransport(group, _meeting_config(self._world, config.timeout()))
        windows = self._share_windows(group, config.window_shape(self._world, FLAGS_PER_SOURCE))
        blocks = min(sms) if config.num_sms is None else min(*sms, config.num_sms)
        rendezvous.together(group, lambda: self._start(windows, blocks))

    def _start(self, windows: Windows, blocks: int) -> None:
        """What this rank does alone once all windows are there. Raises RuntimeError."""
        config, device = self._config, self._device
        shape = config.window_shape(self._world, FLAGS_PER_SOURCE)
        self._windows = windows
        self._views = WindowViews(config, self._world, windows.own, shape, copies=windows.copies)
        self._exchange = self._create(shape, blocks, windows)
        self._free = weakref.finalize(self, _free, self._exchange, windows)
        self._placed: _PlacedRows | None = None
        self._blocks = LAYOUT_BLOCKS_PER_SM * blocks if config.num_sms is None else blocks  # that copy rows
        if config.layout != "rank_major":
            self._placed = _PlacedRows(config, self._exchange, self._rank, self._world, device, self._blocks)
        self._slots = [0] * config.num_channels  # T of each channel's last dispatch
        self._nothing = torch.empty(0, config.row_width, dtype=config.x_dtype, device=device)

    def _check_config(self) -> int:
        """The number of SMs of this rank's GPU."""
        config = self._config
        if config.sum_dtype not in (config.result_dtype, torch.float32):
            raise EpConfigError(
                f"wire_dtype is {config.sum_dtype}; on a GPU {config.result_dtype} or float32 was wanted"
            )
        elements = 16 // config.result_dtype.itemsize
        if config.hidden_size % elements:
            raise EpConfigError(
                f"hidden_size is {config.hidden_size}; on a GPU a multiple of {elements} was wanted, "
                f"16 bytes of {config.result_dtype}"
            )
        return sms(self._device)

    @abstractmethod
    def _share_windows(self, group: dist.ProcessGroup | None, shape: list[int]) -> Windows:
        """Collective; windows and copies are zeroed on return. ``shape``: the fields of ``ExchangeShape``."""

    def _create(self, shape: list[int], blocks: int, windows: Windows) -> int:
        config = self._config
        # The other layouts find places from global ids, whatever the caller wants to see.
        as_wanted = config.layout == "rank_major"
        return int(
            ops.cuda_exchange_create(
                shape,
                self._rank,
                config.hidden_size,
                _native.DTYPES[config.sum_dtype],
                _native.DTYPES[config.result_dtype],
                config.expert_ids == "local" and as_wanted,
                config.pad_id if as_wanted else -1,
                0,
                round(config.timeout() * 1e6),
                blocks,
                self._device.index,
                list(config.expert_ranks(self._world)),
                list(windows.addresses),
                windows.own.data_ptr() if windows.copies or windows.direct else 0,
                list(windows.direct),
                windows.staged,
                self._stagger,
                config.chunk_scale or 1.0,
                _share.get(),
            )
        )

    def dispatch(self, call: DispatchCall) -> Received:
        return self._dispatch(call, send=True)

    def dispatch_send(self, call: DispatchCall) -> None:
        self._launch_dispatch(call, None)

    def dispatch_recv(self, channel: int, slots: int, rows: torch.Tensor | None = None) -> Received:
        nothing = self._nothing
        empty = nothing.new_empty(0, self._config.top_k, dtype=torch.float32)
        call = DispatchCall(channel, nothing, None, empty.int(), empty, slots)
        return self._dispatch(call, send=False, rows=rows)

    def received_places(self, channel: int, slots: int) -> torch.Tensor:
        assert self._placed is not None
        return self._placed.places[channel]

    def combine(self, channel: int, y: torch.Tensor, out: torch.Tensor) -> None:
        self._launch_combine(channel, y, out, self._placed_in(channel))

    def combine_send(self, channel: int, y: torch.Tensor) -> None:
        self._launch_combine(channel, y, None, self._placed_in(channel))

    def combine_recv(self, channel: int, out: torch.Tensor) -> None:
        self._launch_combine(channel, None, out)

    def exchange_sums(
        self,
        call: DispatchCall,
        y: torch.Tensor,
        places: torch.Tensor,
        out: torch.Tensor | None,
        ends: tuple[Transport, int] | None,
    ) -> bool:
        other, ended_channel = ends or (self, 0)
        if type(other) is not type(self):
            return False
        self.check()
        self._slots[call.channel] = call.slots
        plan = [call.slots, *self._plan]
        into = self._nothing if out is None else out
        return bool(
            ops.cuda_exchange_sums(
                self._exchange,
                call.channel,
                call.ids,
                call.weights,
                y,
                places,
                plan,
                other._exchange if ends else 0,
                ended_channel,
                out is not None,
                into,
            )
        )

    def close_exchange(self, channel: int) -> None:
        """The closing flags leave with the next dispatch on the channel, which all ranks make."""
        self.check()

    def close_now(self, channel: int) -> None:
        """As ``close_exchange``, but the closing flags leave at once, and this rank waits for those of the
        others: by two kernels, where the next dispatch needs none."""
        self.check()
        for send in (True, False):
            ops.cuda_close(self._exchange, channel, send)

    def check(self) -> None:
        if self._recovering:
            assert self._meeting is not None
            self._meeting.check()
        word = ops.cuda_exchange_error(self._exchange)
        if word[0] == _native.OK:
            return
        error = error_for(word, self._rank, self._world, self._names)
        if word[0] == _native.PEER_CLOSED:
            raise EpProtocolError(f"{error} in an exchange before; the communicator stays usable")
        raise error

    def recover(self) -> None:
        """All ranks meet with idle GPUs; then all go on behind the highest epoch. Nothing is cleared. Before
        that, graphs that are replayed do nothing."""
        if self._meeting is None:
            raise EpError(f"transport {self.name} cannot recover; a new communicator was wanted")
        self._recovering = True
        torch.cuda.synchronize(self._device)
        ops.cuda_exchange_stop(self._exchange)
        epoch = self._meeting.meet(ops.cuda_exchange_max_epoch(self._exchange))
        ops.cuda_exchange_recover(self._exchange, epoch)
        self._recovering = False

    def mask_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Holds for graphs that were captured before, too. Waits until the GPU is idle."""
        if self._meeting is None:
            return super().mask_ranks(ranks)
        torch.cuda.synchronize(self._device)
        ops.cuda_exchange_mask_ranks(self._exchange, ranks)
        self._meeting.mask_ranks(ranks)
        return self._slots.copy()

    def set_timeout(self, seconds: float) -> None:
        """Holds for graphs that were captured before, too. Waits until the GPU is idle."""
        if self._meeting is not None:
            self._meeting.set_timeout(seconds)
        ops.cuda_exchange_set_timeout(self._exchange, round(seconds * 1e6))

    def destroy(self) -> None:
        """Waits for the GPU: kernels that still run use what is given back."""
        torch.cuda.synchronize(self._device)
        self._free()
        self._placed = None
        if self._meeting is not None:
            self._meeting.destroy()

    def _dispatch(self, call: DispatchCall, send: bool, rows: torch.Tensor | None = None) -> Received:
        count = self._world * call.slots
        tokens = torch.empty(self._world, dtype=torch.int32, device=self._device)
        if self._placed is not None:
            self._launch_dispatch(call, (*self._placed.metadata(call.channel, count), tokens), send)
            window = self._views.rows_and_scales(call.channel, call.slots)
            return self._placed.received(call.channel, *window, tokens, rows)
        ids = torch.empty(count, self._config.top_k, dtype=torch.int32, device=self._device)
        weights = torch.empty(count, self._config.top_k, dtype=torch.float32, device=self._device)
        self._launch_dispatch(call, (ids, weights, tokens), send)
        return Received(*self._views.rows_and_scales(call.channel, call.slots), ids, weights, tokens, None)

    def _launch_dispatch(
        self,
        call: DispatchCall,
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        send: bool = True,
    ) -> None:
        self._refuse_capture()
        self.check()
        self._slots[call.channel] = call.slots
        receive = out is not None
        ids, weights, tokens = out or (self._nothing,) * 3
        ops.cuda_dispatch(
            self._exchange,
            call.channel,
            call.x,
            call.scales,
            call.ids,
            call.weights,
            call.num_tokens,
            [call.slots, *self._plan],
            send,
            receive,
            ids,
            weights,
            tokens,
        )

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is captured on the current stream."""
        with torch.cuda.device(self._device):  # else the question makes a context on another GPU
            return torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self) -> None:
        if self._config.layout == "compact" and self.is_capturing():
            raise EpArgumentError(
                "dispatch was called while a CUDA graph is captured, but in layout compact it waits for the "
                "GPU to know how many rows came; layout rank_major or expert_major was wanted"
            )

    def _placed_in(self, channel: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where this communicator's own layout has the rows of a channel; None if they are rank-major."""
        if self._placed is None:
            return None
        return self._placed.placed(channel, self._world * self._slots[channel])

    def _launch_combine(
        self,
        channel: int,
        y: torch.Tensor | None,
        out: torch.Tensor | None,
        placed: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """``y`` is None in the receiving half, ``out`` in the sending one. ``placed``: places and weights."""
        self.check()
        places = weights = sums = None
        if y is not None and placed is not None:
            places, weights = placed
            places.record_stream(torch.cuda.current_stream(self._device))  # the next dispatch drops them
            shape = (len(places), self._config.hidden_size)
            sums = torch.empty(shape, dtype=self._config.sum_dtype, device=self._device)
            if self._config.layout == "compact":
                ops.cuda_return_rows(y, places, None, self._blocks, sums)
                y, places, weights, sums = sums, None, None, None
        ops.cuda_combine(
            self._exchange,
            channel,
            self._nothing if y is None else y,
            places,
            weights,
            sums,
            self._blocks,
            [self._slots[channel], *self._plan],
            y is not None,
            out is not None,
            self._nothing if out is None else out,
        )


class _PlacedRows:
    """Received rows in a layout other than rank-major, and results back in rank-major rows for combine.

    Each channel has scratch memory of its own, as weights are needed until combine and channels may be on
    different streams.

    ``places``: of each channel's last exchange, [its slots, top_k] int32 (compact: [its slots, 1]).
    """

    def __init__(
        self, config: EpConfig, exchange: int, rank: int, world: int, device: torch.device, blocks: int
    ) -> None:
        self._config, self._exchange, self._device, self._blocks = config, exchange, device, blocks
        self._by_expert = config.layout == "expert_major"
        numbers = local_numbers(config.expert_ranks(world), rank)
        self._num_local = int((numbers >= 0).sum())
        self._local = numbers.to(device)
        channels, slots = config.num_channels, world * config.max_tokens_per_rank

        def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(channels, *shape, dtype=dtype, device=device)

        self._ids = scratch(slots, config.top_k, dtype=torch.int32)
        self._weights = scratch(slots, config.top_k, dtype=torch.float32)
        self.places = [self._ids.new_empty(0)] * channels
        self._tile_counts = scratch(MAX_TILES, self._num_local + 1, dtype=torch.int32)
        torch.cuda.synchronize(device)  # later calls may be on other streams

    def metadata(self, channel: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where dispatch puts ids (global, -1: none) and weights of ``count`` slots: [count, top_k] each."""
        return self._ids[channel, :count], self._weights[channel, :count]

    def received(
        self,
        channel: int,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        tokens: torch.Tensor,
        into: torch.Tensor | None,
    ) -> Received:
        """Rows and scales of a channel's window, [count, ...], copied to their places; behind a dispatch.
        ``into``: memory for the rows there, None for new memory."""
        config, count = self._config, len(rows)
        ids, weights = self.metadata(channel, count)
        places = self.places[channel] = ids.new_empty(count, config.top_k if self._by_expert else 1)
        totals = ids.new_empty(self._num_local + 1)
        tile_counts = self._tile_counts[channel]
        if not self._by_expert:
            ops.cuda_index_rows(ids, self._local, self._blocks, tile_counts, places, totals)
        # The one wait for the GPU: for R.
        lead = [self._num_local, count] if self._by_expert else [int(totals[-1])]

        def out(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*lead, width, dtype=dtype, device=self._device)

        out_rows = out(config.row_width, config.received_dtype) if into is None else into
        out_scales = None
        if scales is not None and config.scales_by_column:
            out_scales = scales.new_empty(self._num_local, config.scale_width, count).transpose(1, 2)
        elif scales is not None:
            out_scales = out(config.scale_width, config.scale_dtype)
        if self._by_expert:
            ops.cuda_sort_rows(
                self._exchange,
                rows,
                scales,
                ids,
                self._local,
                self._blocks,
                tile_counts,
                places,
                totals,
                out_rows,
                out_scales,
            )
            return Received(out_rows, out_scales, None, None, tokens, totals[:-1])
        out_ids, out_weights = out(config.top_k, torch.int32), out(config.top_k, torch.float32)
        ops.cuda_gather_rows(
            rows,
            scales,
            ids,
            weights,
            self._local,
            places,
            config.expert_ids == "local",
            config.pad_id,
            self._blocks,
            out_rows,
            out_scales,
            out_ids,
            out_weights,
        )
        return Received(out_rows, out_scales, out_ids, out_weights, tokens, totals[:-1])

    def placed(self, channel: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and weights of a channel's ``count`` slots. Compact rows are weighted already: their weights
        are for nobody."""
        return self.places[channel], self._weights[channel, :count]


def _free(exchange: int, windows: Windows) -> None:
    ops.cuda_exchange_destroy(exchange)
    windows.release()


def window_bytes(config: EpConfig, world: int) -> int:
    """Of a rank's window."""
    return int(ops.window_layout(config.window_shape(world, FLAGS_PER_SOURCE))[0])


def sms(device: torch.device) -> int:
    """Of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _meeting_config(world: int, timeout_s: float) -> EpConfig:
    """The smallest configuration there is: only its meeting words are used."""
    return EpConfig(
        num_experts=world,
        top_k=1,
        hidden_size=8,
        max_tokens_per_rank=1,
        timeout_s=timeout_s,
        transport=CpuTransport.name,
    )
