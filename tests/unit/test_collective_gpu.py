"""What transport collective for GPUs does without one."""

import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend import rendezvous
from ep_backend.transports.collective import Traffic
from ep_backend.transports.collective_gpu import GpuCollectiveTransport, _Open, find_places
from ep_backend.transports.wires import GlooWire


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("slots", [1, 6])
def test_both_sides_find_the_same_rows(world, slots):
    """What a rank sends to another, that one expects, in the same order; and nothing to itself."""
    g = torch.Generator().manual_seed(world * 10 + slots)
    tokens = torch.randint(0, slots + 1, (world,), generator=g)
    owners = torch.randint(
        -1, world, (world, slots, 2), generator=g
    )  # of each source's tokens, and beyond them
    found = [find_places(owners[r, : tokens[r]], owners, tokens, r) for r in range(world)]
    for r, (sent, received) in enumerate(found):
        assert sent.of_rank[r] == received.of_rank[r] == 0
        for d in range(world):
            if d == r:
                continue
            wanted = [t for t in range(tokens[r]) if d in owners[r, t].tolist()]
            goes = sent.slots.split(sent.of_rank)[d]
            comes = found[d][1].slots.split(found[d][1].of_rank)[r]
            assert goes.tolist() == [d * slots + t for t in wanted]
            assert comes.tolist() == [r * slots + t for t in wanted]


def wire_job(rank, group):
    """Two pieces of other sizes for each pair of ranks, twice under way at once."""
    world = group.size()
    wire = GlooWire(group, range(group.size()), torch.device("cpu"), 10.0)

    def pieces(round):
        def block(source, to, number):
            size = (source * 3 + to * 5 + number + round) % 7
            return torch.full((size,), 100 * round + 16 * source + 4 * to + number, dtype=torch.uint8)

        sent = [[block(rank, r, number) for r in range(world)] for number in range(2)]
        wanted = [[block(r, rank, number) for r in range(world)] for number in range(2)]
        into = [[torch.zeros_like(block) for block in blocks] for blocks in wanted]
        return list(zip(into, sent, strict=True)), into, wanted

    rounds = [pieces(0), pieces(1)]
    waits = [wire.start(moved, 10.0) for moved, _, _ in rounds]
    for wait in waits:
        wait(10.0)
    wire.close()
    return [
        torch.equal(got, want)
        for _, into, wanted in rounds
        for side in zip(into, wanted, strict=True)
        for got, want in zip(*side, strict=True)
    ]


def test_gloo_brings_every_piece_to_its_place():
    for same in ranks(3).run(wire_job):
        assert all(same)
        assert len(same) == 12


def late_job(rank, group):
    wire = GlooWire(group, range(group.size()), torch.device("cpu"), 10.0)
    blocks = [torch.zeros(8, dtype=torch.uint8) for _ in range(group.size())]
    if rank:
        time.sleep(8)
        return None
    start = time.monotonic()
    wait = wire.start([(blocks, blocks)], 1.0)
    with pytest.raises(RuntimeError):
        wait(1.0)
    return time.monotonic() - start


def test_gloo_has_a_deadline():
    with fresh_ranks(2) as group:
        assert 0.9 < group.run(late_job)[0] < 7


def test_what_cannot_be_started_is_final():
    """A rank that is gone may be noticed when the next exchange starts."""
    transport = object.__new__(GpuCollectiveTransport)  # no GPU, no other rank
    wire = SimpleNamespace(start=Mock(side_effect=RuntimeError("connection reset")), abort=Mock())
    vars(transport).update(
        _world=2, _rank=0, _names=(3, 7), _timeout_s=1.0, _wire=wire, _failure=None, traffic=Traffic()
    )
    said = r"rank 3 lost the connection to rank 7 in dispatch.*connection reset"
    with pytest.raises(ep.EpTimeoutError, match=said):
        transport._move(_Open(channel=1, slots=4, captured=False), [])
    with pytest.raises(ep.EpTimeoutError, match=said):
        transport.check()
    wire.abort.assert_called_once()


class Nccl:
    """Stands in for ProcessGroupNCCL."""

    def __init__(self, store, rank, world, options):
        self.config = vars(options.config)

    @staticmethod
    def Options():  # noqa: N802
        return SimpleNamespace(config=SimpleNamespace())


def traffic_class_job(rank, group, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
        patch.setenv("EP_BACKEND_TRAFFIC_CLASS", value)
        return rendezvous.nccl(group, range(2)).config


def test_its_communicator_has_a_traffic_class_of_its_own():
    assert ranks(2).run(traffic_class_job, "96") == [{"traffic_class": 96}] * 2
    assert ranks(2).run(traffic_class_job, "") == [{}] * 2
