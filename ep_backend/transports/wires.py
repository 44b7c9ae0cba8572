"""What carries the rows of transport ``collective`` on GPUs: NCCL, or gloo by way of the CPU."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ep_backend import rendezvous

Piece = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Bytes on the GPU: where to put what comes, by source, and what goes out, by destination. Sizes may differ
from rank to rank and may be 0; what a rank sends to another is what that one expects."""

Wait = Callable[[float], None]
"""Returns when everything has come; raises RuntimeError after so many seconds."""


def choose(
    group: dist.ProcessGroup | None, ranks: Sequence[int], device: torch.device, timeout_s: float
) -> Wire:
    """NCCL if every rank has a GPU of its own, which NCCL insists on among those it takes for one host's;
    else gloo. Among ``ranks`` of ``group``, this rank among them. Collective over ``group``, each rank of
    which must be in exactly one such part."""
    has_nccl = dist.is_nccl_available()
    gpu = (os.environ.get("NCCL_HOSTID"), str(torch.cuda.get_device_properties(device).uuid))
    told = rendezvous.gather(group, (has_nccl, gpu))
    distinct = len({gpu for _, gpu in told}) == len(told)
    if distinct and all(has for has, _ in told):
        return NcclWire(group, ranks, device)
    return GlooWire(group, ranks, device, timeout_s)


class Wire(ABC):
    """Among all ranks of a group, which start the same exchanges in the same order. It is not the group
    itself, whose own operations may be under way at the same time."""

    capturable = False

    @abstractmethod
    def start(self, pieces: Sequence[Piece], timeout_s: float) -> Wait:
        """Behind what is queued on the current stream; what is queued there later finds the pieces, once the
        wait is over."""

    @abstractmethod
    def abort(self) -> None:
        """End what is under way, on this rank; nothing can be started any more."""

    @abstractmethod
    def close(self) -> None:
        """After everything that was started has been waited for."""


class NcclWire(Wire):
    """All pieces of an exchange are one NCCL kernel on the current stream, so a CUDA graph can hold it: then
    nobody may wait."""

    capturable = True

    def __init__(self, group: dist.ProcessGroup | None, ranks: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._nccl = rendezvous.nccl(group, ranks)
        self._options = dist.distributed_c10d.AllToAllOptions()
        self._options.asyncOp = False  # on the current stream
        self._in_graphs = False

    def start(self, pieces: Sequence[Piece], timeout_s: float) -> Wait:
        with torch.cuda.device(self._device):
            self._nccl._start_coalescing()
            try:
                for into, out_of in pieces:
                    self._nccl.alltoall(into, out_of, self._options)
            finally:
                self._nccl._end_coalescing()
            done = torch.cuda.Event()
            if torch.cuda.is_current_stream_capturing():
                self._in_graphs = True
            else:
                done.record()
        return partial(rendezvous.poll, done.query, what="NCCL's all-to-all")

    def abort(self) -> None:
        self._end(self._nccl.abort)

    def close(self) -> None:
        self._end(self._nccl.shutdown)

    def _end(self, call: Callable[[], Any]) -> None:
        if self._in_graphs:
            # NCCL waits until no graph that holds its kernels is left (pytorch/pytorch#115388).
            threading.Thread(target=self._on_device, args=(call,), daemon=True).start()
        else:
            call()

    def _on_device(self, call: Callable[[], Any]) -> None:
        with torch.cuda.device(self._device):
            call()


class GlooWire(Wire):
    """Through memory of the CPU, one all-to-all for all pieces; the host waits for the GPU."""

    def __init__(
        self, group: dist.ProcessGroup | None, ranks: Sequence[int], device: torch.device, timeout_s: float
    ) -> None:
        self._device = device
        self._gloo: Any = rendezvous.part(group, ranks, timeout_s)

    def start(self, pieces: Sequence[Piece], timeout_s: float) -> Wait:
        into = [[blocks[rank] for blocks, _ in pieces] for rank in range(self._gloo.size())]
        out_of = [[blocks[rank] for _, blocks in pieces] for rank in range(self._gloo.size())]
        sent = torch.cat([block for blocks in out_of for block in blocks]).cpu()
        into_sizes, sent_sizes = (
            [sum(block.numel() for block in blocks) for blocks in side] for side in (into, out_of)
        )
        came = torch.empty(sum(into_sizes), dtype=torch.uint8)
        work = rendezvous.all_to_all(self._gloo, came, sent, into_sizes, sent_sizes, timeout_s=timeout_s)
        places = [block for blocks in into for block in blocks]

        def wait(timeout_s: float, sent: torch.Tensor = sent) -> None:  # which must live as long
            work.wait(timedelta(seconds=timeout_s))
            parts = came.to(self._device).split([place.numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                place.copy_(part)

        return wait

    def abort(self) -> None:
        pass  # what has run into its deadline is over

    def close(self) -> None:
        del self._gloo
