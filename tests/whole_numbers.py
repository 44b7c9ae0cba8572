"""Tokens whose exchange is exact whatever the order of sums, with what must come back: all values are small
whole numbers, so that results can be compared on the GPU, in a captured graph too."""

import random

import torch

# Rows may be multiplied by 1 to 5 and stay exact in bfloat16 with top-3: at most 5 * 2 * 3 * 4 * 2 = 240.
TIMES = 5


def factor(expert):
    """What an expert multiplies its rows with: 1 to 4. ``expert``: a number or a tensor of them."""
    return 1 + expert % 4


def factors_of(comm):
    """[local experts + 1] float32: by local number; -1, which is none, gives the last."""
    return torch.tensor([*(float(factor(e)) for e in comm.local_experts), 0.0], device=comm.device)


class Bank:
    """``variants`` inputs of one rank with ``slots`` tokens each, and what combine must return for them.

    Routing, in turns: all experts alike; only those of rank 0, if it has enough; few popular ones; a third of
    the choices are none. ``counts`` says how many of the tokens count: all, none, or any number.
    """

    def __init__(self, config, world, rank, variants, slots, seed, device):
        g = torch.Generator(device).manual_seed(seed * 1009 + rank)
        of_counts = random.Random(seed * 1009 + rank)
        experts, shape = config.num_experts, (variants, slots, config.top_k)
        owners = torch.tensor(config.expert_ranks(world), device=device)
        chance = torch.ones(4, experts, device=device)
        if int((owners == 0).sum()) >= config.top_k:
            chance[1] = (owners == 0).float()
        chance[2] = 1.0 / (1.0 + torch.arange(experts, device=device)) ** 2
        # The largest of u ** (1 / chance) is a draw by chance, and the k largest are one without repetition.
        drawn = torch.rand(variants, slots, experts, generator=g, device=device)
        drawn = drawn.log() / chance[torch.arange(variants) % 4][:, None].clamp(min=1e-9)
        self.ids = drawn.topk(config.top_k, dim=-1).indices
        without = torch.rand(shape, generator=g, device=device) < 1 / 3
        self.ids[3::4][without[3::4]] = -1
        self.weights = torch.randint(1, 3, shape, generator=g, device=device).float()
        x = torch.randint(-2, 3, (variants, slots, config.hidden_size), generator=g, device=device)
        self.x = x.to(config.payload)
        share = torch.where(self.ids >= 0, factor(self.ids) * self.weights, 0.0).sum(-1, keepdim=True)
        self.out = (x * share).to(config.result_dtype)
        counts = [of_counts.choice((0, slots, of_counts.randint(0, slots))) for _ in range(variants)]
        self.counts = torch.tensor(counts, dtype=torch.int32, device=device)
