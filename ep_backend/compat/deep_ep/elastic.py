"""``ElasticBuffer``: DeepEP V2's dispatch and combine, which are normal mode of ``Buffer`` under other names.

New is the expanding layout: a row for each expert of a token, grouped by expert. It is made of the rows that
came, after they came, and folded back before they leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend.compat.deep_ep.buffer import Biases, Buffer, Rows
from ep_backend.compat.deep_ep.checks import (
    check,
    check_bias,
    check_flags,
    check_ids,
    check_rows,
    check_whole,
)
from ep_backend.compat.deep_ep.config import aligned
from ep_backend.compat.deep_ep.normal import Routing, tokens_per_expert
from ep_backend.compat.deep_ep.utils import EventHandle, EventOverlap
from ep_backend.config import EpConfig
from ep_backend.errors import EpArgumentError
from ep_backend.transports.gpu import window_bytes

SIZE_ALIGNMENT = 2 << 20  # of buffer sizes, bytes
SCALE_ALIGNMENT = 16  # of a column of scales for the tensor memory accelerator, bytes


@dataclass
class EPHandle:
    """What ``ElasticBuffer.dispatch`` returns, for later dispatches and for combine. Fields as in DeepEP;
    those of its buffers are None."""

    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    """As the caller or `Buffer.set_num_sms` said; 0: neither did."""
    topk_idx: torch.Tensor
    """[M, top_k] int64, as dispatched; a copy unless ``do_handle_copy`` is False."""
    num_recv_tokens: int
    """R; without ``do_cpu_sync`` as many as can come."""
    num_expanded_tokens: int
    """N, rows of the expanding layout; 0 in the other."""
    num_recv_tokens_per_expert_list: list[int]
    """Rounded up to ``expert_alignment``; empty without ``do_cpu_sync``."""
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    """[ranks] int32: rows from ranks 0 ... i."""
    psum_num_recv_tokens_per_expert: torch.Tensor
    """[local experts] int32: where the rows of expert i end; expanded without their padding, else with it."""
    num_unaligned_recv_tokens_per_expert: torch.Tensor | None
    """[local experts] int32; None unless expanded."""
    recv_src_metadata: torch.Tensor
    """[R, 2] int32: source rank times ``num_max_tokens_per_rank`` plus token, and a number of ours; expanded
    [R, 2 + top_k], with the expanded row of each expert, -1 for none."""
    recv_topk_idx: torch.Tensor = field(repr=False)
    routing: Routing = field(repr=False)
    expanded: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    """Of each expanded row but the padding: the row that came, which of its experts, the expanded row."""
    dst_buffer_slot_idx: None = None
    token_metadata_at_forward: None = None
    channel_linked_list: None = None

    @property
    def do_expand(self) -> bool:
        """Whether the layout is the expanding one."""
        return self.expanded is not None

    def tensors(self) -> list[torch.Tensor]:
        """All that calls on a stream of their own make or use."""
        own = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        return [*own, self.routing.places, *(self.expanded or ())]


def _refused(name: str, instead: str) -> Callable[..., NoReturn]:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise EpArgumentError(f"ElasticBuffer.{name} is not here: {instead}")

    call.__doc__ = f"Not here: {instead}."
    return call


class ElasticBuffer:
    """Dispatch and combine of DeepEP V2 for ``group``, on GPUs or, with CPU tensors, on the CPU.

    Nothing is allocated here. ``num_max_tokens_per_rank``: the default of `dispatch`. ``explicitly_destroy``:
    as in DeepEP. ``deterministic``: results always are. The others are checked and have no meaning; waits end
    after EP_BACKEND_TIMEOUT_S. ``num_cpu_bytes``: refused, it is Engram's.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self.num_bytes = check_whole("num_bytes", num_bytes or 0)
        self.num_max_tokens_per_rank = check_whole("num_max_tokens_per_rank", num_max_tokens_per_rank)
        for name, value in (
            ("hidden", hidden),
            ("num_topk", num_topk),
            ("sl_idx", sl_idx),
            ("num_allocated_qps", num_allocated_qps),
            ("num_cpu_timeout_secs", num_cpu_timeout_secs),
            ("num_gpu_timeout_secs", num_gpu_timeout_secs),
        ):
            check_whole(name, value)
        check_flags(
            use_fp8_dispatch=use_fp8_dispatch,
            deterministic=deterministic,
            allow_hybrid_mode=allow_hybrid_mode,
            allow_multiple_reduction=allow_multiple_reduction,
            prefer_overlap_with_compute=prefer_overlap_with_compute,
        )
        if num_cpu_bytes:
            raise EpArgumentError("num_cpu_bytes is for Engram, which is not here: 0 was wanted")
        self._buffer = Buffer(group, explicitly_destroy=explicitly_destroy)
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        self.num_allocated_qps, self.deterministic = num_allocated_qps, deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.explicitly_destroy = explicitly_destroy
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()

    def destroy(self) -> None:
        """As ``Buffer.destroy``."""
        self._buffer.destroy()

    @staticmethod
    def capture() -> EventHandle:
        """An event of the current stream; on the CPU one that has happened."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """As ``Buffer.get_comm_stream``."""
        return self._buffer.get_comm_stream()

    def get_logical_domain_size(self) -> tuple[int, int]:
        """1 and the number of ranks, on several machines too: nothing depends on where ranks are."""
        return 1, self.num_ranks

    def get_physical_domain_size(self) -> tuple[int, int]:
        """As `get_logical_domain_size`."""
        return 1, self.num_ranks

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, **assumed: Any) -> int:
        """What ``Buffer.set_num_sms`` says, else 20. Arguments have no meaning. To give it to `dispatch` is a
        wish; 0 leaves the number to what was tuned or set for the machine."""
        return Buffer.num_sms

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """0: no call needs any."""
        return 0

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes of the windows that bf16 dispatches of this shape make on each rank. Nothing has to be given
        to ``ElasticBuffer``."""
        top_k = max(check_whole("num_topk", num_topk), 1)
        config = EpConfig(
            num_experts=group.size() * top_k,
            top_k=top_k,
            hidden_size=check_whole("hidden", hidden, 1),
            max_tokens_per_rank=check_whole("num_max_tokens_per_rank", num_max_tokens_per_rank, 1),
        )
        return aligned(window_bytes(config, group.size()), SIZE_ALIGNMENT)

    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send each token to the ranks that hold one of its experts.

        ``x``, ``topk_idx``, ``topk_weights``: as for ``Buffer.dispatch``; the last may be left out.
        ``cumulative_local_expert_recv_stats``: [local experts] int32, to which counts are added.
        ``num_max_tokens_per_rank``: T, equal on all ranks, at least M. ``num_sms``: 0 for the default.
        ``handle``: of an earlier dispatch whose routing is used again, without ``topk_idx``. ``do_cpu_sync``:
        False: fixed shapes and no wait for the GPU, for CUDA graphs; not with ``do_expand``.
        ``allocate_on_comm_stream``, ``num_qps``, ``do_zero_padding``: no meaning; padding is always zero.

        Returns rows (or rows and scales) in order of rank and token, [R, top_k] int64 numbers of local
        experts with -1 for others, their weights or None, the handle, and the event. Without ``do_cpu_sync``
        R is ranks * T; behind the rows that came are rows with ids -1. With ``do_expand`` a row for each
        local expert of a token instead, by expert, each rounded up to ``expert_alignment``; no ids; [N]
        weights.
        ``use_tma_aligned_col_major_sf``: scales column-major, columns begin at multiples of 16 bytes. Raises
        EpArgumentError, EpTimeoutError, EpProtocolError.
        """
        rows, scales = check_rows(x)
        check_flags(do_expand=do_expand, do_zero_padding=do_zero_padding, do_handle_copy=do_handle_copy)
        check_flags(use_tma_aligned_col_major_sf=use_tma_aligned_col_major_sf)
        if do_cpu_sync is not None:
            check_flags(do_cpu_sync=do_cpu_sync)
        _no_epilogue(previous_event_before_epilogue)
        check_whole("num_qps", num_qps)
        sms = check_whole("num_sms", num_sms) or Buffer._wished_sms
        alignment = 1 if expert_alignment is None else check_whole("expert_alignment", expert_alignment, 1)
        sync = do_cpu_sync is None or bool(do_cpu_sync)
        if handle is None:
            tokens = self._most(num_max_tokens_per_rank, len(rows))
            ids = check_ids(topk_idx, len(rows))
            if num_experts is None:
                raise EpArgumentError("num_experts was wanted, or a handle")
            experts = self._buffer._check_experts(num_experts)
            if do_expand and not sync:
                raise EpArgumentError("do_expand needs do_cpu_sync, to know how many rows came; or leave it")
        else:
            _check_again(
                handle,
                topk_idx,
                do_cpu_sync,
                num_experts=num_experts,
                num_max_tokens_per_rank=num_max_tokens_per_rank,
                expert_alignment=expert_alignment,
                do_expand=do_expand,
            )
            ids, tokens, experts = handle.topk_idx, handle.num_max_tokens_per_rank, handle.num_experts
        if topk_weights is not None:
            check("topk_weights", topk_weights, (len(rows), ids.shape[1]), (torch.float32,))
        stats = cumulative_local_expert_recv_stats
        if stats is not None:
            here = (experts // self.num_ranks,)
            check("cumulative_local_expert_recv_stats", stats, here, (torch.int32,))

        def act() -> tuple[tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle], Any]:
            used, weights = handle, topk_weights
            if used is None:
                kept = ids.clone() if do_handle_copy else ids
                sent = kept.new_zeros(kept.shape, dtype=torch.float32) if weights is None else weights
                got, local, came, counts, made = self._buffer._normal.dispatch(
                    rows,
                    scales,
                    ids=kept,
                    weights=sent,
                    num_experts=experts,
                    alignment=alignment,
                    worst=0 if sync else tokens * self.num_ranks,
                    most=tokens,
                    num_sms=sms,
                )
                assert local is not None
                ranks = made.rank_prefix_matrix[:, self.rank_idx]
                used = self._handle(made.send_head, local, ranks, counts, alignment, tokens, sms)
                if do_expand:
                    _expand(used)
            else:
                got, came = self._buffer._normal.dispatch_again(rows, scales, used.routing, sms, weights)
            if stats is not None:
                stats.add_(tokens_per_expert(used.recv_topk_idx, len(stats)))
            arrived = None if weights is None else came
            return _laid_out(got, arrived, used, use_tma_aligned_col_major_sf), used.tensors()

        used_tensors = [rows, scales, ids, topk_weights, stats, *(handle.tensors() if handle else ())]
        (result, _), event = self._run(act, used_tensors, previous_event, async_with_compute_stream)
        return *result, event

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Biases = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Add the rows of all ranks up for each token, without weights; any number of times for a handle.

        ``x``: [R, hidden] bfloat16 as dispatched, expanded [N, hidden]. ``topk_weights``: [R, top_k],
        expanded [N], float32: added up in the same way. ``bias``: as for ``Buffer.combine``. Expanded rows of
        a rank are added up in float32 and rounded once on their way, whatever ``allow_multiple_reduction``
        says.
        Returns [M, hidden] bfloat16, [M, top_k] float32 or None, and the event.
        """
        _check_handle(handle)
        _no_epilogue(previous_event_before_epilogue)
        check_whole("num_qps", num_qps)
        sms = check_whole("num_sms", num_sms) or handle.num_sms
        rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        check("x", x, (rows, None), (torch.bfloat16,))
        if topk_weights is not None:
            shape = (rows,) if handle.do_expand else tuple(handle.recv_topk_idx.shape)
            check("topk_weights", topk_weights, shape, (torch.float32,))
        biases = check_bias(bias, len(handle.topk_idx), x.shape[1])

        def act() -> tuple[torch.Tensor, torch.Tensor | None]:
            folded, weights = (x, topk_weights) if not handle.do_expand else _fold(x, topk_weights, handle)
            return self._buffer._normal.combine(folded, weights, biases, handle.routing, sms)

        (summed, weights), event = self._run(
            act, [x, topk_weights, biases, handle.tensors()], previous_event, async_with_compute_stream
        )
        return summed, weights, event

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False) -> None:
        """Wait on the host until all ranks are here and their GPUs have done what was asked of them before:
        more than DeepEP's, whichever arguments are given."""
        check_flags(use_comm_stream=use_comm_stream, with_cpu_sync=with_cpu_sync)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        rendezvous.gather(self.group, None)

    engram_write = _refused("engram_write", "keep the storage in memory of your own")
    engram_fetch = _refused("engram_fetch", "torch.distributed.all_to_all_single moves rows between ranks")
    pp_set_config = _refused("pp_set_config", "torch.distributed.send and recv need none")
    pp_send = _refused("pp_send", "torch.distributed.send")
    pp_recv = _refused("pp_recv", "torch.distributed.recv")
    create_agrs_session = _refused("create_agrs_session", "torch.distributed's collectives need none")
    destroy_agrs_session = _refused("destroy_agrs_session", "torch.distributed's collectives need none")
    agrs_new_session = _refused("agrs_new_session", "torch.distributed's collectives need none")
    agrs_set_config = _refused("agrs_set_config", "torch.distributed's collectives need none")
    agrs_get_inplace_tensor = _refused("agrs_get_inplace_tensor", "use a tensor of your own")
    all_gather = _refused("all_gather", "torch.distributed.all_gather_into_tensor")

    def _most(self, asked: int | None, tokens: int) -> int:
        most = self.num_max_tokens_per_rank if asked is None else asked
        most = check_whole("num_max_tokens_per_rank", most, 1)
        if tokens > most:
            raise EpArgumentError(
                f"x has {tokens} tokens; at most num_max_tokens_per_rank = {most} were wanted"
            )
        return most

    def _handle(
        self,
        routing: Routing,
        local: torch.Tensor,
        ranks: torch.Tensor,
        counts: list[int],
        alignment: int,
        tokens: int,
        num_sms: int,
    ) -> EPHandle:
        per_expert = tokens_per_expert(local, routing.num_experts // self.num_ranks)
        padded = (per_expert + alignment - 1) // alignment * alignment
        sources = routing.places // routing.slots * tokens + routing.places % routing.slots
        return EPHandle(
            num_experts=routing.num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=tokens,
            num_sms=num_sms,
            topk_idx=routing.ids,
            num_recv_tokens=len(local),
            num_expanded_tokens=0,
            num_recv_tokens_per_expert_list=counts,
            psum_num_recv_tokens_per_scaleup_rank=ranks.contiguous(),
            psum_num_recv_tokens_per_expert=padded.cumsum(0).int(),
            num_unaligned_recv_tokens_per_expert=None,
            recv_src_metadata=torch.stack([sources, routing.places], 1).int(),
            recv_topk_idx=local,
            routing=routing,
        )

    def _run(
        self,
        act: Callable[[], Any],
        given: list[Any],
        previous: EventHandle | EventOverlap | None,
        async_with_compute_stream: bool,
    ) -> tuple[Any, EventOverlap]:
        check_flags(async_with_compute_stream=async_with_compute_stream)
        before = EventOverlap(previous) if isinstance(previous, EventHandle) else previous
        return self._buffer._streams.run(
            act, given, previous_event=before, async_finish=async_with_compute_stream
        )


def _check_handle(handle: object) -> None:
    if not isinstance(handle, EPHandle):
        raise EpArgumentError(f"handle is a {type(handle).__name__}; what dispatch returned was wanted")


def _check_again(handle: EPHandle, topk_idx: object, do_cpu_sync: bool | None, **given: Any) -> None:
    """Arguments of a dispatch with a handle. ``given``: None, or as in the handle's dispatch."""
    _check_handle(handle)
    if topk_idx is not None or do_cpu_sync:
        raise EpArgumentError("a dispatch with a handle takes no topk_idx and no do_cpu_sync")
    for name, value in given.items():
        had = getattr(handle, name)
        if value not in (None, had):
            raise EpArgumentError(f"{name} is {value}; {had}, as in the handle's dispatch, was wanted")


def _no_epilogue(event: object) -> None:
    if event is not None:
        raise EpArgumentError("previous_event_before_epilogue is not supported: give it as previous_event")


def _expand(handle: EPHandle) -> None:
    """Make it a handle of the expanding layout: by expert, in each in order of rank and token."""
    ids = handle.recv_topk_idx
    row, k = (ids >= 0).nonzero(as_tuple=True)
    order = ids[row, k].argsort(stable=True)
    row, k = row[order], k[order]
    expert = ids[row, k]
    ends = handle.psum_num_recv_tokens_per_expert
    counts = tokens_per_expert(ids, len(ends))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    before = counts.cumsum(0) - counts
    slot = torch.arange(len(row), device=ids.device) + (starts - before)[expert]
    slots = torch.full_like(ids, -1)
    slots[row, k] = slot
    handle.expanded = row, k, slot
    handle.num_expanded_tokens = sum(handle.num_recv_tokens_per_expert_list)
    handle.psum_num_recv_tokens_per_expert = (starts + counts).int()
    handle.num_unaligned_recv_tokens_per_expert = counts
    handle.recv_src_metadata = torch.cat([handle.recv_src_metadata, slots.int()], 1)


def _laid_out(
    got: Rows, weights: torch.Tensor | None, handle: EPHandle, column_major: bool
) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle]:
    """What dispatch returns, of the rows and weights that came."""
    rows, scales = got if isinstance(got, tuple) else (got, None)
    ids: torch.Tensor | None = handle.recv_topk_idx
    if handle.expanded is not None:
        row, k, slot = handle.expanded
        total, ids = handle.num_expanded_tokens, None
        rows = _placed(rows, row, slot, total)
        scales = None if scales is None else _placed(scales, row, slot, total)
        if weights is not None:
            weights = weights.new_zeros(total).index_copy_(0, slot, weights[row, k])
    if scales is None:
        return rows, ids, weights, handle
    return (rows, _column_major(scales) if column_major else scales), ids, weights, handle


