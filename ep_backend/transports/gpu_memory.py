"""Memory of GPUs that other processes of the machine map, by descriptors that go from process to process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend._native import ops
from ep_backend.errors import EpConfigError
from ep_backend.transports.shm import DescriptorShare


def share(
    group: dist.ProcessGroup | None,
    ranks: Sequence[int],
    device: torch.device,
    size: int,
    timeout_s: float,
) -> tuple[torch.Tensor, dict[int, PeerMemory]]:
    """``size`` bytes of this rank's GPU, and those of the other ``ranks`` of ``group``; zeroed on return.

    Collective over ``group``, each rank of which must be in exactly one such part. PyTorch's symmetric memory
    is not for this: it counts its meetings per process, which ranks of different parts would not do alike.
    """
    rank = dist.get_rank(group)

    def make() -> tuple[torch.Tensor, DescriptorShare]:
        own, descriptor = ops.gpu_memory_make(device.index, size)
        return own, DescriptorShare(descriptor, ranks.index(rank), len(ranks), timeout_s)

    (own, shared), addresses = rendezvous.together(group, make, lambda made: made[1].address)

    def map_others() -> dict[int, PeerMemory]:
        descriptors = shared.fetch([addresses[r] for r in ranks])
        try:
            return {
                r: PeerMemory(device.index, descriptor, size)
                for r, descriptor in zip(ranks, descriptors, strict=True)
                if r != rank
            }
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    return own, rendezvous.together(group, map_others)[0]


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
