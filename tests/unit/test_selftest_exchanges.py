"""How ``ep-backend selftest`` compares exchanges: what is right passes, one wrong bit does not."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from harness import ranks

import ep_backend as ep
from ep_backend import reference
from ep_backend.selftest import exchanges, graphs, inputs, plan


class Fake:
    """A communicator of one rank whose results are the reference's, but for what ``spoil`` does to them."""

    def __init__(self, config, spoil=lambda name, tensor: None):
        self.config, self.spoil = config, spoil
        self.rank, self.world_size, self.device, self.nodes = 0, 1, torch.device("cpu"), None

    def dispatch_send(self, x, ids, weights, *, scales, tokens_per_rank):
        self.call, self.slots = reference.Call(x, ids, weights, scales), tokens_per_rank

    def dispatch_recv(self, handle):
        received = reference.dispatch(self.config, [self.call], self.slots)[0]
        for name, tensor in vars(received).items():
            if tensor is not None:
                self.spoil(name, tensor)
        return received

    def dispatch(self, *arguments, **more):
        self.dispatch_send(*arguments, **more)
        return self.dispatch_recv(None), None

    def combine_send(self, y, handle):
        self.y = y

    def combine_recv(self, handle):
        out = reference.combine(self.config, [self.call], [self.y], self.slots)[0]
        self.spoil("combined", out)
        return out

    def combine(self, y, handle):
        self.combine_send(y, handle)
        return self.combine_recv(handle)

    def check(self):
        pass


def local_case(payload, layout):
    return next(c for c in plan.local_cases("cpu") if (c.payload, c.layout) == (payload, layout))


@pytest.mark.parametrize("layout", plan.LAYOUTS)
@pytest.mark.parametrize("payload", plan.PAYLOADS)
def test_what_is_right_passes(payload, layout):
    case = local_case(payload, layout)
    comm = Fake(case.config(1, "cpu", 5.0))
    for step in case.steps:
        text, cells = exchanges.exchange(comm, step)
        assert text is None
        assert cells >= sum(step.tokens) * plan.HIDDEN


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("layout", "name", "cell"),
    [
        ("rank_major", "rows", (3, 5)),
        ("rank_major", "scales", (2, 1)),
        ("rank_major", "topk_ids", (1, 2)),
        ("compact", "topk_weights", (0, 1)),
        ("compact", "tokens_per_source", (0,)),
        ("expert_major", "rows", (1, 2, 5)),
        ("expert_major", "rows_per_expert", (4,)),
        ("expert_major", "combined", (7, 11)),
    ],
)
def test_one_wrong_bit_is_found_at_its_cell(layout, name, cell, halves):
    case = local_case("fp8 made by dispatch", layout)

    def spoil(which, tensor):
        if which == name:
            wrong = tensor[cell].clone().reshape(1)
            wrong.view(torch.uint8)[0] ^= 1
            tensor[cell] = wrong[0]

    comm = Fake(case.config(1, "cpu", 5.0), spoil)
    text, _ = exchanges.exchange(comm, replace(case.steps[1], halves=halves))
    assert text.startswith(f"{name}{list(cell)}: "), text
    assert "; 1 of " in text


def test_rows_that_nobody_reads_may_hold_anything():
    case = local_case("bf16", "expert_major")

    def spoil(which, tensor):
        if which == "rows":
            tensor[:, -1] = 9.0

    assert exchanges.exchange(Fake(case.config(1, "cpu", 5.0), spoil), case.steps[3])[0] is None


def test_rows_of_another_shape_are_a_difference_and_no_crash():
    case = local_case("bf16", "compact")

    class Short(Fake):
        def dispatch_recv(self, handle):
            received = super().dispatch_recv(handle)
            return replace(received, rows=received.rows[:-1])

        def combine_recv(self, handle):
            assert len(self.y) == self.call.x.shape[0] - 1
            return torch.zeros(len(self.call.x), plan.HIDDEN, dtype=self.config.result_dtype)

    text, _ = exchanges.exchange(Short(case.config(1, "cpu", 5.0)), case.steps[1])
    assert text.startswith("rows: [36, 256] torch.bfloat16 instead of [37, 256]")


