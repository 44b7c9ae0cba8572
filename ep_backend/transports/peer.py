"""Transport ``peer``: windows in GPU memory that every peer can write, mapped by PyTorch's symmetric memory,
whose own barriers are not used. Where only some ranks of a group exchange, descriptors take its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend.config import EpConfig
from ep_backend.transports import gpu_memory
from ep_backend.transports.gpu import GpuTransport, Windows


class PeerTransport(GpuTransport):
    """Received rows are the window itself: nothing is copied after they have come.

    ``stagger``: 0, or how many ranks, one after another, share a link. Then a rank sends everything to one
    rank, then to the next, to itself last, instead of each row to all its ranks, and the ranks that share a
    link always send to such as share one. It divides the number of ranks and is equal on all.
    """

    name = "peer"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        device: torch.device,
        stagger: int = 0,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._stagger = stagger
        super().__init__(group, config, device, ranks)

    def _share_windows(self, group: dist.ProcessGroup | None, shape: list[int]) -> Windows:
        if self._world < dist.get_world_size(group):
            return self._share_descriptors(group)
        from torch.distributed import _symmetric_memory as symmetric

        window, _ = rendezvous.together(
            group, lambda: symmetric.empty(self.window_bytes, dtype=torch.uint8, device=self._device)
        )
        window.zero_()
        torch.cuda.synchronize(self._device)
        mapping, _ = rendezvous.together(
            group, lambda: symmetric.rendezvous(window, group or dist.distributed_c10d._get_default_group())
        )
        return Windows(mapping.buffer_ptrs, window, keep=mapping)

    def _share_descriptors(self, group: dist.ProcessGroup | None) -> Windows:
        timeout_s = self._config.timeout()
        own, others = gpu_memory.share(group, self._names, self._device, self.window_bytes, timeout_s)
        addresses = [others[r].address if r in others else own.data_ptr() for r in self._names]
        return Windows(addresses, own, keep=others)
