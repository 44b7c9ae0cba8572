"""What DeepEP's documentation and tests say of V2's ``ElasticBuffer``, as jobs for rank processes on GPUs or
CPUs: deepseek-ai/DeepEP, deep_ep/buffers/elastic.py and tests/elastic/test_ep.py."""

from __future__ import annotations

import deep_ep_cases as v1
import gpus
import torch
from deep_ep_cases import EXPERTS_PER_RANK, HIDDEN, TOP_K

from ep_backend import EpArgumentError
from ep_backend.compat.deep_ep import ElasticBuffer, EPHandle, EventHandle

MOST = 40


def ready(rank, group, device):
    """A buffer, the number of ranks, and where tensors go."""
    if device == "cuda":
        device = gpus.take(rank)
    buffer = ElasticBuffer(
        group,
        num_max_tokens_per_rank=MOST,
        hidden=HIDDEN,
        num_topk=TOP_K,
        deterministic=1,  # as DeepEP's own test has it
        explicitly_destroy=True,
    )
    return buffer, group.size(), torch.device(device)


def bits(rows):
    """Of rows, or of rows and scales, as one tensor of bytes."""
    parts = rows if isinstance(rows, tuple) else (rows,)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def wanted_rows(inputs, rank, fp8):
    if not fp8:
        return bits(v1.arrivals(inputs, rank)[0])
    parts = []
    for part in (0, 1):
        sent = [v1.Inputs(each.fp8()[part], each.ids, each.weights) for each in inputs]
        parts.append(v1.arrivals(sent, rank)[0])
    return bits(tuple(parts))


