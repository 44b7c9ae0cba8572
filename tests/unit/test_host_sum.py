"""Sums over ranks through shared memory."""

import time

import pytest
import torch
import torch.distributed as dist
from harness import fresh_ranks, ranks

from ep_backend import EpArgumentError, EpError, EpProtocolError, EpTimeoutError
from ep_backend.host_sum import HostSum

CAPACITY = 24


def sums_job(rank, group, rounds):
    """Every round another shape, other values, and now and then a late rank; returns what is wrong."""
    world = torch.distributed.get_world_size(group)
    host_sum = HostSum(group, CAPACITY, 20.0)
    wrong = []
    for number in range(rounds):
        shape = (4, 1 + number % 6)
        values = torch.arange(4 * shape[1], dtype=torch.int32).view(shape) * (number + 1) + rank
        if (number + 3 * rank) % 97 == 0:
            time.sleep(0.01)
        want = sum(
            torch.arange(4 * shape[1], dtype=torch.int32).view(shape) * (number + 1) + r for r in range(world)
        )
        host_sum.all_reduce(values)
        if not torch.equal(values, want):
            wrong.append(number)
    host_sum.destroy()
    with pytest.raises(EpError, match="destroyed"):
        host_sum.all_reduce(torch.zeros(1, dtype=torch.int32))
    return wrong


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sums_are_those_of_all_ranks(world):
    assert ranks(world).run(sums_job, 300) == [[]] * world


def absent_job(rank, group):
    host_sum = HostSum(group, CAPACITY, 0.3)
    if rank == 1:
        return None
    errors = []
    for _ in range(2):
        try:
            host_sum.all_reduce(torch.ones(1, dtype=torch.int32))
        except EpTimeoutError as error:
            errors.append((error.peer, error.waited_s, str(error)))
    return errors


def test_a_rank_that_does_not_come_is_named_and_the_failure_stays():
    first, second = ranks(2).run(absent_job)[0]
    assert first[0] == second[0] == 1
    assert 0.3 <= first[1] < 5
    assert "rank 0 waited 0.3 s in a host sum for rank 1" in first[2]


def counts_job(rank, group):
    host_sum = HostSum(group, CAPACITY, 5.0)
    try:
        host_sum.all_reduce(torch.ones(1 + rank, dtype=torch.int32))
    except EpProtocolError as error:
        return str(error)


def test_other_counts_are_an_error():
    assert ranks(2).run(counts_job) == [
        f"rank {1 - rank} and rank {rank} brought different counts to a host sum" for rank in (0, 1)
    ]


def refused_job(rank, group):
    host_sum = HostSum(group, CAPACITY, 5.0)
    refused = []
    for values in (
        torch.ones(CAPACITY + 1, dtype=torch.int32),
        torch.ones(2),
        torch.ones(2, 3, dtype=torch.int32).t(),
    ):
        assert not host_sum.takes(values)
        try:
            host_sum.all_reduce(values)
        except EpArgumentError as error:
            refused.append(str(error))
    return refused


def test_other_tensors_are_refused():
    for refused in ranks(2).run(refused_job):
        assert len(refused) == 3
        assert refused[1].startswith(
            "a host sum takes at most 24 contiguous int32 numbers on the CPU, this is"
        )


def interrupted_job(rank, group):
    """A wait can be interrupted: Python acts on signals while it lasts. Then comes the next sum."""
    import signal

    host_sum = HostSum(group, CAPACITY, 20.0)
    second = torch.tensor([10 + rank], dtype=torch.int32)
    if rank == 1:
        dist.barrier(group)
        for values in (torch.ones(3, dtype=torch.int32), second):
            host_sum.all_reduce(values)
        return int(second)

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    start = time.monotonic()
    first = torch.ones(3, dtype=torch.int32)
    try:
        host_sum.all_reduce(first)
    except KeyboardInterrupt:
        waited = time.monotonic() - start
    dist.barrier(group)
    host_sum.all_reduce(second)
    assert first.tolist() == [1, 1, 1]
    return waited, int(second)


def test_a_wait_can_be_interrupted():
    with fresh_ranks(2) as group:
        (waited, sum_here), sum_there = group.run(interrupted_job)
    assert waited < 10
    assert sum_here == sum_there == 21
