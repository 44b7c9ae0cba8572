"""Experts that compute something: an exchange gives what one process with all experts gives."""

import pytest
import torch
from exchange import check_steps, make_call, one_by_one, run_steps, step
from harness import ranks

import ep_backend as ep

LAYOUTS = ("rank_major", "compact", "expert_major")


def expert_weights(config):
    g = torch.Generator().manual_seed(11)
    return torch.randn(config.num_experts, config.hidden_size, config.hidden_size, generator=g) / 16


def dequantised(received):
    if received.scales is None:
        return received.rows.float()
    blocks = received.rows.float().unflatten(-1, (-1, 128))
    return (blocks * received.scales[..., None]).flatten(-2)


def run_experts(c, received):
    """y as an engine makes it, in float32."""
    weights = expert_weights(c.config)[list(c.local_experts)]
    rows = dequantised(received)
    y = torch.zeros(*received.rows.shape[:-1], c.config.hidden_size)
    if received.topk_ids is None:
        for e, count in enumerate(received.rows_per_expert.tolist()):
            y[e, :count] = rows[e, :count] @ weights[e]
        return y
    for row, k in (received.topk_ids != c.config.pad_id).nonzero().tolist():
        y[row] += received.topk_weights[row, k] * (rows[row] @ weights[received.topk_ids[row, k]])
    return y


def model_job(rank, group, config, tokens):
    with ep.Communicator(group, config) as c:
        call = make_call(config, c.world_size, rank, step(tokens, seed=5, routing="skew"))
        g = torch.Generator().manual_seed(rank)
        x = torch.randn(tokens[rank], config.hidden_size, generator=g).to(config.payload)
        received, handle = c.dispatch(x, call.topk_ids, call.topk_weights)
        out = c.combine(run_experts(c, received).to(config.result_dtype), handle)
        dense = torch.einsum("th,tkho->tko", x.float(), expert_weights(config)[call.topk_ids])
        return out, (dense * call.topk_weights[..., None]).sum(1)


@pytest.mark.parametrize("transport", ["cpu", "collective"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("payload", "quantization", "error"),
    [
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 0.02),  # results rounded per rank and per expert: 2^-9 each
        (torch.float32, "fp8_block128", 0.1),  # rows have 3 bits of mantissa
    ],
)
def test_layer(payload, quantization, error, layout, transport):
    config = ep.EpConfig(
        num_experts=7,
        top_k=3,
        hidden_size=128,
        max_tokens_per_rank=10,
        payload=payload,
        quantization=quantization,
        layout=layout,
        transport=transport,
        timeout_s=20.0,
    )
    for out, dense in ranks(3).run(model_job, config, (10, 0, 7)):
        assert out.dtype == payload
        if len(dense):
            distance = (out.float() - dense).norm() / dense.norm()
            assert distance < error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide(layout):
    """As wide as configurations go: 1024 experts, top-16, and rows of kilobytes."""
    by_expert = layout == "expert_major"
    config = ep.EpConfig(
        num_experts=1024,
        top_k=16,
        hidden_size=256 if by_expert else 4096,
        max_tokens_per_rank=8 if by_expert else 64,
        payload=torch.bfloat16,
        wire_dtype=torch.float32,
        layout=layout,
        expert_map=tuple((e * 7 + e // 100) % 2 for e in range(1024)),
        timeout_s=30.0,
    )
    most = config.max_tokens_per_rank
    steps = [step([most, most - 3], seed=1), step([1, most], seed=2, routing="sparse")]
    check_steps(config, steps, ranks(2).run(run_steps, config, steps, one_by_one(steps)))


def repeat_job(rank, group, config, steps):
    return [run_steps(rank, group, config, steps, one_by_one(steps)) for _ in range(3)]


def test_the_same_again():
    """Three runs and two transports: the same bits, without the reference in between."""
    config = ep.EpConfig(
        num_experts=12,
        top_k=5,
        hidden_size=64,
        max_tokens_per_rank=9,
        payload=torch.bfloat16,
        layout="compact",
    )
    steps = [step([9, 3, 0, 8], seed=n, routing="uniform") for n in range(3)]
    for runs in ranks(4).run(repeat_job, config, steps):
        outputs = [combined for run in runs for _, combined in run.values()]
        assert len(outputs) == 6
        for other in outputs[1:]:
            assert all(torch.equal(outputs[0][n], other[n]) for n in range(3))
