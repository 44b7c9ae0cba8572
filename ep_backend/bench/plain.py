"""What ways have in common that exchange with the collectives of torch.distributed alone."""

from __future__ import annotations

import datetime
import functools
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist

from ep_backend.bench import workload
from ep_backend.bench.workload import Inputs, Settings

NCCL_TIMEOUT = datetime.timedelta(seconds=60)


class Plain(ABC):
    """Over gloo on CPUs, over NCCL on GPUs. Ways, each a `Contender`, add the abstract methods,
    ``capturable`` and ``details``."""

    window_bytes: int | None = None

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        self.on_gpus = settings.device == "cuda"
        self.group = _nccl(dist.group.WORLD) if self.on_gpus else None
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.expert_ranks = settings.config("auto").expert_ranks(self.world)
        self._experts = tuple(e for e, rank in enumerate(self.expert_ranks) if rank == self.rank)
        local = torch.full((settings.experts + 1,), -1, dtype=torch.int64)
        local[list(self._experts)] = torch.arange(len(self._experts))
        self._local = local.to(settings.device)
        self.results: list[torch.Tensor] = []
        """For each input set what combine sends: a row for each that was received."""

    def prepare(self, inputs: list[Inputs]) -> None:
        self._inputs = inputs
        self.pieces = [_pieces_of(given) for given in inputs]
        """For each input set everything that travels."""

    def verify(self) -> bool:
        correct = True
        for number, given in enumerate(self._inputs):
            self.dispatch(number)
            self.results[number] = self._compute(self.received())
            out = torch.empty_like(given.expected, dtype=self.settings.result_dtype)
            self.combine(out)
            correct &= given.accepts(out)
        return correct

    @abstractmethod
    def dispatch(self, number: int) -> None: ...
    @abstractmethod
    def combine(self, out: torch.Tensor) -> None: ...
    @abstractmethod
    def received(self) -> list[torch.Tensor]:
        """Of the last dispatch: the pieces of all rows, as bytes [rows, width]."""

    def accepts(self, number: int, out: torch.Tensor) -> bool:
        return self._inputs[number].accepts(out)

    def destroy(self) -> None:  # noqa: B027
        """The group is for all of them."""

    def _compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        given = self._inputs[0]
        dtypes = [given.sent.dtype, given.ids.dtype, given.weights.dtype]
        dtypes += [] if given.sent_scales is None else [given.sent_scales.dtype]
        rows, ids, weights, *scales = (
            part.contiguous().view(dtype) for part, dtype in zip(parts, dtypes, strict=True)
        )
        return workload.weighted_sums(
            rows,
            scales[0] if scales else None,
            self._local[ids.long()],
            weights,
            self._experts,
            self.settings,
        )


def _pieces_of(given: Inputs) -> list[torch.Tensor]:
    """Rows, ids, weights and, of fp8 rows, scales, as bytes: [tokens, width] each."""
    parts = [given.sent, given.ids, given.weights]
    parts += [] if given.sent_scales is None else [given.sent_scales]
    return [part.contiguous().view(torch.uint8) for part in parts]


@functools.lru_cache(maxsize=1)
def _nccl(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The ranks of the default group ``world``, over NCCL. Collective."""
    group = dist.new_group(backend="nccl", timeout=NCCL_TIMEOUT)
    assert group is not None
    return group
