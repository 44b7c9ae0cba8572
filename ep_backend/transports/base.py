"""What every transport does, and what all of them share: the native exchange and its errors."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ep_backend import _native
from ep_backend._native import LAYOUTS, ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpArgumentError, EpError, EpProtocolError, EpTimeoutError
from ep_backend.places import find_places, local_numbers


@dataclass(frozen=True)
class DispatchCall:
    """Checked arguments of one dispatch. ``slots`` is T, the slots per source; ``num_tokens``, if given, says
    on the device how many of the tokens count."""

    channel: int
    x: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor
    slots: int
    num_tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Received:
    """What arrived, in the layout of the communicator; R is the number of rows.

    ``rank_major``: R = world * T, a view of the window; the row of token t of source s is number s * T + t.
    Rows without a local expert hold anything: never multiply them, not even by 0. ``compact``: only the R
    rows that have a local expert, in order of source and token. ``expert_major``: ``rows`` is [local experts,
    world * T, ...], for each expert its rows in order of source and token, then rows that hold anything.
    """

    rows: torch.Tensor
    """[R, hidden] or [local experts, world * T, hidden]; opaque payloads have ``payload_bytes`` columns of
    uint8."""
    scales: torch.Tensor | None
    """As ``rows``, but float32 [..., hidden / 128] for fp8 and uint8 [..., scale_bytes] for opaque payloads;
    else None."""
    topk_ids: torch.Tensor | None
    """[R, top_k] int32, as ``EpConfig.expert_ids`` and ``pad_id`` say. None if expert-major."""
    topk_weights: torch.Tensor | None
    """[R, top_k] float32; 0 where the id is ``pad_id``. None if expert-major."""
    tokens_per_source: torch.Tensor
    """[world] int32: tokens that each rank dispatched, to whomever."""
    rows_per_expert: torch.Tensor | None
    """[local experts] int32. None in the rank-major layout on a GPU, where nobody needs to count."""


class Transport(ABC):
    """How rows travel. Made together by all ranks; used by one thread at a time, in the same order on all
    ranks."""

    name: str
    window_bytes: int
    gives_views = True  # received rank-major rows are memory that later exchanges write again
    recoverable = False  # ``recover`` and ``mask_ranks`` work
    capturable = False  # CUDA graphs can hold its exchanges, if the layout needs no wait for the GPU
    nodes: Sequence[Sequence[int]] | None = None  # as ``Communicator.nodes``

    @abstractmethod
    def dispatch_send(self, call: DispatchCall) -> None: ...
    @abstractmethod
    def dispatch_recv(self, channel: int, slots: int, rows: torch.Tensor | None = None) -> Received:
        """``rows``: where expert-major rows may go; a transport that puts them elsewhere ignores it."""

    @abstractmethod
    def combine_send(self, channel: int, y: torch.Tensor) -> None: ...
    @abstractmethod
    def combine_recv(self, channel: int, out: torch.Tensor) -> None: ...
    @abstractmethod
    def close_exchange(self, channel: int) -> None: ...
    @abstractmethod
    def check(self) -> None: ...
    @abstractmethod
    def recover(self) -> None: ...
    @abstractmethod
    def set_timeout(self, seconds: float) -> None: ...
    @abstractmethod
    def destroy(self) -> None: ...

    def mask_ranks(self, ranks: Sequence[int]) -> list[int]:
        """As ``Communicator.mask_ranks``; `recover` is then of all others. Returns T of each channel's last
        exchange, 0 where there was none."""
        raise EpError(
            f"transport {self.name} cannot mask ranks; a new process group and communicator without them "
            "were wanted"
        )

    def received_places(self, channel: int, slots: int) -> torch.Tensor | None:
        """As ``Communicator.received_places``."""
        return None

    def exchange_sums(
        self,
        call: DispatchCall,
        y: torch.Tensor,
        places: torch.Tensor,
        out: torch.Tensor | None,
        ends: tuple[Transport, int] | None,
    ) -> bool:
        """``Communicator.exchange_sums`` in a better way than by dispatch and combine, without ``out`` its
        first half; ``ends``: the transport and the channel of the exchange that ends. False, and nothing has
        happened, if there is none; the same on all ranks."""
        return False

    # Both halves at once; a transport that has a better way than one after the other says so.
    def dispatch(self, call: DispatchCall) -> Received:
        self.dispatch_send(call)
        return self.dispatch_recv(call.channel, call.slots)

    def combine(self, channel: int, y: torch.Tensor, out: torch.Tensor) -> None:
        self.combine_send(channel, y)
        self.combine_recv(channel, out)


Exchange = TypeVar("Exchange")


def opened(exchanges: Sequence[Exchange | None], channel: int) -> Exchange:
    """The exchange that a channel has open. Raises EpError if it has none."""
    exchange = exchanges[channel]
    if exchange is None:
        raise EpError("the channel has no open exchange: dispatch and combine alternate")
    return exchange


class WindowViews:
    """Received rows and scales of a channel as tensors that are this rank's window itself, or a GPU's copy.

    ``window``: all of it, as bytes; ``copies``: the copies of all channels instead. ``shape``: the fields of
    ``ExchangeShape`` (csrc/common/layout.h).
    """

    def __init__(
        self, config: EpConfig, world: int, window: torch.Tensor, shape: list[int], *, copies: bool = False
    ) -> None:
        self._config, self._world, self._window = config, world, window
        _, first, stride, self._scales_at, self._rows_at, copy_bytes = ops.window_layout(shape)
        self._first: int = 0 if copies else first
        self._stride: int = copy_bytes if copies else stride

    def rows_and_scales(self, channel: int, slots: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[world * T, row] of the received dtype; [world * T, scales], or None if rows have none."""
        config, count = self._config, self._world * slots
        base = self._first + channel * self._stride
        rows = self._view(base + self._rows_at, config.received_dtype, count, config.row_width)
        if not config.row_scale_bytes:
            return rows, None
        return rows, self._view(base + self._scales_at, config.scale_dtype, count, config.scale_width)

    def _view(self, offset: int, dtype: torch.dtype, rows: int, width: int) -> torch.Tensor:
        size = rows * width * dtype.itemsize
        return self._window[offset : offset + size].view(dtype).view(rows, width)


