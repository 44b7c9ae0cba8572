"""What several test files do on real GPUs: configurations, inputs, and jobs of every rank of a group."""

import os
import signal
import time
from dataclasses import replace

import gpus
import torch

import ep_backend as ep
from ep_backend import reference
from ep_backend.selftest.exchanges import on_cpu

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


def of_sums(cfg):
    """What exchanges sums of the rows that ``cfg`` brings, in whatever layout."""
    more = {"layout": "rank_major", "payload": torch.bfloat16, "out_dtype": cfg.result_dtype}
    return replace(cfg, **more, sums_only=True)


def live(cfg, received):
    return (received.topk_ids != cfg.pad_id).any(1)


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


def wrong_replays(rank, group, transport, layout, answers, part):
    """One captured exchange, replayed with other tokens and another count, between eager ones.

    ``answers(comm)``: a function of what was received, for ``combine``. ``part(x, ids, weights, here)``: what
    a rank's answers add up to, float32; ``here``: which choices are of its experts.
    """
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    cfg = config({"payload": torch.bfloat16, "layout": layout}, world, transport)
    wrong = []
    with ep.Communicator(group, cfg, device=device) as comm:
        slots, answer = 24, answers(comm)
        x, ids, weights = (t.to(comm.device) for t in inputs(cfg, rank, slots, 0)[:3])
        count = torch.tensor([slots], dtype=torch.int32, device=comm.device)
        out = torch.empty(slots, cfg.hidden_size, dtype=cfg.result_dtype, device=comm.device)

        def exchange():
            received, handle = comm.dispatch(x, ids, weights, tokens_per_rank=slots, num_tokens=count)
            comm.combine(answer(received), handle, out=out)

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
                rounded = part(x, ids, weights, here).to(cfg.sum_dtype).float()
                want += torch.where(here.any(1, keepdim=True), rounded, 0.0)
            want = want.to(cfg.result_dtype)
            want[now:] = -1
            if not torch.equal(out, want):
                wrong.append((replay, now))
        comm.check()
    return wrong


def graph_job(rank, group, transport):
    """Each rank answers with the row times its weights there."""

    def answers(comm):
        def answer(received):
            factor = received.topk_weights.sum(1, keepdim=True)
            return torch.where(
                live(comm.config, received)[:, None], received.rows.float() * factor, torch.nan
            )

        return answer

    def part(x, ids, weights, here):
        return x.float() * (weights * here).sum(1, keepdim=True)

    return wrong_replays(rank, group, transport, "rank_major", answers, part)


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
