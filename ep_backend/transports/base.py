"""What every transport does, and what all of them share: the native exchange and its errors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Protocol

import torch

from ep_backend import _native
from ep_backend._native import LAYOUTS, ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpArgumentError, EpError, EpProtocolError, EpTimeoutError


@dataclass(frozen=True)
class DispatchCall:
    """Checked arguments of one dispatch. ``slots`` is T, the slots per source."""

    channel: int
    x: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor
    slots: int


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
    """[R, top_k] int32; experts of other ranks and slots without a token are ``pad_id``. None if
    expert-major."""
    topk_weights: torch.Tensor | None
    """[R, top_k] float32; 0 where the id is ``pad_id``. None if expert-major."""
    tokens_per_source: torch.Tensor
    """[world] int32: tokens that each rank dispatched, to whomever."""
    rows_per_expert: torch.Tensor
    """[local experts] int32."""


class Transport(Protocol):
    """How rows travel. Made together by all ranks; used by one thread at a time, in the same order on all
    ranks."""

    name: str
    window_bytes: int

    def dispatch_send(self, call: DispatchCall) -> None: ...
    def dispatch_recv(self, channel: int, slots: int) -> Received: ...
    def combine_send(self, channel: int, y: torch.Tensor) -> None: ...
    def combine_recv(self, channel: int, out: torch.Tensor) -> None: ...
    def close_exchange(self, channel: int) -> None: ...
    def check(self) -> None: ...
    def recover(self) -> None: ...
    def set_timeout(self, seconds: float) -> None: ...
    def destroy(self) -> None: ...


class NativeExchange:
    """This rank's window and its C++ exchange: what CPU transports are built on.

    ``windows``: addresses of all ranks' windows, as this process has them mapped; a rank without one is 0.
    ``own``: this rank's window as bytes.
    """

    def __init__(
        self, config: EpConfig, rank: int, world: int, own: torch.Tensor, windows: list[int]
    ) -> None:
        self.config, self.rank, self.world, self.own = config, rank, world, own
        expert_ranks = config.expert_ranks(world)
        self.num_local = expert_ranks.count(rank)
        self.handle = ops.exchange_create(
            config.window_shape(world),
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
        _, self._first, self._stride, self._scales_at, self._rows_at = ops.window_layout(
            config.window_shape(world)
        )

    def destroy(self) -> None:
        self._free()

    def received(self, channel: int, slots: int) -> Received:
        """The received rows in the layout of the configuration, after all of them have come."""
        config, top_k, capacity = self.config, self.config.top_k, self.world * slots
        tokens = torch.empty(self.world, dtype=torch.int32)
        per_expert = torch.empty(self.num_local, dtype=torch.int32)
        num_rows = ops.dispatch_counts(self.handle, channel, tokens, per_expert)

        row_dtype, width = config.received_dtype, config.row_width
        scale_dtype = torch.float32 if config.is_fp8 else torch.uint8
        scale_width = config.row_scale_bytes // scale_dtype.itemsize
        ids = weights = scales = None
        if config.layout == "rank_major":
            base = self._first + channel * self._stride
            rows = self._view(base + self._rows_at, row_dtype, capacity, width)
            if scale_width:
                scales = self._view(base + self._scales_at, scale_dtype, capacity, scale_width)
            lead = [capacity]
        else:
            lead = [num_rows] if config.layout == "compact" else [self.num_local, capacity]
            rows = torch.empty([*lead, width], dtype=row_dtype)
            if scale_width:
                scales = torch.empty([*lead, scale_width], dtype=scale_dtype)
        if config.layout != "expert_major":
            ids = torch.empty([*lead, top_k], dtype=torch.int32)
            weights = torch.empty([*lead, top_k], dtype=torch.float32)
        ops.dispatch_read(self.handle, channel, LAYOUTS[config.layout], rows, scales, ids, weights)
        return Received(rows, scales, ids, weights, tokens, per_expert)

    def _view(self, offset: int, dtype: torch.dtype, rows: int, width: int) -> torch.Tensor:
        size = rows * width * dtype.itemsize
        return self.own[offset : offset + size].view(dtype).view(rows, width)

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
        _, peer, reporter, phase, channel, expected, seen, waited_us, *masks, closed_by = ops.exchange_error(
            self.handle
        )
        if status == _native.PEER_CLOSED:
            raise EpProtocolError(
                f"rank {closed_by} ended the exchange without a combine, so rank {self.rank} lacks its rows; "
                "the communicator stays usable"
            )
        if status == _native.SLOTS_DIFFER:
            raise EpProtocolError(
                f"rank {peer} and rank {self.rank} gave different tokens_per_rank to the same dispatch; it "
                "must be equal on all ranks"
            )
        if status == _native.AHEAD:
            raise EpProtocolError(
                f"rank {peer} is at exchange {seen} while rank {self.rank} is at {expected}: the ranks did "
                "not make the same calls"
            )
        bits = sum((mask & (2**64 - 1)) << (64 * i) for i, mask in enumerate(masks))
        raise EpTimeoutError(
            rank=self.rank,
            peer=peer,
            phase=_native.PHASES[phase],
            channel=channel,
            epoch_expected=expected,
            epoch_seen=seen,
            waited_s=waited_us / 1e6,
            reported_by=reporter,
            missing=tuple(r for r in range(self.world) if bits >> r & 1),
        )

    def check(self) -> None:
        """Raise the sticky error, if there is one."""
        self.raise_for(ops.exchange_error(self.handle)[0])


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