class NativeExchange:
    """This rank's window and its C++ exchange: what CPU transports are built on.

    ``windows``: addresses of all ranks' windows, as this process has them mapped; a rank without one is 0.
    ``own``: this rank's window as bytes. ``names``: what errors call the ranks, where these are part of a
    larger group; None for 0 ... world - 1.
    """

    def __init__(
        self,
        config: EpConfig,
        rank: int,
        world: int,
        own: torch.Tensor,
        windows: list[int],
        names: Sequence[int] | None = None,
    ) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.names = range(world) if names is None else names
        shape = config.window_shape(world)
        self._views = WindowViews(config, world, own, shape)
        expert_ranks = config.expert_ranks(world)
        self.num_local = expert_ranks.count(rank)
        self.handle = ops.exchange_create(
            shape,
            rank,
            config.hidden_size,
            _native.DTYPES[config.sum_dtype],
            _native.DTYPES[config.received_dtype],
            config.expert_ids == "local",
            config.pad_id,
            0,
            round(config.timeout() * 1e6),
            list(expert_ranks),
            windows,
        )
        self._free = weakref.finalize(self, ops.exchange_destroy, self.handle)

    def destroy(self) -> None:
        self._free()
        self.__dict__.pop("_views", None)  # tensors that were handed out keep the window, nothing else does

    def received_places(self, channel: int, slots: int) -> torch.Tensor:
        """As ``Communicator.received_places``."""
        ids = torch.empty(self.world * slots, self.config.top_k, dtype=torch.int32)
        weights = torch.empty_like(ids, dtype=torch.float32)
        ops.dispatch_read(self.handle, channel, LAYOUTS["rank_major"], None, None, ids, weights)
        return find_places(ids, local_numbers(self.config.expert_ranks(self.world), self.rank))

    def received(self, channel: int, slots: int, out: torch.Tensor | None = None) -> Received:
        """The received rows in the layout of the configuration, after all of them have come. ``out``: where
        expert-major rows go."""
        config, top_k, capacity = self.config, self.config.top_k, self.world * slots
        tokens = torch.empty(self.world, dtype=torch.int32)
        per_expert = torch.empty(self.num_local, dtype=torch.int32)
        num_rows = ops.dispatch_counts(self.handle, channel, tokens, per_expert)

        ids = weights = scales = None
        if config.layout == "rank_major":
            rows, scales = self._views.rows_and_scales(channel, slots)
            lead = [capacity]
        else:
            lead = [num_rows] if config.layout == "compact" else [self.num_local, capacity]
            rows = torch.empty([*lead, config.row_width], dtype=config.received_dtype) if out is None else out
            if config.row_scale_bytes:
                scales = torch.empty([*lead, config.scale_width], dtype=config.scale_dtype)
        if config.layout != "expert_major":
            ids = torch.empty([*lead, top_k], dtype=torch.int32)
            weights = torch.empty([*lead, top_k], dtype=torch.float32)
        ops.dispatch_read(self.handle, channel, LAYOUTS[config.layout], rows, scales, ids, weights)
        return Received(rows, scales, ids, weights, tokens, per_expert)

    def until_done(self, call: Callable[[], int], ids: torch.Tensor | None = None) -> None:
        """Call what may wait until it has waited enough, then `raise_for` its status.

        A long wait returns now and then, so that a signal such as Ctrl-C ends it.
        """
        while (status := call()) == _native.WAITING:
            pass
        self.raise_for(status, ids)

    def raise_for(self, status: int, ids: torch.Tensor | None = None) -> None:
        """Turn a status of the C++ code into the error it means; nothing for success."""
        if status == _native.OK:
            return
        if status in (_native.BAD_ID, _native.DUPLICATE_ID):
            assert ids is not None
            raise EpArgumentError(_describe_bad_ids(ids, self.config.num_experts))
        if status == _native.WRONG_STATE:
            raise EpError("the channel is not at this point of an exchange: dispatch and combine alternate")
        if status == _native.RECOVERING:
            raise EpError(
                "stopped: recover() was called here, but not all ranks came to it; call it again on all ranks"
            )
        *word, closed_by = ops.exchange_error(self.handle)
        if status == _native.PEER_CLOSED:
            # Not sticky: the exchange is over for everybody.
            word[:2] = status, closed_by
            error = error_for(word, self.rank, self.world, self.names)
            raise EpProtocolError(f"{error}; the communicator stays usable")
        raise error_for(word, self.rank, self.world, self.names)

    def check(self) -> None:
        """Raise the sticky error, if there is one."""
        self.raise_for(self.status)

    def check_ids(self, ids: torch.Tensor) -> None:
        """Raise EpArgumentError if expert ids are out of range or an expert stands twice in a token."""
        self.raise_for(ops.check_ids(self.handle, ids), ids)

    @property
    def status(self) -> int:
        """Of the sticky error; OK if there is none."""
        return int(ops.exchange_error(self.handle)[0])


