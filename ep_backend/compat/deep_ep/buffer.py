"""``Buffer``: DeepEP V1's object, with its signatures; checks arguments and lets the modes do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ep_backend.compat.deep_ep.checks import (
    INDEX,
    check,
    check_bias,
    check_flags,
    check_halves,
    check_ids,
    check_rows,
    check_whole,
    no_cost_stats,
)
from ep_backend.compat.deep_ep.config import USUAL_SMS, Config, UsualConfig, aligned
from ep_backend.compat.deep_ep.low_latency import (
    LowLatency,
    LowLatencyHandle,
    Shape,
    combine_fields,
    dispatch_fields,
)
from ep_backend.compat.deep_ep.normal import DispatchHandle, Normal, token_in_rank, tokens_per_expert
from ep_backend.compat.deep_ep.pool import Agreement, Pool
from ep_backend.compat.deep_ep.utils import EventHandle, EventOverlap, Streams
from ep_backend.config import MAX_TOP_K, SCALE_BLOCK, EpConfig
from ep_backend.errors import EpArgumentError
from ep_backend.transports.gpu import Share, window_bytes

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Biases = torch.Tensor | Sequence[torch.Tensor | None] | None


class Buffer:
    """Dispatch and combine for ``group``, on GPUs or, with CPU tensors, on the CPU.

    Nothing is allocated here: communicators are made by the first call of their kind, which is therefore
    collective and takes longer, and must not be inside a CUDA graph. ``num_nvl_bytes``, ``num_rdma_bytes``:
    the size of what `get_local_buffer_tensor` gives, nothing else. ``low_latency_mode``: both modes work
    either way. ``num_qps_per_rank``, ``allow_nvlink_for_low_latency_mode``, ``allow_mnnvl``, ``use_fabric``:
    no meaning. ``explicitly_destroy``: as in DeepEP. ``enable_shrink``: no meaning; a rank that does not
    answer is named by EpTimeoutError, not masked, see `low_latency_update_mask_buffer`. ``comm``: refused,
    MPI is not used.
    """

    num_sms: int = USUAL_SMS
    _wished_sms: int = 0
    """What `set_num_sms` was told; 0: nothing."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if comm is not None or not isinstance(group, dist.ProcessGroup):
            raise EpArgumentError("a torch.distributed process group as group was wanted; MPI is not used")
        self.num_nvl_bytes = check_whole("num_nvl_bytes", num_nvl_bytes)
        self.num_rdma_bytes = check_whole("num_rdma_bytes", num_rdma_bytes)
        check_whole("num_qps_per_rank", num_qps_per_rank)
        check_flags(
            low_latency_mode=low_latency_mode,
            allow_nvlink_for_low_latency_mode=allow_nvlink_for_low_latency_mode,
            allow_mnnvl=allow_mnnvl,
            use_fabric=use_fabric,
            explicitly_destroy=explicitly_destroy,
            enable_shrink=enable_shrink,
        )
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy, self.enable_shrink = explicitly_destroy, enable_shrink
        self._agreement, self._streams, share = Agreement(group), Streams(), Share()
        # One for each mode: ranks are masked in low latency alone.
        self._pools = Pool(group, share), Pool(group, share)
        self._normal = Normal(self._pools[0], self._agreement, self.rank, self.group_size)
        self._low_latency = LowLatency(self._pools[1], self.rank, self.group_size)
        self._memory: dict[bool, torch.Tensor] = {}

    def destroy(self) -> None:
        """Give everything back. Raises EpArgumentError without ``explicitly_destroy``: memory is then freed
        with the object. Later calls raise EpError."""
        if not self.explicitly_destroy:
            raise EpArgumentError("destroy() is for a Buffer that was made with explicitly_destroy=True")
        for pool in self._pools:
            pool.destroy()
        self._agreement.destroy()
        self._low_latency.destroy()
        self._memory.clear()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether fp8 and low-latency calls exist: always."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs for normal mode, an even number: for calls without a ``config`` and configs made from now on.
        Until then what was tuned or set for the machine, else 20."""
        new_num_sms = check_whole("new_num_sms", new_num_sms, 2)
        if new_num_sms % 2:
            raise EpArgumentError(f"new_num_sms is {new_num_sms}; an even number was wanted")
        Buffer.num_sms = Buffer._wished_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event of the current stream; on the CPU one that has happened."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A config for any number of ranks; ``num_sms`` as `set_num_sms` says. Until that is called, 20,
        and a call with this config is as one without."""
        check_whole("num_ranks", num_ranks, 1)
        return Config(Buffer._wished_sms) if Buffer._wished_sms else UsualConfig()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """As `get_dispatch_config`."""
        return Buffer.get_dispatch_config(num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of the windows that bf16 low-latency calls of this shape make on each GPU, for tokens of as
        many experts as there can be. Nothing has to be given to ``Buffer``."""
        num_ranks = check_whole("num_ranks", num_ranks, 1)
        tokens = check_whole("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
        hidden, experts = check_whole("hidden", hidden, 1), check_whole("num_experts", num_experts, 1)
        shape = Shape(tokens, hidden, experts, min(MAX_TOP_K, experts), torch.device("cpu"))
        each = [dispatch_fields(shape, False, False), combine_fields(shape)]
        configs = [EpConfig(max_tokens_per_rank=tokens, **fields) for fields in each]
        return aligned(sum(window_bytes(config, num_ranks) for config in configs))

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream of calls with ``async_finish`` or ``previous_event``. Raises EpArgumentError without a
        GPU."""
        return self._streams.comm

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """Memory of the caller's, ``num_nvl_bytes`` or ``num_rdma_bytes`` from byte ``offset`` on, all of it
        or ``size``. Allocated when it is first asked for, on the GPU if there is one; exchanges do not use
        it."""
        total = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        offset = check_whole("offset", offset)
        if use_rdma_buffer not in self._memory:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._memory[use_rdma_buffer] = torch.empty(total, dtype=torch.uint8, device=device)
        elements = max(0, total - offset) // dtype.itemsize
        wanted = elements if size is None else size.numel()
        if wanted > elements or offset % dtype.itemsize:
            raise EpArgumentError(
                f"{wanted} elements of {dtype} from byte {offset} on do not fit {total} bytes"
            )
        part = self._memory[use_rdma_buffer][offset : offset + wanted * dtype.itemsize].view(dtype)
        return part if size is None else part.view(size)

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """``topk_idx``: [M, top_k] int64, -1 for none. Returns num_tokens_per_rank [ranks] int32, None,
        num_tokens_per_expert [num_experts] int32, is_token_in_rank [M, ranks] bool, and the event. The second
        is None whether or not there are several machines."""
        experts = self._check_experts(num_experts)
        check_ids(topk_idx)

        def act() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            in_rank = token_in_rank(topk_idx, experts, self.group_size)
            return in_rank.sum(0, dtype=torch.int32), tokens_per_expert(topk_idx, experts), in_rank

        (per_rank, per_expert, in_rank), event = self._streams.run(
            act,
            [topk_idx],
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        return per_rank, None, per_expert, in_rank, event

    def dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Rows,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        DispatchHandle | None,
        EventOverlap,
    ]:
        """Send each token to the ranks that hold one of its experts; rows come in order of rank and token.

        ``x``: [M, hidden] bfloat16, or that as float8_e4m3fn with scales, [M, n] or [M] of float32 or int32.
        ``topk_idx``: [M, top_k] int64 global expert ids, -1 for none; ``topk_weights``: [M, top_k] float32.
        ``is_token_in_rank``: [M, ranks] bool, False where a token shall not go; without ids it says where
        tokens go. ``num_tokens_per_expert``: [num_experts] int32. ``handle``: of an earlier dispatch whose
        routing is used again, whatever its tensors hold by now; no other routing may be given then.
        ``num_worst_tokens``: equal on all ranks and at least the rows that any of them receives; as many rows
        are returned, behind those that came rows with ids -1. No host waits for its GPU if it is at least
        ranks times the tokens of the rank that has most; CUDA graphs need that. ``config``: its ``num_sms``
        counts.

        Returns rows (or rows and scales), [R, top_k] int64 numbers of local experts with -1 for others,
        [R, top_k] float32 weights with 0 there, the rows of each local expert rounded up to
        ``expert_alignment`` (empty with ``num_worst_tokens``), the handle, and the event. With ``handle``
        only the first and the last. Raises EpArgumentError, EpTimeoutError, EpProtocolError.
        """
        rows, scales = check_rows(x)
        tokens = len(rows)
        num_sms = self._sms_of(config)
        order: dict[str, Any] = {
            "previous_event": previous_event,
            "async_finish": async_finish,
            "allocate_on_comm_stream": allocate_on_comm_stream,
        }
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise EpArgumentError("a dispatch with a handle takes no topk_idx and no topk_weights")
            routing = _routing(handle)
            (again, _), event = self._streams.run(
                lambda: self._normal.dispatch_again(rows, scales, routing, num_sms),
                [rows, scales, routing.ids, routing.places],
                **order,
            )
            return again, None, None, None, None, event

        if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
            raise EpArgumentError(
                "num_tokens_per_rank, is_token_in_rank and num_tokens_per_expert were wanted, as "
                "get_dispatch_layout returns them, or a handle"
            )
        world = self.group_size
        check("num_tokens_per_rank", num_tokens_per_rank, (world,), (torch.int32,))
        check("is_token_in_rank", is_token_in_rank, (tokens, world), (torch.bool,))
        check("num_tokens_per_expert", num_tokens_per_expert, (None,), (torch.int32,))
        self._check_experts(len(num_tokens_per_expert))
        if num_tokens_per_rdma_rank is not None:
            check("num_tokens_per_rdma_rank", num_tokens_per_rdma_rank, (None,), (torch.int32,))
        if (topk_idx is None) != (topk_weights is None):
            raise EpArgumentError("topk_idx and topk_weights were wanted both, or neither")
        if topk_idx is not None:
            check_ids(topk_idx, tokens)
            check("topk_weights", topk_weights, tuple(topk_idx.shape), (torch.float32,))
        alignment = check_whole("expert_alignment", expert_alignment, 1)
        worst = check_whole("num_worst_tokens", num_worst_tokens)
        ids, weights, in_rank, per_expert = topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert
        result, event = self._streams.run(
            lambda: self._normal.dispatch(
                rows,
                scales,
                ids=ids,
                weights=weights,
                num_experts=len(per_expert),
                in_rank=in_rank,
                per_expert=per_expert,
                alignment=alignment,
                worst=worst,
                num_sms=num_sms,
            ),
            [rows, scales, ids, weights, in_rank, per_expert],
            **order,
        )
        return *result, event

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: Biases = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Add the rows of all ranks up for each token, without weights; any number of times for a handle.

        ``x``: [R, hidden] bfloat16, one row per received row. ``topk_weights``: [R, top_k] float32, added up
        in the same way. ``bias``: one or two [M, hidden] bfloat16, added to the rounded sum in float32.
        Returns [M, hidden] bfloat16, [M, top_k] float32 or None, and the event.
        """
        routing = _routing(handle)
        num_sms = self._sms_of(config)
        check("x", x, (len(routing.places), None), (torch.bfloat16,))
        if topk_weights is not None:
            check("topk_weights", topk_weights, (len(x), None), (torch.float32,))
        biases = check_bias(bias, len(routing.ids), x.shape[1])
        (summed, weights), event = self._streams.run(
            lambda: self._normal.combine(x, topk_weights, biases, routing, num_sms),
            [x, topk_weights, biases, routing.ids, routing.places],
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        return summed, weights, event

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: `dispatch` is for several machines, too."""
        raise EpArgumentError("internode_dispatch is DeepEP's own; call dispatch, for several machines too")

    def internode_combine(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: `combine` is for several machines, too."""
        raise EpArgumentError("internode_combine is DeepEP's own; call combine, for several machines too")

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing: no call needs memory that another has left clean."""
        check_whole("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
        check_whole("hidden", hidden, 1)
        self._check_experts(num_experts)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """Send each token to its experts; rows come by expert, in order of rank and token, in new memory.

        ``x``: [M, hidden] bfloat16. ``topk_idx``: [M, top_k] int64 global ids, -1 for none.
        ``num_max_dispatch_tokens_per_rank``: T, equal on all ranks, at least M.
        ``cumulative_local_expert_recv_stats``: [local experts] int32, to which counts are added. ``use_fp8``:
        rows become float8_e4m3fn with scales for 1x128 elements; ``round_scale``: powers of 2; ``use_ue8m0``:
        these as exponents, four to an int32. ``return_recv_hook``: what is returned is filled when the hook
        is called.

        Returns rows [local experts, ranks * T, hidden] or these and scales [local experts, ranks * T,
        hidden / 128] float32 (/ 512 int32), column-major in the last two dimensions; counts [local experts]
        int32; the handle; the event; the hook or None.
        """
        check("x", x, (None, None), (torch.bfloat16,))
        check_ids(topk_idx, len(x))
        tokens = check_whole("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
        experts = self._check_experts(num_experts)
        check_flags(use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0)
        check_flags(async_finish=async_finish, return_recv_hook=return_recv_hook)
        check_halves(async_finish, return_recv_hook)
        stats = cumulative_local_expert_recv_stats
        if stats is not None:
            local = (experts // self.group_size,)
            check("cumulative_local_expert_recv_stats", stats, local, (torch.int32,))
        if dispatch_wait_recv_cost_stats is not None:
            no_cost_stats("dispatch_wait_recv_cost_stats")
        if use_ue8m0 and not round_scale:
            raise EpArgumentError("use_ue8m0 needs round_scale=True")
        if use_fp8 and x.shape[1] % (4 * SCALE_BLOCK if use_ue8m0 else SCALE_BLOCK):
            raise EpArgumentError(
                f"hidden is {x.shape[1]}; a multiple of 128 was wanted for use_fp8, of 512 for use_ue8m0"
            )
        shape = Shape(tokens, x.shape[1], experts, topk_idx.shape[1], x.device)
        (result, half), event = self._streams.run(
            lambda: self._low_latency.dispatch(
                x,
                topk_idx,
                shape,
                use_fp8=use_fp8,
                round_scale=use_fp8 and round_scale,
                use_ue8m0=use_fp8 and use_ue8m0,
                stats=stats,
                in_halves=return_recv_hook,
            ),
            [x, topk_idx, stats],
            async_finish=async_finish,
        )
        return *result, event, self._hook(half, x)

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """Add the experts' rows up for each token, times their weights; any number of times for a handle.

        ``x``: [local experts, ranks * T, hidden] bfloat16. ``topk_idx``: as dispatched. ``topk_weights``:
        [M, top_k] float32. ``zero_copy``: send what stands in `get_next_low_latency_combine_buffer` instead
        of ``x``. ``out``: [M, hidden] bfloat16. ``return_recv_hook``: ``out`` is filled when the hook is
        called; ids and weights have been exchanged before, so the call waits for the other ranks.

        Returns [M, hidden] bfloat16, the event, the hook or None. A rank's sum for a token is rounded to
        bfloat16 on its way; the sum of these is rounded once more.
        """
        shape = _shape(handle)
        check("topk_idx", topk_idx, (None, shape.top_k), INDEX)
        tokens, local = len(topk_idx), shape.num_experts // self.group_size
        check("topk_weights", topk_weights, (tokens, shape.top_k), (torch.float32,))
        check("x", x, (local, self.group_size * shape.tokens, shape.hidden), (torch.bfloat16,))
        check_flags(use_logfmt=use_logfmt, zero_copy=zero_copy)
        check_flags(async_finish=async_finish, return_recv_hook=return_recv_hook)
        check_halves(async_finish, return_recv_hook)
        if use_logfmt:
            raise EpArgumentError("use_logfmt is not supported: without it rows travel in bfloat16")
        if combine_wait_recv_cost_stats is not None:
            no_cost_stats("combine_wait_recv_cost_stats")
        if out is None:
            out = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=x.device)
        check("out", out, (tokens, shape.hidden), (torch.bfloat16,))
        if not out.is_contiguous():
            raise EpArgumentError(f"out has strides {tuple(out.stride())}; a contiguous tensor was wanted")
        combined, sent = out, self._low_latency.combine_buffer(shape) if zero_copy else x
        half, event = self._streams.run(
            lambda: self._low_latency.combine(
                sent, topk_idx, topk_weights, handle, combined, in_halves=return_recv_hook
            ),
            [sent, topk_idx, topk_weights, combined, handle.places],
            async_finish=async_finish,
        )
        return combined, event, self._hook(half, x)

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """[local experts, ranks * T, hidden] bfloat16, for ``zero_copy``; fill it before the combine. One for
        all handles of a shape."""
        return self._low_latency.combine_buffer(_shape(handle))

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """From the next low-latency call on, leave ``rank_to_mask`` out, or with ``mask`` False no more:
        nothing is sent to it or awaited from it, and its experts' results are missing in the sums.

        All other ranks do so between the same two calls, for the same ranks. After a call that has failed,
        the next one then goes on without them. A rank that has missed calls comes back by
        `low_latency_clean_mask_buffer`, not by ``mask`` False alone. Calls must be like ones before: new
        shapes and formats are for all ranks. Waits until the GPU is idle. Raises EpArgumentError for this
        rank itself and numbers of no rank, EpError where rows travel by torch.distributed (between machines).
        """
        rank_to_mask = check_whole("rank_to_mask", rank_to_mask)
        if rank_to_mask >= self.group_size or (mask and rank_to_mask == self.rank):
            others = [rank for rank in range(self.group_size) if rank != self.rank]
            raise EpArgumentError(f"rank_to_mask is {rank_to_mask}; one of {others} was wanted")
        pool, one = self._low_latency.pool, {rank_to_mask}
        pool.mask(pool.masked | one if mask else pool.masked - one)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Fill ``mask_status``, [ranks] int32: 1 for each rank that is masked here, else 0."""
        check("mask_status", mask_status, (self.group_size,), (torch.int32,))
        masked = self._low_latency.pool.masked
        mask_status.copy_(torch.tensor([rank in masked for rank in range(self.group_size)]))

    def low_latency_clean_mask_buffer(self) -> None:
        """Mask nobody any more. All ranks call it together, those that were masked, too: they meet, so that
        one which has missed calls can go on. Nothing where nobody can be masked. Raises EpError if one does
        not come within the timeout."""
        self._low_latency.pool.unmask()

    def _hook(self, half: Callable[[], None] | None, x: torch.Tensor) -> Callable[[], None] | None:
        if half is None:
            return None
        second = half

        def hook() -> None:
            self._streams.run(second, [x])

        return hook

    def _sms_of(self, config: Config | None) -> int:
        """SMs that the caller wants; 0 if it has no wish."""
        if config is not None and not isinstance(config, Config):
            raise EpArgumentError(f"config is a {type(config).__name__}; a deep_ep.Config was wanted")
        if config is None or (isinstance(config, UsualConfig) and config.num_sms == USUAL_SMS):
            return Buffer._wished_sms
        return config.num_sms

    def _check_experts(self, num_experts: int) -> int:
        """``num_experts`` as an int. Raises EpArgumentError if the ranks cannot have equally many."""
        experts = check_whole("num_experts", num_experts, 1)
        if experts % self.group_size:
            raise EpArgumentError(
                f"num_experts is {experts}; a multiple of the {self.group_size} ranks was wanted"
            )
        return experts


def _routing(handle: tuple[Any, ...]) -> Any:
    if not isinstance(handle, DispatchHandle):
        raise EpArgumentError(f"handle is a {type(handle).__name__}; what dispatch returned was wanted")
    return handle.send_head


def _shape(handle: LowLatencyHandle) -> Shape:
    if not isinstance(handle, LowLatencyHandle):
        raise EpArgumentError(
            f"handle is a {type(handle).__name__}; what low_latency_dispatch returned was wanted"
        )
    return handle.shape
