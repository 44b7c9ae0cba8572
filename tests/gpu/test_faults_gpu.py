"""Ranks with GPUs that are killed, and memory that cannot be pinned: who says what, and what is left."""

import os
import resource
import signal
import time
from pathlib import Path
from unittest import mock

import gpus
import pytest
import torch
import torch.distributed as dist
from faults import (
    MARGIN_S,
    POINTS,
    all_pids,
    caught,
    check_refusals,
    exchange,
    go_on_without,
    make,
    refused,
    refused_start,
    windows_of,
)
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend.surroundings import memory_room
from ep_backend.transports import host

pytestmark = pytest.mark.gpu
TRANSPORTS = ("peer", "host")
DEADLINE_S = 2.5
VICTIM = 1


def start(rank, group, transport, **more):
    return make(group, transport=transport, device=gpus.take(rank), **more)


def end(comm):
    """Destroy; the windows that this process still has."""
    comm.destroy()
    return len(windows_of([os.getpid()]))


def die_at(rank, group, transport, layout, point):
    comm = start(rank, group, transport, layout=layout)
    for n in range(4):
        exchange(comm, n)
    comm.set_timeout(DEADLINE_S)
    dist.barrier(group)

    def at(where):
        if (rank, where) == (VICTIM, point):
            torch.cuda.synchronize()  # all that it has sent by now is sent
            os.kill(os.getpid(), signal.SIGKILL)

    found = caught(comm, lambda: exchange(comm, 4, at=at))
    absent = refused(comm.recover)
    with pytest.raises(ep.EpError, match="not all ranks came"):
        exchange(comm, 5)
    go_on_without(comm, VICTIM)
    return found, absent, end(comm)


def nothing_is_left(group, windows):
    """End the group's processes; then nobody has its windows."""
    pids = group.pids
    group.kill()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not windows_of(all_pids()) & windows


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("layout", "point"), [("rank_major", POINTS[0]), ("expert_major", POINTS[1])])
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_is_killed_in_an_exchange(world, layout, point, transport):
    gpus.needs(world)
    with fresh_ranks(world) as group:
        group.start(die_at, transport, layout, point)
        outcomes = group.outcomes(90)
    assert outcomes[VICTIM].exitcode == -signal.SIGKILL
    for rank in set(range(world)) - {VICTIM}:
        assert outcomes[rank].ok, outcomes[rank]
        found, (seconds, text), left = outcomes[rank].value
        assert (found["rank"], found["peer"]) == (rank, VICTIM), found["text"]
        assert found["phase"] == ("dispatch" if point == POINTS[0] else "combine")
        assert found["elapsed"] < DEADLINE_S + MARGIN_S
        assert found["sticky_s"] < DEADLINE_S
        assert f"rank {VICTIM} did not come to recover()" in text
        assert seconds < DEADLINE_S + MARGIN_S
        assert left == 0