def _describe_bad_ids(ids: torch.Tensor, num_experts: int) -> str:
    outside = ((ids < -1) | (ids >= num_experts)).nonzero()
    if len(outside):
        token, k = outside[0].tolist()
        return (
            f"topk_ids[{token}, {k}] is {int(ids[token, k])}; ids from 0 to {num_experts - 1}, or -1 for "
            "none, were wanted"
        )
    ordered = ids.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    token, k = twice[0].tolist()
    expert = int(ordered[token, k])
    return f"token {token} has expert {expert} twice in its top-k; each expert at most once was wanted"


_PROTOCOL_CAUSES = {
    _native.SLOTS_DIFFER: "not all ranks gave the same tokens_per_rank to a dispatch",
    _native.AHEAD: "the ranks did not make the same calls",
}


def error_for(word: list[int], rank: int, world: int, names: Sequence[int] | None = None) -> EpError:
    """What an error word (csrc/common/status.h, its fields in order) means on ``rank``. ``names``: what to
    call the ranks, None for 0 ... world - 1."""
    status, peer, reporter, phase, channel, expected, seen, waited_us, cause, *masks = word
    names = range(world) if names is None else names
    bits = sum((mask & (2**64 - 1)) << (64 * i) for i, mask in enumerate(masks))
    missing = tuple(names[r] for r in range(world) if bits >> r & 1)
    rank, peer, reporter = (names[r] if r >= 0 else r for r in (rank, peer, reporter))
    if status == _native.ABORTED and cause in (_native.SLOTS_DIFFER, _native.AHEAD):
        blamed = f", and blames rank {peer}" if peer != rank else ", and blames this rank"
        blamed = "" if peer < 0 else blamed
        return EpProtocolError(f"rank {reporter} stopped: {_PROTOCOL_CAUSES[cause]}{blamed}")
    if status == _native.PEER_CLOSED:
        return EpProtocolError(
            f"rank {peer} ended the exchange without a combine, so rank {rank} lacks its rows"
        )
    if status == _native.SLOTS_DIFFER:
        return EpProtocolError(
            f"rank {peer} and rank {rank} gave different tokens_per_rank to the same dispatch; it must be "
            "equal on all ranks"
        )
    if status == _native.AHEAD:
        return EpProtocolError(
            f"rank {peer} is at exchange {seen} while rank {rank} is at {expected}: the ranks did not make "
            "the same calls"
        )
    return EpTimeoutError(
        rank=rank,
        peer=peer,
        phase=_native.PHASES[phase],
        channel=channel,
        epoch_expected=expected,
        epoch_seen=seen,
        waited_s=waited_us / 1e6,
        reported_by=reporter,
        missing=missing,
    )
