"""Transport ``collective`` on GPUs, beside what test_gpus.py does with every transport: over NCCL, and over
gloo by ranks that share a GPU."""

import time
from dataclasses import replace
from unittest import mock

import gpu_jobs
import gpus
import pytest
import torch
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend.transports import collective_gpu

pytestmark = pytest.mark.gpu


def shared_gpu_job(rank, group, more, exchanges=(1, 3, 300, 40, 40, 7, 128)):
    """All ranks use the first GPU, so gloo carries the rows."""
    return gpu_jobs.same_bits_job(rank, group, "collective", more, exchanges, gpu_of_rank=0)


@pytest.mark.parametrize("layout", gpu_jobs.LAYOUTS)
@pytest.mark.parametrize("name", gpu_jobs.CONFIGS)
@pytest.mark.parametrize("world", [2, 4])
def test_collective_by_ranks_that_share_a_gpu(world, name, layout):
    gpus.needs(1)
    more = {**gpu_jobs.CONFIGS[name], "layout": layout}
    assert ranks(world).run(shared_gpu_job, more, timeout=120) == [[]] * world


def counting_job(rank, group, more, gpu_of_rank):
    """Ids go first, and only rows behind them, however few."""
    with mock.patch.object(collective_gpu, "WORTH_COUNTING", 0):
        return gpu_jobs.same_bits_job(rank, group, "collective", more, gpu_of_rank=gpu_of_rank)


@pytest.mark.parametrize("over", ["nccl", "nccl between nodes", "gloo"])
@pytest.mark.parametrize("layout", gpu_jobs.LAYOUTS)
@pytest.mark.parametrize("name", ["bf16", "fp8", "opaque"])
@pytest.mark.parametrize("world", [2, 4])
def test_collective_with_ids_first(world, name, layout, over):
    gpus.needs(1 if over == "gloo" else world)
    more = {**gpu_jobs.CONFIGS[name], "layout": layout}
    gpu = 0 if over == "gloo" else None
    group = gpus.nodes(world) if over == "nccl between nodes" else ranks(world)
    assert group.run(counting_job, more, gpu, timeout=120) == [[]] * world


def traffic_job(rank, group, worth):
    """Rows and bytes that one exchange sends; each rank's tokens go to rank 0."""
    torch.cuda.set_device(0)
    world = torch.distributed.get_world_size(group)
    cfg = gpu_jobs.config({"payload": torch.bfloat16}, world, "collective")
    with (
        mock.patch.object(collective_gpu, "WORTH_COUNTING", worth),
        ep.Communicator(group, cfg, device="cuda:0") as comm,
    ):
        before = replace(comm._transport.traffic)
        x = torch.ones(40, cfg.hidden_size, dtype=torch.bfloat16, device="cuda:0")
        ids = torch.arange(3, device="cuda:0").expand(40, 3)
        received, handle = comm.dispatch(x, ids, torch.ones(40, 3, device="cuda:0"), tokens_per_rank=50)
        comm.combine(received.rows, handle)
        now = comm._transport.traffic
        return tuple(getattr(now, k) - getattr(before, k) for k in vars(now))


def test_collective_with_ids_first_sends_only_rows():
    gpus.needs(1)
    (rows_of_0, back_of_0, bytes_of_0), (rows_of_1, back_of_1, bytes_of_1) = ranks(2).run(traffic_job, 0)
    assert (rows_of_0, back_of_0, rows_of_1, back_of_1) == (0, 40, 40, 0)
    blocks = ranks(2).run(traffic_job, 1 << 40)
    assert [counted[:2] for counted in blocks] == [(50, 50)] * 2
    row = 256 * 2
    assert blocks[0][2] - bytes_of_0 == (50 + 50 - 40) * row
    assert blocks[1][2] - bytes_of_1 == (50 + 50 - 40) * row


def collective_stall_job(rank, group, shared):
    """The last rank does not come to the second exchange."""
    device = gpus.take(0 if shared else rank)
    world = torch.distributed.get_world_size(group)
    cfg = replace(gpu_jobs.config({"payload": torch.bfloat16}, world, "collective"), timeout_s=2.0)
    comm = ep.Communicator(group, cfg, device=device)
    x, ids, weights = (t.to(device) for t in gpu_jobs.inputs(cfg, rank, 20, 3)[:3])

    def exchange():
        received, handle = comm.dispatch(x, ids, weights, tokens_per_rank=20)
        comm.combine(torch.zeros_like(received.rows), handle)

    exchange()
    if rank == world - 1:
        time.sleep(8)
        return None
    start = time.monotonic()
    said = []
    for act in (exchange, exchange, comm.check, comm.recover):
        try:
            act()
        except ep.EpError as error:
            said.append((type(error).__name__, str(error)))
    waited = time.monotonic() - start
    torch.cuda.synchronize()  # nothing of the exchange is left on the GPU
    comm.destroy()
    return said, waited


@pytest.mark.parametrize("shared", [False, True], ids=["nccl", "gloo"])
def test_collective_has_a_deadline(shared):
    gpus.needs(1 if shared else 2)
    with fresh_ranks(2) as group:
        (said, waited), _ = group.run(collective_stall_job, shared, timeout=60)
    assert [name for name, _ in said] == ["EpTimeoutError"] * 3 + ["EpError"]
    assert "cannot recover" in said[-1][1]
    assert waited < 6


def half_captured_job(rank, group):
    """An exchange that is open when a capture begins cannot be ended in it."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = gpu_jobs.config({"payload": torch.bfloat16}, world, "collective")
    said = []
    with ep.Communicator(group, cfg, device=device) as comm:
        x, ids, weights = (t.to(comm.device) for t in gpu_jobs.inputs(cfg, rank, 20, 3)[:3])
        received, handle = comm.dispatch(x, ids, weights)
        y = torch.zeros_like(received.rows)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            weights.mul_(1.0)  # an empty graph would be warned of
            for act in (lambda: comm.dispatch(x, ids, weights), lambda: comm.combine_send(y, handle)):
                try:
                    act()
                except ep.EpArgumentError as error:
                    said.append(str(error))
        return said, bool((comm.combine(y, handle) == 0).all())


def test_collective_is_captured_whole():
    gpus.needs(2)
    for said, combined in ranks(2).run(half_captured_job, timeout=60):
        assert len(said) == 2
        assert all("from dispatch to combine" in text for text in said)
        assert combined
