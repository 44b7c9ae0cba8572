"""Calls that are longer than the windows: the same bits as one exchange, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exchange import make_call, step
from harness import ranks

import ep_backend as ep
from ep_backend.chunked import run_experts
from ep_backend.transports.gpu import window_bytes

WORLD, TOKENS, SLOTS = 3, (23, 0, 9), 24
WHOLE = ep.EpConfig(
    num_experts=7, top_k=3, hidden_size=128, max_tokens_per_rank=SLOTS, payload=torch.bfloat16
)


def weighted(received, factors):
    """Experts that multiply by a number of their own, in the layouts whose rows the caller weights."""
    factor = torch.cat([factors, factors.new_zeros(1)])[received.topk_ids]  # pad_id -1 is the last one
    scale = (factor * received.topk_weights).sum(1, keepdim=True)
    return torch.where(scale != 0, received.rows.float() * scale, 0)


def by_expert(received, factors):
    """The same where combine weights them."""
    return received.rows.float() * factors[:, None, None]


def results(rank, group, config, sizes, channels):
    """The result of one exchange; for each size of the windows the result in pieces and what was counted."""
    call = make_call(config, WORLD, rank, step(TOKENS, seed=5))
    inputs = (call.x, call.topk_ids, call.topk_weights)
    experts = by_expert if config.layout == "expert_major" else weighted
    with ep.Communicator(group, config) as c:
        factors = torch.tensor([1.0 + e for e in c.local_experts])
        received, handle = c.dispatch(*inputs, scales=call.scales)
        whole, all_bytes = c.combine(experts(received, factors), handle), c.window_bytes
    pieces = []
    for size in sizes:
        calls = []

        def counted(received, calls=calls):
            calls.append(received.tokens_per_source.tolist())
            return experts(received, factors)

        small = replace(config, max_tokens_per_rank=size, num_channels=channels)
        with ep.Communicator(group, small) as c:
            out = run_experts(c, counted, *inputs, scales=call.scales, tokens_per_rank=SLOTS)
            pieces.append((out, calls, c.window_bytes))
    return whole, all_bytes, pieces


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("layout", ["rank_major", "compact", "expert_major"])
def test_pieces_give_the_bits_of_the_whole(layout, channels):
    sizes = (7, 8, SLOTS)
    for rank, (whole, all_bytes, pieces) in enumerate(
        ranks(WORLD).run(results, replace(WHOLE, layout=layout), sizes, channels)
    ):
        assert whole.shape == (TOKENS[rank], 128)
        for size, (out, calls, small_bytes) in zip(sizes, pieces, strict=True):
            assert torch.equal(out.view(torch.int16), whole.view(torch.int16))
            starts = range(0, SLOTS, size)
            assert calls == [[min(size, max(0, count - start)) for count in TOKENS] for start in starts]
            assert size == SLOTS or small_bytes < channels * all_bytes / 2


def test_rows_with_scales_go_in_pieces():
    config = replace(WHOLE, payload=torch.float8_e4m3fn, layout="compact")
    for whole, _, ((out, calls, _),) in ranks(WORLD).run(results_fp8, config):
        assert len(calls) == 3
        assert torch.equal(out.view(torch.int16), whole.view(torch.int16))


def results_fp8(rank, group, config):
    return results(rank, group, config, (8,), 2)


def refusals(rank, group):
    config = replace(WHOLE, max_tokens_per_rank=4)
    call = make_call(replace(WHOLE), 1, 0, step((5,), seed=1))
    found = []
    with ep.Communicator(group, config) as c:
        for tokens_per_rank in (4, 0, 5.0, None):
            try:
                run_experts(
                    c, None, call.x, call.topk_ids, call.topk_weights, tokens_per_rank=tokens_per_rank
                )
            except ep.EpArgumentError as error:
                found.append(str(error))
    return found


def test_a_t_that_does_not_hold_the_tokens_is_refused():
    (found,) = ranks(1).run(refusals)
    assert [sentence.split(";")[0] for sentence in found] == [
        f"tokens_per_rank is {wrong}" for wrong in ("4", "0", "5.0", "None")
    ]
    assert all("at least 5 was wanted, as there are 5 tokens" in sentence for sentence in found)


def test_the_documented_sizes_of_windows():
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    table = page.split("## Window memory\n")[1].split("\n## ")[0]
    lines = [re.findall(r"\d+", line) for line in table.splitlines() if re.match(r"\| (ranks|\d)", line)]
    (tokens, *rows), mib = lines, 2**20
    assert len(rows) == 3
    for world, *shown in rows:
        wanted = []
        for slots in map(int, tokens):
            config = ep.EpConfig(num_experts=256, top_k=8, hidden_size=7168, max_tokens_per_rank=slots)
            for quantization in (None, "fp8_block128"):
                size = window_bytes(replace(config, quantization=quantization), int(world))
                wanted.append(f"{size / mib:.0f}")
        assert shown == wanted, world
