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
BF16_DIFF, FP8_DIFF = 1e-5, 9e-4  # of a low-latency combine: test_low_latency.py


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


def diff(x, y):
    """DeepEP's measure of how far two tensors are apart."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum()) if x.numel() else 0.0


def dequantized(rows, scales):
    if scales.dtype == torch.int32:
        scales = (scales.contiguous().view(torch.uint8).int() << 23).view(torch.float32)
    return (rows.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2).bfloat16()


LOW_LATENCY_FORMATS = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "fp8 rounded": {"use_fp8": True, "round_scale": True},
    "fp8 ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


def low_latency_mode(rank, group, device, tokens, routing, seed, form, hooks):
    """Dispatch and combine, several times; returns what must be the same in every repetition."""
    buffer, world, device = ready(rank, group, device, low_latency_mode=True)
    most, experts = max(tokens) + 2, EXPERTS_PER_RANK * world
    inputs = all_inputs(world, tokens, routing, seed, device)
    mine = inputs[rank]
    stats = torch.full((EXPERTS_PER_RANK,), 7, dtype=torch.int32, device=device)
    kept = []
    for repetition in range(3):
        received, counts, handle, event, hook = buffer.low_latency_dispatch(
            mine.x,
            mine.ids,
            most,
            experts,
            cumulative_local_expert_recv_stats=stats,
            **LOW_LATENCY_FORMATS[form],
            async_finish=not hooks,
            return_recv_hook=hooks,
        )
        hook() if hooks else event.current_stream_wait()
        fp8 = form != "bf16"
        rows, scales = received if fp8 else (received, None)
        assert rows.shape == (EXPERTS_PER_RANK, world * most, HIDDEN)
        assert rows.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
        assert rows.is_contiguous()
        if fp8:
            columns = HIDDEN // (512 if form == "fp8 ue8m0" else 128)
            assert scales.shape == (EXPERTS_PER_RANK, world * most, columns)
            assert scales.dtype == (torch.int32 if form == "fp8 ue8m0" else torch.float32)
            assert scales.stride()[1:] == (1, world * most)
        values = dequantized(rows, scales) if fp8 else rows
        src_info, layout_range, *rest = handle
        assert rest == [most, HIDDEN, experts]
        assert (src_info.dtype, layout_range.dtype) == (torch.int32, torch.int64)
        assert src_info.shape == (EXPERTS_PER_RANK, world * most)
        assert layout_range.shape == (EXPERTS_PER_RANK, world)
        for e in range(EXPERTS_PER_RANK):
            chosen = [(s.ids == rank * EXPERTS_PER_RANK + e).any(1) for s in inputs]
            want = torch.cat([s.x[c] for s, c in zip(inputs, chosen, strict=True)])
            count = int(counts[e])
            assert count == len(want)
            assert int(stats[e]) == 7 + (repetition + 1) * count
            for source, came in enumerate(chosen):
                at, number = int(layout_range[e, source]) >> 32, int(layout_range[e, source]) & 0xFFFFFFFF
                assert src_info[e, at : at + number].tolist() == came.nonzero().flatten().tolist()
            if not fp8:
                assert torch.equal(values[e, :count], want)
            else:
                assert diff(values[e, :count], want) < FP8_DIFF
                if form == "fp8 rounded":
                    mantissas = scales[e, :count].contiguous().view(torch.int32) & (2**23 - 1)
                    assert (mantissas == 0).all()
                if count:  # all of the format's range is used: half of it at least with powers of 2
                    largest = rows[e, :count].float().abs().unflatten(1, (-1, 128)).amax(2)
                    assert (largest >= (224 if "fp8 " in form else 448)).all()
            kept.append(rows[e, :count].view(torch.uint8).cpu())
        total = mine.x.float() * mine.weights.masked_fill(mine.ids < 0, 0).sum(1, keepdim=True)
        results = values.clone()
        for e in range(EXPERTS_PER_RANK):
            results[e, int(counts[e]) :] = torch.nan  # nobody reads these
        for zero_copy in (False, True):
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = results
            out = torch.full_like(mine.x, torch.nan)
            combined, event, hook = buffer.low_latency_combine(
                torch.zeros_like(results) if zero_copy else results,
                mine.ids,
                mine.weights,
                handle,
                zero_copy=zero_copy,
                async_finish=not hooks,
                return_recv_hook=hooks,
                out=out,
            )
            hook() if hooks else event.current_stream_wait()
            assert combined.data_ptr() == out.data_ptr()
            assert diff(total, combined) < (FP8_DIFF if fp8 else BF16_DIFF)
            kept.append(combined.view(torch.uint8).cpu())
    for number in range(len(kept) // 3):
        for repetition in (1, 2):
            assert torch.equal(kept[number], kept[number + repetition * (len(kept) // 3)])
    buffer.destroy()


def two_micro_batches(rank, group, device):
    """Hooks of two batches under way at once, as engines overlap them; normal mode in between."""
    buffer, world, device = ready(rank, group, device, low_latency_mode=True)
    experts, batches = EXPERTS_PER_RANK * world, []
    normal = make_inputs(rank, world, 9, "uniform", 3, device)
    for turn in range(3):
        first, second = (
            all_inputs(world, [8 + r for r in range(world)], "uniform", s, device) for s in (1, 2)
        )
        batches = []
        for inputs in (first, second):
            here = inputs[rank]
            rows, counts, handle, _, hook = buffer.low_latency_dispatch(
                here.x, here.ids, Whole(16), Whole(experts), use_fp8=0, return_recv_hook=1
            )
            batches.append((here, rows, counts, handle, hook))
        got, *_, routed, _ = buffer.dispatch(
            normal.x, **layout_of(buffer, normal, world), topk_idx=normal.ids, topk_weights=normal.weights
        )
        for *_, hook in batches:
            hook()
        results = []
        for here, rows, _, handle, _ in batches:
            out, _, hook = buffer.low_latency_combine(
                rows, here.ids, here.weights, handle, return_recv_hook=True
            )
            results.append((here, out, hook))
        assert torch.equal(buffer.combine(got, routed)[0], summed_over_ranks(normal, world).bfloat16())
        buffer.clean_low_latency_buffer(16, HIDDEN, experts)
        for here, out, hook in reversed(results) if turn == 1 else results:
            hook()
            assert diff(here.x.float() * here.weights.sum(1, keepdim=True), out) < BF16_DIFF
    buffer.destroy()


def hooks_of_all_kinds(rank, group, device):
    """A third open hook, hooks that nobody calls, one that is called twice; and parts of a handle."""
    buffer, world, device = ready(rank, group, device, low_latency_mode=True)
    mine = make_inputs(rank, world, 8, "uniform", 1, device)
    experts, said = EXPERTS_PER_RANK * world, []

    def dispatch(most=16, **more):
        return buffer.low_latency_dispatch(
            mine.x, mine.ids, most, experts, use_fp8=False, return_recv_hook=True, **more
        )

    def refused(call):
        try:
            call()
        except ValueError as error:
            said.append(str(error))

    opened = [dispatch(), dispatch()]
    refused(dispatch)
    for rows, _, handle, _, hook in opened:
        hook()
        out, _, _ = buffer.low_latency_combine(rows, mine.ids, mine.weights, handle)
        assert diff(mine.x.float() * mine.weights.sum(1, keepdim=True), out) < BF16_DIFF
    refused(opened[0][-1])
    dispatch(most=64)[-1]()  # a hook that was called twice is not open, so a larger exchange may come
    never = dispatch()  # held, but not called
    for _ in range(3):
        dispatch()[-1]()
    refused(never[-1])
    dispatch()  # not even held
    for _ in range(2):
        opened = [dispatch(), dispatch()]
        for *_, hook in opened:
            hook()
    handle = opened[0][2]
    src_info, layout_range = handle[0:2]
    assert torch.equal(src_info, handle[0])
    assert torch.equal(layout_range, handle[-4])
    assert handle[2:] == (16, HIDDEN, experts)
    buffer.destroy()
    return said


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
        "mask": lambda: buffer.low_latency_update_mask_buffer(0, True),
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
    try:
        buffer.dispatch(mine.x, handle=handle)
    except RuntimeError as error:
        calls["destroyed"], said["destroyed"] = None, str(error)
    return sorted(calls), said


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