def replay_job(rank, group, layout):
    """What the phase graph expects of a replay, against the transport of CPUs."""
    world = dist.get_world_size(group)
    case = plan.Case("bf16", layout, plan.graph_steps(world, graphs.SLOTS, 6))
    wrong = []
    with ep.Communicator(group, case.config(world, "cpu", 20.0)) as comm:
        for step in case.steps:
            call = graphs._call(comm.config, world, rank, step, step.tokens[rank])
            arguments = (call.x, call.topk_ids, call.topk_weights)
            received, handle = comm.dispatch(*arguments, tokens_per_rank=step.slots)
            experts = torch.tensor(comm.local_experts)
            got = exchanges.on_cpu(received)
            out = comm.combine(graphs.answers(comm.config, rank, experts, received), handle)
            want, total = graphs.wanted(comm.config, world, rank, step)
            wrong.append(reference.first_difference(comm.config, got, want))
            wrong.append(reference.difference("combined", out, total))
    return [text for text in wrong if text]


@pytest.mark.parametrize("layout", graphs.LAYOUTS)
def test_what_replays_must_give(layout):
    assert ranks(2).run(replay_job, layout) == [[], []]


class FakeOnGpu(Fake):
    """Counts its tokens as a GPU does, and remembers what a graph would."""

    local_experts = tuple(range(plan.EXPERTS_PER_RANK + 1))

    def dispatch(self, x, ids, weights, *, tokens_per_rank, num_tokens):
        now = int(num_tokens)
        received, _ = super().dispatch(
            x[:now], ids[:now], weights[:now], scales=None, tokens_per_rank=tokens_per_rank
        )
        return (
            replace(received, rows_per_expert=None) if self.config.layout == "rank_major" else received
        ), None

    def combine(self, y, handle, *, out):
        total = super().combine(y, handle)
        out[: len(total)] = total


class FakeGraph:
    """Of the last exchange that was made: a replay makes it again."""

    def replay(self):
        self.captured._keep(self.captured._exchange(graphs.SLOTS))


@pytest.mark.parametrize("layout", graphs.LAYOUTS)
@pytest.mark.parametrize("spoilt", [None, "rows", "combined"])
def test_replays_without_a_gpu(monkeypatch, layout, spoilt):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = plan.Case("bf16", layout, plan.graph_steps(1, graphs.SLOTS, 10))

    def spoil(which, tensor):
        if which == spoilt and tensor.numel():
            tensor.view(torch.int16)[(0,) * tensor.dim()] ^= 1

    captured = graphs._Captured(FakeOnGpu(case.config(1, "auto", 5.0), spoil), case.steps[0])
    captured._graph.captured = captured
    notes = []
    found = [graphs._replay(notes.append, captured, case, number) for number in range(len(case.steps))]
    assert [number for number, note in enumerate(notes) if "eager call" in note] == [4, 9]
    assert "replay 1 (T = 24, tokens 7, uniform routing)" in notes[1]
    texts = [text for text, _ in found if text]
    if spoilt is None:
        assert not texts
        assert all(cells >= graphs.SLOTS * plan.HIDDEN for _, cells in found)
    else:
        assert all(f": {spoilt}[0, 0" in text and "1 of" in text for text in texts)
        assert len(texts) >= 5


def test_finite_inputs_of_replays_differ_by_rank_and_step():
    config = plan.Case("bf16", "rank_major", plan.graph_steps(2, 24, 3)).config(2, "cpu", 5.0)
    steps = plan.graph_steps(2, 24, 3)
    calls = [graphs._call(config, 2, rank, step, 24) for rank in range(2) for step in steps]
    assert all(bool(call.x.isfinite().all()) for call in calls)
    assert len({call.x.sum().item() for call in calls}) == len(calls)


@pytest.mark.parametrize("routing", inputs.ROUTINGS)
def test_no_expert_twice_in_a_token(routing):
    config = plan.Case("bf16", "compact", plan.graph_steps(3, 24, 1)).config(3, "cpu", 5.0)
    ids = inputs.make_call(config, 3, 1, seed=5, count=200, routing=routing).topk_ids
    for row in ids.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
    owners = {config.expert_ranks(3)[e] for e in ids[ids >= 0].tolist()}
    assert len(owners) == {"none": 0, "one_rank": 1}.get(routing, 3)
