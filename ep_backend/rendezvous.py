"""Meetings of a group on the host: used when communicators are made, never in an exchange."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ep_backend import env
from ep_backend.errors import EpConfigError

T = TypeVar("T")
NEVER = timedelta(days=365)


class PeerLostError(EpConfigError):
    """Another rank could not be reached; if it failed, that is the reason to name."""


def gather(group: dist.ProcessGroup | None, value: T) -> list[T]:
    """What every rank gives, in order of rank. Collective. Raises PeerLostError if a rank is lost."""
    values: list[T] = [value] * dist.get_world_size(group)
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise PeerLostError(
            f"rank {dist.get_rank(group)} lost a rank while all of them met on the host: it has ended, or "
            f"cannot be reached ({error})"
        ) from error
    return values


def together(
    group: dist.ProcessGroup | None, act: Callable[[], T], tell: Callable[[T], Any] = lambda result: None
) -> tuple[T, list[Any]]:
    """Run ``act`` on every rank; return its own result and what ``tell`` says of everybody's, in order of
    rank.

    If it raises anywhere, every rank raises EpConfigError with the reason of the first rank that failed: none
    is left waiting for a rank that could not start. What ``tell`` returns must be picklable. Collective.
    """
    failure: Exception | None = None
    try:
        result = act()
        answer = tell(result)
    except Exception as error:
        failure = error
        # A rank that only lost a peer comes last: the peer knows why.
        said = (None, isinstance(error, PeerLostError), str(error) or type(error).__name__)
    else:
        said = (answer, False, "")
    answers = gather(group, said)
    failed = sorted((lost, rank, text) for rank, (_, lost, text) in enumerate(answers) if text)
    if failed:
        _, rank, text = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        here = f"; on this rank: {said[2]}" if failure is not None and said[2] != text else ""
        try:
            raise EpConfigError(f"rank {rank} cannot start{more}: {text}{here}") from failure
        finally:
            failure = None  # else its traceback keeps itself, and what was made, until the next collection
    return result, [told for told, _, _ in answers]


def part(group: dist.ProcessGroup | None, ranks: Sequence[int], timeout_s: float) -> dist.ProcessGroupGloo:
    """A gloo group of some of the ranks of ``group``, this rank among them, that torch.distributed does not
    know of. Collective over ``group``, each rank of which must be in exactly one such part.

    torch.distributed.new_group is not for this: it wants every process of the program to call it, or, without
    that, the same number of groups on all ranks.
    """
    store = _own_store(group, ranks[0])

    def connect() -> dist.ProcessGroupGloo:
        rank = ranks.index(dist.get_rank(group))
        return dist.ProcessGroupGloo(store, rank, len(ranks), timeout=timedelta(seconds=timeout_s))

    return together(group, connect)[0]


def nccl(group: dist.ProcessGroup | None, ranks: Sequence[int]) -> Any:
    """As `part`, a ProcessGroupNCCL that connects when it is first used. Its traffic on the network has the
    class EP_BACKEND_TRAFFIC_CLASS, if that is set.

    Its own deadlines must never pass: torch ends the whole process then.
    """
    store = _own_store(group, ranks[0])

    def make() -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        traffic_class = env.get("EP_BACKEND_TRAFFIC_CLASS")
        if traffic_class is not None:
            options.config.traffic_class = traffic_class  # type: ignore[attr-defined]  # torch's stubs lack it
        return dist.ProcessGroupNCCL(store, ranks.index(dist.get_rank(group)), len(ranks), options)

    return together(group, make)[0]


def _own_store(group: dist.ProcessGroup | None, first: int) -> dist.Store:
    """One for all ranks that name the same ``first`` one. Collective."""
    name = gather(group, secrets.token_hex(8))[first]
    return dist.PrefixStore(f"ep_backend/{name}", dist.distributed_c10d._get_default_store())
