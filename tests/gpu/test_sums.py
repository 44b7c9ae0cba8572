"""Exchanges of sums on real GPUs: results of rows that another communicator has brought."""

from dataclasses import replace

import gpus
import pytest
import torch
from gpu_jobs import OF_WINDOWS, TRANSPORTS, config, inputs, of_sums, results
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend.selftest.exchanges import on_cpu

pytestmark = pytest.mark.gpu


def sums_job(rank, group, transport, more, exchanges=(1, 3, 300, 40, 7, 40)):
    """Results of rows that another exchange has brought, against those of a combine of that exchange."""
    device, world = gpus.take(rank), torch.distributed.get_world_size(group)
    # Two communicators of two channels each share the GPU.
    common = config({"expert_ids": "global", **more}, world, transport, num_channels=2, num_sms=32)
    wrong = []
    with (
        ep.Communicator(group, replace(common, layout="expert_major"), device=device) as by_expert,
        ep.Communicator(group, of_sums(common), device=device) as comm,
    ):
        for number, slots in enumerate(exchanges):
            count = slots - (number * 5 + rank * 3) % (slots + 1)
            given = [t.to(device) for t in inputs(common, rank, count, number)[:3]]
            call = {"tokens_per_rank": slots, "channel": number % 2}
            received, handle = by_expert.dispatch(*given, **call)
            dtype = torch.float32 if number == 4 else common.result_dtype
            y = results(by_expert.config, rank, on_cpu(received), number, dtype).to(device)
            places = by_expert.received_places(handle)
            want = by_expert.combine(y, handle)
            for known in (places, None):
                if number % 3 == 1:
                    opened = comm.exchange_sums_send(y, known, *given[1:], **call)
                    got = comm.combine_recv(opened)
                else:
                    got = comm.exchange_sums(y, known, *given[1:], **call)
                if not torch.equal(got, want):
                    wrong.append((number, slots, known is None))
        comm.check()
    return wrong


SUMS = {
    "bf16": {"payload": torch.bfloat16},
    "fp16 fp32-wire": {"payload": torch.float16, "wire_dtype": torch.float32},
    "fp32, half a unit": {"payload": torch.float32, "hidden_size": 260},
    "bf16, long rows": {"payload": torch.bfloat16, "hidden_size": 7168},
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_of_the_rows_of_another_exchange(world, name, transport):
    gpus.needs(world)
    assert ranks(world).run(sums_job, transport, SUMS[name], timeout=120) == [[]] * world


def sums_in_turn_job(rank, group, transport):
    """Results of rows of another exchange behind exchanges that were left open, and captured in a graph."""
    device, world = gpus.take(rank), torch.distributed.get_world_size(group)
    common = config({"payload": torch.bfloat16, "expert_ids": "global"}, world, transport)
    with (
        ep.Communicator(group, replace(common, layout="expert_major"), device=device) as by_expert,
        ep.Communicator(group, of_sums(common), device=device) as comm,
    ):
        x, *given = (t.to(device) for t in inputs(common, rank, 20, 3)[:3])
        received, handle = by_expert.dispatch(x, *given, tokens_per_rank=33)
        y = results(by_expert.config, rank, on_cpu(received), 3, common.result_dtype).to(device)
        places = by_expert.received_places(handle)
        want = by_expert.combine(y, handle)

        def is_right(known=places):
            return torch.equal(comm.exchange_sums(y, known, *given, tokens_per_rank=33), want)

        same = [is_right()]
        for known in (places, None):  # left open, and then what has rows in the place of words
            comm.exchange_sums_send(y, known, *given, tokens_per_rank=33)
            same += [is_right(), is_right(None)]
        opened = comm.exchange_sums_send(y, places, *given, tokens_per_rank=33)
        same.append(torch.equal(comm.combine_recv(opened), want))
        for _ in range(2):  # exchanges that these end
            _, handle = by_expert.dispatch(x, *given, tokens_per_rank=33)
            call = {"tokens_per_rank": 33, "ends": (by_expert, handle)}
            same.append(torch.equal(comm.exchange_sums(y, places, *given, **call), want))
            _, handle = by_expert.dispatch(x, *given, tokens_per_rank=33)
            call["ends"] = by_expert, handle
            sent = comm.exchange_sums_send(y, places, *given, **call)
            same.append(torch.equal(comm.combine_recv(sent), want) and handle.state == "closed")

        out, graph = torch.empty_like(want), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            comm.exchange_sums(y, places, *given, tokens_per_rank=33, out=out)
        for number in range(1, 5):
            given[1].mul_(2)  # exact, and so are all sums
            out.fill_(-1)
            graph.replay()
            same.append(torch.equal(out, want * 2**number))
        comm.check()
    return same


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_of_another_exchange_in_turn(world, transport):
    gpus.needs(world, own=transport == "collective")
    assert ranks(world).run(sums_in_turn_job, transport, timeout=60) == [[True] * 14] * world


def other_slots_job(rank, group, transport):
    """Ranks that give different T: nothing is read that is not there, and all are told."""
    device, world = gpus.take(rank), torch.distributed.get_world_size(group)
    common = config({"payload": torch.bfloat16, "expert_ids": "global"}, world, transport)
    slots = 33 if rank == 0 else 40
    with ep.Communicator(group, of_sums(common), device=device) as comm:
        given = [t.to(device) for t in inputs(common, rank, slots, 3)[1:3]]
        places = torch.zeros(world * slots, common.top_k, dtype=torch.int32, device=device)
        y = torch.zeros(len(comm.local_experts), world * slots, common.hidden_size, device=device)
        try:
            comm.exchange_sums(y.bfloat16(), places, *given, tokens_per_rank=slots)
            torch.cuda.synchronize()
            comm.check()
        except ep.EpProtocolError as error:
            return str(error)


@pytest.mark.parametrize("transport", OF_WINDOWS)
def test_different_slots_in_an_exchange_of_sums(transport):
    gpus.needs(2)
    with fresh_ranks(2) as group:
        for said in group.run(other_slots_job, transport, timeout=60):
            assert "tokens_per_rank" in said
