"""10^5 exchanges on GPUs with random delays on every rank and on every GPU.

Most are in CUDA graphs that are replayed with other tokens and other counts each time; eager ones come in
between. T, routing, halves or whole, and channel change from exchange to exchange; some are dropped without
combine, some overlap on two channels. Every result is compared on the GPU (whole_numbers.py), which also
counts.
"""

import random
import time
from itertools import zip_longest

import gpus
import pytest
import torch
from harness import fresh_ranks, ranks
from one_gpu import local_ranks, streams
from whole_numbers import TIMES, Bank, factors_of

import ep_backend as ep

pytestmark = [pytest.mark.gpu, pytest.mark.stress]
SLOTS = (1, 1, 7, 7, 7, 32, 32, 100, 260)
MANY = 2050  # T that bulk copies carry if rows have 10 KB; seldom, as comparing takes longer
GRAPHS, TURNS = 6, 24  # graphs of a communicator, and turns in each
CHECK_EVERY = 40  # replays or eager turns between two looks at what the GPU found
# (layout, payload, hidden size, exchanges)
PARTS = (
    ("rank_major", torch.bfloat16, 256, 25_000),
    ("expert_major", torch.bfloat16, 256, 20_000),
    ("rank_major", torch.float32, 2560, 20_000),
    ("compact", torch.bfloat16, 256, 2_000),
    ("expert_major", torch.float32, 136, 15_000),
    ("rank_major", torch.bfloat16, 264, 20_000),
)
TOTAL = 100_000


