"""What of transport ``mixed`` can be seen without a GPU: whose windows a rank gets. Files stand for memory of
GPUs, as both are shared by descriptors."""

import ctypes
import gc
import mmap
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import ranks

from ep_backend import EpConfig, EpConfigError
from ep_backend.transports import gpu_memory, mixed

SIZE = 4096
DEVICE = torch.device("cuda", 0)


def memory(descriptor):
    return torch.frombuffer(mmap.mmap(descriptor, SIZE), dtype=torch.uint8)


class FileOps:
    """``refuse``: mapping fails."""

    def __init__(self, refuse):
        self.refuse, self.mapped = refuse, {}

    def gpu_memory_make(self, device, size):
        descriptor = os.memfd_create("stands for a GPU's memory")
        os.ftruncate(descriptor, size)
        return memory(descriptor), descriptor

    def gpu_memory_map(self, device, descriptor, size):
        if self.refuse:
            raise RuntimeError("made up by a test")
        mapped = memory(descriptor)
        self.mapped[mapped.data_ptr()] = mapped
        return mapped.data_ptr(), size

    def gpu_memory_unmap(self, address, size):
        assert size == SIZE
        del self.mapped[address]


def share(rank, group, parts, refusing=None):
    """The transport's windows, the addresses of the made-up windows in host memory, and open files left."""
    before = len(os.listdir("/proc/self/fd"))
    kept, gpu_memory.ops = gpu_memory.ops, FileOps(rank == refusing)
    released = []
    host = SimpleNamespace(
        addresses=list(range(dist.get_world_size(group))), release=lambda: released.append(1)
    )
    try:
        transport = mixed.MixedTransport.__new__(mixed.MixedTransport)
        transport._names = range(dist.get_world_size(group))
        transport._device, transport.window_bytes = DEVICE, SIZE
        transport._config = EpConfig(num_experts=4, top_k=1, hidden_size=8, max_tokens_per_rank=1)
        transport._part = next(part for part in parts if rank in part)
        transport._share_host_windows = lambda group: host
        windows = transport._share_windows(group, [])
    finally:
        gpu_memory.ops = kept
    return windows, released, len(os.listdir("/proc/self/fd")) - before


def windows_job(rank, group, parts):
    """Each rank writes its number into the windows of its part; what it then finds in its own."""
    windows, released, files = share(rank, group, parts)
    assert not windows.copies
    direct = [r for r, address in enumerate(windows.addresses) if address != r]
    assert direct == [r for r in windows.direct if r != rank]
    others = windows.keep[1]
    for address in [windows.own.data_ptr(), *(window.address for window in others.values())]:
        ctypes.memset(address + rank, 1 + rank, 1)
    dist.barrier(group)
    found = [r for r in range(SIZE) if windows.own[r]]
    assert {r: window.address for r, window in others.items()} == {r: windows.addresses[r] for r in direct}
    windows.release()
    assert released == [1]
    return tuple(windows.direct), found, files


@pytest.mark.parametrize(
    "parts",
    [((0, 1), (2, 3)), ((1, 3), (0, 2)), ((0, 1, 2), (3,)), ((0,), (1,), (2,), (3,)), ((0, 1, 2, 3),)],
    ids=str,
)
def test_a_rank_has_the_windows_of_its_part(parts):
    for rank, (direct, found, files) in enumerate(ranks(4).run(windows_job, parts)):
        assert rank in direct
        assert direct in parts
        assert found == list(direct)
        assert files <= len(direct)  # each mapping of a file keeps a descriptor; a GPU's does not


def refused_job(rank, group):
    before = len(os.listdir("/proc/self/fd"))
    said = ""
    try:
        share(rank, group, ((0, 1), (2, 3)), refusing=3)
    except EpConfigError as error:
        said = str(error)
    gc.collect()  # the error's frames hold what was mapped
    return said, len(os.listdir("/proc/self/fd")) - before


def test_memory_that_one_rank_cannot_map_stops_all():
    for said, files in ranks(4).run(refused_job):
        assert "rank 3 cannot start: a peer's GPU memory cannot be mapped (made up by a test)" in said
        assert files <= 0
