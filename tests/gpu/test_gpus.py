"""On real GPUs: the CPU transport's bits, captured graphs, ranks that stop or die."""

import os
import signal
import time
from dataclasses import replace
from unittest import mock

import gpus
import pytest
import torch
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend import reference

pytestmark = pytest.mark.gpu
CONFIGS = {
    "bf16": {"payload": torch.bfloat16},
    "fp16 fp32-wire": {"payload": torch.float16, "wire_dtype": torch.float32},
    "fp32": {"payload": torch.float32},
    "fp8": {"payload": torch.bfloat16, "quantization": "fp8_block128"},
    "fp8 of fp32": {"payload": torch.float32, "quantization": "fp8_block128", "out_dtype": torch.float16},
    "fp8 by the caller": {"payload": torch.float8_e4m3fn},
    "global ids": {"payload": torch.bfloat16, "expert_ids": "global", "pad_id": 77},
    "opaque": {"payload": torch.uint8, "payload_bytes": 272, "scale_bytes": 20},
}
LAYOUTS = ("rank_major", "compact", "expert_major")
OF_WINDOWS = ("peer", "host")
TRANSPORTS = (*OF_WINDOWS, "collective")


def config(more, world, transport, **common):
    usual = {"num_experts": 4 * world + 1, "top_k": 3, "hidden_size": 256, "max_tokens_per_rank": 300}
    return ep.EpConfig(**{**usual, **more, **common, "transport": transport, "timeout_s": 10.0})


