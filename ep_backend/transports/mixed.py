"""Transport ``mixed``: for machines where some GPUs reach each other's memory and others do not.

The ranks are divided into parts. Inside a part rows and flags go straight into the receiver's GPU, as with
``peer``; between parts they go through memory of the host, as with ``host``. Parts share their windows by
descriptors: PyTorch's symmetric memory counts its meetings per process, which ranks of different parts would
not do alike.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend._native import ops
from ep_backend.config import EpConfig
from ep_backend.errors import EpConfigError
from ep_backend.transports.gpu import Windows
from ep_backend.transports.host import HostTransport
from ep_backend.transports.shm import DescriptorShare


class MixedTransport(HostTransport):
    """Ranks of one machine. ``parts``: all ranks of the group, divided so that inside each part all GPUs
    reach each other's memory; equal on all ranks."""

    name = "mixed"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        device: torch.device,
        parts: Sequence[Sequence[int]],
    ) -> None:
        self._part = next(part for part in parts if dist.get_rank(group) in part)
        super().__init__(group, config, device)

    def _share_windows(self, group: dist.ProcessGroup | None, shape: list[int]) -> Windows:
        mapped = self._share_host_windows(group)
        own, windows = self._share_part(group)
        addresses = list(mapped.addresses)
        for rank, window in windows.items():
            addresses[rank] = window.address
        return Windows(addresses, own, direct=self._part, keep=(mapped, windows), release=mapped.release)

    def _share_part(self, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, dict[int, PeerMemory]]:
        """This rank's window in GPU memory, as bytes, and those of the part's other ranks. Collective over
        all ranks; zeroed on return."""
        place, index = self._part.index(self._rank), self._device.index

        def make() -> tuple[torch.Tensor, DescriptorShare]:
            own, descriptor = ops.gpu_memory_make(index, self.window_bytes)
            return own, DescriptorShare(descriptor, place, len(self._part), self._config.timeout())

        (own, share), addresses = rendezvous.together(group, make, lambda made: made[1].address)

        def map_part() -> dict[int, PeerMemory]:
            descriptors = share.fetch([addresses[rank] for rank in self._part])
            try:
                return {
                    rank: PeerMemory(index, descriptor, self.window_bytes)
                    for rank, descriptor in zip(self._part, descriptors, strict=True)
                    if rank != self._rank
                }
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

        return own, rendezvous.together(group, map_part)[0]


class PeerMemory:
    """Memory of another GPU, mapped until nobody has this any more. Raises EpConfigError if the driver
    refuses."""

    def __init__(self, device: int, descriptor: int, size: int) -> None:
        try:
            self.address, mapped = ops.gpu_memory_map(device, descriptor, size)
        except RuntimeError as error:
            raise EpConfigError(
                f"a peer's GPU memory cannot be mapped ({error}); EP_BACKEND_TRANSPORT=host sends all rows "
                "through host memory"
            ) from error
        weakref.finalize(self, ops.gpu_memory_unmap, self.address, mapped)
