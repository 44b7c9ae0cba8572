"""A small MoE layer on exchanges with gradients, the same without exchanges, and jobs that run the first.

A *case* is a dict: seed, tokens (per rank), layers, transport and what else `EpConfig` takes. Inputs of all
ranks are made from the seed, so every process knows them all.
"""

import gpus
import torch

import ep_backend as ep
from ep_backend import functional

USUAL = {
    "num_experts": 5,
    "top_k": 2,
    "hidden_size": 16,
    "max_tokens_per_rank": 6,
    "payload": torch.float32,
    "timeout_s": 20.0,
}
NAMES = ("out", "x", "weights", "experts")


def config(**more):
    return ep.EpConfig(**{**USUAL, **more})


def make_inputs(cfg, tokens, seed):
    """For each rank: x, ids, weights and the gradient of the result; and all experts' matrices."""
    g = torch.Generator().manual_seed(seed)
    ranks = []
    for count in tokens:
        ids = torch.rand(count, cfg.num_experts, generator=g).topk(cfg.top_k, dim=1).indices
        ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
        rows = torch.randn(2, count, cfg.hidden_size, generator=g).to(cfg.payload)
        ranks.append((rows[0], ids, torch.rand(count, cfg.top_k, generator=g), rows[1]))
    size = cfg.hidden_size
    experts = torch.randn(cfg.num_experts, size, size, generator=g) / size**0.5
    return ranks, experts.to(cfg.payload)


def run_experts(matrices, rows, ids, weights):
    """The weighted sum of the experts of each row, in float32: [R, hidden]. ``ids``: index ``matrices``."""
    total = torch.zeros(rows.shape, device=rows.device)
    for expert, matrix in enumerate(matrices):
        share = (weights * (ids == expert)).sum(1, keepdim=True)
        total = total + share * torch.tanh(rows @ matrix).float()
    return total


def layer(c, x, ids, weights, matrices, **more):
    """One MoE layer of this rank; ``matrices``: of its own experts."""
    received, exchange = functional.dispatch(c, x, ids, weights, **more)
    y = run_experts(matrices, received.rows, received.topk_ids, received.topk_weights)
    return functional.combine(c, y, exchange)


def dense(cfg, inputs, matrices, layers=1):
    """The same in one process, in float32, for all ranks: by rank the result and the gradients of x, weights
    and experts (of all ranks' tokens)."""
    x = torch.cat([rank[0] for rank in inputs]).float().requires_grad_()
    ids = torch.cat([rank[1] for rank in inputs])
    weights = torch.cat([rank[2] for rank in inputs]).requires_grad_()
    matrices = matrices.float().clone().requires_grad_()
    h = x
    for _ in range(layers):
        h = run_experts(matrices, h, ids, weights) + h
    (h * torch.cat([rank[3] for rank in inputs])).sum().backward()
    counts = [len(rank[0]) for rank in inputs]
    by_rank = zip(h.detach().split(counts), x.grad.split(counts), weights.grad.split(counts), strict=True)
    return [(*parts, matrices.grad) for parts in by_rank]


def leaves(c, inputs, matrices):
    """This rank's x, ids, weights, gradient of the result and matrices on its device; what has gradients is a
    leaf."""
    x, ids, weights, toward = (t.to(c.device, copy=True) for t in inputs[c.rank])
    mine = matrices[list(c.local_experts)].to(c.device)
    return x.requires_grad_(), ids, weights.requires_grad_(), toward, mine.requires_grad_()


def layers_job(rank, group, case, *, layers=2, device="cpu", compiled=None, gradient_dtype=None):
    """Forward and backward through layers with residuals; the result and the gradients of x, weights and this
    rank's experts, and which experts these are."""
    if device != "cpu":
        device = gpus.take(rank)
    case = dict(case)
    tokens, seed = case.pop("tokens"), case.pop("seed", 0)
    cfg = config(**case)
    inputs, matrices = make_inputs(cfg, tokens, seed)
    with functional.TrainingCommunicator(group, cfg, device=device, gradient_dtype=gradient_dtype) as c:
        x, ids, weights, toward, mine = leaves(c, inputs, matrices)

        def model(x, ids, weights, mine):
            for _ in range(layers):
                x = layer(c, x, ids, weights, mine) + x
            return x

        if compiled is not None:
            model = torch.compile(model, fullgraph=True, backend=compiled)
        out = model(x, ids, weights, mine)
        (out * toward).sum().backward()
        c.check()
        found = (out.detach(), x.grad, weights.grad, mine.grad)
        return [t.cpu() for t in found], list(c.local_experts)


def check_layers(case, results, *, layers=2, tolerance=1e-5):
    """Compare what ``layers_job`` gave on all ranks with one process. ``tolerance``: of the largest error of
    a tensor, as a part of its largest element."""
    case = dict(case)
    tokens, seed = case.pop("tokens"), case.pop("seed", 0)
    cfg = config(**case)
    inputs, matrices = make_inputs(cfg, tokens, seed)
    by_rank = dense(cfg, inputs, matrices, layers)
    for rank, (found, mine) in enumerate(results):
        wanted = list(by_rank[rank])
        wanted[3] = wanted[3][mine]
        for name, got, want in zip(NAMES, found, wanted, strict=True):
            assert got.shape == want.shape, (rank, name)
            assert got.isfinite().all(), (rank, name)
            if got.numel():
                error = float((got.float() - want).abs().max() / want.abs().max().clamp(min=1e-6))
                assert error <= tolerance, f"rank {rank}, {name}: {error}"