class Player:
    """One rank: its communicator, its stream, its tokens, and what it has found.

    An action is a generator. It yields where the other ranks of this process must catch up before this one
    may wait on the host.
    """

    def __init__(self, comm, stream, seed):
        self.comm, self.stream, self.device = comm, stream, comm.device
        self.chance = random.Random(seed * 64 + comm.rank)
        self.config, self.layout = comm.config, comm.config.layout
        self.factors = factors_of(comm)
        self.banks = {
            slots: Bank(self.config, comm.world_size, comm.rank, variants, slots, seed + slots, self.device)
            for slots, variants in ((slots, 4 if slots == MANY else 24) for slots in {*SLOTS, MANY})
        }
        self.outs = [
            {
                slots: torch.empty(slots, self.config.hidden_size, dtype=bank.out.dtype, device=self.device)
                for slots, bank in self.banks.items()
            }
            for _ in range(self.config.num_channels)
        ]
        # Begun, compared, wrong; number of the first that was wrong.
        self.begun, self.compared, self.wrong = (self._counter(0) for _ in range(3))
        self.first_wrong = self._counter(2**62)
        self.graphs = []

    def _counter(self, start):
        return torch.full((1,), start, dtype=torch.int64, device=self.device)

    def found(self):
        """After all that was launched: (begun, compared, wrong, first wrong); or what stopped the rank."""
        self.stream.synchronize()
        self.comm.check()
        return [int(c) for c in (self.begun, self.compared, self.wrong, self.first_wrong)]

    def dawdle(self):
        """Somebody is late: the GPU, and the host if it is not just capturing."""
        chance = self.chance.random()
        if chance < 0.25:
            torch.cuda._sleep(int(self.chance.expovariate(1 / 5000)))
        elif chance < 0.26 and not torch.cuda.is_current_stream_capturing():
            time.sleep(self.chance.random() * 0.001)

    def take(self, slots):
        """The next tokens, by what the GPU has counted: a replay takes others each time."""
        bank = self.banks[slots]
        self.begun += 1
        number = torch.remainder(self.begun * 7 + self.comm.rank, len(bank.counts))
        times = torch.remainder(self.begun, TIMES) + 1

        def pick(of_all):
            return of_all.index_select(0, number)[0]

        count = bank.counts.index_select(0, number)
        return pick(bank.x) * times, pick(bank.ids), pick(bank.weights), count, pick(bank.out) * times

    def send(self, slots, channel, whole):
        x, ids, weights, count, _ = given = self.take(slots)
        self.dawdle()
        call = self.comm.dispatch if whole else self.comm.dispatch_send
        opened = call(
            x.to(self.config.payload),
            ids,
            weights,
            num_tokens=count,
            tokens_per_rank=slots,
            channel=channel,
        )
        return given, *(opened if whole else (None, opened))

    def experts(self, received):
        """NaN where nobody may read."""
        rows = received.rows.float()
        if self.layout == "expert_major":
            places = torch.arange(rows.shape[1], device=self.device)
            live = (places < received.rows_per_expert[:, None])[..., None]
            y = rows * self.factors[:-1, None, None]
        else:
            live = (received.topk_ids >= 0).any(1, keepdim=True)
            share = self.factors[received.topk_ids.long()] * received.topk_weights
            y = rows * share.sum(1, keepdim=True)
        return torch.where(live, y, torch.nan)

    def exchange(self, slots, channel, whole):
        given, received, handle = self.send(slots, channel, whole)
        yield
        if received is None:
            received = self.comm.dispatch_recv(handle)
        y = self.experts(received)
        if self.chance.random() < 0.5:
            y = y.to(self.config.result_dtype)
        self.dawdle()
        out = self.outs[channel][slots].fill_(-1)
        if whole:
            self.comm.combine(y, handle, out=out)
        else:
            self.comm.combine_send(y, handle)
            yield
            self.dawdle()
            self.comm.combine_recv(handle, out=out)
        *_, count, want = given
        # Rows that do not count are left as they were.
        counts = torch.arange(slots, device=self.device)[:, None] < count
        bad = (out != torch.where(counts, want.to(out.dtype), -1)).any()
        self.compared += 1
        self.wrong += bad
        self.first_wrong.copy_(
            torch.where(bad, torch.minimum(self.first_wrong, self.begun), self.first_wrong)
        )

    def dropped(self, slots, channel, received):
        """The next dispatch on the channel closes it."""
        _, _, handle = self.send(slots, channel, whole=False)
        yield
        if received:
            self.comm.dispatch_recv(handle)

    def turn(self, kind, slots, others, channel):
        """Some exchanges as `turns` has drawn them."""
        # A whole compact dispatch waits on the host, for ranks of this process too.
        may_be_whole = self.layout != "compact"
        if kind == "both channels":
            first = self.exchange(slots, 0, whole=False)
            second = self.exchange(others, 1, whole=may_be_whole)
            for _ in zip_longest(first, second):
                yield
        elif kind == "dropped":
            yield from self.dropped(slots, channel, received=others % 2 == 1)
        else:
            yield from self.exchange(slots, channel, whole=may_be_whole and kind == "whole")

    def capture(self, turns):
        graph = torch.cuda.CUDAGraph()
        pool = self.graphs[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, stream=self.stream, pool=pool):
            for turn in turns:
                for _ in self.turn(*turn):
                    pass
        self.graphs.append(graph)


def draw(plan, number):
    """``number`` turns, equal on all ranks."""
    kinds = ("whole", "whole", "whole", "halves", "both channels", "dropped")

    def slots():
        return MANY if plan.random() < 0.01 else plan.choice(SLOTS)

    return [(plan.choice(kinds), slots(), slots(), plan.randrange(2)) for _ in range(number)]


def sizes(turns):
    """Exchanges, and results that are compared, of some turns."""
    pairs = sum(kind == "both channels" for kind, *_ in turns)
    dropped = sum(kind == "dropped" for kind, *_ in turns)
    return len(turns) + pairs, len(turns) + pairs - dropped


def eager(players, turn):
    """One turn of all ranks of this process, side by side."""
    running = [(player, player.turn(*turn)) for player in players]
    while running:
        players[0].chance.shuffle(running)
        still = []
        for player, action in running:
            with torch.cuda.stream(player.stream):
                player.dawdle()
                if next(action, running) is not running:
                    still.append((player, action))
        running = still


def look(players, seed, begun, compared):
    """Raise AssertionError if a GPU has found something wrong, or has not done all there was to do."""
    for player in players:
        found = player.found()
        if found[:3] != [begun, compared, 0]:
            raise AssertionError(
                f"rank {player.comm.rank}, {player.layout}, seed {seed}: {begun} exchanges, {compared} "
                f"compared; the GPU says {found[0]:#x} and {found[1]:#x}, {found[2]} of them wrong, the "
                f"first in exchange {found[3]} or just before"
            )


