"""Meetings of a group on the host: used when communicators are made, never in an exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ep_backend.errors import EpConfigError

T = TypeVar("T")


def gather(group: dist.ProcessGroup | None, value: T) -> list[T]:
    """What every rank gives, in order of rank. Collective."""
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def together(
    group: dist.ProcessGroup | None, act: Callable[[], T], tell: Callable[[T], Any] = lambda result: None
) -> tuple[T, list[Any]]:
    """Run ``act`` on every rank; return its own result and what ``tell`` says of everybody's, in order of
    rank.

    If it raises anywhere, every rank raises EpConfigError with the reason of the first rank that failed: none
    is left waiting for a rank that could not start. What ``tell`` returns must be picklable. Collective.
    """
    try:
        result = act()
        answer = tell(result)
    except Exception as error:
        gather(group, (None, f"{type(error).__name__}: {error}"))
        raise EpConfigError(f"rank {dist.get_rank(group)} cannot start: {error}") from error
    answers = gather(group, (answer, None))
    failed = [(rank, text) for rank, (_, text) in enumerate(answers) if text is not None]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise EpConfigError(f"rank {failed[0][0]} cannot start{more}: {failed[0][1]}")
    return result, [told for told, _ in answers]
