"""The communicators of a ``Buffer``, and what its ranks agree on before a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ep_backend import Communicator, EpConfig, env, rendezvous
from ep_backend._native import MAX_WORLD
from ep_backend.config import MAX_EXPERTS, MAX_TOKENS
from ep_backend.engines.pool import no_defaults_of_a_model
from ep_backend.errors import EpArgumentError, EpConfigError, EpError
from ep_backend.host_sum import HostSum
from ep_backend.transports.gpu import Share

MARKER_BYTES = 16
"""The shortest row there is: of exchanges that only tell who has which expert."""


class Usual(NamedTuple):
    """In the place of a number of blocks where the caller has no wish: what EP_BACKEND_NUM_SMS, a profile or
    `ep-backend tune` says, at most ``most``; ``blocks`` if nothing says a number."""

    blocks: int
    most: int


Blocks = int | Usual | None
"""Of a communicator's channel; None on CPUs."""


@dataclass
class Member:
    """A communicator of the pool. ``captured``: a CUDA graph holds calls of it, which will be replayed."""

    communicator: Communicator
    captured: bool = False
    alive: bool = True
    _channel: int = 0
    _hooks: dict[int, weakref.ref[Callable[[], None]]] = field(default_factory=dict)
    """Of each channel's last call, while it has not been called."""
    _zeros: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def next_channel(self) -> int:
        """Channels take turns, on all ranks alike. Raises EpArgumentError if every channel has a hook that
        can still be called; one that nobody holds any more ends with the next call on its channel."""
        channels = self.communicator.config.num_channels
        if sum(hook() is not None for hook in self._hooks.values()) == channels:
            raise EpArgumentError(
                f"{channels} calls of this kind are open; at most so many were wanted: call one of their "
                "hooks first"
            )
        self._channel = (self._channel + 1) % channels
        self._hooks.pop(self._channel, None)
        return self._channel

    @property
    def stopped(self) -> bool:
        """Whether an exchange has failed, so that none can be made."""
        try:
            self.communicator.check()
        except EpError:
            return True
        return False

    def recover(self) -> None:
        """`Communicator.recover`. Ranks that have missed calls take the same turns as the others again; hooks
        of calls before are over."""
        self.communicator.recover()
        self._channel = 0
        self._hooks.clear()

    def hook(self, channel: int, finish: Callable[[], Any]) -> Callable[[], None]:
        """``finish`` as the hook of the call that has just been made on ``channel``."""

        def hook() -> None:
            finish()
            if self._hooks.get(channel) is mine:
                del self._hooks[channel]

        mine = self._hooks[channel] = weakref.ref(hook)
        return hook

    @property
    def pending(self) -> bool:
        """Whether the second half of a call is still to come. The same on all ranks: a hook that nobody holds
        counts, for when it goes depends on the rank."""
        return bool(self._hooks)

    def no_weights(self, tokens: int) -> torch.Tensor:
        """[tokens, top_k] float32 zeros."""
        return self._zero(torch.float32, self.communicator.config.top_k)[:tokens]

    def markers(self, tokens: int) -> torch.Tensor:
        """[tokens, MARKER_BYTES] uint8: rows that say nothing."""
        return self._zero(torch.uint8, MARKER_BYTES)[:tokens]

    def _zero(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        if dtype not in self._zeros:
            shape = (self.communicator.config.max_tokens_per_rank, width)
            self._zeros[dtype] = torch.zeros(shape, dtype=dtype, device=self.communicator.device)
        return self._zeros[dtype]


class Pool:
    """Communicators over ``group``, one per shape and format, made when a call first needs one.

    All ranks make the same calls in the same order, so all make and enlarge the same communicators at the
    same time. They take turns on a GPU, with those of other pools of the same ``share``, so they share the
    places there; those that a CUDA graph holds stay until ``destroy``.
    """

    def __init__(self, group: dist.ProcessGroup, share: Share) -> None:
        self.group, self._share = group, share
        self._members: dict[Any, Member] = {}
        self._outgrown: list[Member] = []
        self._alive = True
        self.masked: frozenset[int] = frozenset()

    def get(self, device: torch.device, tokens: int, **fields: Any) -> Member:
        """A communicator for ``tokens`` per rank at least, equal on all ranks. ``fields``: of EpConfig;
        ``num_sms`` may be `Usual`.

        Collective when new or too small, and over the ranks that are not masked after a failure. Raises
        EpConfigError, EpArgumentError for too many tokens or if it is new while ranks are masked, EpError
        after ``destroy``.
        """
        if not self._alive:
            raise EpError("the Buffer has been destroyed")
        if self.masked and any(member.stopped for member in self._all()):
            # One rank may have failed in a dispatch, another in the combine behind it.
            self._recover()
        if tokens > MAX_TOKENS:
            raise EpArgumentError(
                f"a rank brings {tokens} tokens; at most {MAX_TOKENS} were wanted: divide the call"
            )
        key = (device, tuple(sorted(fields.items(), key=lambda item: item[0])))
        member = self._members.get(key)
        small = member is not None and member.communicator.config.max_tokens_per_rank < tokens
        if self.masked and (member is None or small):
            raise EpArgumentError(
                "a call of another shape or format came while ranks are masked; one like a call before was "
                "wanted, for all ranks make communicators together"
            )
        if small:
            self._give_up(key)
            member = None
        if member is None:
            capacity = min(MAX_TOKENS, 1 << max(tokens - 1, 15).bit_length())
            wish = fields.get("num_sms")
            if isinstance(wish, Usual):
                fields["num_sms"] = None
            config = EpConfig(max_tokens_per_rank=capacity, **fields)

            def limit(decided: int | None) -> int | None:
                if isinstance(wish, Usual):
                    decided = min(decided, wish.most) if decided else wish.blocks
                if decided is not None:
                    self._check_agreed(decided)
                return decided

            with no_defaults_of_a_model(), self._share:
                member = Member(Communicator(self.group, config, device=device, limit=limit))
            self._members[key] = member
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            member.captured = True
        return member

    def mask(self, ranks: frozenset[int]) -> None:
        """`Communicator.mask_ranks` of all communicators."""
        if ranks != self.masked:
            for member in self._all():
                member.communicator.mask_ranks(ranks)
            self.masked = ranks

    def unmask(self) -> None:
        """All ranks meet, and mask nobody any more. Nothing where nobody can be masked. Raises EpError, and
        masks the same ranks as before, if one does not come."""
        masked = self.masked
        self.mask(frozenset())
        try:
            self._recover()
        except EpError:
            self.mask(masked)
            raise

    def _recover(self) -> None:
        for member in self._all():
            if member.communicator.recoverable:
                member.recover()

    def _all(self) -> tuple[Member, ...]:
        return (*self._members.values(), *self._outgrown)

    def destroy(self) -> None:
        """Give everything back. Not collective."""
        self._alive = False
        for member in self._all():
            member.alive = False
            member.communicator.destroy()
        self._members.clear()
        self._outgrown.clear()

    def _check_agreed(self, blocks: int) -> None:
        """Collective. Raises EpConfigError if ranks have different ``blocks``, which may follow from their
        GPUs."""
        told = rendezvous.gather(self.group, blocks)
        if len(set(told)) > 1:
            raise EpConfigError(
                f"the ranks' GPUs have different numbers of SMs, which would mean {told} blocks by rank; "
                "equal ones were wanted"
            )

    def _give_up(self, key: Any) -> None:
        member = self._members[key]
        if member.pending:
            raise EpArgumentError(
                "a call with more tokens per rank came before the hook of an earlier one; call that first, "
                "or make two calls of the earlier size if nobody has it any more"
            )
        del self._members[key]
        if member.captured:
            self._outgrown.append(member)
            return
        member.alive = False
        member.communicator.destroy()


class Agreement:
    """Numbers that all ranks learn of each other: through shared memory, or torch.distributed between
    machines."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._world = group, dist.get_rank(group), dist.get_world_size(group)
        self._sum: HostSum | None = None
        self._asked, self._alive = False, True

    def reach(self, tokens: int, counts: Sequence[int] = ()) -> tuple[int, list[int]]:
        """The largest ``tokens`` of a rank, and the sums of ``counts`` over ranks. Collective. Raises EpError
        after ``destroy``."""
        if not self._alive:
            raise EpError("the Buffer has been destroyed")
        if not self._asked:
            self._asked = True
            try:
                with no_defaults_of_a_model():
                    self._sum = HostSum(self._group, MAX_WORLD + MAX_EXPERTS, env.get("EP_BACKEND_TIMEOUT_S"))
            except EpConfigError:  # on all ranks: they are on several machines
                self._sum = None
        if self._sum is None:
            answers = rendezvous.gather(self._group, (tokens, list(counts)))
            totals = [sum(column) for column in zip(*(theirs for _, theirs in answers), strict=True)]
            return max(most for most, _ in answers), totals
        mine = [tokens if rank == self._rank else 0 for rank in range(self._world)]
        values = torch.tensor([*mine, *counts], dtype=torch.int32, device="cpu")
        self._sum.all_reduce(values)
        told = values.tolist()
        return max(told[: self._world]), told[self._world :]

    def destroy(self) -> None:
        self._alive = False
        if self._sum is not None:
            self._sum.destroy()