def play(players, seed, exchanges):
    """At least ``exchanges`` exchanges: how many were begun, how many compared, and how many replayed."""
    plan = random.Random(seed)  # equal on all ranks
    begun = compared = replayed = 0
    # Each kind with each T once: what is loaded or allocated later might wait for kernels that wait.
    for turn in [
        (kind, slots, slots, 0)
        for kind in ("halves", "whole", "both channels", "dropped")
        for slots in sorted({*SLOTS, MANY})
    ]:
        eager(players, turn)
        done = sizes([turn])
        begun, compared = begun + done[0], compared + done[1]
        look(players, seed, begun, compared)
    graphs = []
    if players[0].layout != "compact":
        graphs = [draw(plan, TURNS) for _ in range(GRAPHS)]
        for player in players:
            for turns in graphs:
                player.capture(turns)
    step = 0
    while begun < exchanges:
        step += 1
        if graphs and plan.random() < 0.6:
            number = plan.randrange(GRAPHS)
            for player in players[0].chance.sample(players, len(players)):
                with torch.cuda.stream(player.stream):
                    player.dawdle()
                    player.graphs[number].replay()
            done = sizes(graphs[number])
            replayed += done[0]
        else:
            turns = draw(plan, 1)
            eager(players, turns[0])
            done = sizes(turns)
        begun, compared = begun + done[0], compared + done[1]
        if step % CHECK_EVERY == 0 or begun >= exchanges:
            look(players, seed, begun, compared)
    return begun, compared, replayed


def config_of(world, part, transport):
    layout, payload, hidden, _ = part
    return ep.EpConfig(
        num_experts=4 * world + 2,
        top_k=3,
        hidden_size=hidden,
        max_tokens_per_rank=MANY,
        payload=payload,
        layout=layout,
        num_channels=2,
        timeout_s=30,
        transport=transport,
    )


def a_gpu_each(rank, group, seed, part, transport):
    device = gpus.take(rank)
    world = torch.distributed.get_world_size(group)
    with ep.Communicator(group, config_of(world, part, transport), device=device) as comm:
        player = Player(comm, torch.cuda.Stream(), seed)
        torch.cuda.synchronize()
        return play([player], seed, part[-1])


def all_on_one_gpu(rank, group, seed, part, world):
    with local_ranks(config_of(world, part, "peer"), world) as comms:
        players = [Player(comm, stream, seed) for comm, stream in zip(comms, streams(comms), strict=True)]
        torch.cuda.synchronize()
        return play(players, seed, part[-1])


def report(capsys, where, part, done, start):
    with capsys.disabled():
        print(
            f"\n{where}, {part[0]} {part[1]}: {done[0]} exchanges so far, {done[1]} results compared, "
            f"{done[2]} exchanges in graphs, {time.monotonic() - start:.0f} s",
            end="",
            flush=True,
        )


def run_parts(group, job, where, capsys, *more):
    """All parts, on every rank of ``group``."""
    start, total = time.monotonic(), [0, 0, 0]
    for seed, part in enumerate(PARTS, 1):
        answers = group.run(job, seed, part, *more, timeout=240)
        total = [a + min(of_ranks) for a, of_ranks in zip(total, zip(*answers, strict=True), strict=True)]
        report(capsys, where, part, total, start)
    assert total[0] >= TOTAL
    assert total[1] > 0.75 * TOTAL
    assert total[2] > 0.75 * TOTAL


@pytest.mark.timeout(900)
@pytest.mark.parametrize("transport", ["peer", "host"])
@pytest.mark.parametrize("world", [2, 4])
def test_many_exchanges(world, transport, capsys):
    gpus.needs(world)
    run_parts(ranks(world), a_gpu_each, f"{world} GPUs, {transport}", capsys, transport)


@pytest.mark.timeout(900)
def test_many_exchanges_on_one_gpu(capsys):
    """4 ranks in one process, each on its own stream, which needs a hardware queue of its own."""
    gpus.needs(1)
    with fresh_ranks(1, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}) as group:
        run_parts(group, all_on_one_gpu, "4 ranks on one GPU", capsys, 4)
