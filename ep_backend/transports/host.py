"""Transport ``host``: windows in pinned memory of the host, for GPUs that cannot reach each other's memory.

Every process maps the windows of all ranks and pins them for its GPU. Rows and flags are stored across PCIe
into the receiver's window; a dispatch brings the rows on to the receiver's GPU while more are arriving, since
experts read them more than once, and a combine adds them up where they are. What a rank sends to itself does
not leave its GPU.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend._native import ops
from ep_backend.errors import EpConfigError
from ep_backend.surroundings import local_cpus
from ep_backend.transports.gpu import GpuTransport, Windows
from ep_backend.transports.shm import WindowShare


class HostTransport(GpuTransport):
    """Ranks of one machine. A window's memory is on the NUMA node of the GPU that reads it."""

    name = "host"

    def _share_windows(self, group: dist.ProcessGroup | None, shape: list[int]) -> Windows:
        mapped = self._share_host_windows(group)
        copy_bytes = self._config.num_channels * ops.window_layout(shape)[-1]

        def make_copies() -> torch.Tensor:
            copies = torch.zeros(copy_bytes, dtype=torch.uint8, device=self._device)
            torch.cuda.synchronize(self._device)
            return copies

        copies, _ = rendezvous.together(group, make_copies)
        return Windows(mapped.addresses, copies, copies=True, keep=mapped, release=mapped.release)

    def _share_host_windows(self, group: dist.ProcessGroup | None) -> Pinned:
        return share_windows(group, self._names, self._device, self.window_bytes, self._config.timeout())


def share_windows(
    group: dist.ProcessGroup | None,
    ranks: Sequence[int],
    device: torch.device,
    size: int,
    timeout_s: float,
) -> Pinned:
    """A window of ``size`` bytes of each of ``ranks`` of ``group``, which are on one machine, pinned for
    ``device``; zeroed on return. Collective over ``group``, each rank of which must be in exactly one such
    part. Raises EpConfigError on all ranks."""
    share, addresses = rendezvous.together(
        group,
        lambda: WindowShare(size, ranks.index(dist.get_rank(group)), len(ranks), timeout_s),
        lambda share: share.address,
    )

    def map_all() -> list[mmap.mmap]:
        with near(device):
            return share.map_peers([addresses[r] for r in ranks])

    # The owner takes the pages, near its GPU, before others pin them.
    windows, _ = rendezvous.together(group, map_all)
    return rendezvous.together(group, lambda: Pinned(windows, device))[0]


@contextmanager
def near(device: torch.device) -> Iterator[None]:
    """This thread on the CPUs next to the GPU; where it is, if the machine does not say which they are."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before & local_cpus(Path("/"), ops.gpu_bus_id(device.index)) or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Pinned:
    """Windows pinned for the GPUs of this process, until ``release`` is called or nobody has them any more.
    ``addresses``: for the GPU; ``memory``: for the CPU, [size] uint8 each. Raises EpConfigError if CUDA
    refuses."""

    def __init__(self, windows: Sequence[mmap.mmap], device: torch.device) -> None:
        self.memory: list[torch.Tensor] = []
        self.addresses: list[int] = []
        self.release = weakref.finalize(self, _unpin, self.memory)
        try:
            with torch.cuda.device(device):
                for window in windows:
                    memory = torch.frombuffer(window, dtype=torch.uint8)
                    self.addresses.append(ops.cuda_host_register(memory.data_ptr(), memory.numel()))
                    self.memory.append(memory)
        except RuntimeError as error:
            self.release()
            size = sum(map(len, windows)) / 2**20
            raise EpConfigError(
                f"{size:.0f} MiB of the host's memory cannot be pinned for a GPU ({error}); fewer tokens per "
                "rank need less, and EP_BACKEND_TRANSPORT=collective none"
            ) from error


def _unpin(pinned: list[torch.Tensor]) -> None:
    for memory in pinned:
        ops.cuda_host_unregister(memory.data_ptr())
    pinned.clear()
