"""Plain collectives as the baseline: what engines do where nothing better is there."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ep_backend.bench.plain import Plain
from ep_backend.bench.workload import Inputs

CALIBRATION_ROUNDS = 7


class AllGather(Plain):
    """All-gather of every rank's rows, ids, weights (and scales); reduce-scatter of every rank's sums.

    On CPUs torch.distributed offers several ways to the same result; the fastest for the case's size is
    taken, measured before the case. On GPUs it is NCCL, called as vLLM's default all-to-all does: one
    all-gather for each tensor, one reduce-scatter.
    """

    capturable = True

    def prepare(self, inputs: list[Inputs]) -> None:
        super().prepare(inputs)
        tokens, widths = inputs[0].tokens, [piece.shape[1] for piece in self.pieces[0]]
        rows, hidden, like = self.world * tokens, self.settings.hidden, inputs[0].expected
        result = functools.partial(like.new_empty, dtype=self.settings.result_dtype)
        octets = functools.partial(like.new_empty, dtype=torch.uint8)
        self._gathered = [octets(rows, width) for width in widths]
        self.results = [result(rows, hidden).zero_() for _ in inputs]
        self._number, out = 0, result(tokens, hidden)
        if self.on_gpus:
            self._gather, self._reduce = self._gather_each, self._reduce_scatter
            self._chosen = "all_gather of each tensor", "reduce_scatter"
            return
        self._packed, self._packed_all = octets(tokens, sum(widths)), octets(rows, sum(widths))
        self._scratch = result(rows, hidden)

        gathers = {"all_gather": self._gather_each, "packed all_gather": self._gather_packed}
        reduces = {
            "reduce_scatter": self._reduce_scatter,
            "all_to_all + sum": self._all_to_all_and_sum,
            "all_reduce + slice": self._all_reduce_and_slice,
        }
        gather, reduce = _fastest(gathers, 0), _fastest(reduces, out)
        self._gather, self._reduce, self._chosen = gathers[gather], reduces[reduce], (gather, reduce)

    def dispatch(self, number: int) -> None:
        self._number = number
        self._gather(number)

    def combine(self, out: torch.Tensor) -> None:
        self._reduce(out)

    def details(self) -> dict[str, Any]:
        return {"collectives": " and ".join(self._chosen), "window_bytes": None}

    def _gather_each(self, number: int) -> None:
        for into, piece in zip(self._gathered, self.pieces[number], strict=True):
            _all_gather(into, piece, group=self.group)
        self._is_packed = False

    def _gather_packed(self, number: int) -> None:
        # Rows are left where they arrive: what an engine would do to take them apart is not counted.
        torch.cat(self.pieces[number], dim=1, out=self._packed)
        _all_gather(self._packed_all, self._packed)
        self._is_packed = True

    def received(self) -> list[torch.Tensor]:
        parts = self._gathered
        if self._is_packed:
            parts = list(self._packed_all.split([p.shape[1] for p in self._gathered], dim=1))
        return parts

    def _reduce_scatter(self, out: torch.Tensor) -> None:
        _reduce_scatter(out, self.results[self._number], group=self.group)

    def _all_to_all_and_sum(self, out: torch.Tensor) -> None:
        dist.all_to_all_single(self._scratch, self.results[self._number])
        torch.sum(self._scratch.view(self.world, *out.shape), 0, out=out)

    def _all_reduce_and_slice(self, out: torch.Tensor) -> None:
        self._scratch.copy_(self.results[self._number])
        dist.all_reduce(self._scratch)
        out.copy_(self._scratch.view(self.world, *out.shape)[self.rank])


# Renamed in PyTorch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _fastest(ways: Mapping[str, Callable[[Any], None]], argument: Any) -> str:
    """The way whose slowest rank is the fastest, by the median; the same answer on all ranks."""
    seconds = torch.empty(len(ways), CALIBRATION_ROUNDS + 1, dtype=torch.float64)
    for round_ in range(seconds.shape[1]):
        for way, act in enumerate(ways.values()):
            dist.barrier()
            start = time.perf_counter()
            act(argument)
            seconds[way, round_] = time.perf_counter() - start
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return list(ways)[int(seconds[:, 1:].median(1).values.argmin())]
