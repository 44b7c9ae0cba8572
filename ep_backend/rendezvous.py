"""Meetings of a group on the host, mostly while communicators are made, and what waits of torch.distributed
need to have a deadline."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from threading import Thread
from time import monotonic, sleep
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ep_backend import env
from ep_backend.errors import EpConfigError

T = TypeVar("T")
STARTUP = "EP_BACKEND_STARTUP_TIMEOUT_S"
NEVER = timedelta(days=365)
SPIN_S = 2e-3  # how long the host asks without a pause whether something is done


class PeerLostError(EpConfigError):
    """Another rank could not be reached; if it failed, that is the reason to name."""


def gather(group: dist.ProcessGroup | None, value: T) -> list[T]:
    """What every rank gives, in order of rank. Collective. ``value`` must be picklable.

    Raises PeerLostError if a rank is lost, or has not come within EP_BACKEND_STARTUP_TIMEOUT_S, or the
    group's own timeout if that is shorter; the group is then of no use any more. A group that has nothing
    but NCCL connects when it is first used, for which torch has deadlines of its own.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    device = _device(group)
    told = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    sizes = torch.full((world,), len(told), device=device)
    limit, start = patience(group), monotonic()

    def exchange(into: torch.Tensor, sent: torch.Tensor, *split: Sequence[int]) -> None:
        left = max(0.001, start + limit - monotonic())
        work = all_to_all(group, into, sent, *split, timeout_s=left)
        if device.type != "cpu":  # where a wait has no end of its own
            poll(work.is_completed, left, "the all-to-all")
        work.wait()

    try:
        of_ranks = torch.empty_like(sizes)
        exchange(of_ranks, sizes)
        lengths: list[int] = of_ranks.tolist()
        came = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        exchange(came, told.repeat(world), lengths, [len(told)] * world)
    except RuntimeError as error:
        who, waited = f"rank {1 - rank}" if world == 2 else "a rank", monotonic() - start
        text = f"rank {rank} lost {who} while all of them met on the host: it has ended, or cannot be reached"
        if waited > 0.99 * limit:
            text = (
                f"rank {rank} waited {waited:.1f} s for {who} while all of them met on the host: it does not "
                f"come, or cannot be reached; {STARTUP} and the group's own timeout limit the wait"
            )
        raise PeerLostError(f"{text} ({error})") from error
    return [pickle.loads(bytes(part.tolist())) for part in came.cpu().split(lengths)]


def all_to_all(
    group: dist.ProcessGroup | None,
    into: torch.Tensor,
    sent: torch.Tensor,
    into_sizes: Sequence[int] = (),
    sent_sizes: Sequence[int] = (),
    *,
    timeout_s: float,
) -> dist.Work:
    """Start an all-to-all of pieces of these sizes or, without sizes, of equal ones. Over gloo it ends with
    RuntimeError after ``timeout_s``."""
    # With a deadline of its own: one that only the group's would end keeps the process from ending.
    options = dist.AllToAllOptions()
    options.timeout = timedelta(seconds=timeout_s)
    chosen: Any = group or dist.group.WORLD
    work: dist.Work = chosen.alltoall_base(into, sent, list(into_sizes), list(sent_sizes), options)
    return work


def poll(done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Ask until it is ``done``: a wait of CUDA's own would have no deadline. Raises RuntimeError."""
    start = monotonic()
    while not done():
        waited = monotonic() - start
        if waited > timeout_s:
            raise RuntimeError(f"{what} has not ended")
        if waited > SPIN_S:
            sleep(SPIN_S / 20)


def within(seconds: float, act: Callable[[], T], what: str) -> T:
    """``act()``, for libraries that may wait for ever: on a thread, which is left to itself if it has not
    ended after so many ``seconds``. Raises RuntimeError then."""
    ended: Future[T] = Future()

    def run() -> None:
        try:
            ended.set_result(act())
        except BaseException as error:
            ended.set_exception(error)

    Thread(target=run, name=what, daemon=True).start()
    if not wait([ended], seconds).done:
        raise RuntimeError(f"{what} has not ended after {seconds:g} s")
    return ended.result()


def patience(group: dist.ProcessGroup | None) -> float:
    """How long a meeting waits, in seconds."""
    try:
        ours = env.get(STARTUP)
    except EpConfigError:  # which this rank will tell the others when they meet
        ours = env.variable(STARTUP).default
    chosen: Any = group or dist.group.WORLD
    backend = chosen._get_backend(_device(group))
    return min(float(ours), backend.options._timeout.total_seconds())


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors of a meeting lie."""
    return torch.device(dist.distributed_c10d._get_object_coll_device(group))


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
