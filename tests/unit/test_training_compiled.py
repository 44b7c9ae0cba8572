"""Exchanges with gradients inside torch.compile: one graph, the same results and gradients as without."""

import pytest
import torch
from gradients import config, layer, leaves, make_inputs, run_experts
from harness import ranks

from ep_backend import functional

LAYOUTS = pytest.mark.parametrize("layout", ["rank_major", "compact"])
COMPILE_S = 200.0  # a rank may wait for one that still compiles


def model(c, x, ids, weights, mine):
    """The same exchange twice, and two that overlap on two channels."""
    # Equal calls: a compiler that took them for functions would make one of them, or drop the second.
    x = layer(c, x, ids, weights, mine) + layer(c, x, ids, weights, mine)
    opened = [functional.dispatch(c, x, ids, weights, channel=channel) for channel in (0, 1)]
    total = x
    for received, exchange in opened:
        y = run_experts(mine, received.rows, received.topk_ids, received.topk_weights)
        total = total + functional.combine(c, y, exchange)
    return total


def compiled_job(rank, group, layout, backend, payload):
    cfg = config(layout=layout, num_experts=3, num_channels=2, payload=payload, timeout_s=COMPILE_S)
    found = []
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=layout == "compact"),
        functional.TrainingCommunicator(group, cfg) as c,
    ):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        # Other numbers of tokens, which differ among ranks, make dynamic shapes of them.
        for tokens in ((4, 3), (5, 6)):
            inputs, matrices = make_inputs(cfg, tokens, sum(tokens))
            for function in (model, compiled):
                x, ids, weights, toward, mine = leaves(c, inputs, matrices)
                out = function(c, x, ids, weights, mine)
                (out * toward).sum().backward()
                found.append([t.detach() for t in (out, x.grad, weights.grad, mine.grad)])
        c.check()
    return found


@pytest.mark.parametrize(
    ("backend", "payload", "tolerance"),
    [
        ("aot_eager", torch.float32, 1e-6),
        ("inductor", torch.float32, 1e-4),
        ("inductor", torch.bfloat16, 0.05),
    ],
)
@LAYOUTS
def test_compiled_equals_eager(layout, backend, payload, tolerance):
    for found in ranks(2).run(compiled_job, layout, backend, payload, timeout=COMPILE_S):
        for eager, compiled in (found[:2], found[2:]):
            for want, got in zip(eager, compiled, strict=True):
                assert got.dtype == want.dtype
                assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def operators_job(rank, group, layout):
    """torch's own checks of an operator: its schema is true, its shape function tells the shapes."""
    checks = ("test_schema", "test_faketensor")
    cfg = config(layout=layout)
    inputs, _ = make_inputs(cfg, (4,), 1)
    x, ids, weights, _ = inputs[0]
    with functional.TrainingCommunicator(group, cfg) as c:
        compact = layout == "compact"
        shapes = (None if compact else 6, 1, cfg.num_experts if compact else 0)
        opened = torch.ops.ep_backend.training_dispatch
        torch.library.opcheck(opened.default, (x, ids, weights, c.name, 6, 0, *shapes), test_utils=checks)
        rows, received_ids, received_weights, *_, number = opened(x, ids, weights, c.name, 6, 0, *shapes)
        common = (ids, number, c.name, 6, 0)
        # A combine ends its exchange, so it has no second call to compare with.
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.ops.ep_backend.training_combine(rows, *common, torch.float32)
        out = torch.ops.ep_backend.training_combine(rows, *common, torch.float32)
        assert (fake.shape, fake.dtype) == (out.shape, out.dtype)
        for name, arguments in (
            ("training_combine_backward", (out, *common, len(rows), torch.float32)),
            ("training_dispatch_backward", (rows, *common)),
            ("training_weights_backward", (received_weights, ids, received_ids, c.name, 6)),
        ):
            operator = getattr(torch.ops.ep_backend, name).default
            torch.library.opcheck(operator, arguments, test_utils=checks)
    return True


@LAYOUTS
def test_operators(layout):
    assert all(ranks(1).run(operators_job, layout))
