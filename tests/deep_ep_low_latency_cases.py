"""The jobs of deep_ep_cases.py for low-latency mode: deepseek-ai/DeepEP's tests/test_low_latency.py."""

import pytest
import torch
import torch.distributed as dist
from deep_ep_cases import (
    EXPERTS_PER_RANK,
    HIDDEN,
    Whole,
    all_inputs,
    dequantized,
    layout_of,
    make_inputs,
    ready,
    summed_over_ranks,
)

from ep_backend import EpArgumentError, EpTimeoutError

BF16_DIFF, FP8_DIFF = 1e-5, 9e-4  # of a combine
FORMATS = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "fp8 rounded": {"use_fp8": True, "round_scale": True},
    "fp8 ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


def diff(x, y):
    """DeepEP's measure of how far two tensors are apart."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum()) if x.numel() else 0.0


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
            **FORMATS[form],
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


def masked_ranks(rank, group, device, answers):
    """The last rank is masked by the others, stays away, and comes back. ``answers``: whether it is masked
    before a call waits for it, or has been waited for in vain."""
    buffer, world, device = ready(rank, group, device, low_latency_mode=True)
    experts, gone = EXPERTS_PER_RANK * world, world - 1
    inputs = all_inputs(world, [5 + r for r in range(world)], "uniform", 4, device)
    mine, status = inputs[rank], torch.empty(world, dtype=torch.int32, device=device)

    def call(present):
        rows, counts, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.ids, 16, experts, use_fp8=False)
        for e in range(EXPERTS_PER_RANK):
            chosen = [(s.ids == rank * EXPERTS_PER_RANK + e).any(1) for s in inputs]
            want = torch.cat([inputs[r].x[chosen[r]] for r in present])
            assert int(counts[e]) == len(want)
            assert torch.equal(rows[e, : len(want)], want)
        out, _, _ = buffer.low_latency_combine(rows, mine.ids, mine.weights, handle)
        here = torch.isin(mine.ids // EXPERTS_PER_RANK, torch.tensor(present, device=device))
        assert diff(mine.x.float() * (mine.weights * here).sum(1, keepdim=True), out) < BF16_DIFF

    call(range(world))
    if rank != gone:
        if not answers:
            if device.type == "cuda":  # a failure is raised by the call after it
                buffer.low_latency_dispatch(mine.x, mine.ids, 16, experts, use_fp8=False)
                torch.cuda.synchronize()
            with pytest.raises(EpTimeoutError):
                buffer.low_latency_dispatch(mine.x, mine.ids, 16, experts, use_fp8=False)
        buffer.low_latency_update_mask_buffer(gone, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * gone + [1]
        for _ in range(3):
            call(range(gone))
        with pytest.raises(EpArgumentError, match="while ranks are masked 16 was wanted"):
            buffer.low_latency_dispatch(mine.x, mine.ids, 15, experts, use_fp8=False)
        with pytest.raises(EpArgumentError, match="another shape"):
            buffer.low_latency_dispatch(mine.x, mine.ids, 16, experts, use_fp8=True)
    dist.barrier(group)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * world
    for _ in range(3):
        call(range(world))
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


def _layers(buffer, batches, most, overlapped):
    """Layers of two batches of at most ``most`` tokens per rank, one after the other, or as vLLM's two-batch
    overlap orders them: what one batch has sent the other waits for, just before it sends itself."""
    experts = EXPERTS_PER_RANK * buffer.group_size
    factors = torch.arange(1.0, EXPERTS_PER_RANK + 1, device=batches[0].x.device)[:, None, None]
    results, opened = [batch.x for batch in batches], []

    def wait():
        while opened:
            opened.pop()()

    def send(call, *given, **more):
        wait()
        *made, _, hook = call(*given, return_recv_hook=True, **more)
        opened.append(hook)
        if not overlapped:
            wait()
        return made

    def dispatch(number):
        x = results[number] / 2
        return send(buffer.low_latency_dispatch, x, batches[number].ids, most, experts, use_fp8=False)

    def combine(number, rows, _, handle):
        y = (rows * factors).bfloat16()
        given = (batches[number].ids, batches[number].weights, handle)
        results[number] = send(buffer.low_latency_combine, y, *given)[0]

    for _ in range(3):
        if overlapped:
            came = [dispatch(0), dispatch(1)]
            combine(0, *came[0])
            combine(1, *came[1])
        else:
            for number in range(2):
                combine(number, *dispatch(number))
    wait()
    return results


def layers_of_two_batches(rank, group, device, most):
    """Two batches' layers overlapped, and on GPUs in a graph with other inputs: the bits of one batch after
    the other."""
    buffer, world, device = ready(rank, group, device, low_latency_mode=True)

    def inputs(seed):
        return [
            make_inputs(rank, world, tokens, "uniform", 2 * seed + number, device)
            for number, tokens in enumerate((2 + rank % 2, 2))
        ]

    def is_right(got, want):
        return all(map(torch.equal, got, want))

    batches = inputs(0)
    want = _layers(buffer, batches, most, overlapped=False)
    same = [is_right(_layers(buffer, batches, most, overlapped=True), want) for _ in range(3)]
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            outs = _layers(buffer, batches, most, overlapped=True)
        for seed in range(1, 6):
            fresh = inputs(seed)
            want = _layers(buffer, fresh, most, overlapped=False)
            for batch, other in zip(batches, fresh, strict=True):
                for name, tensor in vars(batch).items():
                    tensor.copy_(getattr(other, name))
            graph.replay()
            same.append(is_right(outs, want))
    assert all(same), same
    buffer.destroy()


def hooks_of_all_kinds(rank, group, device):
    """A combine before its dispatch's hook, a third open hook, hooks that nobody calls, one that is called
    twice; and parts of a handle."""
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
    refused(lambda: buffer.low_latency_combine(opened[0][0], mine.ids, mine.weights, opened[0][2]))
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
