"""The library's one object: dispatch tokens to the ranks that hold their experts, combine the results."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import ParamSpec, TypeVar

import msgspec
import torch
import torch.distributed as dist

from ep_backend import _native, env, rendezvous, tuned
from ep_backend.arguments import Arguments, named
from ep_backend.config import EpConfig, wrong_timeout
from ep_backend.errors import EpArgumentError, EpConfigError, EpError
from ep_backend.facts import neighbours, nodes, parts, unchecked
from ep_backend.places import find_places, local_numbers, weighted_sums
from ep_backend.probe import Record, probe
from ep_backend.select import Decision, apply_env, decide
from ep_backend.transports import OF_GPUS
from ep_backend.transports.base import DispatchCall, Received, Transport
from ep_backend.transports.collective import CollectiveTransport
from ep_backend.transports.collective_gpu import GpuCollectiveTransport
from ep_backend.transports.cpu import CpuTransport
from ep_backend.transports.hier import HierTransport
from ep_backend.transports.host import HostTransport
from ep_backend.transports.mixed import MixedTransport
from ep_backend.transports.peer import PeerTransport

Make = Callable[[dist.ProcessGroup | None, EpConfig, torch.device, list[Record], Decision], Transport]
TRANSPORTS: dict[str, Make] = {
    CpuTransport.name: lambda group, config, *_: CpuTransport(group, config),
    CollectiveTransport.name: lambda group, config, device, *_: (
        CollectiveTransport(group, config)
        if device.type == "cpu"
        else GpuCollectiveTransport(group, config, device)
    ),
    PeerTransport.name: lambda group, config, device, records, decision: PeerTransport(
        group, config, device, decision.peer_group if decision.peer_order == "staggered" else 0
    ),
    HostTransport.name: lambda group, config, device, *_: HostTransport(group, config, device),
    MixedTransport.name: lambda group, config, device, records, _: MixedTransport(
        group, config, device, parts(records)
    ),
    HierTransport.name: lambda group, config, device, records, _: HierTransport(
        group, config, device, nodes(records), parts(records)
    ),
}


def available(device: torch.device) -> frozenset[str]:
    """Names of the transports that this build has for tensors on ``device``."""
    if device.type == "cpu":
        return frozenset({CpuTransport.name, CollectiveTransport.name, HierTransport.name})
    return frozenset({CollectiveTransport.name, HierTransport.name, *OF_GPUS} if _native.HAS_CUDA else ())


def prepare_nccl(group: dist.ProcessGroup | None, device: torch.device) -> list[Record]:
    """Set what the profile of this group's machines asks for where nothing is set yet, as an engine does;
    before anything has started NCCL. Returns the records of all ranks, in order of rank.

    ``device``: what this rank computes on. A transport that EP_BACKEND_TRANSPORT asks for does not matter
    here. Collective. Raises EpConfigError on all ranks as `ep_backend.select.decide` does.
    """
    records = _tried_out(group, device, rendezvous.gather(group, probe(device)))
    free = []
    for record in records:
        environment = {k: text for k, text in record.environment.items() if k != "EP_BACKEND_TRANSPORT"}
        free.append(msgspec.structs.replace(record, environment=environment))
    apply_env(decide(free, available=available(device)))
    return records


def _tried_out(group: dist.ProcessGroup | None, device: torch.device, records: list[Record]) -> list[Record]:
    """``records``, again if the choice depends on what nobody has tried out. Collective.

    Now that it is known which GPUs the group uses, they can be tried out: one rank of a machine does it, the
    others wait for what it finds.
    """
    if not unchecked(records):
        return records
    group_gpus = neighbours(records, dist.get_rank(group))
    return rendezvous.together(group, lambda: probe(device, neighbours=group_gpus), lambda record: record)[1]


P = ParamSpec("P")
R = TypeVar("R")


def _not_traced(method: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a method: its graph breaks here.

    What an exchange does is in no tensor that a trace sees: a traced one would be left out without a word.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            # Not where the method is defined: that would import the compiler into every program.
            disabled: Callable[P, R] = torch.compiler.disable(method)
            return disabled(*args, **kwargs)
        return method(*args, **kwargs)

    return call


@dataclass
class Handle:
    """One exchange, from dispatch to combine. Made by ``dispatch``; give it back to ``combine`` once."""

    channel: int
    tokens_per_rank: int
    """T: slots per source of this exchange."""
    num_tokens: int
    """Tokens that this rank dispatched: rows that combine returns."""
    is_view: bool
    """Whether received rows and scales are a view of the window rather than memory of their own."""
    num_rows: int = 0
    """Rows that were received: R in ``Received``; 0 until they have come."""
    state: str = "sent"
    """"sent", "received", "returned" (combine sent), "combined" or "closed"."""

    @property
    def valid_until(self) -> str:
        """Until when received rows hold what was received."""
        if not self.is_view:
            return "for as long as the tensor lives"
        return "until combine, release or the next dispatch on this channel"


class Communicator:
    """Dispatch and combine for one expert-parallel group.

    Made by all ranks of ``group`` together, from equal configurations. Exchanges of a channel alternate
    (dispatch, combine, dispatch, ...) and happen in the same order on all ranks. Not for several threads at
    once.

    ``group``: a torch.distributed process group, None for the default one. ``device``: where rows live, "cpu"
    (the default) or a GPU. ``limit``: makes of the number of SMs that was decided, None for no limit, the one
    that is used; equal on all ranks; for callers whose communicators share a GPU. Raises EpConfigError on
    every rank if any rank cannot start, has another configuration or does not come within
    EP_BACKEND_STARTUP_TIMEOUT_S.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        *,
        device: torch.device | str | None = None,
        limit: Callable[[int | None], int | None] | None = None,
    ) -> None:
        self.config = config
        for sentence in env.misspelt():
            warnings.warn(sentence, stacklevel=2)
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise EpConfigError("this process is not in the group; one of its ranks was wanted")
        expert_ranks, told = rendezvous.together(
            group, lambda: self._start(device), lambda _: (config, probe(self.device))
        )
        for rank, (theirs, _) in enumerate(told):
            # Every rank compares all with rank 0, so that all fail with the same words.
            if different := told[0][0].differences(theirs):
                raise EpConfigError(
                    f"rank 0 and rank {rank} have different configurations: {'; '.join(different)}"
                )
        records = [record for _, record in told]
        if self._may_use_peer(records):
            records = _tried_out(group, self.device, records)
        self.decision: Decision = decide(
            records,
            config.transport,
            available=available(self.device),
            shape=tuned.Shape.of(config, self.world_size),
            num_sms=config.num_sms,
        )
        if limit is not None and (sms := limit(self.decision.sms)) != self.decision.sms:
            # Chunks were tuned with the other number.
            reason = f"{self.decision.reason} The caller limits SMs of an exchange to {tuned.limit(sms)}."
            self.decision = msgspec.structs.replace(
                self.decision, sms=sms, chunk_scale=1.0, reason=reason.strip()
            )
        for sentence in self.decision.warnings if self.rank == 0 else ():
            warnings.warn(sentence, stacklevel=2)
        self.local_experts = tuple(e for e, rank in enumerate(expert_ranks) if rank == self.rank)
        self._arguments = Arguments(config, self.world_size, len(self.local_experts), self.device)
        scale = self.decision.chunk_scale if config.chunk_scale is None else config.chunk_scale
        config = replace(config, num_sms=self.decision.sms, chunk_scale=scale)
        make = TRANSPORTS[self.decision.transport]
        self._transport = make(group, config, self.device, records, self.decision)
        self._handles: list[Handle | None] = [None] * config.num_channels
        self._alive = True

    def _start(self, device: torch.device | str | None) -> tuple[int, ...]:
        """What can go wrong on one rank alone, before anybody waits for it. Returns each expert's rank."""
        if wrong := env.wrong_values():  # also of variables that nothing here would read
            raise EpConfigError("; ".join(wrong))
        if not isinstance(self.config, EpConfig):
            raise EpConfigError(f"config is {named(self.config)}; an EpConfig was wanted")
        self.config.timeout()
        self.device = torch.device(device or "cpu")
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                found = f"PyTorch {torch.__version__} finds no GPU here"
                raise EpConfigError(f"device is {self.device}, but {found}")
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            self.device = torch.device("cuda", index)
        elif self.device.type != "cpu":
            raise EpConfigError(f"device is {self.device}; cpu or cuda was wanted")
        return self.config.expert_ranks(self.world_size)

    def _may_use_peer(self, records: list[Record]) -> bool:
        wish = self.config.transport
        if wish == "auto":
            wish = env.get("EP_BACKEND_TRANSPORT", records[0].environment)
        by_peers = (PeerTransport.name, MixedTransport.name)
        may = wish in ("auto", HierTransport.name, *by_peers)
        return may and not available(self.device).isdisjoint(by_peers)

    @property
    def transport(self) -> str:
        """Name of the transport in use."""
        return self._transport.name

    @property
    def nodes(self) -> Sequence[Sequence[int]] | None:
        """The ranks of each node, over which combine adds up (transport hier), as `reference.combine` wants
        them; None where it adds up over ranks alone."""
        return self._transport.nodes

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can hold exchanges: on GPUs, if the layout does not have to know how many rows
        came."""
        return self._transport.capturable and self.config.layout != "compact"

    @property
    def recoverable(self) -> bool:
        """Whether `recover` and `mask_ranks` work: not where torch.distributed carries the rows (collective,
        hier)."""
        return self._transport.recoverable

    @property
    def window_bytes(self) -> int:
        """Bytes of this rank's windows, all channels together."""
        return self._transport.window_bytes

    @_not_traced
    def dispatch(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        tokens_per_rank: int | None = None,
        num_tokens: torch.Tensor | None = None,
        channel: int = 0,
    ) -> tuple[Received, Handle]:
        """Send each token to every rank that holds one of its experts, once; receive what the others sent
        here.

        ``x``: [M, hidden_size] of ``config.payload`` (opaque: [M, payload_bytes] uint8). ``topk_ids``: [M,
        top_k] int32 or int64, global expert ids, -1 for none, no expert twice in a token. ``topk_weights``:
        [M, top_k] float32. ``scales``: with a float8 payload [M, hidden_size / 128] float32, with an opaque
        one [M, scale_bytes] uint8. ``tokens_per_rank``: T, equal on all ranks, M <= T <=
        ``config.max_tokens_per_rank`` (the default); M may differ and may be 0. ``num_tokens``: [1] int32 on
        the GPU, at most M: how many of the tokens count, read when a captured graph is replayed; later rows
        of combine's result are left as they were. A dispatch that is still open on the channel is closed
        first, on all ranks. Raises EpArgumentError before anything is sent; EpTimeoutError; EpProtocolError.

        On a GPU nothing can be raised about the ids without waiting for it: ids out of range count as none,
        and experts that stand twice in a token are not looked for.
        """
        self._usable()
        call = self._arguments.dispatch(
            x, topk_ids, topk_weights, scales, tokens_per_rank, num_tokens, channel
        )
        received = self._in_order(self._transport.dispatch(call))
        handle = self._opened(call)
        handle.num_rows, handle.state = received.rows.shape[0], "received"
        return received, handle

    @_not_traced
    def combine(self, y: torch.Tensor, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Send the experts' results back; return their sum for each of this rank's tokens, [M, hidden_size].

        ``y``, of the result's dtype or float32: rank-major and compact [R, hidden_size], one row per received
        row, weighted and summed over this rank's experts by the caller (rank-major: rows without a local
        expert are not read); expert-major [local experts, world * T, hidden_size], unweighted. This rank's
        sum for a token is rounded once to ``config.sum_dtype``; the sums are added in float32 in order of
        rank and rounded once. A token without experts gives zeros. ``out``: where to put the result. Raises
        EpArgumentError before anything is sent; EpTimeoutError; EpProtocolError if a peer closed the
        exchange.
        """
        self._expect(handle, "received")
        out = self._arguments.out(out, handle.num_tokens)
        y = self._arguments.results(y, handle.tokens_per_rank, handle.num_rows)
        # A peer that closed the exchange ends it here too.
        handle.state, self._handles[handle.channel] = "combined", None
        self._transport.combine(handle.channel, y, out)
        return out

    @_not_traced
    def dispatch_send(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        tokens_per_rank: int | None = None,
        num_tokens: torch.Tensor | None = None,
        channel: int = 0,
    ) -> Handle:
        """First half of ``dispatch``: everything is on its way when it returns, nothing has been waited
        for."""
        self._usable()
        call = self._arguments.dispatch(
            x, topk_ids, topk_weights, scales, tokens_per_rank, num_tokens, channel
        )
        self._transport.dispatch_send(call)
        return self._opened(call)

    @_not_traced
    def dispatch_recv(self, handle: Handle, *, rows: torch.Tensor | None = None) -> Received:
        """Second half of ``dispatch``: wait for the rows of all ranks.

        ``rows``: in the expert-major layout, where to put them: contiguous, of the shape and dtype that
        `Received` documents.
        """
        self._expect(handle, "sent")
        if rows is not None:
            self._arguments.rows(rows, handle.tokens_per_rank)
        received = self._transport.dispatch_recv(handle.channel, handle.tokens_per_rank, rows)
        if rows is not None and received.rows is not rows:
            received = replace(received, rows=rows.copy_(received.rows))
        handle.num_rows, handle.state = received.rows.shape[0], "received"
        return self._in_order(received)

    @_not_traced
    def received_places(self, handle: Handle) -> torch.Tensor | None:
        """Where the rows of each slot stand in the expert-major layout: [world * T, top_k] int32, token t of
        source s in row s * T + t. ``expert * world * T + i``: it is the i-th row of this rank's ``expert``;
        -1: the choice is none of this rank's experts. It stays as it is for as long as it lives.

        None where the transport does not keep them (hier). ``EpConfig.expert_ids`` must be "global". Raises
        EpArgumentError otherwise, and in another layout.
        """
        self._expect(handle, "received")
        config = self.config
        if config.layout != "expert_major" or config.expert_ids != "global" or config.pad_id != -1:
            raise EpArgumentError(
                "received_places is for the layout expert_major with global expert_ids and pad_id -1"
            )
        return self._transport.received_places(handle.channel, handle.tokens_per_rank)

    @_not_traced
    def combine_send(self, y: torch.Tensor, handle: Handle) -> None:
        """First half of ``combine``. The received rows must not be read any more."""
        self._expect(handle, "received")
        y = self._arguments.results(y, handle.tokens_per_rank, handle.num_rows)
        self._transport.combine_send(handle.channel, y)
        handle.state = "returned"

    @_not_traced
    def combine_recv(self, handle: Handle, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Second half of ``combine``: wait for the sums of all ranks and add them."""
        self._expect(handle, "returned")
        out = self._arguments.out(out, handle.num_tokens)
        # A peer that closed the exchange ends it here too.
        handle.state, self._handles[handle.channel] = "combined", None
        self._transport.combine_recv(handle.channel, out)
        return out

    @_not_traced
    def exchange_sums(
        self,
        y: torch.Tensor,
        places: torch.Tensor | None,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        tokens_per_rank: int | None = None,
        channel: int = 0,
        out: torch.Tensor | None = None,
        ends: tuple[Communicator, Handle] | None = None,
    ) -> torch.Tensor:
        """``dispatch``, without rows, and ``combine`` of what experts have made of the rows of another
        communicator's exchange with the same ids: for weights that come later than rows.

        For ``EpConfig.sums_only``. ``y``: as the other one received its rows, expert-major. ``places``: as
        its `received_places` gives them; None: they are found again, which takes longer. ``ends``: that other
        communicator, over the same ranks, and its handle, to `release` it on the way. Then this is a call of
        that communicator, too: in the order of its channel's calls, in graphs that it must outlive, and after
        a failure both must recover. All ranks give ``ends`` and ``places`` or none does, and ``y`` of the
        same dtype. The rest as for these two.
        """
        self._usable()
        call, y = self._arguments.sums(y, places, topk_ids, topk_weights, tokens_per_rank, channel)
        _check_ends(ends)
        out = self._arguments.out(out, len(call.x))
        self._opened(call)
        self._handles[channel] = None
        self._exchange_sums(call, y, places, out, ends)
        return out

    @_not_traced
    def exchange_sums_send(
        self,
        y: torch.Tensor,
        places: torch.Tensor | None,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        tokens_per_rank: int | None = None,
        channel: int = 0,
        ends: tuple[Communicator, Handle] | None = None,
    ) -> Handle:
        """First half of ``exchange_sums``, in which weights are waited for; ``combine_recv`` is the
        second."""
        self._usable()
        call, y = self._arguments.sums(y, places, topk_ids, topk_weights, tokens_per_rank, channel)
        _check_ends(ends)
        self._exchange_sums(call, y, places, None, ends)
        handle = self._opened(call)
        handle.state = "returned"
        return handle

    @_not_traced
    def release(self, handle: Handle) -> None:
        """End an exchange whose results nobody wants, on all ranks; the next dispatch would do it
        otherwise."""
        self._expect(handle, "sent", "received")
        self._transport.close_exchange(handle.channel)
        self._closed(handle)

    @_not_traced
    def check(self) -> None:
        """Raise the error that stopped the communicator, if one did."""
        self._usable()
        self._transport.check()

    @_not_traced
    def recover(self) -> None:
        """Go on after a timeout, on all ranks together; open exchanges are lost.

        Every rank of the group must call it that is not masked. Raises EpError if one does not come within
        the timeout or is dead: then a new communicator is needed, or `mask_ranks`. Until it has succeeded,
        CUDA graphs that are replayed send nothing and leave their outputs as they are; `check` raises.
        """
        self._usable()
        self._transport.recover()
        for handle in self._handles:
            if handle is not None:
                handle.state = "closed"
        self._handles = [None] * self.config.num_channels

    @_not_traced
    def mask_ranks(self, ranks: Iterable[int]) -> None:
        """From the next exchange on, leave ``ranks`` out: nothing is sent to them or awaited from them, and
        ``combine`` adds up without their experts. They take the place of those of an earlier call.

        All others call it, each at the same point between two exchanges; after an error they `recover`
        behind it. While ranks are masked every ``tokens_per_rank`` is that of the channel's last exchange,
        failed ones included: rows of a rank that lives after all would fall on those of others. So one that
        may live, and may have sent its part of an exchange that this rank has not begun, can only be masked
        where that number never changes. A rank that has missed exchanges comes back by `recover` on all
        ranks, when nobody is masked any more. Raises EpError with transports collective and hier,
        EpArgumentError for this rank itself and numbers of no rank.
        """
        self._usable()
        masked = list(ranks)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        if wrong := [rank for rank in masked if rank not in others]:
            raise EpArgumentError(f"rank {wrong[0]!r} cannot be masked; any of {others} were wanted")
        slots = self._transport.mask_ranks(masked)
        self._arguments.slots_stay = slots if masked else None

    @_not_traced
    def set_timeout(self, seconds: float) -> None:
        """Change how long this rank waits for its peers, from the next wait on."""
        if wrong := wrong_timeout(seconds):
            raise EpArgumentError(f"the timeout is {wrong}")
        self._usable()
        self._transport.set_timeout(seconds)

    @_not_traced
    def destroy(self) -> None:
        """Give everything back. Received views stay readable. May be called twice."""
        if self._alive:
            self._alive = False
            self._transport.destroy()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def _in_order(self, received: Received) -> Received:
        """Scales by column, where they are wanted so and the transport does not give them so."""
        scales = received.scales
        if not self.config.scales_by_column or scales is None or scales.stride(1) == 1:
            return received
        return replace(received, scales=scales.mT.contiguous().mT)

    def _closed(self, handle: Handle) -> None:
        handle.state, self._handles[handle.channel] = "closed", None

    def _usable(self) -> None:
        if not self._alive:
            raise EpError("the communicator has been destroyed")

    def _expect(self, handle: Handle, *states: str) -> None:
        self._usable()
        if not isinstance(handle, Handle):
            raise EpArgumentError(f"handle is {named(handle)}; the Handle that dispatch returned was wanted")
        if handle.state in states and not any(mine is handle for mine in self._handles):
            raise EpArgumentError(
                "the handle is of another communicator; one of this communicator was wanted"
            )
        if handle.state not in states:
            raise EpArgumentError(
                f"the handle's exchange is {handle.state!r}; {' or '.join(map(repr, states))} was wanted: "
                "each dispatch is received once and then combined or released once"
            )

    def _opened(self, call: DispatchCall) -> Handle:
        """The handle of the exchange that ``call`` has opened; it takes the place of one that was left
        open."""
        before = self._handles[call.channel]
        if before is not None:
            before.state = "closed"
        is_view = self.config.layout == "rank_major" and self._transport.gives_views
        handle = Handle(call.channel, call.slots, call.x.shape[0], is_view=is_view)
        self._handles[call.channel] = handle
        return handle

    def _exchange_sums(
        self,
        call: DispatchCall,
        y: torch.Tensor,
        places: torch.Tensor | None,
        out: torch.Tensor | None,
        ends: tuple[Communicator, Handle] | None,
    ) -> None:
        transport, config = self._transport, self.config
        ended = None
        if ends is not None:
            other, handle = ends
            ended = other._transport, handle.channel
        if places is not None and transport.exchange_sums(call, y, places, out, ended):
            if ends is not None:
                other._closed(handle)
            return
        if ends is not None:
            other.release(handle)
        received = transport.dispatch(call)
        assert received.topk_ids is not None
        assert received.topk_weights is not None
        if places is None:
            places = find_places(
                received.topk_ids, local_numbers(config.expert_ranks(self.world_size), self.rank)
            )
        sums = weighted_sums(y, places, received.topk_weights, config.sum_dtype)
        if out is None:
            transport.combine_send(call.channel, sums)
        else:
            transport.combine(call.channel, sums, out)


def _check_ends(ends: tuple[Communicator, Handle] | None) -> None:
    """Whether an exchange of sums can end the one that is given."""
    if ends is not None:
        other, handle = ends
        other._expect(handle, "received")
        if handle.is_view:
            raise EpArgumentError("the exchange that ends must have rows of their own, expert-major")