def aligned(count, alignment):
    return -(-count // alignment) * alignment


def dispatch_and_combine(rank, group, device, tokens, routing, fp8, alignment, events):
    """All layouts. ``events``: calls are asynchronous, after an event."""
    buffer, world, device = ready(rank, group, device)
    inputs = v1.all_inputs(world, tokens, routing, 7, device)
    mine = inputs[rank]
    came, ids, weights, src, per_source = v1.arrivals(inputs, rank)
    rows, counts = wanted_rows(inputs, rank, fp8), [int((ids == e).sum()) for e in range(EXPERTS_PER_RANK)]
    padded = [aligned(count, alignment) for count in counts]
    x = mine.fp8() if fp8 else mine.x
    given = {
        "topk_idx": mine.ids,
        "topk_weights": mine.weights,
        "num_experts": EXPERTS_PER_RANK * world,
        "expert_alignment": alignment,
    }

    def run(call, **arguments):
        if events:
            arguments |= {"previous_event": ElasticBuffer.capture(), "allocate_on_comm_stream": True}
            assert isinstance(arguments["previous_event"], EventHandle)
        *result, event = call(**arguments, async_with_compute_stream=events)
        if events:
            event.current_stream_wait()
        return result

    def dispatch(**arguments):
        return run(buffer.dispatch, x=x, **arguments)

    # As the rows came.
    stats = torch.ones(EXPERTS_PER_RANK, dtype=torch.int32, device=device)
    got, got_ids, got_weights, handle = dispatch(**given, cumulative_local_expert_recv_stats=stats)
    assert isinstance(handle, EPHandle)
    assert torch.equal(bits(got), rows)
    assert torch.equal(got_ids, ids)
    assert torch.equal(got_weights, weights)
    assert stats.tolist() == [1 + count for count in counts]
    assert (handle.num_recv_tokens, handle.num_recv_tokens_per_expert_list) == (len(ids), padded)
    assert handle.psum_num_recv_tokens_per_expert.tolist() == torch.tensor(padded).cumsum(0).tolist()
    ends = torch.tensor(per_source).cumsum(0).tolist()
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == ends
    first = [MOST * source for source, count in enumerate(per_source) for _ in range(count)]
    sources = torch.tensor(first, dtype=torch.int32, device=device) + src.int()
    assert torch.equal(handle.recv_src_metadata[:, 0], sources)
    again, again_ids, no_weights, same = dispatch(handle=handle)
    assert same is handle
    assert no_weights is None
    assert torch.equal(bits(again), rows)
    assert torch.equal(again_ids, ids)

    # As many rows as can come.
    worst, worst_ids, worst_weights, unsynced = dispatch(**given, do_cpu_sync=0)
    assert len(worst_ids) == len(worst_weights) == world * MOST
    assert unsynced.num_recv_tokens_per_expert_list == []
    assert unsynced.psum_num_recv_tokens_per_scaleup_rank.tolist() == ends
    assert torch.equal(bits(worst)[: len(rows)], rows)
    assert torch.equal(worst_ids[: len(rows)], ids)
    assert (worst_ids[len(rows) :] == -1).all()

    # A row for each expert of a token.
    expanded, no_ids, flat, grouped = dispatch(**given, do_expand=True, use_tma_aligned_col_major_sf=True)
    assert no_ids is None
    assert grouped.num_expanded_tokens == len(flat) == sum(padded)
    if fp8 and len(flat):
        assert expanded[1].stride(0) == 1
        assert 4 * expanded[1].stride(1) % 16 == 0
    slots = grouped.recv_src_metadata[:, 2:]
    assert torch.equal(slots >= 0, ids >= 0)
    begin = 0
    for expert, count in enumerate(counts):
        row, place = (ids == expert).nonzero(as_tuple=True)
        assert slots[row, place].tolist() == list(range(begin, begin + count))
        assert torch.equal(bits(expanded)[begin : begin + count], rows[row])
        assert torch.equal(flat[begin : begin + count], weights[row, place])
        assert not bits(expanded)[begin + count : begin + padded[expert]].any()
        assert not flat[begin + count : begin + padded[expert]].any()
        assert int(grouped.psum_num_recv_tokens_per_expert[expert]) == begin + count
        begin += padded[expert]
    assert grouped.num_unaligned_recv_tokens_per_expert.tolist() == counts
    cached = dispatch(handle=grouped, topk_weights=2 * mine.weights, do_expand=True, do_zero_padding=True)
    assert torch.equal(bits(cached[0]), bits(expanded))
    assert torch.equal(cached[2], 2 * flat)

    # And back, twice for each handle.
    masked = mine.weights.masked_fill(mine.ids < 0, 0.0)
    total = v1.summed_over_ranks(mine, world).bfloat16()
    biases = torch.ones_like(mine.x), 2 * torch.ones_like(mine.x)
    with_biases = (total.float() + 3).bfloat16()
    beyond = torch.full((world * MOST - len(came), HIDDEN), float("nan"), device=device).bfloat16()
    for one, x_back, w_back in (
        (handle, came, weights),
        (unsynced, torch.cat([came, beyond]), worst_weights),
    ):
        summed, summed_weights = run(buffer.combine, x=x_back, handle=one, topk_weights=w_back)
        assert torch.equal(summed, total)
        assert torch.equal(summed_weights, masked)
        assert torch.equal(run(buffer.combine, x=x_back, handle=one, bias=biases)[0], with_biases)
    y = torch.full((sum(padded), HIDDEN), float("nan"), device=device).bfloat16()
    there = slots >= 0
    y[slots[there].long()] = came[there.nonzero()[:, 0]]
    owners = torch.where(mine.ids >= 0, mine.ids // EXPERTS_PER_RANK, -1)
    times = [(owners == each).sum(1, keepdim=True) for each in range(world)]
    total = sum((mine.x.float() * count).bfloat16().float() for count in times).bfloat16()
    for _ in range(2):
        summed, summed_weights = run(buffer.combine, x=y, handle=grouped, topk_weights=flat)
        assert torch.equal(summed, total)
        assert torch.equal(summed_weights, masked)
    buffer.destroy()


def small_things(rank, group, device):
    """Sizes, defaults, weights that are left out, and the caller's ids, which may change later."""
    buffer, world, device = ready(rank, group, device)
    assert (buffer.rank_idx, buffer.num_ranks) == (rank, world)
    assert buffer.get_logical_domain_size() == buffer.get_physical_domain_size() == (1, world)
    hints = [ElasticBuffer.get_buffer_size_hint(group, tokens, HIDDEN, TOP_K) for tokens in (64, 4096)]
    assert hints[0] % (2 << 20) == 0
    assert hints[0] < hints[1]
    sms = buffer.get_theoretical_num_sms(EXPERTS_PER_RANK * world, TOP_K)
    assert buffer.get_theoretical_num_qps(sms) <= buffer.num_allocated_qps
    mine = v1.make_inputs(rank, world, 6, "uniform", 3, device)
    for copied in (True, False):
        ids = mine.ids.clone()
        arguments = {"num_experts": EXPERTS_PER_RANK * world, "num_max_tokens_per_rank": 6, "num_sms": sms}
        rows, _, none, handle, event = buffer.dispatch(mine.x, ids, do_handle_copy=copied, **arguments)
        assert none is None
        assert event.event is None
        assert (handle.topk_idx.data_ptr() != ids.data_ptr()) == copied
        assert (handle.num_max_tokens_per_rank, handle.num_sms) == (6, sms)
        if copied:
            ids.zero_()
        total = v1.summed_over_ranks(mine, world).bfloat16()
        assert torch.equal(buffer.combine(rows, handle)[0], total)
    buffer.barrier(with_cpu_sync=True)
    buffer.destroy()


def refusals(rank, group, device):
    """What each wrong call says; the names of the calls."""
    buffer, world, device = ready(rank, group, device)
    mine = v1.make_inputs(rank, world, 4, "uniform", 3, device)
    experts = EXPERTS_PER_RANK * world
    _, _, _, handle, _ = buffer.dispatch(mine.x, mine.ids, num_experts=experts)
    calls = {
        "cpu memory": lambda: ElasticBuffer(group, num_cpu_bytes=1 << 21),
        "experts": lambda: buffer.dispatch(mine.x, mine.ids),
        "uneven experts": lambda: buffer.dispatch(mine.x, mine.ids, num_experts=experts + 1),
        "too many": lambda: buffer.dispatch(mine.x, mine.ids, num_experts=experts, num_max_tokens_per_rank=3),
        "unsynced": lambda: buffer.dispatch(
            mine.x, mine.ids, num_experts=experts, do_expand=1, do_cpu_sync=0
        ),
        "flag": lambda: buffer.dispatch(mine.x, mine.ids, num_experts=experts, do_cpu_sync=2),
        "ids again": lambda: buffer.dispatch(mine.x, mine.ids, handle=handle),
        "another layout": lambda: buffer.dispatch(mine.x, handle=handle, do_expand=True),
        "epilogue": lambda: buffer.combine(
            mine.x, handle, previous_event_before_epilogue=ElasticBuffer.capture()
        ),
        "rows": lambda: buffer.combine(mine.x[:1], handle),
        "engram": lambda: buffer.engram_fetch(mine.ids),
        "gather": lambda: buffer.all_gather(mine.x),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except EpArgumentError as error:
            said[name] = str(error)
    buffer.destroy()
    return sorted(calls), said
