"""Plain collectives as the baseline: what engines do where nothing better is there."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ep_backend.bench import workload
from ep_backend.bench.workload import Inputs, Settings

CALIBRATION_ROUNDS = 7
NCCL_TIMEOUT = datetime.timedelta(seconds=60)


class AllGather:
    """All-gather of every rank's rows, ids, weights (and scales); reduce-scatter of every rank's sums.

    On CPUs torch.distributed offers several ways to the same result; the fastest for the case's size is
    taken, measured before the case. On GPUs it is NCCL, called as vLLM's default all-to-all does: one
    all-gather for each tensor, one reduce-scatter.
    """

    capturable = True
    window_bytes: int | None = None

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self._settings = name, settings
        self._on_gpus = settings.device == "cuda"
        self._group = _nccl(dist.group.WORLD) if self._on_gpus else None
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        ranks = settings.config("auto").expert_ranks(self._world)
        self._experts = tuple(e for e, rank in enumerate(ranks) if rank == self._rank)
        local = torch.full((settings.experts + 1,), -1, dtype=torch.int64)
        local[list(self._experts)] = torch.arange(len(self._experts))
        self._local = local.to(settings.device)

    def prepare(self, inputs: list[Inputs]) -> None:
        self._inputs = inputs
        self._pieces = [self._pieces_of(given) for given in inputs]
        tokens, widths = inputs[0].tokens, [piece.shape[1] for piece in self._pieces[0]]
        rows, hidden, like = self._world * tokens, self._settings.hidden, inputs[0].expected
        result = functools.partial(like.new_empty, dtype=self._settings.result_dtype)
        octets = functools.partial(like.new_empty, dtype=torch.uint8)
        self._gathered = [octets(rows, width) for width in widths]
        self._results = [result(rows, hidden).zero_() for _ in inputs]
        self._number, out = 0, result(tokens, hidden)
        if self._on_gpus:
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

    def verify(self) -> bool:
        correct = True
        for number, given in enumerate(self._inputs):
            self.dispatch(number)
            self._results[number] = self._compute(self._received())
            out = torch.empty_like(given.expected, dtype=self._settings.result_dtype)
            self.combine(out)
            correct &= given.accepts(out)
        return correct

    def dispatch(self, number: int) -> None:
        self._number = number
        self._gather(number)

    def combine(self, out: torch.Tensor) -> None:
        self._reduce(out)

    def accepts(self, number: int, out: torch.Tensor) -> bool:
        return self._inputs[number].accepts(out)

    def details(self) -> dict[str, Any]:
        return {"collectives": " and ".join(self._chosen), "window_bytes": None}

    def destroy(self) -> None: ...

    def _pieces_of(self, given: Inputs) -> list[torch.Tensor]:
        """Everything that travels, as bytes: [tokens, width] each."""
        parts = [given.sent, given.ids, given.weights]
        parts += [] if given.sent_scales is None else [given.sent_scales]
        return [part.contiguous().view(torch.uint8) for part in parts]

    def _gather_each(self, number: int) -> None:
        for into, piece in zip(self._gathered, self._pieces[number], strict=True):
            _all_gather(into, piece, group=self._group)
        self._is_packed = False

    def _gather_packed(self, number: int) -> None:
        # Rows are left where they arrive: what an engine would do to take them apart is not counted.
        torch.cat(self._pieces[number], dim=1, out=self._packed)
        _all_gather(self._packed_all, self._packed)
        self._is_packed = True

    def _received(self) -> list[torch.Tensor]:
        parts = self._gathered
        if self._is_packed:
            parts = list(self._packed_all.split([p.shape[1] for p in self._gathered], dim=1))
        given = self._inputs[0]
        dtypes = [given.sent.dtype, given.ids.dtype, given.weights.dtype]
        dtypes += [] if given.sent_scales is None else [given.sent_scales.dtype]
        return [part.contiguous().view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]

    def _compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        rows, ids, weights = parts[:3]
        scales = parts[3] if len(parts) > 3 else None
        local = self._local[ids.long()]
        return workload.weighted_sums(rows, scales, local, weights, self._experts, self._settings)

    def _reduce_scatter(self, out: torch.Tensor) -> None:
        _reduce_scatter(out, self._results[self._number], group=self._group)

    def _all_to_all_and_sum(self, out: torch.Tensor) -> None:
        dist.all_to_all_single(self._scratch, self._results[self._number])
        torch.sum(self._scratch.view(self._world, *out.shape), 0, out=out)

    def _all_reduce_and_slice(self, out: torch.Tensor) -> None:
        self._scratch.copy_(self._results[self._number])
        dist.all_reduce(self._scratch)
        out.copy_(self._scratch.view(self._world, *out.shape)[self._rank])


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


@functools.lru_cache(maxsize=1)
def _nccl(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The ranks of the default group ``world``, over NCCL. Collective."""
    group = dist.new_group(backend="nccl", timeout=NCCL_TIMEOUT)
    assert group is not None
    return group
