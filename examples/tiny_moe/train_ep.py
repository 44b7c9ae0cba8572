"""Train the tiny MoE model with its experts spread over ranks: the loss curve of one rank.

    python examples/tiny_moe/train_ep.py --steps 20
    torchrun --nproc-per-node 2 examples/tiny_moe/train_ep.py --steps 20

Each step's batch has two shares (``--shares``), which the ranks divide. One rank takes them one after the
other through the unchanged model of transformers; two ranks hold half of the experts each, and what is no
expert as a copy each. Both print the same losses up to the rounding of float32.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from corpus import documents
from torch import nn
from torch.nn.functional import cross_entropy, linear, silu
from train import Options, Running, balance_loss, make_model, make_optimizers, schedule
from transformers import PreTrainedTokenizerFast

from ep_backend import EpConfig, functional

HERE = Path(__file__).parent


class ParallelExperts(nn.Module):
    """This rank's experts of a layer, in the place of all of them."""

    def __init__(self, experts: nn.Module, communicator: functional.TrainingCommunicator) -> None:
        super().__init__()
        mine = list(communicator.local_experts)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[mine])
        self.down_proj = nn.Parameter(experts.down_proj.detach()[mine])
        self.communicator = communicator

    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """``x`` [M, hidden], ids and weights [M, top_k] -> [M, hidden]"""
        received, exchange = functional.dispatch(self.communicator, x, topk_ids, topk_weights)
        y = torch.zeros_like(received.rows)
        for expert, (up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            rows, k = torch.where(received.topk_ids == expert)
            gate, value = linear(received.rows[rows], up).chunk(2, dim=-1)
            result = linear(silu(gate) * value, down) * received.topk_weights[rows, k, None]
            y = y.index_add(0, rows, result)
        return functional.combine(self.communicator, y, exchange)


def batches(options: Options) -> Iterator[torch.Tensor]:
    """Endless batches of running text: int64 [batch_tokens / sequence, sequence]."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE)
    encoded = [[*tokenizer.encode(d.text), tokenizer.eos_token_id] for d in documents()]
    running = Running(encoded, options)
    while True:
        yield running.next(options.sequence)


def train(
    options: Options, shares: int, group: dist.ProcessGroup | None = None, device: str = "cpu"
) -> list[float]:
    """Train for ``options.steps`` steps; return the loss of each. ``group``: the ranks, None for one."""
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if shares % world or options.batch_tokens // options.sequence % shares:
        raise SystemExit(
            f"{shares} shares of a batch do not suit {world} ranks, or its sequences do not suit them"
        )
    torch.manual_seed(options.seed)
    model = make_model(options, PreTrainedTokenizerFast.from_pretrained(HERE))
    communicator = None
    if group is not None:
        config = EpConfig(
            num_experts=options.experts,
            top_k=options.top_k,
            hidden_size=model.config.hidden_size,
            max_tokens_per_rank=options.batch_tokens // shares,
            payload=torch.float32,
            layout="compact",
        )
        communicator = functional.TrainingCommunicator(group, config, device=device)
        for layer in model.model.layers:
            layer.mlp.experts = ParallelExperts(layer.mlp.experts, communicator)
    model.to(device)
    optimizers = make_optimizers(model, options)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    losses = []
    for step, tokens in zip(range(options.steps), batches(options), strict=False):
        for each, peak in zip(groups, peaks, strict=True):
            each["lr"] = peak * schedule(step, options.steps, options.warmup)
        total = torch.zeros((), device=device)
        for share in tokens.to(device).chunk(shares)[rank::world]:
            out = model(input_ids=share, output_router_logits=True)
            loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), share[:, 1:].flatten())
            balance = balance_loss(out.router_logits, options.top_k)
            ((loss + options.balance * balance) / shares).backward()
            total += loss.detach() / shares
        if group is not None:
            dist.all_reduce(total, group=group)
        clip(model, group)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(total))
        if rank == 0:
            print(f"step {step + 1}/{options.steps}  loss {losses[-1]:.5f}", flush=True)
    if communicator is not None:
        communicator.destroy()
    return losses


@torch.no_grad()
def clip(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Bring the gradients of all shares together, and their norm over all ranks' parameters to 1 at most.

    An expert has got the gradients of all ranks' tokens through the exchanges; the rest are added up here.
    """
    experts = {p for m in model.modules() if isinstance(m, ParallelExperts) for p in m.parameters()}
    common = [p.grad for p in model.parameters() if p not in experts]
    squares = sum((p.grad.square().sum() for p in experts), torch.zeros((), device=common[0].device))
    if group is not None:
        for gradient in common:
            dist.all_reduce(gradient, group=group)
        dist.all_reduce(squares, group=group)
    norm = (squares + sum(gradient.square().sum() for gradient in common)).sqrt()
    for p in model.parameters():
        p.grad.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shares", type=int, default=2, help="parts of a batch, divided among the ranks [2]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    group, device = None, given.device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if given.device == "cuda" else "gloo")
        group = dist.group.WORLD
    torch.set_num_threads(1)
    train(Options(out=Path(), steps=given.steps, warmup=5), given.shares, group, device)
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
