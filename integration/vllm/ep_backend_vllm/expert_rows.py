"""How received top-k ids become what a device's expert kernels accept.

A received row carries all k ids of its token; those of experts on other ranks are -1 with weight 0. Every
row has at least one expert on this rank (compact layout).
"""

from typing import Protocol

import torch


class ExpertRows(Protocol):
    expert_ids: str
    """EpConfig.expert_ids to ask for."""

    def ids_and_weights(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, k] int32 and float32 as received -> [R, k'] of the same types for the experts, k' <= k."""
        ...


class LocalIds:
    """For kernels that ignore expert_map and index their local weights with whatever they get (vLLM's CPU
    experts).

    Columns without a local expert repeat the row's own first one with weight 0. That costs work but cannot
    go out of bounds, and cannot bring a NaN that the row would not have had anyway. Local experts come
    first, so columns that no row needs are cut off.
    """

    expert_ids = "local"

    def ids_and_weights(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        foreign = ids < 0
        order = foreign.to(torch.uint8).argsort(dim=1, stable=True)
        columns = max(1, ids.shape[1] - int(foreign.sum(dim=1).min())) if ids.shape[0] else 1
        order = order[:, :columns]
        ids, weights = ids.gather(1, order), weights.gather(1, order)
        return torch.where(ids < 0, ids[:, :1], ids).contiguous(), weights.contiguous()


class GlobalIds:
    """For kernels that apply expert_map. Some reject -1: give an expert of another rank, mapped to -1."""

    expert_ids = "global"

    def __init__(self, num_experts: int, rank: int, world_size: int) -> None:
        # Placement is linear and the first num_experts % world_size ranks hold one more.
        self._foreign_id = 0 if rank > 0 else -(-num_experts // world_size)

    def ids_and_weights(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(ids < 0, self._foreign_id, ids), weights
