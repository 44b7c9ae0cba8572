"""Communicators that cannot start, and what is left behind when ranks end in any way: nothing."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from faults import MARGIN_S, all_pids, exchange, make, windows_of
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend.transports import shm


def no_window(rank, group, victim, what):
    """One rank cannot start; then, with nothing in its way, all can."""
    before = sorted(os.listdir("/proc/self/fd"))
    undo = []
    # Nobody answers there, so it may take this long.
    options = {"timeout_s": 10} if what == "elsewhere" else {}

    def replace(thing, name, value):
        undo.append((thing, name, getattr(thing, name)))
        setattr(thing, name, value)

    def broken(*args, **kwargs):
        raise OSError(12, "made up by a test")

    if rank == victim:
        if what == "no memory":
            replace(os, "memfd_create", broken)
        elif what == "cannot map":
            replace(shm.mmap, "mmap", broken)
        else:

            class Elsewhere(shm.WindowShare):
                def __init__(self, *args):
                    super().__init__(*args)
                    self.address = ("\0ep_backend-on-another-machine", *self.address[1:])

            import ep_backend.transports.cpu as cpu

            replace(cpu, "WindowShare", Elsewhere)
    try:
        make(group, **options)
    except ep.EpConfigError as error:
        text = str(error)
    else:
        raise AssertionError("a rank that cannot start was not noticed")
    finally:
        for thing, name, value in undo:
            setattr(thing, name, value)
    after = sorted(os.listdir("/proc/self/fd"))
    with make(group) as comm:
        for n in range(3):
            exchange(comm, n)
    return text, len(after) - len(before)


@pytest.mark.parametrize("what", ["no memory", "cannot map"])
def test_one_rank_cannot_start(what):
    for rank, (text, more_files) in enumerate(ranks(3).run(no_window, 1, what, timeout=120)):
        assert "rank 1 cannot start" in text, (rank, text)
        assert "made up by a test" in text
        assert more_files <= 0, f"rank {rank} keeps {more_files} files open"


def test_a_rank_out_of_reach():
    """Its address means nothing here: it runs elsewhere. Nobody can map it, so nobody starts."""
    for text, more_files in ranks(3).run(no_window, 1, "elsewhere", timeout=150):
        assert "They must run on one machine" in text
        assert more_files <= 0


def die_at_start(rank, group):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        make(group)
    except ep.EpError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("started without a rank")


def test_death_at_start():
    with fresh_ranks(3) as group:
        group.start(die_at_start)
        outcomes = group.outcomes(90)
    for rank in (0, 2):
        assert outcomes[rank].ok, outcomes[rank]
        text, seconds = outcomes[rank].value
        assert f"rank {rank} lost a rank while all of them met" in text
        assert seconds < MARGIN_S


def shared_megabytes():
    return int(re.search(r"Shmem: +(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 1024


@pytest.mark.alone  # it counts the shared memory of the whole machine
@pytest.mark.parametrize("how", ["exit", "kill -9 of all", "kill -9 of one"])
def test_nothing_is_left(how, tmp_path):
    def left_files():
        return [str(p) for folder in ("/dev/shm", "/tmp") for p in Path(folder).glob("*ep_backend-*")]

    files_before, shared_before = left_files(), shared_megabytes()
    with fresh_ranks(3) as group:
        pids = group.pids
        group.start(hold, how, str(tmp_path))
        deadline = time.monotonic() + 90
        while len(os.listdir(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        ours = windows_of(pids)
        assert len(ours) == 3, "each rank has a window, and all map it"
        held = shared_megabytes() - shared_before
        sockets = Path("/proc/net/unix").read_text()
        assert not any(f"@ep_backend-{pid}-" in sockets for pid in pids), "a socket is still open"
        if how != "exit":
            for pid in pids if how == "kill -9 of all" else pids[1:2]:
                os.kill(pid, signal.SIGKILL)
        outcomes = group.outcomes(60)
        if how == "kill -9 of one":
            for rank in (0, 2):
                assert "EpTimeoutError" in str(outcomes[rank])
        elif how == "exit":
            assert [o.exitcode for o in outcomes] == [0, 0, 0]
    deadline = time.monotonic() + 20
    while windows_of(all_pids()) & ours and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not windows_of(all_pids()) & ours
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert left_files() == files_before
    # Other work on the machine shares memory too, so only most of it must have gone.
    assert held > 100
    assert shared_megabytes() - shared_before < 0.3 * held


def hold(rank, group, how, folder):
    """Fill the windows, tell, and wait for the end."""
    comm = make(group, hidden_size=4096, max_tokens_per_rank=512)
    exchange(comm, 0, tokens=512)
    exchange(comm, 1, tokens=512)
    comm.set_timeout(4)
    Path(folder, f"held-{os.getpid()}").touch()
    dist.barrier(group)
    time.sleep(3)
    if how == "exit":
        os._exit(0)
    for n in range(10**6):
        exchange(comm, n)


def fork_a_child(rank, group):
    comm = make(group)
    exchange(comm, 0)
    child = os.fork()
    if child == 0:
        # What a child inherits it may drop: nothing of the parent's changes.
        comm.destroy()
        os._exit(0)
    os.waitpid(child, 0)
    for n in range(1, 20):
        exchange(comm, n)
    comm.destroy()
    return windows_of([os.getpid()])


def test_a_forked_child():
    assert ranks(2).run(fork_a_child) == [set(), set()]


def on_two_cores(rank, group):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[:2]))
    try:
        with make(group) as comm:
            dist.barrier(group)
            start = time.monotonic()
            for n in range(2000):
                exchange(comm, n)
            return time.monotonic() - start
    finally:
        os.sched_setaffinity(0, set(cores))


def test_four_ranks_on_two_cores_do_not_starve_each_other():
    """A bound that holds on a busy machine too; on an idle one it is a few seconds."""
    seconds = max(ranks(4).run(on_two_cores, timeout=180))
    print(f"2000 exchanges of 4 ranks on 2 cores: {seconds:.1f} s")
    assert seconds < 60
