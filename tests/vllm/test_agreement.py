"""vLLM's agreement before each step goes through shared memory, with the results of torch.distributed."""

import functools
from types import SimpleNamespace

import pytest
import torch
from harness import fresh_ranks

MODULES = ("vllm.v1.worker.dp_utils", "vllm.v1.worker.gpu.dp_utils")


def in_place(distributed, group, tensor):
    distributed.all_reduce(tensor, group=group)
    return tensor


def agree_job(rank, group, newer):
    """Sums as both model runners ask for them. ``newer``: the group has a sum of its own."""
    import importlib

    import torch.distributed as dist
    from ep_backend_vllm import agreement

    modules = [importlib.import_module(name) for name in MODULES]
    asked = []

    def own_sum(tensor):
        asked.append(tensor.dtype)
        dist.all_reduce(tensor, group=group)
        return tensor

    coordinator = SimpleNamespace(cpu_group=group)
    if newer:
        coordinator.cpu_all_reduce_ = own_sum
    agreement.get_dp_group = lambda: coordinator
    agreement.agree_through_shared_memory()
    (host_sum,) = agreement._sums.values()
    calls = []
    original = host_sum.all_reduce
    host_sum.all_reduce = lambda values: (calls.append(values.shape), original(values))
    ways = [functools.partial(in_place, getattr(module, "dist", dist), group) for module in modules]
    if newer:
        ways.append(lambda t: coordinator.cpu_all_reduce_(t))
    results = []
    for way in ways:
        for dtype, shape in ((torch.int32, (6, 2)), (torch.int32, (40, 2)), (torch.float32, (2,))):
            results.append(way(torch.full(shape, rank + 1, dtype=dtype)).unique().tolist())
    agreement.forget()
    left = modules[0].dist.all_reduce(torch.ones(1, dtype=torch.int32), group=group)
    return results, calls, asked, left is None and not agreement._sums


@pytest.mark.timeout(200)
@pytest.mark.parametrize("newer", [False, True])
def test_small_sums_take_the_other_way_and_all_sums_are_right(newer):
    with fresh_ranks(2) as group:
        answers = group.run(agree_job, newer, timeout=150)
    for results, calls, asked, forgotten in answers:
        assert results == [[3]] * len(results)
        assert calls == [(6, 2)] * (3 if newer else 2)  # not the large one, not floats
        assert asked == ([torch.int32, torch.float32] if newer else [])
        assert forgotten


def apart_job(rank, group):
    """Ranks that share no memory keep torch.distributed."""
    import importlib

    import torch.distributed as dist
    from ep_backend_vllm import agreement

    module = importlib.import_module(MODULES[0])
    agreement.get_dp_group = lambda: SimpleNamespace(cpu_group=group)
    original = agreement.probe
    agreement.probe = lambda device: _elsewhere(original(device), rank)
    agreement.agree_through_shared_memory()
    return module.dist is dist, len(agreement._sums)


def _elsewhere(record, rank):
    import msgspec

    return msgspec.structs.replace(record, boot_id=f"machine {rank}")


@pytest.mark.timeout(200)
def test_ranks_of_several_machines_agree_as_before():
    with fresh_ranks(2) as group:
        assert group.run(apart_job, timeout=150) == [(True, 0)] * 2
