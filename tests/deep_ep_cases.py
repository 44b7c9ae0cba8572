"""What DeepEP's documentation and tests say of its calls, as jobs for rank processes on GPUs or CPUs.

Shapes, orders, counts and tolerances are those of deepseek-ai/DeepEP: deep_ep/buffer.py,
tests/test_intranode.py, tests/test_low_latency.py. Every rank makes the inputs of all ranks from the same
seeds, and so knows what must come.
"""

from __future__ import annotations

from dataclasses import dataclass

import gpus
import torch

from ep_backend.compat.deep_ep import Buffer, Config, EventOverlap

HIDDEN, TOP_K, EXPERTS_PER_RANK = 1024, 4, 3
ROUTINGS = ("uniform", "skewed", "holes", "nobody")


@dataclass
class Inputs:
    """Of one rank."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def fp8(self):
        """As the caller of a dispatch would quantise: [M, hidden] and [M, hidden / 128]."""
        blocks = self.x.float().unflatten(1, (-1, 128))
        scales = blocks.abs().amax(2).clamp(1e-4) / 448
        return (blocks / scales[..., None]).flatten(1).to(torch.float8_e4m3fn), scales


@dataclass
class Whole:
    """A whole number as numpy has them: no int, but it stands for one."""

    value: int

    def __index__(self):
        return self.value


def make_inputs(rank, world, tokens, routing, seed, device):
    g = torch.Generator().manual_seed(1000 * seed + rank)
    experts = EXPERTS_PER_RANK * world
    x = torch.randn(tokens, HIDDEN, generator=g).bfloat16()
    scores = torch.rand(tokens, experts, generator=g)
    if routing == "skewed":
        scores[:, :TOP_K] += 0.8  # most tokens want the first rank
    ids = scores.topk(TOP_K, dim=1).indices
    if routing == "holes":
        ids[torch.rand(ids.shape, generator=g) < 0.5] = -1
    if routing == "nobody":
        ids[:] = -1
    weights = torch.rand(tokens, TOP_K, generator=g)
    return Inputs(x.to(device), ids.to(device), weights.to(device))


def all_inputs(world, tokens, routing, seed, device):
    return [make_inputs(r, world, tokens[r], routing, seed, device) for r in range(world)]


def ready(rank, group, device, **arguments):
    """A buffer, the number of ranks, and where tensors go."""
    if device == "cuda":
        device = gpus.take(rank)
    buffer = Buffer(group, int(1e6), explicitly_destroy=True, **arguments)
    return buffer, group.size(), torch.device(device)


def layout_of(buffer, mine, world):
    per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        mine.ids, EXPERTS_PER_RANK * world
    )
    assert per_rdma_rank is None
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }


def check_layout(mine, world, layout):
    """Against counting by hand."""
    experts = EXPERTS_PER_RANK * world
    want = torch.zeros(len(mine.x), world, dtype=torch.bool)
    for token, ids in enumerate(mine.ids.tolist()):
        for expert in ids:
            if expert >= 0:
                want[token, expert // EXPERTS_PER_RANK] = True
    assert torch.equal(layout["is_token_in_rank"].cpu(), want)
    assert layout["num_tokens_per_rank"].tolist() == want.sum(0).tolist()
    assert layout["num_tokens_per_expert"].tolist() == [int((mine.ids == e).sum()) for e in range(experts)]
    dtypes = [t.dtype for t in layout.values()]
    assert dtypes == [torch.int32, torch.int32, torch.bool]


def arrivals(inputs, rank):
    """What a rank receives in normal mode: tokens of each source, local ids, weights."""
    first = rank * EXPERTS_PER_RANK
    rows, ids, weights, tokens, per_source = [], [], [], [], []
    for source in inputs:
        here = (source.ids >= first) & (source.ids < first + EXPERTS_PER_RANK)
        came = here.any(1)
        tokens.append(came.nonzero().flatten())
        rows.append(source.x[came])
        ids.append(torch.where(here, source.ids - first, -1)[came])
        weights.append(torch.where(here, source.weights, 0.0)[came])
        per_source.append(int(came.sum()))
    return torch.cat(rows), torch.cat(ids), torch.cat(weights), torch.cat(tokens), per_source


def summed_over_ranks(mine, world):
    """What a combine of the received rows gives: each token as often as it was sent."""
    ranks = torch.where(mine.ids >= 0, mine.ids // EXPERTS_PER_RANK, -1)
    times = sum((ranks == r).any(1).float() for r in range(world))
    return mine.x.float() * times[:, None]


def normal_mode(rank, group, device, tokens, routing, seed, wait):
    """Layout, dispatch, cached dispatch and combine. ``wait``: None, "async", or "previous" for both."""
    buffer, world, device = ready(rank, group, device)
    inputs = all_inputs(world, tokens, routing, seed, device)
    mine = inputs[rank]
    rows, ids, weights, src, per_source = arrivals(inputs, rank)
    layout = layout_of(buffer, mine, world)
    check_layout(mine, world, layout)
    config = Config(24, 8, 256)

    def run(call, **arguments):
        if wait:
            arguments["async_finish"] = True
        if wait == "previous":
            arguments |= {"previous_event": Buffer.capture(), "allocate_on_comm_stream": True}
        result = call(config=config, **arguments)
        assert isinstance(result[-1], EventOverlap)
        if wait:
            result[-1].current_stream_wait()
        return result[:-1]

    per_expert = [int((ids == e).sum()) for e in range(EXPERTS_PER_RANK)]
    for fp8 in (False, True):
        for with_top_k in (True, False):
            x = mine.fp8() if fp8 else mine.x
            arguments = {"topk_idx": mine.ids, "topk_weights": mine.weights} if with_top_k else {}
            got, got_ids, got_weights, counts, handle = run(buffer.dispatch, x=x, **layout, **arguments)
            again = run(buffer.dispatch, x=x, handle=handle)
            assert again[1:] == (None, None, None, None)
            for received in (got, again[0]):
                if fp8:
                    want = [s.fp8() for s in inputs]
                    for part in (0, 1):
                        sources = zip(want, inputs, strict=True)
                        sent = [Inputs(pair[part], s.ids, s.weights) for pair, s in sources]
                        wanted_part = arrivals(sent, rank)[0]
                        assert received[part].dtype == wanted_part.dtype
                        assert torch.equal(received[part].view(torch.uint8), wanted_part.view(torch.uint8))
                else:
                    assert received.dtype == torch.bfloat16
                    assert torch.equal(received, rows)
            assert counts == per_expert
            assert handle[0][:, rank].tolist() == torch.tensor(per_source).cumsum(0).tolist()
            assert torch.equal(handle[3], src.int())
            assert torch.equal(handle[4], layout["is_token_in_rank"])
            if with_top_k:
                assert torch.equal(got_ids, ids)
                assert torch.equal(got_weights, weights)
            else:
                assert (got_ids, got_weights) == (None, None)
            # Any number of combines for a handle, whichever exchange came last.
            for _ in range(2):
                total, total_weights = run(
                    buffer.combine, x=rows, handle=handle, topk_weights=weights if with_top_k else None
                )
                assert torch.equal(total, summed_over_ranks(mine, world).bfloat16())
                if with_top_k:
                    assert torch.equal(total_weights, mine.weights.masked_fill(mine.ids < 0, 0.0))
                else:
                    assert total_weights is None
    buffer.destroy()


def normal_details(rank, group, device):
    """Alignment, worst case, bias, open exchanges, more tokens than before, 1-D scales, default config."""
    buffer, world, device = ready(rank, group, device)
    tokens = [20 + 3 * r for r in range(world)]
    inputs = all_inputs(world, tokens, "holes", 5, device)
    mine = inputs[rank]
    rows, ids, weights, _, _ = arrivals(inputs, rank)
    layout = layout_of(buffer, mine, world)
    routing = {**layout, "topk_idx": mine.ids, "topk_weights": mine.weights}

    *_, counts, first, event = buffer.dispatch(mine.x, **routing, expert_alignment=Whole(16))
    assert event.event is None
    assert counts == [-(-int((ids == e).sum()) // 16) * 16 for e in range(EXPERTS_PER_RANK)]

    worst = world * max(tokens)
    got, got_ids, got_weights, none, handle, _ = buffer.dispatch(mine.x, **routing, num_worst_tokens=worst)
    assert none == []
    assert len(got) == len(got_ids) == len(got_weights) == worst
    assert torch.equal(got[: len(rows)], rows)
    assert torch.equal(got_ids[: len(rows)], ids)
    assert torch.equal(got_weights[: len(rows)], weights)
    assert (got_ids[len(rows) :] == -1).all()
    assert (got_weights[len(rows) :] == 0).all()
    total = summed_over_ranks(mine, world)
    for _ in range(2):
        assert torch.equal(buffer.combine(got, handle)[0], total.bfloat16())

    bias = torch.randn_like(mine.x)
    rounded = total.bfloat16().float()
    for given in (bias, [bias], (bias, None)):
        assert torch.equal(buffer.combine(rows, first, bias=given)[0], (rounded + bias.float()).bfloat16())
    both = (rounded + bias.float() + mine.x.float()).bfloat16()
    assert torch.equal(buffer.combine(rows, first, bias=(bias, mine.x))[0], both)

    # Exchanges that are open at once, closed in another order, with more tokens each time.
    opened = []
    for number in range(4):
        more = all_inputs(world, [t * (number + 1) for t in tokens], "uniform", number, device)
        here = more[rank]
        got, *_, handle, _ = buffer.dispatch(
            here.x, **layout_of(buffer, here, world), topk_idx=here.ids, topk_weights=here.weights
        )
        assert torch.equal(got, arrivals(more, rank)[0])
        opened.append((here, got, handle))
    for here, got, handle in reversed(opened):
        assert torch.equal(buffer.combine(got, handle)[0], summed_over_ranks(here, world).bfloat16())

    q, scales = mine.fp8()
    (_, got_scales), *_ = buffer.dispatch((q, scales[:, 0].contiguous()), **routing)
    flat = [arrivals([Inputs(s.fp8()[1][:, :1], s.ids, s.weights)], rank)[0] for s in inputs]
    assert torch.equal(got_scales, torch.cat(flat).flatten())
    packed = scales.contiguous().view(torch.int32)
    (_, got_packed), *_ = buffer.dispatch((q, packed), **routing)
    assert got_packed.dtype == torch.int32
    buffer.destroy()


def masked_and_reused(rank, group, device):
    """What the caller does with its own tensors: it drops tokens by the mask, and writes the next layer's ids
    where those of a handle stood."""
    buffer, world, device = ready(rank, group, device)
    inputs = all_inputs(world, [7 + 2 * r for r in range(world)], "uniform", 6, device)
    mine = inputs[rank]
    router, layout = mine.ids.clone(), layout_of(buffer, mine, world)
    mask = layout["is_token_in_rank"]
    mask[0], mask[-1, 0] = False, False
    for source in inputs:  # what is left
        source.ids[0] = -1
        source.ids[-1] = source.ids[-1].masked_fill(source.ids[-1] < EXPERTS_PER_RANK, -1)
    rows, ids, *_ = arrivals(inputs, rank)
    total = summed_over_ranks(mine, world).bfloat16()
    for with_top_k in (True, False):
        reused, in_rank = router.clone(), mask.clone()
        arguments = {"topk_idx": reused, "topk_weights": mine.weights} if with_top_k else {}
        got, got_ids, _, _, handle, _ = buffer.dispatch(
            mine.x, **{**layout, "is_token_in_rank": in_rank}, **arguments
        )
        assert torch.equal(got, rows)
        if with_top_k:
            assert torch.equal(got_ids, ids)
        reused.fill_(0)
        in_rank.fill_(True)
        for _ in range(2):
            assert torch.equal(buffer.combine(got, handle)[0], total)
        assert torch.equal(buffer.dispatch(mine.x, handle=handle)[0], rows)
        assert torch.equal(handle[4], mask)
    buffer.destroy()


def least_worst_case(rank, group, device):
    """num_worst_tokens of just the rows that come, with uneven ranks; then too few, and unequal ones."""
    buffer, world, device = ready(rank, group, device)
    tokens = [2] * (world - 1) + [11]
    inputs = all_inputs(world, tokens, "skewed", 4, device)
    for source in inputs:
        source.ids[:, 0] = 0  # all of them go to rank 0
        source.ids[:, 1:] = torch.where(source.ids[:, 1:] == 0, -1, source.ids[:, 1:])
    mine, most = inputs[rank], sum(tokens)
    rows, ids, _, _, _ = arrivals(inputs, rank)
    routing = {**layout_of(buffer, mine, world), "topk_idx": mine.ids, "topk_weights": mine.weights}

    def dispatch(worst):
        return buffer.dispatch(mine.x, **routing, num_worst_tokens=worst)

    said = []
    for worst in (most - 1, most + rank):
        try:
            dispatch(worst)
        except ValueError as error:
            said.append(str(error))
    for worst in (most, 5 * most + 1):
        got, got_ids, _, _, handle, _ = dispatch(worst)
        assert len(got) == len(got_ids) == worst
        assert torch.equal(got[: len(rows)], rows)
        assert torch.equal(got_ids[: len(rows)], ids)
        assert (got_ids[len(rows) :] == -1).all()
        assert torch.equal(buffer.combine(got, handle)[0], summed_over_ranks(mine, world).bfloat16())
    buffer.destroy()
    return said


def dequantized(rows, scales):
    if scales.dtype == torch.int32:
        scales = (scales.contiguous().view(torch.uint8).int() << 23).view(torch.float32)
    return (rows.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2).bfloat16()


def many_repetitions(rank, group, device, times):
    """The same bits every time, as DeepEP's pressure test wants."""
    buffer, world, device = ready(rank, group, device)
    inputs = all_inputs(world, [33 - r for r in range(world)], "holes", 11, device)
    mine = inputs[rank]
    layout, experts, seen = layout_of(buffer, mine, world), EXPERTS_PER_RANK * world, None
    for _ in range(times):
        got, ids, weights, _, handle, _ = buffer.dispatch(
            mine.x, **layout, topk_idx=mine.ids, topk_weights=mine.weights
        )
        total, total_weights, _ = buffer.combine(got * 0.3, handle, topk_weights=weights)
        (rows, scales), counts, ll, _, _ = buffer.low_latency_dispatch(mine.x, mine.ids, 33, experts)
        out, _, _ = buffer.low_latency_combine(dequantized(rows, scales), mine.ids, mine.weights, ll)
        filled = torch.arange(rows.shape[1], device=device) < counts[:, None]
        now = [got, ids, weights, total, total_weights, rows.view(torch.uint8)[filled], scales[filled], out]
        now = [t.cpu() for t in now]
        seen = seen or now
        assert all(torch.equal(a, b) for a, b in zip(seen, now, strict=True))
    buffer.destroy()


