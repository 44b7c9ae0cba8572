"""On real GPUs: the CPU transport's bits, captured graphs, ranks that stop or die."""

import os
import signal
from unittest import mock

import gpus
import pytest
import torch
from gpu_jobs import (
    CONFIGS,
    LAYOUTS,
    OF_WINDOWS,
    TRANSPORTS,
    closing_job,
    config,
    graph_job,
    inputs,
    live,
    loop_job,
    same_bits_job,
    wrong_replays,
)
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_bits_as_the_cpu_transport(world, name, layout, transport):
    gpus.needs(world)
    more = {**CONFIGS[name], "layout": layout}
    assert ranks(world).run(same_bits_job, transport, more, timeout=120) == [[]] * world


def staggered_job(rank, group):
    """Every rank's order of stores, and what differs."""
    with mock.patch.dict(os.environ, {"EP_BACKEND_PEER_ORDER": "staggered"}):
        more = {"payload": torch.bfloat16}
        small = config(more, torch.distributed.get_world_size(group), "peer")
        with ep.Communicator(group, small, device=gpus.take(rank)) as comm:
            order = comm.decision.peer_order
        return order, same_bits_job(rank, group, "peer", more)


@pytest.mark.parametrize("world", [2, 4])
def test_same_bits_in_staggered_order(world):
    gpus.needs(world)
    assert ranks(world).run(staggered_job, timeout=120) == [("staggered", [])] * world


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_bits_with_many_tokens_and_ranks_without_experts(world, layout, transport):
    """Bulk copies, several tiles of slots; neighbouring experts live on different ranks, none on the last."""
    gpus.needs(world)
    more = {
        "payload": torch.bfloat16,
        "layout": layout,
        "hidden_size": 4096 if layout == "rank_major" else 256,  # 20 MB of results go by bulk copies
        "max_tokens_per_rank": 2500,
        "num_experts": 9,
        "expert_map": tuple(e % max(1, world - 1) for e in range(9)),
    }
    exchanges = (2500, 2443, 2500, 1000, 2461, 2100)
    assert ranks(world).run(same_bits_job, transport, more, exchanges, timeout=120) == [[]] * world


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_graph_replays_with_other_counts(world, transport):
    gpus.needs(world, own=transport == "collective")  # NCCL in a graph does not take turns
    assert ranks(world).run(graph_job, transport, timeout=120) == [[]] * world


def expert_major_graph_job(rank, group, transport):
    """Each expert answers with its number times the row."""

    def answers(comm):
        factors = torch.tensor([e + 1.0 for e in comm.local_experts], device=comm.device)

        def answer(received):
            place = torch.arange(received.rows.shape[1], device=comm.device)
            filled = place[None, :] < received.rows_per_expert[:, None]
            y = received.rows.float() * factors[:, None, None]
            return torch.where(filled[..., None], y, torch.nan)

        return answer

    def part(x, ids, weights, here):
        total = torch.zeros(x.shape, device=x.device)
        for k in range(ids.shape[1]):
            y = x.float() * (ids[:, k, None] + 1.0)
            total = torch.where(here[:, k, None], reference.fma(weights[:, k, None], y, total), total)
        return total

    return wrong_replays(rank, group, transport, "expert_major", answers, part)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_expert_major_graph_replays_with_other_counts(world, transport):
    gpus.needs(world, own=transport == "collective")  # NCCL in a graph does not take turns
    assert ranks(world).run(expert_major_graph_job, transport, timeout=120) == [[]] * world


def compact_capture_job(rank, group, transport):
    """A compact dispatch while a graph is captured; then an exchange as usual."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = config({"payload": torch.bfloat16, "layout": "compact"}, world, transport)
    said = []
    with ep.Communicator(group, cfg, device=device) as comm:
        x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, 20, 3)[:3])

        def exchange():
            received, handle = comm.dispatch(x, ids, weights)
            return comm.combine(received.rows, handle)

        want = exchange()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weights.mul_(1.0)  # an empty graph would be warned of
            for call in (comm.dispatch, comm.dispatch_send):
                try:
                    call(x, ids, weights)
                except ep.EpArgumentError as error:
                    said.append(str(error))
        graph.replay()
        comm.check()
        return said, torch.equal(exchange(), want)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [1, 2])
def test_compact_refuses_to_be_captured(world, transport):
    gpus.needs(world)
    for said, right_again in ranks(world).run(compact_capture_job, transport, timeout=60):
        assert len(said) == 2
        assert all("CUDA graph" in text and "expert_major was wanted" in text for text in said)
        assert right_again


def twice_job(rank, group, transport, layout):
    """An expert that stands twice in a token: nobody looks for that on a GPU, and nothing may break."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = config({"payload": torch.bfloat16, "layout": layout}, world, transport)
    with ep.Communicator(group, cfg, device=device) as comm:
        x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, 20, 3)[:3])

        def exchange(ids):
            received, handle = comm.dispatch(x, ids, weights, tokens_per_rank=20)
            y = torch.zeros_like(received.rows) if layout == "expert_major" else received.rows
            return received.rows_per_expert.tolist(), comm.combine(y, handle)

        _, want = exchange(ids)
        counts, _ = exchange(torch.zeros_like(ids))
        _, again = exchange(ids)
        comm.check()
        return counts, torch.equal(again, want)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("world", [1, 2])
