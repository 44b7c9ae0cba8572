"""Made-up machines for the tests of `ep-backend doctor`, one for each hardware profile and more."""

import itertools

import msgspec

from ep_backend.checks import Direction, worker
from ep_backend.doctor import report
from ep_backend.doctor.plan import Shape
from ep_backend.doctor.warmup import AllReduce, WarmUp
from ep_backend.nvml import Gpu, Link
from ep_backend.probe import Record, _both_ways
from ep_backend.transports import OF_GPUS

SMALL = Shape(name="small", hidden=2048, experts=128, topk=8, layers=48)
LARGE = Shape(name="large", hidden=7168, experts=256, topk=8, layers=61)
SKIPPED = WarmUp(outcome="skipped", why="this is a test")
EVERYTHING = frozenset({"cpu", "collective", *OF_GPUS})


def uuid(number):
    return f"GPU-{number:04d}"


def cpus(**changes):
    fields = {
        "host": "laptop",
        "cpus": 8,
        "shared_memory": "27:1",
        "shared_memory_bytes": 16 << 30,
        "versions": {"ep_backend": "0.1", "torch": "2.13.0+cpu"},
    }
    return Record(**{**fields, **changes})


class NoAccess:
    """Operators on a machine whose driver offers no peer access; there are no others to call."""

    @staticmethod
    def gpu_pair_attributes(source, target):
        return 0, 0


def without_access(a, b):
    """What the checks report of such a direction."""
    direction, broken = worker.try_direction(NoAccess, a, b, uuid(a), uuid(b))
    assert not broken
    return direction


def gpus(
    count=4,
    *,
    name="NVIDIA H200",
    nvlink=lambda a, b: True,
    ancestor="NODE",
    works=lambda a, b: True,
    access=lambda a, b: True,
    rate=350e9,
    gpu=None,
    **changes,
):
    """``works(a, b)``: what the data check from a to b said; None: it was not made, and nothing is known.
    ``access(a, b)``: whether the driver offers peer access; without it there is no check."""
    about = {
        "memory_bytes": 141 << 30,
        "bar1_bytes": 256 << 30,
        "pcie_generation": 5,
        "pcie_width": 16,
        "mig": False,
        "nvlinks": 18 if nvlink(0, 1) else 0,
        "nvlink_peer": "switch" if nvlink(0, 1) else "",
        **(gpu or {}),
    }
    directions = tuple(
        without_access(a, b)
        if not access(a, b)
        else Direction(
            source=uuid(a),
            target=uuid(b),
            access=True,
            works=works(a, b),
            problem="what arrived was not what was sent" if works(a, b) is False else "",
            store_bytes_per_s=rate if works(a, b) else None,
            copy_bytes_per_s=rate * 1.1 if works(a, b) else None,
            latency_s=1.24e-6 if works(a, b) else None,
            atomics=nvlink(a, b),
        )
        for a, b in itertools.permutations(range(count), 2)
    )
    links = tuple(
        Link(a=uuid(a), b=uuid(b), nvlink=nvlink(a, b), ancestor=ancestor)
        for a, b in itertools.combinations(range(count), 2)
    )
    fields = {
        "host": "node",
        "cpus": 64,
        "shared_memory": "27:1",
        "shared_memory_bytes": 64 << 30,
        "versions": {"ep_backend": "0.1", "torch": "2.11.0+cu130", "nccl": "2.28.9"},
        "driver": "580.65.06",
        "cuda_driver": "13.0",
        "gpus": tuple(
            Gpu(uuid=uuid(n), name=name, bus_id=f"0{n}:00.0", numa_node=n * 2 // count, **about)
            for n in range(count)
        ),
        "visible": tuple(uuid(n) for n in range(count)),
        "links": tuple(
            msgspec.structs.replace(link, peer_works=_both_ways(link, directions)) for link in links
        ),
        "directions": directions,
        "hcas": ("mlx5_0:1",),
    }
    return Record(**{**fields, **changes})


def none(a, b):
    return False


def bridges(a, b):
    """NVLink between GPUs 0 and 1, 2 and 3, ..."""
    return a // 2 == b // 2


# Profiles that are recognised by a data check that failed.
BROKEN = ("pcie_partial",)
# By profile: a machine that must be recognised as it, and the transport that must be used.
PROFILES = {
    "cpu": (cpus(), "cpu"),
    "nvl72": (gpus(fabric_works=True, gpu={"fabric_cluster": "c-1", "fabric_clique": 7}), "peer"),
    "nvswitch": (gpus(8), "peer"),
    "nvlink_pairs": (gpus(4, nvlink=bridges, rate=250e9), "mixed"),
    # Recognised only where there are several machines; doctor looks at one.
    "pcie_rdma": (
        gpus(2, nvlink=none, ancestor="PXB", rate=50e9, environment={"EP_BACKEND_PROFILE": "pcie_rdma"}),
        "collective",
    ),
    "pcie_partial": (
        gpus(4, nvlink=none, works=bridges, ancestor="PHB", rate=50e9, hcas=()),
        "mixed",
    ),
    "pcie_p2p": (gpus(4, nvlink=none, ancestor="PXB", rate=50e9, hcas=()), "peer"),
    "pcie_blackwell": (
        gpus(2, nvlink=none, access=none, ancestor="PHB", name="NVIDIA GeForce RTX 4090", hcas=()),
        "host",
    ),
}


def warmed(ranks, seconds=lambda ranks, size: 20e-6 + size / 100e9):
    """A warm-up that went well; all-reduces over all GPUs and, where there are four or more, over halves."""
    groups = [ranks, ranks // 2] if ranks >= 4 else [ranks]
    return WarmUp(
        outcome="ok",
        ranks=ranks,
        took_s=8.5,
        all_reduces=tuple(
            AllReduce(ranks=group, bytes=size, seconds=seconds(group, size))
            for group in groups
            for size in (4096, 1 << 20, 64 << 20)
        ),
    )


def examined(record, warm_up=None, environ=None, shapes=(SMALL, LARGE), tokens=(1, 128), **more):
    """The report about ``record``, with a warm-up that went well where there are GPUs to warm up."""
    used = len(record.used_gpus())
    decision, undecided = report.choose(record, EVERYTHING)
    if warm_up is None:
        warm_up = warmed(used) if used > 1 else SKIPPED
    rate = {"copy_bytes_per_s": 20e9} if decision and decision.transport == "cpu" else {}
    more = {**rate, **more}
    return report.examine(
        record, decision, undecided, warm_up, shapes, tokens, used or 4, environ=environ or {}, **more
    )