def inputs(cfg, rank, count, seed):
    g = torch.Generator().manual_seed(seed * 100 + rank)
    ids = torch.rand(count, cfg.num_experts, generator=g).topk(cfg.top_k, dim=1).indices
    ids[torch.rand(ids.shape, generator=g) < 0.1] = -1
    weights = torch.rand(count, cfg.top_k, generator=g)
    if cfg.payload == torch.uint8:
        x = torch.randint(0, 256, (count, cfg.row_width), generator=g, dtype=torch.uint8)
        return (
            x,
            ids,
            weights,
            torch.randint(0, 256, (count, cfg.scale_bytes), generator=g, dtype=torch.uint8),
        )
    x = (torch.randn(count, cfg.hidden_size, generator=g) * 3).to(cfg.payload)
    scales = torch.rand(count, cfg.hidden_size // 128, generator=g) if cfg.payload.itemsize == 1 else None
    return x, ids, weights, scales


def live(cfg, received):
    return (received.topk_ids != cfg.pad_id).any(1)


def on_cpu(received):
    return ep.Received(*(None if t is None else t.cpu() for t in vars(received).values()))


def results(cfg, rank, received, seed, dtype):
    """What the experts of a rank return; rows that nobody reads are NaN. ``received``: on the CPU."""
    g = torch.Generator().manual_seed(seed * 7 + rank)
    y = torch.randn(*received.rows.shape[:-1], cfg.hidden_size, generator=g).to(dtype)
    return torch.where(reference.defined_rows(cfg, received)[..., None], y, torch.nan)


def same_bits_job(rank, group, transport, more, exchanges=(1, 3, 300, 40, 40, 7, 128), gpu_of_rank=None):
    """Each exchange, T after T, on the GPU and on the CPU; returns what differs."""
    device = gpus.take(rank if gpu_of_rank is None else gpu_of_rank)
    world = torch.distributed.get_world_size(group)
    wrong = []
    with (
        ep.Communicator(group, config(more, world, "cpu", num_channels=2)) as cpu,
        ep.Communicator(group, config(more, world, transport, num_channels=2), device=device) as gpu,
    ):
        cfg = cpu.config
        for number, slots in enumerate(exchanges):
            count = slots - (number * 5 + rank * 3) % (slots + 1)
            x, ids, weights, scales = inputs(cfg, rank, count, number)
            call = {"tokens_per_rank": slots, "channel": number % 2}
            got, sums = [], []
            for comm in (cpu, gpu):
                x_, ids_, w_ = (t.to(comm.device) for t in (x, ids, weights))
                s_ = None if scales is None else scales.to(comm.device)
                if number % 3 == 1:
                    handle = comm.dispatch_send(x_, ids_, w_, scales=s_, **call)
                    received = comm.dispatch_recv(handle)
                else:
                    received, handle = comm.dispatch(x_, ids_, w_, scales=s_, **call)
                got.append(on_cpu(received))
                if handle.is_view != (cfg.layout == "rank_major"):
                    wrong.append((number, slots, "is_view"))
                if number == 3:  # left open: the next dispatch on the channel closes it
                    continue
                dtype = torch.float32 if number % 2 else cfg.result_dtype
                y = results(cfg, rank, got[0], number, dtype).to(comm.device)
                if number % 3 == 1:
                    comm.combine_send(y, handle)
                    sums.append(comm.combine_recv(handle).cpu())
                else:
                    sums.append(comm.combine(y, handle).cpu())
            want, have = got
            if cfg.layout == "rank_major":
                want = replace(want, rows_per_expert=None)  # nobody counts them on a GPU
            if different := reference.first_difference(cfg, have, want):
                wrong.append((number, slots, different))
            if sums and not torch.equal(*sums):
                wrong.append((number, slots, "combined"))
        gpu.check()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_bits_as_the_cpu_transport(world, name, layout, transport):
    gpus.needs(world)
    more = {**CONFIGS[name], "layout": layout}
    assert ranks(world).run(same_bits_job, transport, more, timeout=120) == [[]] * world


def sums_job(rank, group, transport, more, exchanges=(1, 3, 300, 40, 7, 40)):
    """Results of rows that another exchange has brought, against those of a combine of that exchange."""
    device, world = gpus.take(rank), torch.distributed.get_world_size(group)
    # Two communicators of two channels each share the GPU.
    common = config({"expert_ids": "global", **more}, world, transport, num_channels=2, num_sms=32)
    wrong = []
    with (
        ep.Communicator(group, replace(common, layout="expert_major"), device=device) as by_expert,
        ep.Communicator(group, common, device=device) as comm,
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
                    opened = comm.exchange_sums_send(y, known, *given, **call)
                    got = comm.combine_recv(opened)
                else:
                    got = comm.exchange_sums(y, known, *given, **call)
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


def graph_job(rank, group, transport):
    """One captured exchange, replayed with other tokens and another count, between eager ones."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = config({"payload": torch.bfloat16}, world, transport)
    wrong = []
    with ep.Communicator(group, cfg, device=device) as comm:
        slots = 24
        x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, slots, 0)[:3])
        count = torch.tensor([slots], dtype=torch.int32, device=comm.device)
        out = torch.empty(slots, cfg.hidden_size, dtype=cfg.result_dtype, device=comm.device)

        def exchange():
            received, handle = comm.dispatch(x, ids, weights, tokens_per_rank=slots, num_tokens=count)
            factor = received.topk_weights.sum(1, keepdim=True)
            y = torch.where(live(cfg, received)[:, None], received.rows.float() * factor, torch.nan)
            comm.combine(y, handle, out=out)

        exchange()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            exchange()
        owners = torch.tensor(cfg.expert_ranks(world), device=comm.device)
        for replay in range(20):
            now = (replay * 7 + rank * 5) % (slots + 1)
            for old, new in zip((x, ids, weights), inputs(cfg, rank, slots, 100 + replay)[:3], strict=True):
                old.copy_(new)
            count.fill_(now)
            out.fill_(-1)
            exchange() if replay % 5 == 4 else graph.replay()
            want = torch.zeros(slots, cfg.hidden_size, device=comm.device)
            for r in range(world):
                here = (owners[ids.clamp(min=0)] == r) & (ids >= 0)
                part = (x.float() * (weights * here).sum(1, keepdim=True)).to(cfg.sum_dtype).float()
                want += torch.where(here.any(1, keepdim=True), part, 0.0)
            want = want.to(cfg.result_dtype)
            want[now:] = -1
            if not torch.equal(out, want):
                wrong.append((replay, now))
        comm.check()
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_graph_replays_with_other_counts(world, transport):
    gpus.needs(world, own=transport == "collective")  # NCCL in a graph does not take turns
    assert ranks(world).run(graph_job, transport, timeout=120) == [[]] * world


def expert_major_graph_job(rank, group, transport):
    """The same in the expert-major layout: each expert answers with its number times the row."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = config({"payload": torch.bfloat16, "layout": "expert_major"}, world, transport)
    wrong = []
    with ep.Communicator(group, cfg, device=device) as comm:
        slots = 24
        x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, slots, 0)[:3])
        count = torch.tensor([slots], dtype=torch.int32, device=comm.device)
        out = torch.empty(slots, cfg.hidden_size, dtype=cfg.result_dtype, device=comm.device)
        place = torch.arange(world * slots, device=comm.device)
        factors = torch.tensor([e + 1.0 for e in comm.local_experts], device=comm.device)

        def exchange():
            received, handle = comm.dispatch(x, ids, weights, tokens_per_rank=slots, num_tokens=count)
            filled = place[None, :] < received.rows_per_expert[:, None]
            y = received.rows.float() * factors[:, None, None]
            comm.combine(torch.where(filled[..., None], y, torch.nan), handle, out=out)

        exchange()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            exchange()
        owners = torch.tensor(cfg.expert_ranks(world), device=comm.device)
        for replay in range(20):
            now = (replay * 7 + rank * 5) % (slots + 1)
            for old, new in zip((x, ids, weights), inputs(cfg, rank, slots, 100 + replay)[:3], strict=True):
                old.copy_(new)
            count.fill_(now)
            out.fill_(-1)
            exchange() if replay % 5 == 4 else graph.replay()
            want = torch.zeros(slots, cfg.hidden_size, device=comm.device)
            for r in range(world):
                here = (owners[ids.clamp(min=0)] == r) & (ids >= 0)
                part = torch.zeros_like(want)
                for k in range(cfg.top_k):
                    y = x.float() * (ids[:, k, None] + 1.0)
                    part = torch.where(here[:, k, None], reference.fma(weights[:, k, None], y, part), part)
                want += torch.where(here.any(1, keepdim=True), part.to(cfg.sum_dtype).float(), 0.0)
            want = want.to(cfg.result_dtype)
            want[now:] = -1
            if not torch.equal(out, want):
                wrong.append((replay, now))
        comm.check()
    return wrong


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


