"""Normal mode: rows in order of source rank and token, sums that the caller has weighted.

A dispatch is an exchange in the layout rank-major, of which the rows that came are taken out. Its combine is
that of the same exchange while that is open. A handle outlives its exchange, though: DeepEP combines any
number of times with one. Then an exchange of marker rows says again which rank has which token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ep_backend import Communicator, Handle, Received
from ep_backend.compat.deep_ep.config import USUAL_SMS
from ep_backend.compat.deep_ep.pool import MARKER_BYTES, Agreement, Blocks, Member, Pool, Usual
from ep_backend.config import MAX_TOP_K
from ep_backend.errors import EpArgumentError
from ep_backend.transports.gpu import BLOCKS_PER_SM, sms

LARGEST_SHARE = 0.45
"""Blocks of a communicator for each SM of the GPU, at most; low-latency mode has places for more."""
WEIGHT_BLOCKS = 8


@dataclass
class Routing:
    """Where the tokens of a dispatch went, and from where rows came."""

    ids: torch.Tensor
    """[M, top_k], as dispatched; without top-k indices the ranks themselves, -1 for none. The caller's own
    tensor may change later, so this is a copy."""
    num_experts: int
    slots: int
    """T of the exchange."""
    places: torch.Tensor
    """[R] int64: the slot of each received row."""
    opened: tuple[Member, Handle] | None = None

    def take_open(self, hidden: int) -> tuple[Communicator, Handle] | None:
        """The exchange of the dispatch, if a combine can still end it."""
        opened, self.opened = self.opened, None
        if opened is None:
            return None
        member, handle = opened
        communicator = member.communicator
        usable = member.alive and handle.state == "received"
        return (communicator, handle) if usable and communicator.config.hidden_size == hidden else None


class DispatchHandle(NamedTuple):
    """Fields as in DeepEP's intranode handle; those of its channels have no meaning here and are None."""

    rank_prefix_matrix: torch.Tensor
    """[ranks, ranks] int32: in this rank's column the number of rows received from ranks 0 ... i; -1 in the
    others, which DeepEP fills too."""
    channel_prefix_matrix: None
    recv_channel_prefix_matrix: None
    recv_src_idx: torch.Tensor
    """[R] int32: the token of its source that each row is."""
    is_token_in_rank: torch.Tensor
    send_head: Routing


