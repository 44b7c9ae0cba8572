"""Exchanges are linear maps, and their backward passes the transposed maps: <A x, g> = <x, A' g>, exactly.

All numbers are small whole ones, so that every sum is exact in the formats tried, whatever its order.
"""

import pytest
import torch
from gradients import config
from harness import ranks
from hypothesis import given
from hypothesis import strategies as st

from ep_backend import functional

MOST = 5


@st.composite
def cases(draw):
    world = draw(st.sampled_from([1, 2, 3]))
    experts = draw(st.integers(world, 7))
    slots = draw(st.integers(1, MOST))
    return {
        "tokens": draw(st.tuples(*[st.integers(0, slots)] * world)),
        "slots": slots,
        "seed": draw(st.integers(0, 2**31)),
        "transport": draw(st.sampled_from(["cpu", "collective"])),
        "gradient_dtype": draw(st.sampled_from([None, torch.float32])),
        "config": {
            "num_experts": experts,
            "top_k": draw(st.integers(1, min(4, experts))),
            "hidden_size": 8,
            "max_tokens_per_rank": MOST,
            "layout": draw(st.sampled_from(["rank_major", "compact"])),
            "payload": draw(st.sampled_from([torch.float32, torch.bfloat16])),
            "wire_dtype": draw(st.sampled_from([None, torch.float32])),
            "pad_id": draw(st.sampled_from([-1, 1000])),
            "expert_map": draw(
                st.none() | st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts)
            ),
        },
    }


def whole(g, *shape):
    return torch.randint(-3, 4, shape, generator=g).float()


def transposed_job(rank, group, case):
    """For dispatch of rows, dispatch of weights and combine: both inner products of this rank."""
    cfg = config(transport=case["transport"], **case["config"])
    g = torch.Generator().manual_seed(case["seed"] + rank)
    count = case["tokens"][rank]
    ids = torch.rand(count, cfg.num_experts, generator=g).topk(cfg.top_k, dim=1).indices
    ids[torch.rand(ids.shape, generator=g) < 0.3] = -1
    x = whole(g, count, cfg.hidden_size).to(cfg.payload).requires_grad_()
    weights = whole(g, count, cfg.top_k).requires_grad_()
    with functional.TrainingCommunicator(group, cfg, gradient_dtype=case["gradient_dtype"]) as c:
        received, exchange = functional.dispatch(c, x, ids, weights, tokens_per_rank=case["slots"])
        live = (received.topk_ids != cfg.pad_id).any(1, keepdim=True)
        y = torch.where(live, whole(g, *received.rows.shape), torch.nan).to(cfg.payload).requires_grad_()
        out = functional.combine(c, y, exchange)
        outputs = received.rows, received.topk_weights, out
        toward = [whole(g, *t.shape).to(t.dtype) for t in outputs]
        gradients = torch.autograd.grad(outputs, (x, weights, y), toward)
        c.check()
    forward = [float((t.float() * to.float()).sum()) for t, to in zip(outputs, toward, strict=True)]
    inputs = (x, weights, torch.where(live, y, 0))
    backward = [float((t.float() * to.float()).sum()) for t, to in zip(inputs, gradients, strict=True)]
    return forward, backward


@pytest.mark.timeout(600)
@given(cases())
def test_backward_is_the_transposed_map(case):
    results = ranks(len(case["tokens"])).run(transposed_job, case)
    forward = [sum(column) for column in zip(*(pair[0] for pair in results), strict=True)]
    backward = [sum(column) for column in zip(*(pair[1] for pair in results), strict=True)]
    assert forward == backward
