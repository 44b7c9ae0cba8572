"""How received top-k ids become what vLLM's CPU expert kernels accept.

A received row carries all k ids of its token as local ids; those of experts on other ranks are -1 with
weight 0. Every row has at least one expert on this rank (compact layout).
"""

import torch


def ids_and_weights(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, k] int32 and float32 as received -> [R, k'] of the same types for the experts, k' <= k.

    The kernels ignore expert_map and index their weights with whatever they get. Columns without a local
    expert repeat the row's own first one with weight 0. That costs work but cannot go out of bounds, and
    cannot bring a NaN that the row would not have had anyway. Local experts come first, so columns that no
    row needs are cut off.
    """
    foreign = ids < 0
    order = foreign.to(torch.uint8).argsort(dim=1, stable=True)
    columns = max(1, ids.shape[1] - int(foreign.sum(dim=1).min())) if ids.shape[0] else 1
    order = order[:, :columns]
    ids, weights = ids.gather(1, order), weights.gather(1, order)
    return torch.where(ids < 0, ids[:, :1], ids).contiguous(), weights.contiguous()
