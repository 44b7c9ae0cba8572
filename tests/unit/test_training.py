"""Gradients through exchanges: against one process without any, and what keeps exchanges apart."""

import pytest
import torch
from gradients import check_layers, config, dense, layer, layers_job, leaves, make_inputs
from harness import ranks
from torch.utils.checkpoint import checkpoint

import ep_backend as ep
from ep_backend import functional

LAYOUTS = pytest.mark.parametrize("layout", ["rank_major", "compact"])
TRANSPORTS = pytest.mark.parametrize("transport", ["cpu", "collective"])
CASES = {
    "even": (4, 4, 4, 4),
    "ragged": (6, 1, 3, 5),
    "a rank without tokens": (3, 0, 6, 2),
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("tokens", CASES.values(), ids=CASES)
@TRANSPORTS
@LAYOUTS
def test_layers_equal_one_process(layout, transport, tokens, world):
    case = {"tokens": tokens[:world], "layout": layout, "transport": transport, "seed": world}
    check_layers(case, ranks(world).run(layers_job, case))


@pytest.mark.parametrize("gradient_dtype", [None, torch.float32])
@TRANSPORTS
@LAYOUTS
def test_layers_in_bfloat16(layout, transport, gradient_dtype):
    case = {"tokens": (6, 3), "layout": layout, "transport": transport, "payload": torch.bfloat16}

    check_layers(case, ranks(2).run(bfloat16_job, case, gradient_dtype), tolerance=0.03)


def bfloat16_job(rank, group, case, gradient_dtype):
    return layers_job(rank, group, case, gradient_dtype=gradient_dtype)


@pytest.mark.parametrize("more", [{"expert_ids": "global"}, {"pad_id": 77}, {"expert_map": (1, 0, 0, 1, 0)}])
@LAYOUTS
def test_gradients_of_weights_whatever_ids_mean(layout, more):
    """Each weight is used where its expert is, and only there; what stands beside padding does not count."""
    results = ranks(2).run(weights_job, {"layout": layout, **more})
    for used, gradient in results:
        assert torch.equal(gradient, used)


def weights_job(rank, group, more):
    cfg = config(**more)
    inputs, _ = make_inputs(cfg, (4, 5), 1)
    with functional.TrainingCommunicator(group, cfg) as c:
        x, ids, weights = inputs[rank][:3]
        weights.requires_grad_()
        received, _ = functional.dispatch(c, x, ids, weights)
        numbers = received.topk_ids if cfg.expert_ids == "global" else None
        here = received.topk_ids != cfg.pad_id
        if numbers is not None:  # global ids name the experts of other ranks too
            here = here & torch.isin(numbers, torch.tensor(c.local_experts))
        seven = torch.where(here, 7.0, 0.0)
        beside = torch.where(received.topk_ids == cfg.pad_id, torch.nan, seven)
        received.topk_weights.backward(beside)
        return torch.where(ids >= 0, 7.0, 0.0), weights.grad


@LAYOUTS
def test_gradcheck(layout):
    """Numerical and analytical Jacobians. float64 is no payload: float32, and steps so large that its
    rounding does not count, which is exact for maps that are linear in each input."""
    assert all(ranks(2).run(gradcheck_job, layout, timeout=120))


def gradcheck_job(rank, group, layout):
    cfg = config(hidden_size=4, layout=layout)
    inputs, _ = make_inputs(cfg, (3, 3), 5)
    with functional.TrainingCommunicator(group, cfg) as c:
        x, ids, weights = inputs[rank][:3]

        def exchange(x, weights):
            received, exchange = functional.dispatch(c, x, ids, weights)
            return functional.combine(c, received.rows * received.topk_weights.sum(1, keepdim=True), exchange)

        leaves = (x.requires_grad_(), weights.requires_grad_())
        return torch.autograd.gradcheck(exchange, leaves, eps=0.5, atol=1e-4, rtol=1e-4)


def stale_job(rank, group, layout, transport):
    """Slots without a row hold NaN of an exchange before; the caller's own results there are NaN too."""
    cfg = config(layout=layout, transport=transport)
    inputs, matrices = make_inputs(cfg, (6, 6), 2)
    with functional.TrainingCommunicator(group, cfg) as c:
        x, ids, weights, toward, mine = leaves(c, inputs, matrices)
        all_ids = torch.rand(ids.shape[0], cfg.num_experts).topk(cfg.top_k).indices
        layer(c, torch.full_like(x, torch.nan), all_ids, torch.ones_like(weights), mine)
        received, exchange = functional.dispatch(c, x, ids, weights)
        live = (received.topk_ids >= 0).any(1, keepdim=True)
        y = torch.where(live, received.rows, torch.nan).detach().requires_grad_()
        out = functional.combine(c, y, exchange)
        (of_y,) = torch.autograd.grad(out, y, toward)
        # To the rows and weights come gradients that are NaN where no row came.
        nan = torch.where(live, 1.0, torch.nan)
        of_x, of_weights = torch.autograd.grad(
            (received.rows, received.topk_weights),
            (x, weights),
            (nan.expand_as(received.rows), torch.where(received.topk_ids >= 0, nan, torch.nan)),
        )
        assert not (of_y * ~live).any()
        return [bool(t.isfinite().all()) for t in (received.rows, out, of_y, of_x, of_weights)]


@TRANSPORTS
@LAYOUTS
def test_rows_that_hold_anything(layout, transport):
    assert all(all(finite) for finite in ranks(2).run(stale_job, layout, transport))


def alive_job(rank, group, layout, channels):
    """Micro-batches and layers whose backward passes all come later; on two channels they overlap, too."""
    cfg = config(layout=layout, num_channels=channels)
    batches = [make_inputs(cfg, (4, 2), seed)[0] for seed in (1, 2)]
    _, matrices = make_inputs(cfg, (4, 2), 0)
    with functional.TrainingCommunicator(group, cfg) as c:
        mine = matrices[list(c.local_experts)].requires_grad_()
        parts = [batch[rank] for batch in batches]
        rows = [part[0].requires_grad_() for part in parts]
        weights = [part[2].requires_grad_() for part in parts]
        states = list(rows)
        for _ in range(3):
            if channels == 1:
                states = [
                    layer(c, h, part[1], w, mine) + h
                    for h, part, w in zip(states, parts, weights, strict=True)
                ]
                continue
            received = [
                functional.dispatch(c, h, part[1], w, channel=channel)
                for channel, (h, part, w) in enumerate(zip(states, parts, weights, strict=True))
            ]
            for channel in (0, 1):
                got, exchange = received[channel]
                y = got.rows * got.topk_weights.sum(1, keepdim=True)
                states[channel] = functional.combine(c, y, exchange) + states[channel]
        loss = sum((h * part[3]).sum() for h, part in zip(states, parts, strict=True))
        loss.backward()
        c.check()
        return [h.detach() for h in states], [x.grad for x in rows], [w.grad for w in weights]


@LAYOUTS
def test_layers_and_batches_alive_at_once(layout):
    results = ranks(2).run(alive_job, layout, 1)
    cfg = config()
    _, matrices = make_inputs(cfg, (4, 2), 0)
    for batch, seed in enumerate((1, 2)):
        inputs, _ = make_inputs(cfg, (4, 2), seed)
        for rank, wanted in enumerate(dense(cfg, inputs, matrices, 3)):
            for got, want in zip(results[rank], wanted[:3], strict=True):
                torch.testing.assert_close(got[batch], want, rtol=1e-4, atol=1e-5)


@LAYOUTS
def test_two_channels_overlap(layout):
    """An identity for experts: a layer multiplies a token by 1 and the sum of its weights."""
    for rank, (states, of_x, of_weights) in enumerate(ranks(2).run(alive_job, layout, 2)):
        for batch, seed in enumerate((1, 2)):
            x, ids, weights, toward = make_inputs(config(), (4, 2), seed)[0][rank]
            used = (weights * (ids >= 0)).sum(1, keepdim=True)
            torch.testing.assert_close(states[batch], x * (1 + used) ** 3)
            torch.testing.assert_close(of_x[batch], toward * (1 + used) ** 3)
            each = (toward * x * 3 * (1 + used) ** 2).sum(1, keepdim=True) * (ids >= 0)
            torch.testing.assert_close(of_weights[batch], each, rtol=1e-4, atol=1e-5)


def partly_job(rank, group, layout, kind):
    """Only some of the inputs have gradients, or they take only part of the way."""
    cfg = config(layout=layout)
    inputs, matrices = make_inputs(cfg, (3, 5), 3)
    with functional.TrainingCommunicator(group, cfg) as c:
        for _ in range(2):  # what the first round leaves open must not disturb the second
            x, ids, weights, toward, mine = leaves(c, inputs, matrices)
            if kind == "experts only":
                x, weights = x.detach(), weights.detach()
            if kind == "checkpoint":
                out = checkpoint(layer, c, x, ids, weights, mine, use_reentrant=False)
            elif kind == "no combine":
                received, _ = functional.dispatch(c, x, ids, weights)
                (received.rows.sum() + 2 * received.topk_weights.sum()).backward()
                continue
            else:
                out = layer(c, x, ids, weights, mine)
            (out * toward).sum().backward()
        c.check()
        return x.grad, weights.grad, mine.grad, list(c.local_experts)


@pytest.mark.parametrize("kind", ["whole", "checkpoint", "experts only", "no combine"])
@LAYOUTS
def test_part_of_the_way(layout, kind):
    cfg = config()
    inputs, matrices = make_inputs(cfg, (3, 5), 3)
    wanted = dense_without_residual(inputs, matrices)
    for rank, (of_x, of_weights, of_experts, mine) in enumerate(ranks(2).run(partly_job, layout, kind)):
        if kind == "no combine":
            ids = inputs[rank][1]
            owner = torch.tensor([0, 0, 0, 1, 1, -1])[ids]  # the last stands for -1
            ranks_of_token = torch.stack([(owner == r).any(1) for r in range(2)], 1).sum(1)
            assert torch.equal(of_x, ranks_of_token[:, None].float().expand_as(of_x))
            assert torch.equal(of_weights, 2.0 * (ids >= 0))
            continue
        torch.testing.assert_close(of_experts, wanted[2][mine], rtol=1e-4, atol=1e-5)
        if kind != "experts only":
            torch.testing.assert_close(of_x, wanted[0][rank], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(of_weights, wanted[1][rank], rtol=1e-4, atol=1e-5)


def dense_without_residual(inputs, matrices):
    """Gradients of one layer's x and weights by rank, and of all experts."""
    by_rank = dense(config(), inputs, matrices)
    of_x = [gradients[1] - rank[3] for gradients, rank in zip(by_rank, inputs, strict=True)]
    return of_x, [gradients[2] for gradients in by_rank], by_rank[0][3]


def refused_job(rank, group):
    def refused(error, act, *args, **more):
        try:
            act(*args, **more)
        except error as found:
            return str(found)
        raise AssertionError("it was accepted")

    for more in (
        {"quantization": "fp8_block128", "hidden_size": 128},
        {"layout": "expert_major"},
        {"sums_only": True, "payload": torch.bfloat16, "expert_ids": "global"},
    ):
        found = refused(ep.EpConfigError, functional.TrainingCommunicator, group, config(**more))
        assert "wanted" in found
    assert "gradient_dtype" in refused(
        ep.EpConfigError, functional.TrainingCommunicator, group, config(), gradient_dtype=torch.float64
    )
    alone = {"gradient_dtype": torch.int8 if rank == 1 else None}
    assert "rank 1" in refused(ep.EpConfigError, functional.TrainingCommunicator, group, config(), **alone)
    inputs, matrices = make_inputs(config(), (4, 4), 4)
    with functional.TrainingCommunicator(group, config()) as c:
        x, ids, weights, toward, mine = leaves(c, inputs, matrices)
        assert "TrainingCommunicator" in refused(
            ep.EpArgumentError, functional.dispatch, None, x, ids, weights
        )
        assert "channel" in refused(ep.EpArgumentError, functional.dispatch, c, x, ids, weights, channel=1)
        out = layer(c, x, ids, weights, mine)
        received, exchange = functional.dispatch(c, x, ids, weights)
        out.backward(toward)  # takes the channel from the exchange that is open
        ended = refused(ep.EpArgumentError, functional.combine, c, received.rows, exchange)
        assert "channel 0 has ended" in ended
        with torch.no_grad():
            kept = layer(c, x, ids, weights, mine)
        assert torch.equal(kept, out)
        c.check()
        (once,) = torch.autograd.grad(layer(c, x, ids, weights, mine).pow(2).sum(), x, create_graph=True)
        assert "second derivatives" in refused(ep.EpArgumentError, once.sum().backward)
        out = layer(c, x, ids, weights, mine)
    del c
    assert "no more" in refused(ep.EpArgumentError, out.backward, toward)
    return True


def test_what_is_refused():
    assert all(ranks(2).run(refused_job))
