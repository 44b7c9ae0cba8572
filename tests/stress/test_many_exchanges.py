"""10^5 exchanges of 4 rank processes through the Python API, with random delays on every rank.

Every result is compared. Tokens, T, routing, layout and channel change from exchange to exchange; some are
dropped without combine, some overlap on two channels. All values are small whole numbers, so the reference is
exact whatever the order of sums.
"""

import random
import time

import pytest
import torch
from harness import ranks

import ep_backend as ep

pytestmark = pytest.mark.stress

WORLD, EXPERTS, TOP_K, HIDDEN, MAX_TOKENS = 4, 10, 3, 64, 8
CHUNK, CHUNKS, VARIANTS = 4000, 25, 48
LAYOUTS = ("rank_major", "compact", "rank_major", "expert_major", "compact")


def factor(expert):
    """What an expert multiplies its rows with."""
    return float(1 + expert % 4)


class Variant:
    """T, and this rank's tokens with what must come back, for rows multiplied by 1; the caller multiplies."""

    def __init__(self, seed, rank):
        of_all = random.Random(seed)
        self.slots = of_all.randint(1, MAX_TOKENS)
        g = torch.Generator().manual_seed(seed * 31 + rank)
        tokens = random.Random(seed * 31 + rank).choice(
            (0, self.slots, random.Random(seed + rank).randint(0, self.slots))
        )
        self.x = torch.randint(-4, 5, (tokens, HIDDEN), generator=g).float()
        chosen = [torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(tokens)]
        self.ids = torch.stack(chosen) if chosen else torch.empty(0, TOP_K, dtype=torch.int64)
        if seed % 3 == 0:
            self.ids %= 4  # crowded; duplicates become -1
            for row in self.ids:
                for j in range(1, TOP_K):
                    if row[j] in row[:j]:
                        row[j] = -1
        self.weights = torch.randint(1, 3, self.ids.shape, generator=g).float()
        factors = torch.tensor([factor(e) for e in range(EXPERTS)] + [0.0])
        self.out = self.x * (factors[self.ids] * self.weights).sum(1, keepdim=True)


def exchanges(rank, group, seed, layout, count):
    """``count`` exchanges; returns how many results were compared. Raises at the first that is wrong."""
    config = ep.EpConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        max_tokens_per_rank=MAX_TOKENS,
        payload=torch.float32,
        layout=layout,
        num_channels=2,
        timeout_s=60,
        transport="cpu",
    )
    plan, delays = random.Random(seed), random.Random(seed * 64 + rank)  # the plan is equal on all ranks
    variants = [Variant(seed * 1000 + i, rank) for i in range(VARIANTS)]
    compared = 0

    def dawdle():
        chance = delays.random()
        if chance < 0.02:
            time.sleep(delays.random() * (0.005 if chance < 0.0005 else 0.0003))

    with ep.Communicator(group, config) as comm:
        factors = torch.tensor([factor(e) for e in comm.local_experts] + [0.0])  # [-1] is padding's

        def send(variant, times, channel):
            dawdle()
            return comm.dispatch_send(
                variant.x * times,
                variant.ids,
                variant.weights,
                tokens_per_rank=variant.slots,
                channel=channel,
            )

        def answer(handle):
            dawdle()
            received = comm.dispatch_recv(handle)
            if layout == "expert_major":
                y = received.rows * factors[:-1, None, None]
            else:
                y = received.rows * (factors[received.topk_ids] * received.topk_weights).sum(1, keepdim=True)
            dawdle()
            comm.combine_send(y, handle)

        def compare(handle, variant, times):
            dawdle()
            out = comm.combine_recv(handle)
            if not torch.equal(out, variant.out * times):
                raise AssertionError(
                    f"rank {rank}, {layout}, seed {seed}: exchange {done} gave a wrong result"
                )

        done = 0
        while done < count:
            kind, channel = plan.random(), plan.randrange(2)
            first, second = plan.choice(variants), plan.choice(variants)
            times = float(1 + done % 61)  # rows of another exchange are noticed
            if kind < 0.05:
                send(first, times, channel)  # dropped before it was received, or after
                done += 1
            elif kind < 0.1:
                comm.dispatch_recv(send(first, times, channel))
                done += 1
            elif kind < 0.4:
                a, b = send(first, times, 0), send(second, times + 1, 1)
                for handle in (a, b) if plan.random() < 0.5 else (b, a):
                    answer(handle)
                compare(b, second, times + 1)
                compare(a, first, times)
                done, compared = done + 2, compared + 2
            else:
                handle = send(first, times, channel)
                answer(handle)
                compare(handle, first, times)
                done, compared = done + 1, compared + 1
    return done, compared


@pytest.mark.timeout(1800)
def test_many_exchanges_with_random_delays(capsys):
    start, done, compared = time.monotonic(), 0, 0
    for chunk in range(CHUNKS):
        layout = LAYOUTS[chunk % len(LAYOUTS)]
        answers = ranks(WORLD).run(exchanges, chunk + 1, layout, CHUNK, timeout=300)
        done += min(count for count, _ in answers)
        compared += min(count for _, count in answers)
        with capsys.disabled():
            print(f"\n{done} exchanges, {compared} results compared on each of {WORLD} ranks, ", end="")
            print(f"last {layout}, {time.monotonic() - start:.0f} s", end="", flush=True)
    assert done >= 100_000
    assert compared > 80_000
