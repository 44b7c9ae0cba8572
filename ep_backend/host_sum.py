"""Sums of a few numbers over the ranks of one machine, for what hosts agree on before each step of an engine.

Over sockets that takes longer than a whole MoE layer; through shared memory it takes about a microsecond a
rank. How it is done and why two banks are enough: csrc/kernels/cpu/host_sum.h.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ep_backend import _native, rendezvous
from ep_backend._native import ops
from ep_backend.errors import EpArgumentError, EpError, EpProtocolError, EpTimeoutError
from ep_backend.transports.shm import WindowShare

SPIN_US = 5000
"""How long a waiting rank keeps its core, if there are enough of them: a nap would last 60 us at least."""
CORES_PER_RANK = 2


class HostSum:
    """Made together by all ranks of ``group``; used by one thread at a time, in the same order on all ranks.

    ``capacity``: most numbers in one sum. ``timeout_s``: how long a rank waits for the others. ``ranks``:
    those of the group that add up with this one, itself included; None for all. Every rank of the group must
    be in exactly one such part. Raises EpConfigError on all ranks if they cannot share memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        capacity: int,
        timeout_s: float,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._names = range(dist.get_world_size(group)) if ranks is None else ranks
        self.rank, self.world_size = self._names.index(dist.get_rank(group)), len(self._names)
        self.capacity, self.timeout_s = capacity, timeout_s
        size = int(ops.host_sum_bytes(capacity))
        share, addresses = rendezvous.together(
            group,
            lambda: WindowShare(size, self.rank, self.world_size, timeout_s),
            lambda share: share.address,
        )
        boards, _ = rendezvous.together(group, lambda: share.map_peers([addresses[r] for r in self._names]))
        self._boards = [torch.frombuffer(board, dtype=torch.uint8) for board in boards]
        enough_cores = len(os.sched_getaffinity(0)) >= CORES_PER_RANK * self.world_size
        self._handle = ops.host_sum_create(
            self.rank, capacity, SPIN_US if enough_cores else 0, [board.data_ptr() for board in self._boards]
        )
        self._free = weakref.finalize(self, ops.host_sum_destroy, self._handle)
        self._interrupted: torch.Tensor | None = None

    def all_reduce(self, values: torch.Tensor) -> None:
        """Replace ``values`` (contiguous int32 on the CPU, any shape of at most ``capacity`` numbers, the
        same on all ranks) by its sum over the ranks.

        A call that a signal ends (Ctrl-C) counts: the next one ends it first. Raises EpTimeoutError, which
        names the rank that did not come, and EpProtocolError if a rank brought another count; both stay.
        EpArgumentError for anything else than such a tensor, EpError after ``destroy``.
        """
        if not self._free.alive:
            raise EpError("the host sum has been destroyed")
        if not self.takes(values):
            raise EpArgumentError(
                f"a host sum takes at most {self.capacity} contiguous int32 numbers on the CPU, this is "
                f"{values.dtype} {list(values.shape)} on {values.device}"
            )
        if self._interrupted is not None:
            self._add(self._interrupted)
            self._interrupted = None
        self._add(values)

    def _add(self, values: torch.Tensor) -> None:
        timeout_us = round(self.timeout_s * 1e6)
        try:
            while (status := ops.host_sum(self._handle, values, timeout_us)) == _native.WAITING:
                pass  # Python acts on signals here
        except BaseException:
            self._interrupted = values.clone()
            raise
        if status == _native.OK:
            return
        blamed, waited_us = ops.host_sum_error(self._handle)
        rank, peer = self._names[self.rank], self._names[blamed]
        if status == _native.TIMEOUT:
            raise EpTimeoutError(rank=rank, peer=peer, phase="a host sum", waited_s=waited_us / 1e6)
        raise EpProtocolError(f"rank {peer} and rank {rank} brought different counts to a host sum")

    def takes(self, values: torch.Tensor) -> bool:
        """Whether `all_reduce` takes this tensor."""
        return (
            values.dtype == torch.int32
            and values.device.type == "cpu"
            and values.is_contiguous()
            and values.numel() <= self.capacity
        )

    def destroy(self) -> None:
        """Not collective. May be called twice."""
        self._free()