def closing_job(rank, group, transport):
    """Exchanges that are left at every point, then one that must be right; then ranks that disagree."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = config({"payload": torch.bfloat16}, world, transport)
    with ep.Communicator(group, cfg, device=device) as comm:
        x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, 20, 3)[:3])

        def dispatch():
            return comm.dispatch(x, ids, weights, tokens_per_rank=33)

        def combine(received, handle):
            return comm.combine(torch.where(live(cfg, received)[:, None], received.rows, 0.0), handle)

        want = combine(*dispatch())
        same = []
        comm.dispatch_send(x, ids, weights, tokens_per_rank=33)
        same.append(torch.equal(combine(*dispatch()), want))
        dispatch()
        same.append(torch.equal(combine(*dispatch()), want))
        received, handle = dispatch()
        comm.combine_send(torch.zeros_like(received.rows), handle)
        same.append(torch.equal(combine(*dispatch()), want))

        opened = dispatch()
        said = ""
        if rank == 0:
            combine(*opened)
            torch.cuda.synchronize()
            try:
                comm.check()
            except ep.EpProtocolError as error:
                said = str(error)
        same.append(torch.equal(combine(*dispatch()), want))
        comm.check()
    return same, said


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [2, 4])
def test_closing(world, transport):
    gpus.needs(world)
    results = ranks(world).run(closing_job, transport, timeout=60)
    assert [same for same, _ in results] == [[True] * 4] * world
    assert "ended the exchange without a combine" in results[0][1]


def sums_in_turn_job(rank, group, transport):
    """Results of rows of another exchange behind exchanges that were left open, and captured in a graph."""
    device, world = gpus.take(rank), torch.distributed.get_world_size(group)
    common = config({"payload": torch.bfloat16, "expert_ids": "global"}, world, transport)
    with (
        ep.Communicator(group, replace(common, layout="expert_major"), device=device) as by_expert,
        ep.Communicator(group, common, device=device) as comm,
    ):
        given = [t.to(device) for t in inputs(common, rank, 20, 3)[:3]]
        received, handle = by_expert.dispatch(*given, tokens_per_rank=33)
        y = results(by_expert.config, rank, on_cpu(received), 3, common.result_dtype).to(device)
        places = by_expert.received_places(handle)
        want = by_expert.combine(y, handle)

        def is_right():
            return torch.equal(comm.exchange_sums(y, places, *given, tokens_per_rank=33), want)

        same = [is_right()]
        comm.dispatch_send(*given, tokens_per_rank=33)
        same.append(is_right())
        received, _ = comm.dispatch(*given, tokens_per_rank=33)
        same.append(is_right())
        _, handle = comm.dispatch(*given, tokens_per_rank=33)
        comm.combine_send(torch.zeros_like(received.rows), handle)
        same.append(is_right())
        comm.exchange_sums_send(y, places, *given, tokens_per_rank=33)
        same.append(is_right())
        for _ in range(2):  # exchanges that these end
            _, handle = by_expert.dispatch(*given, tokens_per_rank=33)
            call = {"tokens_per_rank": 33, "ends": (by_expert, handle)}
            same.append(torch.equal(comm.exchange_sums(y, places, *given, **call), want))
            _, handle = by_expert.dispatch(*given, tokens_per_rank=33)
            call["ends"] = by_expert, handle
            sent = comm.exchange_sums_send(y, places, *given, **call)
            same.append(torch.equal(comm.combine_recv(sent), want) and handle.state == "closed")

        out, graph = torch.empty_like(want), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            comm.exchange_sums(y, places, *given, tokens_per_rank=33, out=out)
        for number in range(1, 5):
            given[2].mul_(2)  # exact, and so are all sums
            out.fill_(-1)
            graph.replay()
            same.append(torch.equal(out, want * 2**number))
        comm.check()
    return same


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_of_another_exchange_in_turn(world, transport):
    gpus.needs(world, own=transport == "collective")
    assert ranks(world).run(sums_in_turn_job, transport, timeout=60) == [[True] * 13] * world


def other_slots_job(rank, group, transport):
    """Ranks that give different T: nothing is read that is not there, and all are told."""
    device, world = gpus.take(rank), torch.distributed.get_world_size(group)
    common = config({"payload": torch.bfloat16, "expert_ids": "global"}, world, transport)
    slots = 33 if rank == 0 else 40
    with ep.Communicator(group, common, device=device) as comm:
        given = [t.to(device) for t in inputs(common, rank, slots, 3)[:3]]
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


def loop_job(rank, group, transport, stall_s):
    """Replays until a peer fails; then says what was raised, how long it took, and whether recovery works."""
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = ep.EpConfig(
        num_experts=4 * world,
        top_k=2,
        hidden_size=256,
        max_tokens_per_rank=8,
        transport=transport,
        timeout_s=2.0,
    )
    with ep.Communicator(group, cfg, device=device) as comm:
        x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, 8, 1)[:3])
        out = torch.empty(8, cfg.hidden_size, dtype=cfg.result_dtype, device=comm.device)

        def exchange():
            received, handle = comm.dispatch(x, ids, weights)
            comm.combine(torch.zeros_like(received.rows), handle, out=out)

        exchange()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                exchange()
        start, error = time.monotonic(), None
        while error is None and time.monotonic() - start < 20:
            if rank == 1 and time.monotonic() - start > 1.0:
                if stall_s is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(stall_s)
            graph.replay()
            torch.cuda.synchronize()
            try:
                comm.check()
            except ep.EpTimeoutError as caught:
                error = (caught.peer, caught.phase, time.monotonic() - start)
        if stall_s is None:
            try:
                comm.recover()
                return error, "recovered"
            except ep.EpError as refused:
                return error, str(refused)
        comm.set_timeout(10.0)  # the ranks come to the meeting at very different times
        comm.recover()
        out.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        comm.check()
        return error, bool((out == 0).all())


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
