"""Exchanges with gradients inside torch.compile: one graph, the same results and gradients as without."""

import re

import pytest
import torch
from functorch.compile import make_boxed_func
from gradients import config, layers_job, leaves, make_inputs
from harness import ranks
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch.compiler import assume_constant_result

from ep_backend import functional

COMPILE_S = 200.0  # a rank may wait for one that still compiles
SIZES = ((4, 3), (5, 6))  # tokens per rank; the second time they become dynamic shapes


def model(c, x, ids, weights, mine):
    """The same exchange twice, and two that overlap on two channels; experts that are quickly compiled."""

    def opened(channel):
        return functional.dispatch(c, x, ids, weights, channel=channel)

    def returned(received, exchange):
        y = (received.rows @ mine.sum(0)).float() * received.topk_weights.sum(1, keepdim=True)
        return functional.combine(c, torch.tanh(y), exchange)

    # Equal calls, which a compiler that took them for functions would make once.
    x = returned(*opened(0)) + returned(*opened(0)) + x
    first, second = opened(0), opened(1)
    return returned(*first) * returned(*second)


def compiled_job(rank, group, backend, layout, payload, sizes):
    cfg = config(layout=layout, num_channels=2, payload=payload, timeout_s=COMPILE_S)
    found = []
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=layout == "compact"),
        functional.TrainingCommunicator(group, cfg) as c,
    ):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for tokens in sizes:
            inputs, matrices = make_inputs(cfg, tokens, sum(tokens))
            for function in (model, compiled):
                x, ids, weights, toward, mine = leaves(c, inputs, matrices)
                out = function(c, x, ids, weights, mine)
                (out * toward).sum().backward()
                found.append([t.detach() for t in (out, x.grad, weights.grad, mine.grad)])
        c.check()
    return found


@pytest.mark.parametrize(
    ("backend", "layout", "payload", "sizes", "tolerance"),
    [
        ("aot_eager", "compact", torch.float32, SIZES, 1e-6),
        ("aot_eager", "rank_major", torch.bfloat16, SIZES, 1e-6),
        ("inductor", "compact", torch.float32, SIZES[:1], 1e-4),
        ("inductor", "rank_major", torch.float32, SIZES[:1], 1e-4),
    ],
)
def test_compiled_equals_eager(backend, layout, payload, sizes, tolerance):
    results = ranks(2).run(compiled_job, backend, layout, payload, sizes, timeout=COMPILE_S)
    for found in results:
        for eager, compiled in zip(found[::2], found[1::2], strict=True):
            for want, got in zip(eager, compiled, strict=True):
                assert got.dtype == want.dtype
                assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def order_job(rank, group):
    """Names of the operators in the graphs of the forward and of the backward pass, in their order."""
    names = []

    def keep(graph, inputs):
        effects = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.with_effects]
        names.append([str(n.args[1]).removeprefix("ep_backend.training_") for n in effects])
        return make_boxed_func(graph.forward)

    cfg = config(num_experts=3, num_channels=2)
    inputs, matrices = make_inputs(cfg, (4,), 1)
    with functional.TrainingCommunicator(group, cfg) as c:
        x, ids, weights, toward, mine = leaves(c, inputs, matrices)
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        compiled(c, x, ids, weights, mine).backward(toward)
    return names


def test_order_of_a_compiled_graph():
    """Every exchange of the program is there, in its order, and in the opposite one on the way back."""
    forward, backward = ranks(1).run(order_job, timeout=COMPILE_S)[0]
    opened, returned = "dispatch.default", "combine.default"
    wanted = [opened, returned] * 2 + [opened] * 2 + [returned] * 2
    assert forward == wanted
    back = {
        returned: ["combine_backward.default"],
        opened: ["dispatch_backward.default", "weights_backward.default"],
    }
    assert backward == [name for each in reversed(wanted) for name in back[each]]


def inductor_job(rank, group):
    """Names of the operators in Inductor's code of a forward and of a backward pass, in their order: of
    layers that it orders otherwise, for less memory, unless it is told what is behind what."""
    case = {"tokens": (300,), "hidden_size": 256, "max_tokens_per_rank": 300, "layout": "compact"}
    case |= {"transport": "cpu"}
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        _, codes = run_and_get_code(layers_job, rank, group, case, compiled="inductor")
    return [re.findall(r"ep_backend\.training_(\w+)\.default\(", code) for code in codes]


def test_order_of_inductor():
    """If one rank's were another, each would wait for the other in another exchange."""
    forward, backward = ranks(1).run(inductor_job, timeout=COMPILE_S)[0]
    assert forward == ["dispatch", "combine"] * 2
    assert backward == ["combine_backward", "dispatch_backward", "weights_backward"] * 2


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


@pytest.mark.parametrize("layout", ["rank_major", "compact"])
def test_operators(layout):
    assert all(ranks(1).run(operators_job, layout))


def refused_job(rank, group):
    """As with a release of torch that does not keep the order of exchanges."""
    cfg = config(layout="rank_major", num_channels=2)
    inputs, matrices = make_inputs(cfg, (4,), 1)
    kept, functional._compiles = functional._compiles, assume_constant_result(lambda: False)
    said = []
    try:
        with functional.TrainingCommunicator(group, cfg) as c:
            x, ids, weights, _, mine = leaves(c, inputs, matrices)
            try:
                torch.compile(model, fullgraph=True, backend="eager")(c, x, ids, weights, mine)
            except Exception as error:
                said.append(str(error))
            y, exchange = x.detach(), functional.dispatch(c, x, ids, weights)[1]
            try:
                torch.compile(functional.combine, fullgraph=True, backend="eager")(c, y, exchange)
            except Exception as error:
                said.append(str(error))
            torch._dynamo.reset()
            broken = torch.compile(model, backend="eager")(c, x, ids, weights, mine)
            same = torch.equal(broken, model(c, x, ids, weights, mine))
    finally:
        functional._compiles = kept
    return said, same


def test_a_release_that_does_not_keep_the_order():
    ((said, same),) = ranks(1).run(refused_job, timeout=COMPILE_S)
    assert len(said) == 2, "dispatch, and combine alone"
    assert all("exchanges cannot be compiled with PyTorch" in text for text in said)
    assert same
