"""Top-k ids and weights as expert kernels get them."""

import pytest
import torch
from ep_backend_vllm.expert_rows import for_cpu_kernel


def weighted(ids, weights, num_experts):
    """Total weight of each expert in each row: what the row's sum over experts depends on."""
    totals = torch.zeros(ids.shape[0], num_experts)
    valid = ids >= 0
    rows = torch.arange(ids.shape[0]).unsqueeze(1).expand_as(ids)
    totals.index_put_((rows[valid], ids[valid].long()), weights[valid], accumulate=True)
    return totals


def random_rows(rows, top_k, num_local, seed):
    """As received: each row has 1..top_k distinct local experts in random columns, else -1 and weight 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_local, generator=generator)[:top_k] for _ in range(rows)])
    foreign = torch.rand(rows, top_k, generator=generator) < 0.6
    foreign[torch.arange(rows), torch.randint(top_k, (rows,), generator=generator)] = False
    weights = torch.rand(rows, top_k, generator=generator) + 0.1
    return ids.masked_fill(foreign, -1).int(), weights.masked_fill(foreign, 0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (1, 4), (7, 2), (33, 6)])
def test_local_ids_are_in_range_and_mean_the_same(rows, top_k, seed):
    ids, weights = random_rows(rows, top_k, 8, seed)
    new_ids, new_weights = for_cpu_kernel(ids, weights)
    assert int(new_ids.min()) >= 0
    assert int(new_ids.max()) < 8
    assert torch.equal(weighted(new_ids, new_weights, 8), weighted(ids, weights, 8))
    assert new_ids.shape[1] == int((ids >= 0).sum(dim=1).max()), "no column that no row needs"
    assert new_ids.dtype == torch.int32
    assert new_ids.is_contiguous()
    assert new_weights.is_contiguous()


def test_filled_columns_repeat_an_expert_of_the_same_row():
    ids = torch.tensor([[-1, 3, -1], [2, 1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.0, 0.5, 0.0], [0.25, 0.75, 0.0]])
    new_ids, new_weights = for_cpu_kernel(ids, weights)
    assert new_ids.tolist() == [[3, 3], [2, 1]]
    assert new_weights.tolist() == [[0.5, 0.0], [0.25, 0.75]]


def test_no_rows():
    ids, weights = for_cpu_kernel(torch.empty(0, 4, dtype=torch.int32), torch.empty(0, 4))
    assert ids.shape == weights.shape == (0, 1)
