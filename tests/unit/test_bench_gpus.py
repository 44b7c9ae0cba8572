"""What `ep-backend bench` does about GPUs before it times anything, on made-up machines without any."""

import contextlib
import os
from types import SimpleNamespace
from unittest import mock

import msgspec
import pytest
import torch
from harness import ranks
from machines import gpu_machine, pcie_machine

from ep_backend import communicator, select
from ep_backend.bench import gpus, timing
from ep_backend.transports import host


@pytest.fixture
def meter(monkeypatch):
    """`gpus.Gpus` with rates that are made up, and the names of those that were measured."""
    measured = []

    def rate(name, value):
        return lambda: measured.append(name) or value

    monkeypatch.setattr(gpus, "peer_write_rate", rate("peer", 400e9))
    monkeypatch.setattr(gpus, "host_copy_rate", rate("host", 38e9))
    monkeypatch.setattr(gpus.rendezvous, "gather", lambda group, value: [value] * 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    return lambda records, names=("peer", "host"): (gpus.Gpus(records, names), measured)


def apart(records):
    """The same ranks, each in a network namespace of its own."""
    return [
        msgspec.structs.replace(record, shared_memory=f"27:1:{rank}") for rank, record in enumerate(records)
    ]


@pytest.mark.parametrize(
    ("records", "writes"),
    [
        (gpu_machine(2), True),
        (pcie_machine(2), True),
        (pcie_machine(2, works=False), False),  # so are records with EP_BACKEND_PEER_ACCESS=0
        (pcie_machine(2, works=None), False),
        (pcie_machine(4, works=True)[:3] + pcie_machine(4, host="node1")[3:], False),
        (apart(gpu_machine(2)), False),
    ],
    ids=["nvlink", "checked", "failed", "not tried", "two machines", "two nodes of one"],
)
def test_peers_are_written_to_only_where_that_is_known_to_work(meter, records, writes):
    made, measured = meter(records)
    assert ("peer" in measured) == writes
    assert made.machine()["peer_write_bytes_per_s"] == (400_000_000_000 if writes else None)


def test_each_way_has_its_own_limit(meter):
    made, measured = meter(gpu_machine(2))
    names = ("peer", "nccl", "host", "mixed", "hier")
    assert [made.rate_of(name) for name in names] == [400e9, 400e9, 38e9, None, None]
    assert made.machine()["host_copy_bytes_per_s"] == 38_000_000_000
    measured.clear()
    without, _ = meter(gpu_machine(2), ("peer",))
    assert measured == ["peer"]
    assert without.machine()["host_copy_bytes_per_s"] is None


def test_nccl_starts_with_what_the_profile_sets(monkeypatch):
    """The records are those after the pairs were tried out, as a communicator makes them."""
    before, after = pcie_machine(2, works=None), pcie_machine(2, works=False)
    told = {}
    monkeypatch.setattr(
        communicator, "probe", lambda device, neighbours=(): (before, after)[bool(neighbours)]
    )
    monkeypatch.setattr(communicator.rendezvous, "gather", lambda group, value: value)
    monkeypatch.setattr(communicator.rendezvous, "together", lambda group, act, tell: (None, act()))
    monkeypatch.setattr(communicator.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(communicator, "available", lambda device: select.AVAILABLE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "Gpus", lambda records, names: told.update(records=records))
    with mock.patch.dict(os.environ):
        for name in ("NCCL_P2P_LEVEL", "NCCL_P2P_DISABLE"):
            os.environ.pop(name, None)
        timing._meter("cuda", ("host", "nccl"))
        assert os.environ["NCCL_P2P_LEVEL"] == "LOC"
    assert told["records"] == after


def host_copies_job(rank, group):
    """What is in the windows and in the GPU's memory after each copy was made once."""
    world = torch.distributed.get_world_size()
    ops = SimpleNamespace(
        cuda_host_register=lambda address, size: address, cuda_host_unregister=lambda _: None
    )
    seen = {}

    def rate(copies, size):
        half = size
        own = copies[0][1].untyped_storage()
        window = torch.empty(0, dtype=torch.uint8).set_(own)
        window[half:] = 100 + rank
        for target, source in copies[1:]:
            assert source.shape == target.shape
            target.fill_(rank + 1)
        torch.distributed.barrier()
        copies[0][0].copy_(copies[0][1])
        seen.update(
            written=window[:half].view(world - 1, -1).unique(dim=1).flatten().tolist(),
            read=copies[0][0].unique().tolist(),
            size=size,
        )
        torch.distributed.barrier()
        return 5.0

    with (
        mock.patch.object(host, "ops", ops),
        mock.patch.object(host, "near", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(gpus, "_device", return_value=torch.device("cpu")),
        mock.patch.object(gpus, "HOST_COPY_BYTES", 1 << 14),
        mock.patch.object(gpus, "_rate", rate),
    ):
        return gpus.host_copy_rate(), seen


def test_host_memory_is_copied_both_ways_through_the_windows():
    for rank, (rate, seen) in enumerate(ranks(3).run(host_copies_job)):
        assert rate == 5.0
        assert seen["written"] == [(rank + 1) % 3 + 1, (rank + 2) % 3 + 1], "a part from each peer"
        assert seen["read"] == [100 + rank], "its own window, not what peers write"
        assert seen["size"] == 1 << 14


def test_what_the_host_queued_too_late_is_taken_again(monkeypatch):
    """With a longer sleep once that is not just a hiccup; also if only another rank was late."""
    slept, elsewhere = [], [True, True, True, False, False]
    monkeypatch.setattr(gpus, "anywhere", lambda late: late or elsewhere[len(slept) - 1])

    def sample(cycles):
        slept.append(cycles)
        return None if len(slept) == 4 else len(slept)

    assert gpus.in_time(sample, 100) == (5, 400)
    assert slept == [100, 100, 200, 200, 400]
