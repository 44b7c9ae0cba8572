"""Nodes: which ranks are on which, what a made-up network carries, and what is refused."""

import os
from dataclasses import replace

import gpus
import pytest
import torch
from exchange import check_steps, make_call, one_by_one, run_steps, step
from harness import fresh_ranks, ranks
from machines import cpu_rank
from nodes import crossings, make, run_steps_on

import ep_backend as ep
from ep_backend import reference
from ep_backend.facts import nodes, uneven

TWO_BY_TWO = ((0, 1), (2, 3))
TURNS = ((0, 2), (1, 3))
CONFIG = ep.EpConfig(
    num_experts=12, top_k=4, hidden_size=64, max_tokens_per_rank=16, payload=torch.float32, timeout_s=20.0
)


def nccl_job(rank, group):
    return {name: value for name, value in os.environ.items() if name in gpus.NODES}


def test_to_nccl_each_rank_of_made_up_nodes_is_a_host_of_its_own():
    """Else NCCL would go from GPU to GPU inside the machine, and nothing would be between nodes."""
    told = gpus.nodes(2).run(nccl_job)
    hosts = [said.pop("NCCL_HOSTID") for said in told]
    assert len(set(hosts)) == 2
    assert told == [{"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}] * 2
    assert not any("NCCL_HOSTID" in said for said in ranks(2).run(nccl_job)), (
        "other tests' ranks are as before"
    )


def test_nodes_are_ranks_that_share_memory():
    here, there = cpu_rank(boot_id="b0"), cpu_rank(boot_id="b1")
    assert nodes([here, there, there, here]) == ((0, 3), (1, 2))
    # containers of one machine, each with a /dev/shm or a network of its own
    assert nodes([here, cpu_rank(boot_id="b0", shared_memory="53:1")]) == ((0,), (1,))
    assert uneven(((0, 3), (1, 2))) == ""
    assert "2, 1 ranks; the same number on each was wanted" in uneven(((0, 1), (2,)))


# --- what travels ---


def traffic_job(rank, group, on, config, one):
    with make(rank, group, on, config) as comm:
        call = make_call(config, comm.world_size, rank, one)
        received, handle = comm.dispatch(call.x, call.topk_ids, call.topk_weights, scales=call.scales)
        comm.combine(torch.zeros(len(received.rows), config.hidden_size), handle)
        sent = comm._transport.traffic
        return sent.dispatched_rows, sent.combined_rows, sent.bytes


@pytest.mark.parametrize("on", [TWO_BY_TWO, TURNS, ((0,), (1,), (2,)), ((0, 1, 2),)])
@pytest.mark.parametrize(
    "more", [{}, {"payload": torch.bfloat16, "quantization": "fp8_block128", "hidden_size": 256}]
)
def test_a_token_crosses_the_network_once_per_node(on, more):
    config = replace(CONFIG, **more)
    world = sum(map(len, on))
    one = step([3, 16, 0, 7][:world], seed=5, routing="uniform")
    sent = ranks(world).run(traffic_job, on, config, one)
    calls = [make_call(config, world, rank, one) for rank in range(world)]
    rows, others = crossings(config, calls, on), world * (len(on) - 1)
    assert sum(dispatched for dispatched, _, _ in sent) == rows
    assert sum(combined for _, combined, _ in sent) == rows
    record = config.row_bytes + config.row_scale_bytes + 8 * config.top_k + 8
    wanted = rows * (record + config.wire_row_bytes) + others * (24 + 16)
    assert sum(counted for _, _, counted in sent) == wanted
    assert (rows > 0) == (len(on) > 1)


def wide_job(rank, group, on, config, one):
    results = run_steps(rank, group, config, [one], one_by_one([one]), ("cpu",))
    return results | run_steps_on(rank, group, on, config, [one], one_by_one([one]))


def test_sums_agree_with_those_of_other_transports():
    """Not in all bits, as they are added up in another order."""
    config = replace(CONFIG, top_k=8)
    one = step([16, 9, 1, 16], seed=3)
    for results in ranks(4).run(wide_job, TURNS, config, one):
        (_, cpu), (_, hier) = results["cpu"], results["hier"]
        scale = cpu[0].abs().amax(1, keepdim=True)
        assert ((cpu[0] - hier[0]).abs() <= 1e-4 * scale).all()
        assert cpu[0].abs().sum() > 0


# --- channels that wait for each other, and ranks that close ---


def test_closing_reaches_all_nodes():
    """One rank closes; those of its node learn it there, and tell the others."""
    steps = [step([2, 3, 4, 5], seed=n, closers=closers) for n, closers in enumerate([(3,), (), (0, 1)])]
    check_steps(CONFIG, steps, ranks(4).run(run_steps_on, TURNS, CONFIG, steps, one_by_one(steps)), TURNS)


# --- what is refused ---


def refusal_job(rank, group, on, config):
    try:
        make(rank, group, on, config).destroy()
    except ep.EpConfigError as error:
        return str(error)
    raise AssertionError("it started")


@pytest.mark.parametrize(
    ("on", "config", "said"),
    [
        (((0, 1), (2,)), CONFIG, "asks for transport 'hier', but the nodes have 2, 1 ranks"),
        (((0,), (1,), (2,)), replace(CONFIG, max_tokens_per_rank=8192), "8192 tokens for each of 3 nodes"),
    ],
)
def test_a_group_that_cannot_be_served(on, config, said):
    assert all(said in text for text in ranks(3).run(refusal_job, on, config))


def bad_ids_job(rank, group, on):
    """A call that is refused changes nothing: the exchange before stays open and can be combined."""
    with make(rank, group, on, CONFIG) as comm:
        x, ids, weights = torch.ones(2, 64), torch.tensor([[0, 3, 6, 9], [1, 4, 7, 10]]), torch.ones(2, 4)
        received, handle = comm.dispatch(x, ids, weights)
        for wrong in (12, 0):
            bad = ids.clone()
            bad[1, 3] = wrong
            bad[1, 0] = 0
            with pytest.raises(ep.EpArgumentError):
                comm.dispatch(x, bad, weights)
        with pytest.raises(ep.EpError, match="cannot recover"):
            comm.recover()
        with pytest.raises(ep.EpError, match="cannot mask ranks"):
            comm.mask_ranks([1 - rank % 2])
        times = (received.topk_ids >= 0).sum(1, keepdim=True)
        return comm.combine(torch.where(times > 0, received.rows * times, 0.0), handle)


def test_wrong_ids_change_nothing():
    for out in ranks(4).run(bad_ids_job, TURNS):
        assert reference.same_bits(out, torch.full((2, 64), 4.0))


def slots_job(rank, group, on, slots):
    comm = make(rank, group, on, CONFIG)
    with pytest.raises(ep.EpError) as first:
        comm.dispatch(
            torch.ones(2, 64), torch.zeros(2, 4).long() - 1, torch.ones(2, 4), tokens_per_rank=slots[rank]
        )
    with pytest.raises(ep.EpError) as again:
        comm.check()
    comm.destroy()
    return type(first.value).__name__, str(first.value), str(again.value)


@pytest.mark.parametrize("slots", [(4, 4, 4, 5), (4, 4, 5, 5)], ids=["one rank", "one node"])
def test_different_slots(slots):
    with fresh_ranks(4) as group:
        answers = group.run(slots_job, TWO_BY_TWO, slots, timeout=40)
    for kind, text, stays in answers:
        assert text == stays
        assert kind == "EpProtocolError", text
        assert "tokens_per_rank" in text
