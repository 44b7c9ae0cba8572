"""Records of made-up machines."""

import itertools

import msgspec

from ep_backend import profiles
from ep_backend.checks import OrderRates
from ep_backend.nvml import Gpu, Link
from ep_backend.probe import Record

KNOWN = profiles.shipped()
VERSIONS = {"ep_backend": "0.1", "torch": "2.13.0", "nccl": "2.28.3"}
EVERYTHING = frozenset(profiles.TRANSPORTS)


def cpu_rank(**changes):
    fields = {"host": "laptop", "boot_id": "b0", "shared_memory": "27:1", "versions": {"torch": "2.13.0+cpu"}}
    return Record(**{**fields, **changes})


def gpu_machine(count=4, host="node0", nvlink=lambda a, b: True, used=None, **changes):
    """Records of ranks with one GPU each, on a machine where ``nvlink(a, b)`` says how GPUs are joined."""
    uuids = [f"GPU-{host}-{index}" for index in range(count)]
    links = tuple(
        Link(a=uuids[a], b=uuids[b], nvlink=nvlink(a, b), ancestor="NODE")
        for a, b in itertools.combinations(range(count), 2)
    )
    fields = {
        "host": host,
        "boot_id": f"boot-{host}",
        "shared_memory": "27:1",
        "versions": VERSIONS,
        "cuda_driver": "13.0",
        "gpus": tuple(Gpu(uuid=uuid) for uuid in uuids),
        "visible": tuple(uuids),
        "links": links,
    }
    ranks = range(count) if used is None else used
    return [Record(**{**fields, "device": uuids[rank], **changes}) for rank in ranks]


def pcie_machine(count=8, works=True, ancestor="PXB", **changes):
    """Records of ranks on a machine without NVLink. ``works``: whether the data check of a pair passed."""
    records = gpu_machine(count, nvlink=lambda a, b: False, **changes)
    return with_peer_access(records, works, ancestor)


def with_orders(records, *measured, group=1):
    """The same machine; each rank has measured a pair of ``measured``: bytes per second of each GPU in the
    two orders. Fewer pairs: the other ranks have measured nothing."""
    gpus = tuple(record.device for record in records)
    rates = [
        (OrderRates(gpus=gpus, group=group, together_bytes_per_s=together, staggered_bytes_per_s=staggered),)
        for together, staggered in measured
    ]
    rates += [()] * (len(records) - len(rates))
    return [
        msgspec.structs.replace(record, orders=orders) for record, orders in zip(records, rates, strict=True)
    ]


def with_peer_access(records, works, ancestor):
    links = tuple(
        msgspec.structs.replace(link, peer_works=works, ancestor=ancestor) for link in records[0].links
    )
    return [msgspec.structs.replace(record, links=links) for record in records]


def fabric_machine(count=4, cluster="c1", clique=1, **changes):
    """Records of ranks on a machine whose GPUs belong to an NVLink fabric across machines."""
    records = gpu_machine(count, **{"fabric_works": True, **changes})
    gpus = tuple(
        msgspec.structs.replace(gpu, fabric_cluster=cluster, fabric_clique=clique, fabric_state="completed")
        for gpu in records[0].gpus
    )
    return [msgspec.structs.replace(record, gpus=gpus) for record in records]


def pairs(a, b):
    """NVLink bridges between GPUs 0 and 1, 2 and 3, ..."""
    return a // 2 == b // 2


def broken(records, which):
    """The same machine; the data check failed between GPUs a and b where ``which(a, b)``."""
    links = tuple(
        msgspec.structs.replace(link, peer_works=False)
        if which(*(int(uuid[-1]) for uuid in (link.a, link.b)))
        else link
        for link in records[0].links
    )
    return [msgspec.structs.replace(record, links=links) for record in records]


def one_bad_pair(records):
    """The same machine with one pair whose data check failed."""
    return broken(records, lambda a, b: (a, b) == (0, 1))


def partial_machine(count=4, near="PIX", **changes):
    """Peer access works between GPUs 0 and 1, 2 and 3, ..., which are near to each other, and only there."""
    records = pcie_machine(count, **changes)
    links = tuple(
        msgspec.structs.replace(
            link,
            peer_works=pairs(*(int(uuid[-1]) for uuid in (link.a, link.b))),
            ancestor=near if pairs(*(int(uuid[-1]) for uuid in (link.a, link.b))) else "SYS",
        )
        for link in records[0].links
    )
    return [msgspec.structs.replace(record, links=links) for record in records]


def two(machine, *arguments, **changes):
    return machine(*arguments, **changes) + machine(*arguments, host="node1", **changes)