def test_an_expert_twice_in_a_token(world, layout, transport):
    gpus.needs(world)
    outcomes = ranks(world).run(twice_job, transport, layout, timeout=60)
    assert all(right_again for _, right_again in outcomes)
    assert outcomes[0][0][0] == world * 20  # as much as it has room for
    assert not any(outcomes[0][0][1:])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [2, 4])
def test_closing(world, transport):
    gpus.needs(world)
    results = ranks(world).run(closing_job, transport, timeout=60)
    assert [same for same, _ in results] == [[True] * 4] * world
    assert "ended the exchange without a combine" in results[0][1]


@pytest.mark.parametrize("transport", OF_WINDOWS)
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_dies_between_replays(world, transport):
    gpus.needs(world)
    with fresh_ranks(world) as group:
        group.start(loop_job, transport, None)
        outcomes = group.outcomes(timeout=60)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in set(range(world)) - {1}:
        assert outcomes[rank].ok, str(outcomes[rank])
        (peer, _, waited), recovery = outcomes[rank].value
        assert peer == 1
        assert waited < 8
        assert "1" in recovery
        assert recovery != "recovered"


@pytest.mark.parametrize("transport", OF_WINDOWS)
@pytest.mark.parametrize("world", [2, 4])
def test_recovery_after_a_stall(world, transport):
    gpus.needs(world)
    with fresh_ranks(world) as group:
        results = group.run(loop_job, transport, 4.0, timeout=60)
    for rank, ((peer, _, _), right_again) in enumerate(results):
        assert peer == 1 or rank == 1
        assert right_again


def two_streams_job(rank, group, transport):
    """Two communicators at the same time on two streams."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = config({"payload": torch.bfloat16}, world, transport)
    wrong = 0
    with (
        ep.Communicator(group, cfg, device=device) as one,
        ep.Communicator(group, cfg, device=device) as two,
    ):
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for number in range(200):
            outs = []
            # The two are launched in another order on every second rank.
            pairs = list(zip((one, two), streams, strict=True))
            for comm, stream in pairs if rank % 2 else pairs[::-1]:
                with torch.cuda.stream(stream):
                    x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, 40, number)[:3])
                    received, handle = comm.dispatch(x, ids, weights, tokens_per_rank=40)
                    y = torch.where(live(cfg, received)[:, None], received.rows, 0.0)
                    outs.append(comm.combine(y, handle))
            torch.cuda.synchronize()
            wrong += not torch.equal(*outs)
        one.check()
        two.check()
    return wrong


@pytest.mark.parametrize("transport", OF_WINDOWS)
@pytest.mark.parametrize("world", [2, 4])
def test_two_communicators_on_two_streams(world, transport):
    gpus.needs(world)
    assert ranks(world).run(two_streams_job, transport, timeout=120) == [0] * world


def two_full_channels_job(rank, group, transport):
    """One exchange behind the other on two channels that fill the GPU together, launched in another order on
    every second rank: a kernel that comes early must not keep the other channel's from its place."""
    device = gpus.take(rank)
    world, slots, rounds = torch.distributed.get_world_size(group), 512, 12
    fields = {"payload": torch.bfloat16, "hidden_size": 7168, "max_tokens_per_rank": slots}
    cfg = config(fields, world, transport, num_channels=2, timeout_s=10.0)
    x, ids, weights = (t.to(device) for t in inputs(cfg, rank, slots, 0)[:3])
    wrong = 0
    with ep.Communicator(group, cfg, device=device) as comm:
        assert comm.decision.sms is None
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for _ in range(5):
            outs = [None, None]
            torch.cuda.synchronize()
            for channel in (0, 1) if rank % 2 else (1, 0):
                with torch.cuda.stream(streams[channel]):
                    for _ in range(rounds):
                        received, handle = comm.dispatch(x, ids, weights, channel=channel)
                        outs[channel] = comm.combine(received.rows, handle)
            torch.cuda.synchronize()
            comm.check()
            wrong += not torch.equal(*outs)
    return wrong


@pytest.mark.parametrize("transport", OF_WINDOWS)
@pytest.mark.parametrize("world", [2, 4])
def test_two_channels_that_fill_the_gpu(world, transport):
    gpus.needs(world)
    assert ranks(world).run(two_full_channels_job, transport, timeout=120) == [0] * world
