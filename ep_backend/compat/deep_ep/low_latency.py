"""Low-latency mode: rows by expert, weighted sums.

The top-k weights come only with the combine, but the ranks that hold the experts apply them before rows
travel back. So a combine is an exchange of its own, which brings weights first; where the rows of each of
its slots stand is known since the dispatch of the rows. That one's exchange is never combined: the
first combine of its rows ends it, or else the next one on its channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ep_backend.communicator import Communicator, Handle
from ep_backend.compat.deep_ep.pool import Member, Pool, Usual
from ep_backend.config import SCALE_BLOCK
from ep_backend.errors import EpArgumentError
from ep_backend.transports.gpu import sms

CHANNELS = 2
"""Calls whose hooks may be open at once, as in DeepEP."""
SHARE = 1 / 2
"""Blocks of one channel for each SM of the GPU: both channels and the kernels behind theirs fill it."""
FEW_TOKENS, SMALL_CHUNKS = 32, 1 / 2
"""Of a combine: up to so many tokens chunks of that size, against the usual one."""
MIN_AMAX = 1e-4  # of a block that is quantised with a rounded scale; DeepEP's
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Shape:
    """What dispatch and combine of an exchange have in common."""

    tokens: int
    """T: most tokens that a rank dispatches."""
    hidden: int
    num_experts: int
    top_k: int
    device: torch.device

    def fields(self) -> dict[str, Any]:
        """Those of EpConfig."""
        blocks = 0 if self.device.type == "cpu" else max(1, int(SHARE * sms(self.device)))
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "hidden_size": self.hidden,
            "out_dtype": torch.bfloat16,
            "expert_ids": "global",
            "num_channels": CHANNELS,
            "num_sms": Usual(blocks, blocks) if blocks else None,
        }


def dispatch_fields(shape: Shape, quantized: bool, rounded: bool) -> dict[str, Any]:
    """EpConfig of a dispatch: bf16, fp8 by the kernel, or fp8 that is quantised before."""
    # Scales of columns, as GEMMs with scales of blocks read them, and as DeepEP gives them.
    fields = {**shape.fields(), "layout": "expert_major", "scales_by_column": quantized}
    if rounded:
        return {**fields, "payload": torch.float8_e4m3fn}
    return {
        **fields,
        "payload": torch.bfloat16,
        "quantization": "fp8_block128" if quantized else None,
    }


def combine_fields(shape: Shape) -> dict[str, Any]:
    """EpConfig of a combine."""
    # More blocks for few tokens: each makes the sums of many experts' rows.
    scale = SMALL_CHUNKS if shape.tokens <= FEW_TOKENS else None
    return {
        **shape.fields(),
        "sums_only": True,
        "chunk_scale": scale,
    }


class LowLatencyHandle(Sequence[Any]):
    """As DeepEP's: (src_info, layout_range, T, hidden, num_experts). The first two are computed when they are
    asked for.

    ``src_info``: [local experts, ranks * T] int32, the token of its source that a row is; beyond the count,
    -1. ``layout_range``: [local experts, ranks] int64, ``first << 32 | count`` of each source's rows.
    """

    def __init__(self, shape: Shape, world: int) -> None:
        self.shape, self._world = shape, world
        self.places: torch.Tensor | None = None
        """As ``Communicator.received_places``. None until the rows have come, and with transport hier."""
        self.exchange: tuple[Member, Handle] | None = None
        """That has brought the rows. None until they have come."""

    @property
    def ends(self) -> tuple[Communicator, Handle] | None:
        """What the first combine ends on its way: the exchange, if nothing else has ended it."""
        if self.exchange is None:
            return None
        member, handle = self.exchange
        return (member.communicator, handle) if member.alive and handle.state == "received" else None

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        if isinstance(place, range):
            return tuple(self[each] for each in place)
        if place < 2:
            return self._sources()[place]
        return (self.shape.tokens, self.shape.hidden, self.shape.num_experts)[place - 2]

    def _sources(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.places is None:
            raise EpArgumentError(
                "src_info and layout_range are not known: call the hook first; transport hier has none"
            )
        slots, local = len(self.places), self.shape.num_experts // self._world
        slot = torch.arange(slots, device=self.places.device)[:, None].expand_as(self.places)
        # All others write behind the end. No mask: a CUDA graph may hold this.
        at = torch.where(self.places < 0, local * slots, self.places).long()
        src_info = torch.full((local * slots + 1,), -1, dtype=torch.int32, device=at.device)
        src_info.scatter_(0, at.flatten(), (slot % self.shape.tokens).int().flatten())
        group = at // slots * self._world + slot // self.shape.tokens
        counts = at.new_zeros((local + 1) * self._world)
        counts.scatter_add_(0, group.flatten(), torch.ones_like(at).flatten())
        counts = counts.view(-1, self._world)[:local]
        return src_info[:-1].view(local, slots), (counts.cumsum(1) - counts) << 32 | counts


class LowLatency:
    """Dispatch and combine of low-latency mode; arguments are checked by ``Buffer``."""

    def __init__(self, pool: Pool, rank: int, world: int) -> None:
        self.pool, self._rank, self._world = pool, rank, world
        self._combine_buffers: dict[Shape, torch.Tensor] = {}

    def dispatch(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        shape: Shape,
        *,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        stats: torch.Tensor | None,
        in_halves: bool,
    ) -> tuple[tuple[Any, torch.Tensor, LowLatencyHandle], Callable[[], None] | None]:
        """As ``Buffer.low_latency_dispatch``: rows, counts and handle; the second half if ``in_halves``."""
        fields = dispatch_fields(shape, use_fp8, round_scale)
        member = self.pool.get(shape.device, shape.tokens, **fields)
        communicator = member.communicator
        scales = None
        if round_scale:
            x, scales = quantize_rounded(x)
        experts, capacity = shape.num_experts // self._world, self._world * shape.tokens
        channel = member.next_channel()
        call: dict[str, Any] = {"scales": scales, "tokens_per_rank": shape.tokens, "channel": channel}
        handle = LowLatencyHandle(shape, self._world)
        new: dict[str, Any] = {"device": shape.device}
        later = None  # scales that are not as they came, or come only with the second half
        if use_fp8 and (use_ue8m0 or in_halves):
            columns, dtype = shape.hidden // SCALE_BLOCK, torch.float32
            if use_ue8m0:
                columns, dtype = columns // 4, torch.int32
            later = torch.empty(experts, columns, capacity, dtype=dtype, **new).mT

        if in_halves:
            row_type = communicator.config.received_dtype
            rows = torch.empty(experts, capacity, shape.hidden, dtype=row_type, **new)
            counts = torch.empty(experts, dtype=torch.int32, **new)
            sent = communicator.dispatch_send(x, ids, member.no_weights(len(x)), **call)
        else:
            received, sent = communicator.dispatch(x, ids, member.no_weights(len(x)), **call)
            assert received.rows_per_expert is not None
            rows, counts = received.rows, received.rows_per_expert

        def finish() -> None:
            got = communicator.dispatch_recv(sent, rows=rows) if in_halves else received
            if in_halves:
                assert got.rows_per_expert is not None
                counts.copy_(got.rows_per_expert)
            if later is not None:
                assert got.scales is not None
                later.copy_(pack_ue8m0(got.scales) if use_ue8m0 else got.scales)
            if stats is not None:
                stats.add_(counts)
            handle.places, handle.exchange = communicator.received_places(sent), (member, sent)

        scales = later if in_halves or later is not None else received.scales
        result = ((rows, scales) if use_fp8 else rows, counts, handle)
        if in_halves:
            return result, member.hook(channel, finish)
        finish()
        return result, None

    def combine(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        dispatched: LowLatencyHandle,
        out: torch.Tensor,
        *,
        in_halves: bool,
    ) -> Callable[[], None] | None:
        """As ``Buffer.low_latency_combine``, into ``out``; the second half if ``in_halves``."""
        if dispatched.exchange is None:
            raise EpArgumentError("the rows have not come: call the hook of their dispatch first")
        shape = dispatched.shape
        member = self.pool.get(shape.device, shape.tokens, **combine_fields(shape))
        communicator, channel = member.communicator, member.next_channel()
        if member.captured:  # so the graph may hold the other one, too
            dispatched.exchange[0].captured = True
        given = (x, dispatched.places, ids, weights)
        call: dict[str, Any] = {
            "tokens_per_rank": shape.tokens,
            "channel": channel,
            "ends": dispatched.ends,
        }
        if not in_halves:
            communicator.exchange_sums(*given, **call, out=out)
            return None
        handle = communicator.exchange_sums_send(*given, **call)
        return member.hook(channel, lambda: communicator.combine_recv(handle, out=out))

    def destroy(self) -> None:
        self._combine_buffers.clear()

    def combine_buffer(self, shape: Shape) -> torch.Tensor:
        """What the next combine with ``zero_copy`` sends: [local experts, ranks * T, hidden] bfloat16."""
        if shape not in self._combine_buffers:
            size = (shape.num_experts // self._world, self._world * shape.tokens, shape.hidden)
            self._combine_buffers[shape] = torch.empty(size, dtype=torch.bfloat16, device=shape.device)
        return self._combine_buffers[shape]


def quantize_rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [M, n] and float32 scales [M, n / 128] that are powers of 2: the least that keep
    ``max(amax, 1e-4) / scale`` within 448. ``x``: [M, n] bfloat16. NaN and infinities as in
    `ep_backend.reference.quantize_fp8`: one NaN leaves the rest of its block alone, an infinity does not."""
    blocks = x.float().unflatten(-1, (-1, SCALE_BLOCK))
    amax = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1).clamp(min=MIN_AMAX)
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)
    powers = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    scales = torch.where(amax.isinf(), amax, powers)
    q = (blocks / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return q.flatten(-2).to(torch.float8_e4m3fn), scales


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """int32 [..., n / 4]: four exponents of float32 powers of 2, the first in the lowest byte."""
    return (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8).view(torch.int32)