def replay(rank, group, transport, folder):
    """Replays of many exchanges, one behind the other, until a peer is missing; then without it."""
    comm = start(rank, group, transport)
    x = torch.ones(8, 64, device=comm.device)
    lost = comm.config.expert_ranks(comm.world_size).index(VICTIM)
    ids = torch.tensor([[0, lost]] * 8, device=comm.device)  # of two ranks, each of which returns the row
    weights = torch.ones(8, 2, device=comm.device)
    out = torch.empty_like(x)

    def one():
        received, handle = comm.dispatch(x, ids, weights)
        comm.combine(received.rows, handle, out=out)

    one()
    torch.testing.assert_close(out, 2 * x, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            one()
    comm.set_timeout(DEADLINE_S)
    dist.barrier(group)
    Path(folder, str(rank)).touch()
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < 60:
            last = time.monotonic()
            for _ in range(4):
                graph.replay()
            torch.cuda.synchronize()
            comm.check()
    except ep.EpTimeoutError as error:
        found = str(error), error.peer, time.monotonic() - last
    else:
        raise AssertionError("a rank was killed and nobody noticed")
    go_on_without(comm, VICTIM)
    out.fill_(-1)
    graph.replay()
    torch.cuda.synchronize()
    comm.check()
    return *found, torch.equal(out, x), end(comm)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_is_killed_while_a_graph_is_replayed(world, transport, tmp_path):
    """From outside, at any moment: a kernel of its may be at work in its peers' windows."""
    gpus.needs(world)
    with fresh_ranks(world) as group:
        group.start(replay, transport, str(tmp_path))
        deadline = time.monotonic() + 60
        while len(os.listdir(tmp_path)) < world and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        windows = windows_of(group.pids)
        assert len(windows) >= world, "the meeting's, and those of transport host"
        os.kill(group.pids[VICTIM], signal.SIGKILL)
        outcomes = group.outcomes(DEADLINE_S + 30)
        for rank in set(range(world)) - {VICTIM}:
            assert outcomes[rank].ok, outcomes[rank]
            text, peer, waited, right, left = outcomes[rank].value
            assert peer == VICTIM, text
            assert right
            assert waited < DEADLINE_S + MARGIN_S
            assert left == 0
        nothing_is_left(group, windows)


def come_late(rank, group, transport):
    """One rank calls recover() and gives up, without a failure of its own; then both meet."""
    comm = start(rank, group, transport)
    x = torch.ones(8, 64, device=comm.device)
    ids = torch.tensor([[0, 5]] * 8, device=comm.device)
    out = torch.empty_like(x)

    def one():
        received, handle = comm.dispatch(x, ids, torch.ones(8, 2, device=comm.device))
        comm.combine(received.rows, handle, out=out)

    def epoch():
        return ep._native.ops.cuda_exchange_max_epoch(comm._transport._exchange)

    one()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    torch.cuda.synchronize()
    dist.barrier(group)
    moved = None
    if rank != VICTIM:
        comm.set_timeout(DEADLINE_S)
        refused(comm.recover)
        before = epoch()
        graph.replay()
        torch.cuda.synchronize()
        moved = epoch() - before
        with pytest.raises(ep.EpError, match="not all ranks came"):
            comm.check()
        comm.set_timeout(30)
    dist.barrier(group)
    comm.recover()
    before = epoch()
    out.fill_(-1)
    graph.replay()
    torch.cuda.synchronize()
    comm.check()
    return moved, epoch() - before, torch.equal(out, 2 * x), end(comm)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_leaves_a_rank_that_could_not_recover(transport):
    gpus.needs(2)
    late, came = ranks(2).run(come_late, transport, timeout=90)
    assert late == (0, late[1], True, 0)
    assert late[1] > 0, "the epoch says nothing"
    assert came[2:] == (True, 0)


class Refusing:
    """The library's operators, but the second window is pinned already, so that CUDA refuses it."""

    def __init__(self):
        self.pinned = []

    def __getattr__(self, name):
        return getattr(ep._native.ops, name)

    def cuda_host_register(self, address, size):
        if self.pinned:
            ep._native.ops.cuda_host_register(address, size)
            try:
                return ep._native.ops.cuda_host_register(address, size)
            finally:
                ep._native.ops.cuda_host_unregister(address)
        self.pinned.append(address)
        return ep._native.ops.cuda_host_register(address, size)

    def cuda_host_unregister(self, address):
        ep._native.ops.cuda_host_unregister(address)
        self.pinned.remove(address)


def refused_by_cuda(rank, group):
    """One rank's CUDA refuses; then, with nothing in the way, all can start."""
    start(rank, group, "host").destroy()
    ops = Refusing() if rank == VICTIM else host.ops
    with mock.patch.object(host, "ops", ops):
        found = refused_start(lambda: start(rank, group, "host"))
    left = ops.pinned if rank == VICTIM else []
    with start(rank, group, "host") as comm:
        for n in range(5):
            exchange(comm, n)
    return found, left


@pytest.mark.parametrize("world", [2, 4])
def test_memory_that_cuda_does_not_pin(world):
    gpus.needs(world)
    found, left = zip(*ranks(world).run(refused_by_cuda, timeout=90), strict=True)
    check_refusals(found, f"rank {VICTIM} cannot start", "cannot be pinned for a GPU")
    assert left == ([],) * world


def with_little_memlock(rank, group):
    """Root may lock what it likes, and CUDA may not ask: then this limit must not matter."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, before[1]))
    try:
        with start(rank, group, "host", hidden_size=4096, max_tokens_per_rank=256) as comm:
            for n in range(5):
                exchange(comm, n)
            return ""
    except ep.EpConfigError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def test_a_small_memlock_limit():
    gpus.needs(2)
    said = ranks(2).run(with_little_memlock, timeout=60)
    print(f"with a memlock limit of 64 KiB: {said}")
    assert said == ["", ""] or all("cannot be pinned for a GPU" in text for text in said)


def too_much(rank, group):
    dist.barrier(group)
    more = {"channels": 16, "hidden_size": 16384, "max_tokens_per_rank": 16384}
    return refused_start(lambda: start(rank, group, "host", **more))


def test_windows_larger_than_the_memory():
    """Here the kernel would end a rank: the host's memory does not hold two windows of 64 GiB."""
    gpus.needs(2)
    if memory_room(Path("/")).free > 128 << 30:
        pytest.skip("the windows would fit")
    found = ranks(2).run(too_much, timeout=60)
    check_refusals(found, "rank 0 cannot start (and 1 more)", "windows of 2 ranks", "are left")
