"""all_to_all_single in plain torch: what somebody would write who sends rows only where their experts are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ep_backend.bench.plain import Plain
from ep_backend.bench.workload import Inputs, Settings


class AllToAll(Plain):
    """Each rank tells the others how many rows they get, then sends these with ids, weights (and scales), one
    all_to_all_single each: a token once to every rank that has one of its experts. The sums come back the
    same way, and each is added to its token, in the result's dtype.

    How many rows come is known on the host before they are received, so no CUDA graph can hold it.
    """

    capturable = False

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self._rank_of = torch.tensor(self.expert_ranks, device=settings.device)

    def prepare(self, inputs: list[Inputs]) -> None:
        super().prepare(inputs)
        self._ids = [given.ids.long() for given in inputs]
        self.results = [torch.empty(0)] * len(inputs)

    def dispatch(self, number: int) -> None:
        self._number = number
        ids = self._ids[number]
        goes = torch.zeros(self.world, ids.shape[0], dtype=torch.bool, device=ids.device)
        goes.scatter_(0, self._rank_of[ids].T, True)
        counts = goes.sum(1)
        came = torch.empty_like(counts)
        dist.all_to_all_single(came, counts, group=self.group)
        self._tokens = goes.nonzero()[:, 1]  # by rank, then by token
        self._sent, self._came = torch.stack((counts, came)).tolist()
        self._received = [
            self._exchange(piece.index_select(0, self._tokens), self._sent, self._came)
            for piece in self.pieces[number]
        ]

    def received(self) -> list[torch.Tensor]:
        return self._received

    def combine(self, out: torch.Tensor) -> None:
        back = self._exchange(self.results[self._number], self._came, self._sent)
        out.zero_().index_add_(0, self._tokens, back)

    def details(self) -> dict[str, Any]:
        return {"window_bytes": None}

    def _exchange(self, rows: torch.Tensor, sent: list[int], came: list[int]) -> torch.Tensor:
        """``rows`` [sum of ``sent``, width], in order of the ranks that get them; what came from each."""
        received = rows.new_empty(sum(came), rows.shape[1])
        dist.all_to_all_single(received, rows, came, sent, group=self.group)
        return received
