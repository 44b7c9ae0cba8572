"""A rank that dies or stalls: the others raise EpTimeoutError in time and blame it; then recovery."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faults import MARGIN_S, POINTS, caught, exchange, go_on_without, make, refused, stop
from harness import fresh_ranks

import ep_backend as ep

DEADLINE_S = 2.5  # a machine with much other work may keep a rank waiting for a second


def check_blame(found, rank, victim, phases):
    assert found["rank"] == rank
    assert found["peer"] == victim, found["text"]
    assert found["phase"] in phases, found["text"]
    assert found["reported_by"] != victim
    assert found["elapsed"] < DEADLINE_S + MARGIN_S
    assert found["sticky_s"] < DEADLINE_S
    assert f"rank {rank}" in found["text"]
    assert f"rank {victim}" in found["text"]
    if found["reported_by"] == rank:
        assert victim in found["missing"]
        assert found["elapsed"] > DEADLINE_S * 0.9, "it gave up too early"


def die(rank, group, victim, point, layout):
    comm = make(group, layout=layout, channels=2)
    for n in range(4):
        exchange(comm, n, channel=n % 2)
    comm.set_timeout(DEADLINE_S)
    dist.barrier(group)
    found = caught(
        comm, lambda: exchange(comm, 4, at=lambda p: stop("dies") if (rank, p) == (victim, point) else None)
    )
    tries = [refused(comm.recover) for _ in range(2)]
    comm.destroy()
    return found, tries


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("victim", "layout"), [(2, "rank_major"), (0, "expert_major")])
def test_death(victim, point, layout):
    with fresh_ranks(3) as group:
        group.start(die, victim, point, layout)
        outcomes = group.outcomes(90)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    # Between the halves of combine all its flags are out: the others lack nothing yet.
    late = point == POINTS[2]
    for rank in {0, 1, 2} - {victim}:
        if late:
            assert "went unnoticed" in str(outcomes[rank])
            continue
        assert outcomes[rank].ok, outcomes[rank]
        found, tries = outcomes[rank].value
        check_blame(found, rank, victim, ("dispatch",) if point == POINTS[0] else ("combine",))
        for seconds, text in tries:
            assert seconds < DEADLINE_S + MARGIN_S
            assert f"rank {victim} did not come to recover()" in text


def die_in_a_loop(rank, group, victim, exchanges):
    comm = make(group)
    for n in range(10):
        exchange(comm, n)
    dist.barrier(group)
    comm.set_timeout(DEADLINE_S)

    def loop():
        for n in range(10**6):
            if rank == victim and n == exchanges:
                stop("dies")
            exchange(comm, n)

    found = caught(comm, loop)
    return found, refused(comm.recover)


@pytest.mark.parametrize("exchanges", [1, 57])
def test_death_in_mid_loop(exchanges):
    victim = 1
    with fresh_ranks(4) as group:
        group.start(die_in_a_loop, victim, exchanges)
        outcomes = group.outcomes(90)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    for rank in {0, 2, 3}:
        assert outcomes[rank].ok, outcomes[rank]
        found, (seconds, _) = outcomes[rank].value
        assert found["peer"] == victim, found["text"]
        assert found["phase"] == "dispatch"
        assert seconds < DEADLINE_S + MARGIN_S


def left_by_one(rank, group, victim, layout):
    """A death, and exchanges of the others afterwards."""
    comm = make(group, layout=layout, channels=2)
    for n in range(4):
        exchange(comm, n, channel=n % 2)
    comm.set_timeout(DEADLINE_S)
    dist.barrier(group)
    caught(comm, lambda: exchange(comm, 4, at=lambda p: stop("dies") if rank == victim else None))
    refused(comm.recover)
    go_on_without(comm, victim)
    x, ids, weights = torch.ones(1, 64), torch.tensor([[0, 1]]), torch.ones(1, 2)
    with pytest.raises(ep.EpArgumentError, match="while ranks are masked 8 was wanted"):
        comm.dispatch(x, ids, weights, tokens_per_rank=4)
    for wrong in (rank, 3, -1, "1"):
        with pytest.raises(ep.EpArgumentError, match="cannot be masked"):
            comm.mask_ranks([wrong])
    exchange(comm, 26, without=[victim])
    comm.destroy()
    return True


def retried(rank, group):
    """The last exchange before the mask, which failed, had another number of slots than those before it."""
    comm = make(group)
    exchange(comm, 0)
    dist.barrier(group)
    if rank == 2:
        stop("dies")
    comm.set_timeout(DEADLINE_S)
    call = torch.ones(1, 64), torch.tensor([[0, 1]]), torch.ones(1, 2)
    with pytest.raises(ep.EpTimeoutError):
        comm.dispatch(*call, tokens_per_rank=4)
    with pytest.raises(ep.EpTimeoutError):
        comm.dispatch(*call)  # which sends nothing
    comm.set_timeout(30)
    comm.mask_ranks([2])
    comm.recover()
    with pytest.raises(ep.EpArgumentError, match="while ranks are masked 4 was wanted"):
        comm.dispatch(*call)
    received, _ = comm.dispatch(*call, tokens_per_rank=4)
    return received.tokens_per_source.tolist()


def test_slots_stay_those_of_the_exchange_that_failed():
    """A rank that was thought dead may have sent rows of it."""
    with fresh_ranks(3) as group:
        group.start(retried)
        outcomes = group.outcomes(90)
    assert [outcomes[rank].value for rank in range(2)] == [[1, 1, 0]] * 2


def ends_a_wait(rank, group):
    """A wait that a signal ends is over: after recovery the next one has all of its time."""
    comm = make(group)
    exchange(comm, 0)
    comm.set_timeout(DEADLINE_S)
    dist.barrier(group)
    if rank == 0:

        def interrupt(number, frame):
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            exchange(comm, 1)
        time.sleep(DEADLINE_S)
    dist.barrier(group)
    comm.recover()
    if rank == 1:
        time.sleep(0.5)
    exchange(comm, 2)
    return True


def test_a_wait_that_is_interrupted():
    with fresh_ranks(2) as group:
        assert group.run(ends_a_wait) == [True, True]


@pytest.mark.parametrize(("victim", "layout"), [(0, "rank_major"), (1, "compact"), (2, "expert_major")])
def test_the_others_go_on_without_a_dead_rank(victim, layout):
    with fresh_ranks(3) as group:
        group.start(left_by_one, victim, layout)
        outcomes = group.outcomes(120)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    assert [outcomes[rank].value for rank in range(3) if rank != victim] == [True, True]


def stall(rank, group, victim, layout):
    """At each point in turn: stall, find out, recover too early, go on, recover, and be right again."""
    comm = make(group, layout=layout, channels=2)
    pids = [None] * dist.get_world_size(group)
    dist.all_gather_object(pids, os.getpid(), group=group)
    number, founds, early = 0, [], []
    for point in POINTS[:2]:
        for _ in range(3):
            exchange(comm, number, channel=number % 2)
            number += 1
        dist.barrier(group)
        comm.set_timeout(DEADLINE_S if rank != victim else 30)

        def one_that_stalls(point=point, number=number):
            exchange(comm, number, at=lambda p: stop("stalls") if (rank, p) == (victim, point) else None)
            exchange(comm, number)  # the victim may find all flags of its own exchange

        founds.append(caught(comm, one_that_stalls))
        number += 1
        if rank != victim:
            early.append(refused(comm.recover))
        if rank == (victim + 1) % len(pids):
            time.sleep(2 * DEADLINE_S)  # all others have their errors, and have tried to recover, by now
            os.kill(pids[victim], signal.SIGCONT)
        comm.set_timeout(30)
        comm.recover()
        comm.check()
        for _ in range(10):
            exchange(comm, number, channel=number % 2)
            number += 1
    return founds, early


@pytest.mark.parametrize(("victim", "layout"), [(0, "compact"), (2, "rank_major")])
def test_stall_and_recovery(victim, layout):
    with fresh_ranks(3) as group:
        group.start(stall, victim, layout)
        outcomes = group.outcomes(120)
    for rank, outcome in enumerate(outcomes):
        assert outcome.ok, outcome
        founds, early = outcome.value
        for found, point in zip(founds, POINTS, strict=False):
            if rank == victim:
                # Told by the others, about itself.
                assert found["peer"] == victim
                assert found["reported_by"] != victim
            else:
                check_blame(found, rank, victim, ("dispatch",) if point == POINTS[0] else ("combine",))
        for seconds, text in early:
            assert seconds < DEADLINE_S + MARGIN_S
            assert f"rank {victim} did not come" in text


def stall_before_closing(rank, group, victim):
    """The others drop the exchange and begin the next: the wait for the closing flags has a deadline too."""
    comm = make(group)
    exchange(comm, 0)
    dist.barrier(group)
    x = torch.ones(1, 64)
    ids = torch.tensor([[0, 5]])
    comm.dispatch(x, ids, torch.ones(1, 2))
    if rank == victim:
        stop("dies")
    comm.set_timeout(DEADLINE_S)
    return caught(comm, lambda: exchange(comm, 1))


def test_death_while_others_close():
    with fresh_ranks(3) as group:
        group.start(stall_before_closing, 1)
        outcomes = group.outcomes(60)
    for rank in (0, 2):
        assert outcomes[rank].ok, outcomes[rank]
        check_blame(outcomes[rank].value, rank, 1, ("combine",))


def stop_collective(rank, group, victim, how):
    comm = make(group, transport="collective")
    for n in range(3):
        exchange(comm, n)
    comm.set_timeout(DEADLINE_S)
    dist.barrier(group)

    def loop():
        for n in range(3, 6):
            if rank == victim and n == 4:
                stop(how)
            exchange(comm, n)

    found = caught(comm, loop)
    return found, refused(comm.recover)


@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_collective(how):
    """torch.distributed does not tell whom it waited for: peer is -1, or the rank that was named."""
    with fresh_ranks(3) as group:
        group.start(stop_collective, 2, how)
        outcomes = group.outcomes(DEADLINE_S + 30, stopped={2} if how == "stalls" else ())
    assert not outcomes[2].ok
    for rank in (0, 1):
        assert outcomes[rank].ok, outcomes[rank]
        found, (_, text) = outcomes[rank].value
        assert found["rank"] == rank
        assert found["peer"] in (-1, 2)
        assert found["elapsed"] < DEADLINE_S + MARGIN_S
        assert "cannot recover" in text
    texts = [outcomes[rank].value[0]["text"] for rank in (0, 1)]
    if how == "dies":
        assert all("lost the connection to a peer" in text for text in texts), texts
    else:  # who sees its deadline first closes the connections of the other
        assert any(f"waited {DEADLINE_S:.1f} s" in text for text in texts), texts


def wait_for_nobody(rank, group, ready):
    comm = make(group)
    comm.set_timeout(4)
    dist.barrier(group)
    if rank == 1:
        time.sleep(8)
        return None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may have it ignored
    start = time.monotonic()
    try:
        Path(ready).touch()
        exchange(comm, 0)
    except (KeyboardInterrupt, ep.EpTimeoutError) as error:
        return type(error).__name__, time.monotonic() - start
    raise AssertionError("nobody came, and yet")


def test_interrupt(tmp_path):
    """Ctrl-C in a wait takes effect at the deadline at the latest."""
    with fresh_ranks(2) as group:
        ready = tmp_path / "ready"
        group.start(wait_for_nobody, str(ready))
        deadline = time.monotonic() + 40
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        os.kill(group.pids[0], signal.SIGINT)
        outcomes = group.outcomes(40)
    assert outcomes[0].ok, outcomes[0]
    kind, seconds = outcomes[0].value
    assert kind == "KeyboardInterrupt"
    assert seconds < 4 + MARGIN_S


def interrupted(rank, group):
    """Seconds that rank 0 waited for rank 1, which does not come, until Ctrl-C ended the wait."""
    comm = make(group)
    exchange(comm, 0)
    dist.barrier(group)
    if rank == 1:
        dist.barrier(group)
        return None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        exchange(comm, 1)
    waited = time.monotonic() - start
    dist.barrier(group)
    comm.destroy()
    return waited


def test_ctrl_c_ends_a_wait():
    with fresh_ranks(2) as group:
        waited, _ = group.run(interrupted, timeout=60)
    assert 0.4 < waited < MARGIN_S  # the deadline is 30 s
