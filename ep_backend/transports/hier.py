"""Transport ``hier``: several nodes, each of which shares memory inside.

A token crosses the network once for each node that has one of its experts, from rank (n, i) to rank (m, i):
transport ``collective`` among the ranks of the same place, to which nodes are what ranks are otherwise. There
transport ``cpu``, or on GPUs ``peer``, ``mixed`` or ``host``, brings it to the ranks that hold the experts.
The sums go back the same way: added up inside the node first, then one row per token and node. On GPUs
``collective`` mostly sends all slots to every node. See docs/architecture.md for bytes and numerics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ep_backend import _native
from ep_backend.config import MAX_TOKENS, EpConfig
from ep_backend.errors import EpArgumentError, EpConfigError, EpError, EpProtocolError, EpTimeoutError
from ep_backend.facts import uneven
from ep_backend.host_sum import HostSum
from ep_backend.transports.base import DispatchCall, Received, Transport, opened
from ep_backend.transports.collective import CollectiveTransport, Traffic
from ep_backend.transports.collective_gpu import GpuCollectiveTransport
from ep_backend.transports.cpu import CpuTransport
from ep_backend.transports.gpu import GpuTransport, sms
from ep_backend.transports.host import HostTransport
from ep_backend.transports.mixed import MixedTransport
from ep_backend.transports.peer import PeerTransport

NODE_PATIENCE = 1.25
"""How much longer than a wait between nodes one inside a node lasts: a rank that misses another node can then
say so before its own node misses it."""


@dataclass
class _Open:
    """The exchange that a channel has open. ``places``: where received rows stood and where they went, in
    layouts that need to know."""

    slots: int
    received: bool = False
    returned: bool = False
    places: tuple[torch.Tensor, torch.Tensor] | None = None


class HierTransport(Transport):
    """``nodes``: the ranks of each node (`ep_backend.facts.nodes`); ``parts``: of GPUs, those that reach each
    other's memory (`ep_backend.facts.parts`). Raises EpConfigError on all ranks if nodes differ in their
    number of ranks, or cannot be reached. A failed operation of torch.distributed cannot be recovered
    from.

    On GPUs, too, every half waits on the host until what it needs has come.
    """

    name = "hier"
    nodes: Sequence[Sequence[int]]

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        device: torch.device,
        nodes: Sequence[Sequence[int]],
        parts: Sequence[Sequence[int]] = (),
    ) -> None:
        if wrong := uneven(nodes):
            raise EpConfigError(f"transport hier: {wrong}")
        if config.max_tokens_per_rank * len(nodes) > MAX_TOKENS:
            raise EpConfigError(
                f"transport hier: a rank holds max_tokens_per_rank = {config.max_tokens_per_rank} tokens "
                f"for each of {len(nodes)} nodes; at most {MAX_TOKENS} together were wanted"
            )
        self._config, self.nodes, self._rank = config, nodes, dist.get_rank(group)
        self._device = device
        self._world = dist.get_world_size(group)
        here, place = next(
            (n, ranks.index(self._rank)) for n, ranks in enumerate(nodes) if self._rank in ranks
        )
        self._partners = tuple(ranks[place] for ranks in nodes)
        node_of = {rank: n for n, ranks in enumerate(nodes) for rank in ranks}
        expert_ranks = config.expert_ranks(self._world)
        expert_nodes = tuple(node_of[rank] for rank in expert_ranks)
        network_config = replace(
            config, expert_map=expert_nodes, layout="rank_major", expert_ids="global", pad_id=-1
        )

        # Inside a node its experts have numbers of their own, in the order of their ids, and rows are bytes.
        # Behind their scales the rows of some layouts carry more: see _carried.
        mine = [e for e, node in enumerate(expert_nodes) if node == here]
        number = torch.full((config.num_experts + 1,), -1, dtype=torch.int32)  # [-1] is -1
        number[mine] = torch.arange(len(mine), dtype=torch.int32)
        self._number = number.to(device)
        self._num_local = expert_ranks.count(self._rank)
        nobody = max(0, config.top_k - len(mine))  # experts that fill up what a configuration must have
        owners = [nodes[here].index(expert_ranks[e]) for e in mine] + [0] * nobody
        self._num_lists = owners.count(place)
        self._sorts = config.layout != "rank_major"
        self._keeps_ids = config.expert_ids == "global" and config.layout != "expert_major"
        node_config = replace(
            config,
            num_experts=len(owners),
            expert_map=tuple(owners),
            max_tokens_per_rank=len(nodes) * config.max_tokens_per_rank,
            payload=torch.uint8,
            sums_only=False,
            quantization=None,
            payload_bytes=config.row_bytes,
            scale_bytes=config.row_scale_bytes + 4 * self._sorts + 8 * config.top_k * self._keeps_ids,
            out_dtype=config.sum_dtype,
            wire_dtype=config.sum_dtype,
            expert_ids="local",
            pad_id=-1,
        )
        self._join(group, network_config, node_config, here, parts)
        self._tokens = HostSum(group, self._world, config.timeout(), ranks=nodes[here])
        self.set_timeout(config.timeout())

        # Blocks of T rows: (place, node) as the node's exchange has them, and by rank as they are handed out.
        size = len(nodes[here])
        sources = torch.tensor([nodes[n][i] for i in range(size) for n in range(len(nodes))])
        self.gives_views = self._in_order = bool((sources == torch.arange(self._world)).all())
        self._sources, self._blocks = sources.to(device), sources.argsort().to(device)
        self.window_bytes = self._network.window_bytes + self._node.window_bytes
        self._open: list[_Open | None] = [None] * config.num_channels
        self._failure: EpError | None = None

    def _join(
        self,
        group: dist.ProcessGroup | None,
        network: EpConfig,
        node: EpConfig,
        here: int,
        parts: Sequence[Sequence[int]],
    ) -> None:
        """Make what carries rows between nodes and inside this one. Collective, and the same kind on all
        nodes."""
        self._network: CollectiveTransport | GpuCollectiveTransport
        self._node: CpuTransport | GpuTransport
        ranks, device = self.nodes[here], self._device
        if device.type == "cpu":
            self._network = CollectiveTransport(group, network, ranks=self._partners)
            self._node = CpuTransport(group, node, ranks=ranks)
            return
        # The two may be on the GPU at once.
        half = max(1, (self._config.num_sms or sms(device)) // 2)
        network, node = replace(network, num_sms=half), replace(node, num_sms=half)
        self._network = GpuCollectiveTransport(group, network, device, self._partners)
        reaching = [set(part) for part in parts]
        if all(any(part.issuperset(each) for part in reaching) for each in self.nodes):
            self._node = PeerTransport(group, node, device, ranks=ranks)
        elif any(len(part.intersection(each)) > 1 for part in reaching for each in self.nodes):
            self._node = MixedTransport(group, node, device, parts, ranks)
        else:
            self._node = HostTransport(group, node, device, ranks)

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent to other nodes."""
        return self._network.traffic

    def dispatch_send(self, call: DispatchCall) -> None:
        """Starts to send between nodes; waits for the counts of the other nodes only."""
        self._begin()
        if call.num_tokens is not None:
            raise EpArgumentError("num_tokens is for CUDA graphs, and transport hier cannot be captured")
        if isinstance(self._network, CollectiveTransport):
            self._network.check_ids(call.ids)
        self.close_exchange(call.channel)
        with self._watched(call.channel, between_nodes=True):
            self._network.dispatch_send(call)
        self._open[call.channel] = _Open(call.slots)

    def dispatch_recv(self, channel: int, slots: int, rows: torch.Tensor | None = None) -> Received:
        self._begin()
        return self._receive(channel)

    def combine_send(self, channel: int, y: torch.Tensor) -> None:
        """Sends inside the node."""
        self._begin()
        exchange = opened(self._open, channel)
        y = self._as_received(y, exchange)
        if y.dtype != self._config.sum_dtype:
            y = y.float()  # which the node's exchange takes, too
        with self._watched(channel):
            self._node.combine_send(channel, y)
        exchange.returned = True

    def combine_recv(self, channel: int, out: torch.Tensor) -> None:
        self._begin()
        self._return_sums(channel)
        self._open[channel] = None
        with self._watched(channel, between_nodes=True):
            self._network.combine_recv(channel, out)
            self._settle(self._network)

    def close_exchange(self, channel: int) -> None:
        self._begin()
        exchange = self._open[channel]
        if exchange is None:
            return
        if not exchange.received:
            self._receive(channel)
        if exchange.returned:  # what other nodes wait for must reach them
            try:
                self._return_sums(channel)
            except EpProtocolError:
                self.check()
                return
        else:
            with self._watched(channel):
                self._close_node(channel)
        self._open[channel] = None
        with self._watched(channel, between_nodes=True):
            self._network.close_exchange(channel)

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._network.check()
        self._node.check()

    def recover(self) -> None:
        raise EpError(
            "transport hier cannot recover: torch.distributed keeps no group usable after a failure; make a "
            "new communicator"
        )

    def set_timeout(self, seconds: float) -> None:
        self._network.set_timeout(seconds)
        self._node.set_timeout(NODE_PATIENCE * seconds)
        self._tokens.timeout_s = NODE_PATIENCE * seconds

    def destroy(self) -> None:
        self._network.destroy()
        self._node.destroy()
        self._tokens.destroy()

    def _begin(self) -> None:
        """Before every call of an exchange. Raises what stopped it, and EpArgumentError in a capture."""
        self.check()
        if isinstance(self._node, GpuTransport) and self._node.is_capturing():
            raise EpArgumentError(
                "a CUDA graph is captured, but with transport hier the host waits in every call"
            )

    def _receive(self, channel: int) -> Received:
        """Take what came from the partners in other nodes, and give it to the ranks of this node."""
        exchange = opened(self._open, channel)
        with self._watched(channel, between_nodes=True):
            arrived = self._network.dispatch_recv(channel, exchange.slots)
            self._settle(self._network)
        assert arrived.topk_ids is not None
        assert arrived.topk_weights is not None
        rows, slots = arrived.rows.view(torch.uint8), len(self.nodes) * exchange.slots
        carried = self._carried(arrived, exchange.slots)
        ids = self._number[arrived.topk_ids.long()]
        call = DispatchCall(channel, rows, carried, ids, arrived.topk_weights, slots)
        tokens = torch.zeros(self._world, dtype=torch.int32)
        tokens[list(self._partners)] = arrived.tokens_per_source.cpu()
        with self._watched(channel):
            received = self._node.dispatch(call)
            self._tokens.all_reduce(tokens)
            self._settle(self._node)
        exchange.received = True
        tokens = tokens.to(self._device)
        return self._as_documented(replace(received, tokens_per_source=tokens), exchange)

    def _return_sums(self, channel: int) -> None:
        """Add up what the ranks of this node give for each token, and send it to the token's node."""
        shape = (len(self.nodes) * opened(self._open, channel).slots, self._config.hidden_size)
        sums = torch.empty(shape, dtype=self._config.sum_dtype, device=self._device)
        try:
            with self._watched(channel):
                self._node.combine_recv(channel, sums)
                self._settle(self._node)
        except EpProtocolError:
            self.check()
            # A rank of this node has closed the exchange. It is over for all: the other nodes must learn it.
            self._open[channel] = None
            with self._watched(channel, between_nodes=True):
                self._network.close_exchange(channel)
            raise
        with self._watched(channel, between_nodes=True):
            self._network.combine_send(channel, sums)

    def _settle(self, transport: Transport) -> None:
        """Wait until what was started on a GPU has ended; raise what it found, as on a CPU."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
            transport.check()

    def _close_node(self, channel: int) -> None:
        """Tell this node at once: its other ranks would keep other nodes waiting."""
        if isinstance(self._node, GpuTransport):
            self._node.close_now(channel)
        else:
            self._node.close_exchange(channel)

    @contextmanager
    def _watched(self, channel: int, *, between_nodes: bool = False) -> Iterator[None]:
        """Around everything that may fail for good: the first failure stays, and this node learns of it."""
        try:
            yield
        except (EpTimeoutError, EpProtocolError) as error:
            if isinstance(error, EpProtocolError) and self._is_well():
                raise  # a peer closed the exchange
            self._failure = self._between_nodes(error) if between_nodes else error
            if isinstance(self._node, CpuTransport):  # a GPU's peers learn it by their own deadline
                assert isinstance(self._network, CollectiveTransport)
                protocol = isinstance(error, EpProtocolError)
                self._node.stop(channel, self._network.status if protocol else _native.TIMEOUT)
            if self._failure is error:
                raise
            raise self._failure from error

    def _is_well(self) -> bool:
        try:
            self._network.check()
            self._node.check()
        except EpError:
            return False
        return True

    def _between_nodes(self, error: EpError) -> EpError:
        """In a combine, a partner that does not answer may itself be waiting for a rank of its node."""
        if not isinstance(error, EpTimeoutError) or error.phase != "combine":
            return error
        partners = ", ".join(str(rank) for rank in self._partners if rank != self._rank)
        return EpTimeoutError(
            rank=error.rank,
            peer=-1,
            phase=error.phase,
            channel=error.channel,
            waited_s=error.waited_s,
            lost=error.lost,
            detail=f"it is among {partners} or the other ranks of their nodes; {error.detail}",
        )

    def _carried(self, arrived: Received, slots: int) -> torch.Tensor | None:
        """What rows have with them inside the node, [nodes * T, bytes]: their scales; where they must be
        sorted, the int32 number source * T + token; if global ids were asked for, all ids and weights."""
        parts = [] if arrived.scales is None else [arrived.scales.view(torch.uint8)]
        if self._sorts:
            firsts = torch.tensor(self._partners, dtype=torch.int32, device=self._device) * slots
            numbers = firsts[:, None] + torch.arange(slots, dtype=torch.int32, device=self._device)
            parts.append(numbers.view(-1, 1).view(torch.uint8))
        if self._keeps_ids:
            assert arrived.topk_ids is not None
            assert arrived.topk_weights is not None
            parts += [arrived.topk_ids.view(torch.uint8), arrived.topk_weights.view(torch.uint8)]
        if len(parts) > 1:
            return torch.cat(parts, dim=1)
        return parts[0] if parts else None

    def _as_documented(self, got: Received, exchange: _Open) -> Received:
        """Rows of the node's exchange, which come in order of (place, node, token), in order of (source,
        token)."""
        config = self._config
        per_expert = got.rows_per_expert
        if per_expert is not None:
            per_expert = per_expert[: self._num_local]
        rows, carried, ids, weights = got.rows, got.scales, got.topk_ids, got.topk_weights
        if config.layout == "expert_major":
            rows = rows[: self._num_local]
        if self._sorts:
            assert carried is not None
            lists = carried[None] if config.layout == "compact" else carried[: self._num_local]
            at = config.row_scale_bytes
            numbers = lists[..., at : at + 4].contiguous().view(torch.int32).squeeze(-1)
            filled = numbers.new_tensor([len(rows)]) if config.layout == "compact" else per_expert
            assert filled is not None
            exchange.places = _in_order(numbers, filled)
            rows, carried = (_moved(t, exchange.places) for t in (rows, carried[: len(rows)]))
            if ids is not None and weights is not None:
                ids, weights = (_moved(t, exchange.places) for t in (ids, weights))
        elif not self._in_order:
            assert ids is not None
            assert weights is not None
            rows, ids, weights = (self._by_source(t, self._blocks) for t in (rows, ids, weights))
            carried = None if carried is None else self._by_source(carried, self._blocks)
        scales = None
        if config.row_scale_bytes:
            assert carried is not None
            scales = carried[..., : config.row_scale_bytes].contiguous().view(config.scale_dtype)
        if self._keeps_ids:
            assert carried is not None
            assert ids is not None
            here, size = (ids >= 0).any(1, keepdim=True), 4 * config.top_k
            all_ids, all_weights = carried[:, -2 * size :].split(size, dim=1)
            ids = torch.where(here, all_ids.contiguous().view(torch.int32), -1)
            weights = torch.where(here, all_weights.contiguous().view(torch.float32), 0.0)
        if ids is not None:
            ids = ids.masked_fill(ids < 0, config.pad_id)
        return Received(
            rows.view(config.received_dtype), scales, ids, weights, got.tokens_per_source, per_expert
        )

    def _as_received(self, y: torch.Tensor, exchange: _Open) -> torch.Tensor:
        """The experts' results in the order in which the node's exchange handed the rows out."""
        if not self._sorts:
            return y if self._in_order else self._by_source(y, self._sources)
        assert exchange.places is not None
        shape = list(y.shape)
        if self._config.layout == "expert_major":
            shape[0] = self._num_lists
        stood, went = exchange.places
        return _moved(y, (went, stood), y.new_empty(shape))

    def _by_source(self, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Blocks of T rows in another order."""
        return rows.unflatten(0, (self._world, -1)).index_select(0, order).flatten(0, 1)


def _in_order(numbers: torch.Tensor, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rows stand and where they go if each list is sorted by the rows' numbers: two [rows] int64 of
    places in all lists. ``numbers``: [lists, capacity]; ``filled``: how many count in each list."""
    capacity = numbers.shape[1]
    is_row = torch.arange(capacity, device=numbers.device) < filled[:, None]
    order = numbers.masked_fill(~is_row, torch.iinfo(torch.int32).max).argsort(dim=1, stable=True)
    firsts = torch.arange(len(numbers), device=numbers.device)[:, None] * capacity
    return (order + firsts)[is_row], is_row.flatten().nonzero().flatten()


def _moved(
    rows: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], into: torch.Tensor | None = None
) -> torch.Tensor:
    """``rows`` at their new places; what stands elsewhere is undefined. Rows of any type have whole words."""
    moved = torch.empty_like(rows) if into is None else into
    stood, went = places
    if len(stood):
        old, new = (t.flatten(0, -2).view(torch.int32) for t in (rows, moved))
        new.index_copy_(0, went, old.index_select(0, stood))
    return moved