def token_in_rank(ids: torch.Tensor, num_experts: int, world: int) -> torch.Tensor:
    """[M, ranks] bool: whether a token has an expert on a rank. ``ids``: [M, top_k], -1: none."""
    ranks = torch.where(ids >= 0, ids // (num_experts // world), world).long()
    found = torch.zeros(len(ids), world + 1, dtype=torch.bool, device=ids.device)
    return found.scatter_(1, ranks, True)[:, :world].contiguous()


def tokens_per_expert(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[num_experts] int32: how often each id stands in ``ids``; negative ones do not count."""
    flat = ids.flatten().long().clamp(min=-1) + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    ones = torch.ones_like(flat, dtype=torch.int32)
    return counts.scatter_add_(0, flat, ones)[1:].contiguous()


def _only_in(in_rank: torch.Tensor, ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """A copy of ``ids``, [M, top_k], with -1 for experts of ranks that a token shall not go to."""
    world = in_rank.shape[1]
    ranks = (ids // (num_experts // world)).clamp(0, world - 1).long()
    return ids.masked_fill(in_rank.gather(1, ranks).logical_not(), -1)


class Normal:
    """Dispatch and combine of normal mode; arguments are checked by ``Buffer``."""

    def __init__(self, pool: Pool, agreement: Agreement, rank: int, world: int) -> None:
        self._pool, self._agreement, self._rank, self._world = pool, agreement, rank, world

    def dispatch(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        *,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        num_experts: int,
        in_rank: torch.Tensor | None = None,
        per_expert: torch.Tensor | None = None,
        alignment: int,
        worst: int,
        most: int = 0,
        num_sms: int,
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None, list[int], DispatchHandle]:
        """As ``Buffer.dispatch`` without a handle, without the event. With ``ids`` and ``weights`` nothing
        else need be given; ``ids`` belong to the handle then. ``most``: tokens that a rank can have, where
        the ranks know that already and ``worst`` has room for all of them."""
        here, counts = num_experts // self._world, []
        if ids is None:
            assert in_rank is not None
            assert per_expert is not None
            counts = per_expert.tolist()
            ids, num_experts = self._ranks_as_ids(in_rank), self._world
        elif in_rank is not None:
            ids = _only_in(in_rank, ids, num_experts)
        if worst:
            slots = most or self._slots_for(worst, len(x), ids, num_experts)
        else:
            slots, counts = self._agreement.reach(len(x), counts)
            slots = max(slots, 1)
        routing = Routing(ids, num_experts, slots, ids.new_empty(0))
        received = self._exchange(x, scales, routing, weights, num_sms)
        assert received.topk_ids is not None
        assert received.topk_weights is not None
        came = (received.topk_ids >= 0).any(1)
        if worst:
            # Rows that came first, in order; no wait for the GPU. The rest has no expert here.
            routing.places = came.logical_not().byte().argsort(stable=True)[:worst]
        else:
            routing.places = came.nonzero().flatten()  # waits until it is known how many
        from_rank = came.view(self._world, slots).sum(1)
        prefix = torch.full((self._world, self._world), -1, dtype=torch.int32, device=x.device)
        prefix[:, self._rank] = from_rank.cumsum(0).int()
        in_rank = token_in_rank(ids, num_experts, self._world) if in_rank is None else in_rank.clone()
        handle = DispatchHandle(prefix, None, None, (routing.places % slots).int(), in_rank, routing)
        rows = self._rows(received, routing, x, scales)
        if weights is None:
            counts = counts[self._rank * here : (self._rank + 1) * here]
            return rows, None, None, _aligned([] if worst else counts, alignment), handle
        ids = received.topk_ids.index_select(0, routing.places).long()
        if not worst:
            counts = tokens_per_expert(ids, here).tolist()
        weights = received.topk_weights.index_select(0, routing.places)
        return rows, ids, weights, _aligned(counts, alignment), handle

    def dispatch_again(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        routing: Routing,
        num_sms: int,
        weights: torch.Tensor | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Other rows to where those of an earlier dispatch went, and other weights if there are any; nothing
        is counted or agreed on."""
        if len(x) != len(routing.ids):
            raise EpArgumentError(f"x has {len(x)} tokens; the {len(routing.ids)} of the handle were wanted")
        received = self._exchange(x, scales, routing, weights, num_sms)
        rows = self._rows(received, routing, x, scales)
        if weights is None:
            return rows, None
        assert received.topk_weights is not None
        return rows, received.topk_weights.index_select(0, routing.places)

    def combine(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        biases: tuple[torch.Tensor, ...],
        routing: Routing,
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``Buffer.combine``, without the event."""
        if len(x) != len(routing.places):
            raise EpArgumentError(f"x has {len(x)} rows; the {len(routing.places)} received ones were wanted")
        summed = self._sum(x, routing, routing.take_open(x.shape[1]), blocks_for(num_sms, x.device))
        if biases:
            total = summed.float()
            for bias in biases:
                total += bias
            summed = total.to(summed.dtype)
        if weights is None:
            return summed, None
        top_k = weights.shape[1]
        padded = torch.nn.functional.pad(weights, (0, -top_k % 8))
        return summed, self._sum(padded, routing, None, WEIGHT_BLOCKS)[:, :top_k].contiguous()

    def _slots_for(self, worst: int, tokens: int, ids: torch.Tensor, num_experts: int) -> int:
        """T of a dispatch that returns ``worst`` rows, or the same error on all ranks. Only where more rows
        could come than that is it counted how many will, which waits for the GPU."""
        mine = [worst if rank == self._rank else 0 for rank in range(self._world)]
        most, asked = self._agreement.reach(tokens, mine)
        if len(set(asked)) > 1:
            raise EpArgumentError(f"num_worst_tokens is {asked} on the ranks; the same on all was wanted")
        if worst < self._world * most:
            if ids.is_cuda and torch.cuda.is_current_stream_capturing():
                raise EpArgumentError(
                    f"num_worst_tokens is {worst}; in a CUDA graph, where rows cannot be counted, at least "
                    f"{self._world * most} was wanted: ranks times the {most} tokens of the one with most"
                )
            sent = token_in_rank(ids, num_experts, self._world).sum(0).tolist()
            _, coming = self._agreement.reach(tokens, sent)
            if max(coming) > worst:
                raise EpArgumentError(
                    f"num_worst_tokens is {worst}, but rank {coming.index(max(coming))} would receive "
                    f"{max(coming)} rows: at least that was wanted, on all ranks"
                )
        return max(most, -(-worst // self._world))

    def _ranks_as_ids(self, in_rank: torch.Tensor) -> torch.Tensor:
        if self._world > MAX_TOP_K:
            raise EpArgumentError(
                f"dispatch without topk_idx is for at most {MAX_TOP_K} ranks, these are {self._world}: give "
                "topk_idx and topk_weights"
            )
        ranks = torch.arange(self._world, device=in_rank.device)
        return torch.where(in_rank, ranks, -1)

    def _exchange(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        routing: Routing,
        weights: torch.Tensor | None,
        num_sms: int,
    ) -> Received:
        member = self._pool.get(
            x.device,
            routing.slots,
            num_experts=routing.num_experts,
            top_k=routing.ids.shape[1],
            hidden_size=x.shape[1],
            payload=torch.uint8,
            payload_bytes=x.shape[1] * x.element_size(),
            scale_bytes=0 if scales is None else 4 * _columns(scales),
            num_sms=blocks_for(num_sms, x.device),
        )
        communicator = member.communicator
        if scales is not None:
            scales = scales.reshape(len(x), _columns(scales)).contiguous().view(torch.uint8)
        received, handle = communicator.dispatch(
            x.contiguous().view(torch.uint8),
            routing.ids,
            member.no_weights(len(x)) if weights is None else weights,
            scales=scales,
            tokens_per_rank=routing.slots,
        )
        routing.opened = (member, handle)
        return received

    def _rows(
        self, received: Received, routing: Routing, x: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rows, and scales if there are any, as x was given."""
        words = received.rows.view(torch.int64)
        rows = words.index_select(0, routing.places).view(x.dtype)
        if scales is None:
            return rows
        assert received.scales is not None
        parts = received.scales.view(torch.int32).index_select(0, routing.places).view(scales.dtype)
        return rows, parts.flatten() if scales.dim() == 1 else parts

    def _sum(
        self,
        rows: torch.Tensor,
        routing: Routing,
        opened: tuple[Communicator, Handle] | None,
        blocks: Blocks,
    ) -> torch.Tensor:
        """[M, width]: for each token the sum of what the ranks have for it. ``rows``: [R, width]."""
        communicator, handle = opened or self._ask_again(rows, routing, blocks)
        results = rows.new_empty(self._world * routing.slots, rows.shape[1])
        words = rows.contiguous().view(torch.int64)
        results.view(torch.int64).index_copy_(0, routing.places, words)
        return communicator.combine(results, handle)

    def _ask_again(self, rows: torch.Tensor, routing: Routing, blocks: Blocks) -> tuple[Communicator, Handle]:
        member = self._pool.get(
            rows.device,
            routing.slots,
            num_experts=routing.num_experts,
            top_k=routing.ids.shape[1],
            hidden_size=rows.shape[1],
            payload=torch.uint8,
            payload_bytes=MARKER_BYTES,
            out_dtype=rows.dtype,
            num_sms=blocks,
        )
        tokens = len(routing.ids)
        _, handle = member.communicator.dispatch(
            member.markers(tokens), routing.ids, member.no_weights(tokens), tokens_per_rank=routing.slots
        )
        return member.communicator, handle


def blocks_for(num_sms: int, device: torch.device) -> Blocks:
    """Blocks of the kernels for a number of SMs, 0 if nobody has a wish; as many as leave room for others."""
    if device.type == "cpu":
        return None
    most = max(1, int(LARGEST_SHARE * sms(device)))
    blocks = min(BLOCKS_PER_SM * (num_sms or USUAL_SMS), most)
    return blocks if num_sms else Usual(blocks, most)


def _columns(scales: torch.Tensor) -> int:
    return 1 if scales.dim() == 1 else scales.shape[1]


def _aligned(counts: list[int], alignment: int) -> list[int]:
    return [-(-count // alignment) * alignment for count in counts]
