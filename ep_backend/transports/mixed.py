"""Transport ``mixed``: for machines where some GPUs reach each other's memory and others do not.

The ranks are divided into parts. Inside a part rows and flags go straight into the receiver's GPU, as with
``peer``; between parts they go through memory of the host, as with ``host``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ep_backend.config import EpConfig
from ep_backend.transports import gpu_memory
from ep_backend.transports.gpu import Windows
from ep_backend.transports.host import HostTransport


class MixedTransport(HostTransport):
    """Ranks of one machine. ``parts``: all ranks of the group, divided so that inside each part all GPUs
    reach each other's memory; equal on all ranks. ``ranks``: as for every transport for GPUs."""

    name = "mixed"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        device: torch.device,
        parts: Sequence[Sequence[int]],
        ranks: Sequence[int] | None = None,
    ) -> None:
        rank = dist.get_rank(group)
        part = next(part for part in parts if rank in part)
        self._part = [r for r in part if ranks is None or r in ranks]
        super().__init__(group, config, device, ranks)

    def _share_windows(self, group: dist.ProcessGroup | None, shape: list[int]) -> Windows:
        mapped = self._share_host_windows(group)
        own, windows = gpu_memory.share(
            group, self._part, self._device, self.window_bytes, self._config.timeout()
        )
        addresses = list(mapped.addresses)
        for rank, window in windows.items():
            addresses[self._names.index(rank)] = window.address
        direct = [self._names.index(rank) for rank in self._part]
        return Windows(addresses, own, direct=direct, keep=(mapped, windows), release=mapped.release)
