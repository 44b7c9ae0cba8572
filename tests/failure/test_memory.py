"""Too little memory of each kind: every rank says so at the start, nothing is left, and less memory works."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from faults import check_refusals, exchange, make, refused_start
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend.surroundings import memory_room
from ep_backend.transports import host

MIB = 1 << 20
LARGE = {"hidden_size": 4096, "max_tokens_per_rank": 256}
HUGE = {"hidden_size": 4096, "max_tokens_per_rank": 2048}  # of 200 MiB
LARGEST = {"hidden_size": 16384, "max_tokens_per_rank": 16384}  # with 16 channels of 96 GiB
SMALL = {"hidden_size": 64, "max_tokens_per_rank": 8}


def without_room(rank, group, transport, kind, victim):
    """One rank may not take as much as a window; then it may."""
    before = resource.getrlimit(kind)
    if rank == victim:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (128 * MIB + used * (kind == resource.RLIMIT_AS), before[1]))
    try:
        found = refused_start(lambda: make(group, transport=transport, **HUGE))
    finally:
        resource.setrlimit(kind, before)
    with make(group, transport=transport, **SMALL) as comm:
        exchange(comm, 1)
    return found


@pytest.mark.parametrize(
    ("transport", "kind", "words"),
    [
        ("cpu", resource.RLIMIT_FSIZE, "no shared memory of"),
        ("cpu", resource.RLIMIT_AS, "cannot be mapped"),
        ("collective", resource.RLIMIT_AS, "no memory of"),
    ],
)
def test_a_rank_that_may_not_take_a_window(transport, kind, words):
    found = ranks(3).run(without_room, transport, kind, 1)
    check_refusals(found, "rank 1 cannot start", words)


@contextlib.contextmanager
def control_group(limit):
    """A control group with ``limit`` bytes of memory, of version 1 or 2. Needs to be root."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    old = (first / "memory.limit_in_bytes").exists()
    group = (first if old else second) / f"ep_backend-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group for memory can be made: {error}")
    try:
        yield group
    finally:
        deadline = time.monotonic() + 20
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def in_a_control_group(rank, group, folder, members):
    if rank in members:
        Path(folder, "cgroup.procs").write_text(str(os.getpid()))
    dist.barrier(group)
    found = refused_start(lambda: make(group, **HUGE))
    with make(group, **SMALL) as comm:
        for n in range(3):
            exchange(comm, n)
    return found


@pytest.mark.parametrize(
    ("members", "limit"),
    [
        ((0, 1, 2), 500 * MIB),  # room for two windows
        ((1,), 150 * MIB),  # for none
    ],
)
def test_a_control_group_that_is_too_small(members, limit):
    """The kernel would end a rank there, at the first page too many."""
    with control_group(limit) as folder:
        with fresh_ranks(3) as group:
            found = group.run(in_a_control_group, str(folder), members)
        first = min(members)
        check_refusals(found, f"rank {first} cannot start", f"windows of {len(members)} ranks", folder.name)


def too_much(rank, group):
    dist.barrier(group)
    found = refused_start(lambda: make(group, channels=16, **LARGEST))
    with make(group, **SMALL) as comm:
        exchange(comm, 1)
    return found


def test_more_than_the_machine_has():
    if memory_room(Path("/")).free > 250 << 30:
        pytest.skip("three of the largest windows that there are may fit")
    check_refusals(
        ranks(3).run(too_much), "rank 0 cannot start (and 2 more)", "windows of 3 ranks", "are left"
    )


def test_a_small_dev_shm():
    """Windows have no name in a file system, so the size of one does not matter."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("a mount of its own is not permitted")
    command = [sys.executable, "-m", "ep_backend.cli", "selftest", "--device", "cpu", "--phase", "node"]
    inside = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && df -k /dev/shm | tail -1 && exec "$@"'
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "sh", *command], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.split()[1] == "64"


def refused_by_cuda(rank, group, victim):
    """Transport host's windows where CUDA, made up here, refuses to pin the second one on one rank."""
    pinned = []

    def register(address, size):
        if rank == victim and pinned:
            raise RuntimeError("CUDA error: out of memory")
        pinned.append(address)
        return address

    ops = SimpleNamespace(
        cuda_host_register=register,
        cuda_host_unregister=pinned.remove,
        gpu_bus_id=lambda index: "0000:00:00.0",
        window_layout=host.ops.window_layout,
    )
    config = ep.EpConfig(num_experts=6, top_k=2, timeout_s=30, **LARGE)
    transport = host.HostTransport.__new__(host.HostTransport)
    transport._config, transport._device = config, torch.device("cpu")
    transport._rank, transport._world = rank, dist.get_world_size(group)
    transport._names = range(transport._world)
    shape = config.window_shape(transport._world)
    transport.window_bytes = ops.window_layout(shape)[0]
    with (
        mock.patch.object(host, "ops", ops),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "synchronize"),
    ):
        found = refused_start(lambda: transport._share_windows(group, shape))
        return found, len(pinned)


def test_memory_that_cannot_be_pinned():
    found, left = zip(*ranks(3).run(refused_by_cuda, 1), strict=True)
    check_refusals(
        found, "rank 1 cannot start", "cannot be pinned for a GPU (CUDA error: out of memory)", "collective"
    )
    assert left == (0, 0, 0)