def refusals(rank, group, device):
    """Returns the sentence of every call that must be refused; no rank may be left waiting by one."""
    buffer, world, device = ready(rank, group, device)
    mine = make_inputs(rank, world, 5, "uniform", 1, device)
    experts = EXPERTS_PER_RANK * world
    layout = layout_of(buffer, mine, world)
    got, *_, handle, event = buffer.dispatch(mine.x, **layout, topk_idx=mine.ids, topk_weights=mine.weights)
    rows, _, low, _, _ = buffer.low_latency_dispatch(mine.x, mine.ids, 8, experts, use_fp8=False)
    back = (rows, mine.ids, mine.weights, low)
    waits = torch.zeros(world, world, dtype=torch.int64)

    def ll(ids=mine.ids, **more):
        return buffer.low_latency_dispatch(mine.x, ids, 8, experts, **more)

    calls = {
        "group": lambda: Buffer(None),
        "bytes": lambda: Buffer(group, -1),
        "flag": lambda: Buffer(group, low_latency_mode=2),
        "no whole number": lambda: Buffer(group, 1e9),
        "true bytes": lambda: Buffer(group, True),
        "sms": lambda: Buffer.set_num_sms(7),
        "config": lambda: Config(0),
        "other config": lambda: buffer.dispatch(mine.x, handle=handle, config=24),
        "handle and ids": lambda: buffer.dispatch(mine.x, handle=handle, topk_idx=mine.ids),
        "wrong handle": lambda: buffer.combine(mine.x, low),
        "no layout": lambda: buffer.dispatch(mine.x, topk_idx=mine.ids, topk_weights=mine.weights),
        "only ids": lambda: buffer.dispatch(mine.x, **layout, topk_idx=mine.ids),
        "dtype": lambda: buffer.dispatch(mine.x.float(), **layout),
        "tokens of a handle": lambda: buffer.dispatch(mine.x[:3], handle=handle),
        "rows of a handle": lambda: buffer.combine(mine.x[:1], handle),
        "uneven experts": lambda: buffer.get_dispatch_layout(mine.ids, experts + 1),
        "allocation": lambda: buffer.dispatch(mine.x, handle=handle, allocate_on_comm_stream=True),
        "no event": lambda: event.current_stream_wait(),
        "worst": lambda: buffer.dispatch(
            mine.x, **layout, topk_idx=mine.ids, topk_weights=mine.weights, num_worst_tokens=world
        ),
        "internode": lambda: buffer.internode_dispatch(mine.x),
        "too many": lambda: buffer.low_latency_dispatch(mine.x, mine.ids, 4, experts),
        "ue8m0": lambda: ll(use_ue8m0=True),
        "hook and async": lambda: ll(async_finish=True, return_recv_hook=True),
        "costs": lambda: ll(dispatch_wait_recv_cost_stats=waits),
        "logfmt": lambda: buffer.low_latency_combine(*back, use_logfmt=True),
        "combine costs": lambda: buffer.low_latency_combine(*back, combine_wait_recv_cost_stats=waits),
        "strides of out": lambda: buffer.low_latency_combine(*back, out=mine.x.T.contiguous().T),
        "many experts": lambda: ll(ids=mine.ids.repeat(1, 5)),
        "biases": lambda: buffer.combine(got, handle, bias=[None] * 3),
        "other out": lambda: buffer.low_latency_combine(*back, out=mine.x[:2]),
        "mask": lambda: buffer.low_latency_update_mask_buffer(rank, True),
        "memory": lambda: buffer.get_local_buffer_tensor(torch.float32, torch.Size([1 << 20])),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    # Nothing was sent: the next exchange is as good as any.
    assert torch.equal(
        buffer.combine(buffer.dispatch(mine.x, handle=handle)[0], handle)[0],
        summed_over_ranks(mine, world).bfloat16(),
    )
    status = torch.ones(world, dtype=torch.int32, device=device)
    buffer.low_latency_update_mask_buffer(0, False)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * world
    *_, hook = buffer.low_latency_dispatch(mine.x, mine.ids, 16, experts, return_recv_hook=True)
    try:
        buffer.low_latency_dispatch(mine.x, mine.ids, 64, experts, return_recv_hook=True)
    except ValueError as error:
        calls["larger before a hook"], said["larger before a hook"] = None, str(error)
    hook()
    buffer.destroy()
    destroyed = {
        "destroyed, with a handle": lambda: buffer.dispatch(mine.x, handle=handle),
        "destroyed, normal": lambda: buffer.dispatch(
            mine.x, **layout, topk_idx=mine.ids, topk_weights=mine.weights
        ),
        "destroyed, low latency": lambda: ll(),
    }
    for name, call in destroyed.items():
        try:
            call()
        except RuntimeError as error:
            said[name] = str(error)
    return sorted([*calls, *destroyed]), said


def captured(rank, group, device):
    """Low-latency calls and dispatch with num_worst_tokens in CUDA graphs, replayed with other inputs."""
    buffer, world, device = ready(rank, group, device, low_latency_mode=True)
    tokens, experts = 16, EXPERTS_PER_RANK * world

    def inputs_of(seed):
        return make_inputs(rank, world, tokens, "holes", seed, device)

    now = inputs_of(0)

    def low_latency():
        (rows, scales), counts, handle, _, hook = buffer.low_latency_dispatch(
            now.x, now.ids, tokens, experts, return_recv_hook=True
        )
        hook()
        results = dequantized(rows, scales)
        out, _, hook = buffer.low_latency_combine(
            results, now.ids, now.weights, handle, return_recv_hook=True
        )
        hook()
        return out, counts

    def normal():
        layout = layout_of(buffer, now, world)
        rows, ids, weights, _, handle, _ = buffer.dispatch(
            now.x, **layout, topk_idx=now.ids, topk_weights=now.weights, num_worst_tokens=tokens * world
        )
        total, total_weights, _ = buffer.combine(rows, handle, topk_weights=weights)
        return total, total_weights, ids

    for act in (low_latency, normal):
        for _ in range(2):  # communicators are made, and every channel has been used
            act()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = act()
        for seed in range(1, 5):
            other = inputs_of(seed)
            for name in ("x", "ids", "weights"):
                getattr(now, name).copy_(getattr(other, name))
            graph.replay()
            replayed = [t.clone() for t in held]
            eager = act()
            assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))
    torch.cuda.synchronize()
    buffer.destroy()
