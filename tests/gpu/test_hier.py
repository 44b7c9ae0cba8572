"""Transport ``hier`` between GPUs: made-up nodes, NCCL between them, and kernels of ours inside."""

import time
from dataclasses import replace
from unittest import mock

import gpu_jobs
import gpus
import pytest
import torch
from exchange import check_steps, make_call, one_by_one, step
from harness import fresh_ranks
from nodes import crossings, make, run_steps_on

import ep_backend as ep
from ep_backend.transports import collective_gpu

pytestmark = pytest.mark.gpu
TWO_BY_TWO = ((0, 1), (2, 3))
TURNS = ((0, 2), (1, 3))
STEPS = [
    step([3, 16, 0, 7], seed=1),
    step([300, 5, 299, 300], seed=2, result=torch.float32),
    step([0, 0, 2, 0], seed=3, slots=2),
    step([40, 40, 40, 40], seed=4, slots=40),
]
# What a node's GPUs reach of each other: everything, nothing, and pairs that are not the nodes.
REACH = {"peer": ((0, 1, 2, 3),), "host": ((0,), (1,), (2,), (3,)), "mixed": ((0, 1), (2,), (3,))}


def config(more):
    usual = {"num_experts": 17, "top_k": 3, "hidden_size": 256, "max_tokens_per_rank": 300}
    return ep.EpConfig(**{**usual, **more, "timeout_s": 10.0})


def steps_job(rank, group, parts, *args):
    """`run_steps_on` on GPUs that reach each other as ``parts`` says."""
    with mock.patch("ep_backend.communicator.parts", return_value=parts):
        return run_steps_on(rank, group, *args, device="cuda")


@pytest.mark.parametrize("layout", gpu_jobs.LAYOUTS)
@pytest.mark.parametrize("name", gpu_jobs.CONFIGS)
@pytest.mark.parametrize(("inside", "on"), [("peer", TURNS), ("host", TWO_BY_TWO), ("mixed", TWO_BY_TWO)])
def test_same_bits_as_the_reference(inside, on, name, layout):
    gpus.needs(4)
    cfg = config({**gpu_jobs.CONFIGS[name], "layout": layout})
    answers = gpus.nodes(4).run(steps_job, REACH[inside], on, cfg, STEPS, one_by_one(STEPS), timeout=120)
    check_steps(cfg, STEPS, answers, on, "cuda")


def test_closing_reaches_all_nodes():
    """One rank closes; those of its node learn it there, and tell the others."""
    gpus.needs(4)
    cfg = config({})
    steps = [step([2, 3, 4, 5], seed=n, closers=closers) for n, closers in enumerate([(3,), (), (0, 1), ()])]
    answers = gpus.nodes(4).run(steps_job, REACH["peer"], TURNS, cfg, steps, one_by_one(steps), timeout=120)
    check_steps(cfg, steps, answers, TURNS, "cuda")


def traffic_job(rank, group, on, cfg, one, worth):
    """Rows that this rank sends to other nodes, both ways, where ids go first: with ``worth`` bytes saved.
    Each rank returns the row itself."""
    device = gpus.take(rank)
    with (
        mock.patch.object(collective_gpu, "WORTH_COUNTING", worth),
        make(rank, group, on, cfg, device=device) as comm,
    ):
        call = make_call(cfg, comm.world_size, rank, one)
        x, ids, weights = (t.to(device) for t in (call.x, call.topk_ids, call.topk_weights))
        received, handle = comm.dispatch(x, ids, weights)
        live = (received.topk_ids != cfg.pad_id).any(1, keepdim=True)
        out = comm.combine(torch.where(live, received.rows, 0), handle)
        owners = torch.tensor([*cfg.expert_ranks(comm.world_size), -1], device=device)[ids.long()]
        times = sum((owners == r).any(1, keepdim=True).float() for r in range(comm.world_size))
        want = torch.where(times > 0, x.float() * times, 0)
        torch.testing.assert_close(out.float(), want, rtol=0.02, atol=0, equal_nan=True)
        return comm._transport.traffic.dispatched_rows, comm._transport.traffic.combined_rows


SMALL = {"top_k": 6}, [3, 16, 0, 7], 0
LARGE = (
    {"top_k": 1, "hidden_size": 4096, "max_tokens_per_rank": 1024},
    [1024] * 4,
    collective_gpu.WORTH_COUNTING,
)


@pytest.mark.parametrize(
    ("on", "size"),
    [(TWO_BY_TWO, SMALL), (TURNS, SMALL), (((0,), (1,), (2,), (3,)), SMALL), (TWO_BY_TWO, LARGE)],
)
def test_a_token_crosses_the_network_once_per_node(on, size):
    gpus.needs(4)
    more, tokens, worth = size
    cfg, one = config(more), step(tokens, seed=5)
    sent = gpus.nodes(4).run(traffic_job, on, cfg, one, worth, timeout=60)
    rows = crossings(cfg, [make_call(cfg, 4, rank, one) for rank in range(4)], on)
    assert rows > 0
    assert [sum(way) for way in zip(*sent, strict=True)] == [rows, rows]


def stall_job(rank, group):
    """Rank 3 does not come to the second exchange; what the others say, and when."""
    device = gpus.take(rank)
    with make(rank, group, TWO_BY_TWO, replace(config({}), timeout_s=2.0), device=device) as comm:
        x, ids = torch.ones(4, 256, dtype=torch.bfloat16), torch.tensor([[0, 5, 16]] * 4)
        inputs = [t.to(device) for t in (x, ids, torch.ones(4, 3))]

        def exchange():
            received, handle = comm.dispatch(*inputs)
            comm.combine(torch.zeros_like(received.rows), handle)

        exchange()
        if rank == 3:
            time.sleep(7)
            return None
        start, said = time.monotonic(), []
        for act in (exchange, exchange, comm.check):
            try:
                act()
            except ep.EpTimeoutError as error:
                said.append(str(error))
        return said, time.monotonic() - start


def test_a_rank_that_does_not_come():
    gpus.needs(4)
    with fresh_ranks(4, gpus.NODES) as group:
        answers = group.run(stall_job, timeout=60)
    for said, waited in answers[:3]:
        assert len(said) == 3
        assert len(set(said)) == 1, "the first failure stays"
        assert waited < 6


def captured_job(rank, group):
    with make(rank, group, TWO_BY_TWO, config({}), device=gpus.take(rank)) as comm:
        x = torch.ones(4, 256, dtype=torch.bfloat16, device=comm.device)
        ids = torch.zeros(4, 3, dtype=torch.int32, device=comm.device).fill_(-1)
        weights = torch.ones(4, 3, device=comm.device)
        said = ""
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            weights.mul_(1.0)  # an empty graph would be warned of
            try:
                comm.dispatch(x, ids, weights)
            except ep.EpArgumentError as error:
                said = str(error)
        return comm.capturable, said


def test_a_capture_is_refused():
    gpus.needs(4)
    for capturable, said in gpus.nodes(4).run(captured_job, timeout=60):
        assert not capturable
        assert "with transport hier the host waits" in said