def _placed(rows: torch.Tensor, row: torch.Tensor, slot: torch.Tensor, total: int) -> torch.Tensor:
    """[total, n]: the rows ``row`` at ``slot``, elsewhere zeros."""
    words = rows.contiguous().view(torch.uint8)
    placed = words.new_zeros(total, words.shape[1])
    return placed.index_copy_(0, slot, words.index_select(0, row)).view(rows.dtype)


def _fold(
    x: torch.Tensor, weights: torch.Tensor | None, handle: EPHandle
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[R, hidden] sums of the expanded rows in order of their place in top-k, and [R, top_k] weights. Padding
    is not read."""
    assert handle.expanded is not None
    row, k, slot = handle.expanded
    # One place of top-k after the other: the order of additions is then always the same.
    slots = handle.recv_src_metadata[:, 2:].long()
    total = x.new_zeros(handle.num_recv_tokens, x.shape[1], dtype=torch.float32)
    if len(x):
        for place in slots.T:
            rows = x.index_select(0, place.clamp(min=0)).float()
            total += rows.masked_fill(place[:, None] < 0, 0.0)
    if weights is not None:
        weights = weights.new_zeros(handle.recv_topk_idx.shape).index_put_((row, k), weights[slot])
    return total.to(x.dtype), weights


def _column_major(scales: torch.Tensor) -> torch.Tensor:
    """Columns that begin at multiples of 16 bytes."""
    rows, columns = scales.shape
    stride = aligned(rows, SCALE_ALIGNMENT // scales.element_size())
    return scales.new_zeros(columns, stride).T[:rows].copy_(scales)
