"""Two micro-batches through vLLM's own kernel and its own threads that take turns, in two processes with real
communicators, without GPUs: streams are names here, and the CPU transport plays the GPUs' part."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import fresh_ranks

WORLD, HIDDEN, EXPERTS, TOP_K, LAYERS = 2, 32, 6, 2, 3
TOKENS = ((3, 5), (4, 1))
"""Of each rank, of each micro-batch."""


def inputs(rank, batch):
    generator = torch.Generator().manual_seed(10 * rank + batch)
    count = TOKENS[rank][batch]
    x = torch.randn(count, HIDDEN, generator=generator)
    layers = []
    for _ in range(LAYERS):
        ids = torch.rand(count, EXPERTS, generator=generator).topk(TOP_K, dim=1).indices.int()
        layers.append((ids, torch.rand(count, TOP_K, generator=generator)))
    return x, layers


def expert_scale(ids):
    """What an expert does to a row: it multiplies it."""
    return 1.0 + ids.float() / EXPERTS


def overlapped(rank, group):
    """The result of every micro-batch after all layers, and the order in which things were done."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from ep_backend_vllm.prepare_finalize import EpPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.v1.worker import ubatching

    from ep_backend import Communicator, EpConfig

    def get_handle(fields):
        return Communicator(dist.group.WORLD, EpConfig(**fields, num_channels=2, timeout_s=30))

    manager = SimpleNamespace(
        device=torch.device("cuda"),
        rank=rank,
        world_size=WORLD,
        scheduler_limit=8,
        num_channels=2,
        get_handle=get_handle,
    )
    moe = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(sp_size=1, dp_size=2, use_ep=True),
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        in_dtype=torch.float32,
        max_num_tokens=8,
    )
    experts = SimpleNamespace(
        moe_config=moe,
        quant_config=None,
        expects_unquantized_inputs=True,
        finalize_weight_and_reduce_impl=TopKWeightAndReduceNoOP,
    )
    layer = EpPrepareAndFinalize(moe, manager)
    layer.post_init_setup(experts)
    kernel = mk.FusedMoEKernelModularImpl(layer, experts)

    ubatching.current_stream = lambda: "stream"
    ubatching._CURRENT_CONTEXTS[:] = [None, None]
    events = [threading.Event() for _ in range(2)]
    ready = threading.Barrier(3)
    results, failures, order = {}, [], []

    def run(batch):
        context = ubatching.UBatchContext(
            id=batch,
            comm_stream="stream",
            compute_stream="stream",
            forward_context=SimpleNamespace(dp_metadata=None),
            ready_barrier=ready,
            cpu_wait_event=events[batch],
            cpu_signal_event=events[1 - batch],
            gpu_comm_done_event=None,
            gpu_compute_done_event=None,
        )
        try:
            with context:
                x, layers = inputs(rank, batch)
                for number, (ids, weights) in enumerate(layers):
                    rows, _, _, row_ids, row_weights = kernel._prepare(x, weights, ids, EXPERTS, None, False)
                    order.append((number, batch))
                    mine = row_ids // (EXPERTS // WORLD) == rank
                    factor = torch.where(mine, row_weights * expert_scale(row_ids), 0).sum(1, keepdim=True)
                    y = torch.where(mine.any(1, keepdim=True), rows * factor, 0)
                    output = torch.full_like(x, float("nan"))
                    x = kernel._finalize(output, y, x, row_weights, row_ids, False, None, None)
                results[batch] = x
        except BaseException as error:
            failures.append(error)
            events[1 - batch].set()

    threads = [threading.Thread(target=run, args=(batch,)) for batch in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    events[0].set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    layer._communicator.destroy()
    return [results[batch].tolist() for batch in range(2)], order


@pytest.mark.timeout(200)
def test_two_batches_take_turns_and_equal_the_dense_product():
    with fresh_ranks(WORLD) as group:
        answers = group.run(overlapped, timeout=120)
    for rank, (results, order) in enumerate(answers):
        assert order == [(layer, batch) for layer in range(LAYERS) for batch in range(2)], (
            "the batches alternate"
        )
        for batch in range(2):
            x, layers = inputs(rank, batch)
            for ids, weights in layers:
                x = x * (weights * expert_scale(ids)).sum(1, keepdim=True)
            torch.testing.assert_close(torch.tensor(results[batch]), x, rtol=1e-4, atol=1e-5)
