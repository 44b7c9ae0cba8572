"""Which rows, ids and weights the experts get: what a GPU's kernels and what the CPU's kernel can take."""

from typing import Any

import torch


def config_fields(device: torch.device, rank: int, num_experts: int) -> dict[str, Any]:
    """Layout and expert ids of a communicator, as fields of EpConfig.

    On a GPU the experts work on the window itself, all world * T rows of it, and get global ids, from which
    their expert_map finds the local ones. Rows without a token get the id of an expert that lives elsewhere,
    since not every kernel takes -1. The CPU kernel ignores expert_map and computes whatever it is given: only
    the rows that have an expert here, with local ids.
    """
    if device.type == "cpu":
        return {"layout": "compact", "expert_ids": "local"}
    # Experts are laid out in order of rank: rank 0 has the first and, if there are several, not the last.
    elsewhere = num_experts - 1 if rank == 0 else 0
    return {"layout": "rank_major", "expert_ids": "global", "pad_id": elsewhere}


def for_cpu_kernel(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, k] int32 and float32 as received -> [R, k'] of the same types, k' <= k.

    Every row has an expert of this rank; experts of others are -1 with weight 0. The kernel indexes its
    weights with whatever it gets. Columns without a local expert repeat the row's own first one with weight
    0. That costs work but cannot go out of bounds, and cannot bring a NaN that the row would not have had
    anyway. Local experts come first, so columns that no row needs are cut off.
    """
    foreign = ids < 0
    order = foreign.to(torch.uint8).argsort(dim=1, stable=True)
    columns = max(1, ids.shape[1] - int(foreign.sum(dim=1).min())) if ids.shape[0] else 1
    order = order[:, :columns]
    ids, weights = ids.gather(1, order), weights.gather(1, order)
    return torch.where(ids < 0, ids[:, :1], ids).contiguous(), weights.contiguous()
