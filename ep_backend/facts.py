"""From the records of all ranks to the facts that profiles speak of. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from ep_backend.checks import OrderRates, order_matters, switch_group
from ep_backend.nvml import BEHIND_A_SWITCH, Link
from ep_backend.probe import Record
from ep_backend.profiles import Condition, version

# The NCCL_P2P_LEVELs for PCIe, by how far they reach, and how far two GPUs with a common ancestor are
# apart (NCCL, src/graph/topo.h: PATH_PIX ... PATH_SYS). GPUs of one board count as if a switch joined
# them, and host bridges of one NUMA node as one.
_LEVELS = ("LOC", "PIX", "PXB", "PHB", "SYS")
DISTANCE = {"LOC": 1, "PIX": 1, "PXB": 2, "PHB": 3, "NODE": 3, "SYS": 4}

# What NVIDIA asks for where NCCL shares memory of the host:
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html#shared-memory
LEAST_SHARED_MEMORY = 1 << 30

Pairs = Mapping[tuple[str, str], Link | None]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the records of a group say together, in the words of `profiles.Condition`. None: not known."""

    gpus: str
    several_gpus: bool
    nvlink: str | None
    peer_access: str | None
    peer_level: str | None
    pcie_switch: str | None
    several_hosts: bool
    hca: bool
    fabric: bool | None
    cuda_driver: str | None
    nccl: str | None
    shares_memory: bool  # all ranks see the same /dev/shm of one kernel
    hosts: int
    failed_links: tuple[Link, ...] = ()  # between the group's GPUs: the data check failed
    closed_links: tuple[Link, ...] = ()  # between the group's GPUs: the driver offers no peer access
    shared_memory_bytes: int | None = None  # of the smallest /dev/shm


def gather(records: Sequence[Record]) -> Facts:
    """Facts about the group. Only the GPUs that the group uses count, and the links between them."""
    hosts = _hosts(records)
    shared = {(_host(record), record.shared_memory) for record in records}
    pairs = [_pairs(host) for host in hosts.values()]
    failed, closed = _failed(pairs, records)
    return Facts(
        gpus="all" if all(record.used_gpus() for record in records) else "none",
        several_gpus=bool(_verdicts(pairs, lambda link: True)),
        nvlink=_share(pairs, lambda link: link.nvlink),
        peer_access=_share(pairs, lambda link: link.peer_works),
        pcie_switch=_share(pairs, lambda link: link.ancestor in BEHIND_A_SWITCH if link.ancestor else None),
        several_hosts=len(hosts) > 1,
        hca=all(any(record.hcas for record in host) for host in hosts.values()),
        peer_level=_peer_level(pairs),
        fabric=_fabric(records),
        cuda_driver=_lowest(record.cuda_driver for record in records),
        nccl=_lowest(record.versions.get("nccl", "") for record in records),
        shares_memory=len(shared) == 1,
        hosts=len(hosts),
        shared_memory_bytes=min(
            (r.shared_memory_bytes for r in records if r.shared_memory_bytes is not None), default=None
        ),
        failed_links=failed,
        closed_links=closed,
    )


def order_rates(records: Sequence[Record]) -> tuple[OrderRates, ...]:
    """What each rank knows of the orders in which just the group's GPUs store into each other."""
    used = {uuid for record in records for uuid in record.used_gpus()}
    return tuple(one for record in records for one in record.orders if set(one.gpus) == used)


def peer_group(records: Sequence[Record]) -> int:
    """How many ranks, one after another, have GPUs behind one PCIe switch, if as many behind each; else 1."""
    used = list(dict.fromkeys(uuid for record in records for uuid in record.used_gpus()))
    return switch_group(used, [link for record in records for link in record.links])


def unchecked(records: Sequence[Record]) -> bool:
    """Whether the choice depends on what nobody has tried out: some pairs of the group's GPUs are known to
    lack NVLink, and of one of these nothing else is known, or all work and the orders of stores were not
    compared."""
    links = [link for pair in (_pairs(host) for host in _hosts(records).values()) for link in pair.values()]
    known = [link for link in links if link is not None and link.nvlink is not None]
    used = {uuid for record in records for uuid in record.used_gpus()}
    if len(known) < len(links):
        return False
    between = [link for link in known if used.issuperset((link.a, link.b))]
    if any(not link.nvlink and link.peer_works is None for link in between):
        return True
    if len(_hosts(records)) > 1 or not all(link.peer_works for link in between):
        return False
    return order_matters(sorted(used), between) and not order_rates(records)


def neighbours(records: Sequence[Record], rank: int) -> tuple[str, ...]:
    """UUIDs of the GPUs that the group uses on the host of ``rank``."""
    host = _hosts(records)[_host(records[rank])]
    return tuple(sorted({uuid for record in host for uuid in record.used_gpus()}))


def nodes(records: Sequence[Record]) -> tuple[tuple[int, ...], ...]:
    """The ranks that share memory with each other, in order of rank; nodes in the order of their first
    ranks."""
    found: dict[tuple[tuple[str, str], str], list[int]] = {}
    for rank, record in enumerate(records):
        found.setdefault((_host(record), record.shared_memory), []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())


def islands(records: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    """UUIDs of the GPUs that the group uses, divided into islands inside which every pair reaches each
    other's memory: it has passed the data check or, if nobody could try, has NVLink. In the driver's order.

    Islands grow pair by pair, those with NVLink first: where A reaches B and B reaches C but A not C,
    somebody is left out.
    """
    order = list(dict.fromkeys(gpu.uuid for record in records for gpu in record.gpus))
    used = sorted(
        {uuid for record in records for uuid in record.used_gpus()},
        key=lambda uuid: (order.index(uuid) if uuid in order else len(order), uuid),
    )
    hosts = _hosts(records).values()
    links = {frozenset(pair): link for host in hosts for pair, link in _pairs(host).items()}
    pairs = [
        (not link.nvlink, a, b)
        for a, b in itertools.combinations(used, 2)
        if (link := links.get(frozenset((a, b)))) and link.peer_works is not False
        if link.peer_works or link.nvlink
    ]
    reaching = {frozenset(pair) for _, *pair in pairs}
    found: dict[str, tuple[str, ...]] = {uuid: (uuid,) for uuid in used}
    for _, a, b in sorted(pairs, key=lambda pair: pair[0]):
        joined = tuple(uuid for uuid in used if uuid in (*found[a], *found[b]))
        if all(frozenset(pair) in reaching for pair in itertools.combinations(joined, 2)):
            found |= dict.fromkeys(joined, joined)
    return tuple(dict.fromkeys(found.values()))


def parts(records: Sequence[Record]) -> tuple[tuple[int, ...], ...]:
    """The ranks of each island of GPUs, in order of rank."""
    return tuple(
        tuple(rank for rank, record in enumerate(records) if set(record.used_gpus()) & set(island))
        for island in islands(records)
    )


def uneven(nodes: Sequence[Sequence[int]]) -> str:
    """What is wrong with nodes that have different numbers of ranks; an empty text if they have not."""
    sizes = [len(ranks) for ranks in nodes]
    if len(set(sizes)) == 1:
        return ""
    return f"the nodes have {', '.join(map(str, sizes))} ranks; the same number on each was wanted"


def unmet(condition: Condition, facts: Facts) -> list[str]:
    """The parts of ``condition`` that do not hold, in words; an empty list means that it holds."""
    missing = []
    for name in Condition.__struct_fields__:
        wanted = getattr(condition, name)
        if wanted is None:
            continue
        if name.endswith(("_below", "_at_least")):
            what, below = (
                (name[: -len("_below")], True)
                if name.endswith("_below")
                else (name[: -len("_at_least")], False)
            )
            found = getattr(facts, what)
            ok = found is not None and (version(found) < version(wanted)) == below
        else:
            found = getattr(facts, name)
            ok = found == wanted
        if not ok:
            missing.append(f"{name} must be {word(wanted)} and is {word(found)}")
    return missing


def short_of_shared_memory(facts: Facts, transport: str) -> bool:
    """Whether NCCL goes through /dev/shm here, with ``transport`` chosen, and that is small. Transport host
    itself does not."""
    through_host = transport in ("host", "mixed", "collective") and facts.gpus == "all" and facts.several_gpus
    space = facts.shared_memory_bytes
    return through_host and facts.nvlink != "all" and space is not None and space < LEAST_SHARED_MEMORY


def reaches(level: str, link: Link) -> bool:
    """Whether NCCL_P2P_LEVEL=``level`` makes NCCL use peer access over ``link``. An unknown link is as long
    as can be, and an unknown level makes nothing."""
    if link.nvlink:
        return level == "NVL" or level in _LEVELS[1:]
    return level in _LEVELS and DISTANCE.get(link.ancestor, DISTANCE["SYS"]) <= _LEVELS.index(level)


def machine(record: Record) -> str:
    """Equal on all ranks of one machine, however it is divided by names."""
    return record.boot_id or record.host


def _host(record: Record) -> tuple[str, str]:
    """What counts as a machine of its own."""
    return machine(record), record.node


def _hosts(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    hosts: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        hosts.setdefault(_host(record), []).append(record)
    return hosts


def _pairs(records: Sequence[Record]) -> dict[tuple[str, str], Link | None]:
    """The pairs of GPUs that count in one host, with what all its ranks together know of them.

    One GPU alone is judged by its neighbours: they tell what machine it is.
    """
    known: dict[tuple[str, str], Link] = {}
    for link in (link for record in records for link in record.links):
        pair = (min(link.a, link.b), max(link.a, link.b))
        known[pair] = _worse(known.get(pair, link), link)
    used = sorted({uuid for record in records for uuid in record.used_gpus()})
    if len(used) == 1:
        return {pair: link for pair, link in known.items() if used[0] in pair}
    return {(a, b): known.get((a, b)) for i, a in enumerate(used) for b in used[i + 1 :]}


def _worse(a: Link, b: Link) -> Link:
    """What two ranks say of one pair: a failure counts, and any knowledge more than none."""

    def verdict(x: bool | None, y: bool | None) -> bool | None:
        return False if False in (x, y) else True if True in (x, y) else None

    return msgspec.structs.replace(
        a,
        nvlink=verdict(a.nvlink, b.nvlink),
        peer_works=verdict(a.peer_works, b.peer_works),
        ancestor=max(a.ancestor, b.ancestor, key=lambda name: (DISTANCE.get(name, 0), name)),
    )


def _failed(hosts: Iterable[Pairs], records: Sequence[Record]) -> tuple[tuple[Link, ...], tuple[Link, ...]]:
    """The used links without working peer access: where it is broken, and where the driver offers none."""
    used = {uuid for record in records for uuid in record.used_gpus()}
    directions = [one for record in records for one in record.directions]
    closed = {frozenset((one.source, one.target)) for one in directions if one.access is False}
    closed -= {frozenset((one.source, one.target)) for one in directions if one.broken}
    without = [
        link
        for host in hosts
        for pair, link in sorted(host.items(), key=lambda item: item[0])
        if link and link.peer_works is False and used.issuperset(pair)
    ]
    return (
        tuple(link for link in without if frozenset((link.a, link.b)) not in closed),
        tuple(link for link in without if frozenset((link.a, link.b)) in closed),
    )


def _fabric(records: Sequence[Record]) -> bool | None:
    """Whether the GPUs that count are in one partition of one fabric, and its handles were really exchanged.

    A fabric without a name is none: machines without one may report that theirs is complete.
    """
    works = {record.fabric_works for record in records}
    if works != {True}:
        return False if False in works else None
    domains = {
        (gpu.fabric_cluster, gpu.fabric_clique)
        for record in records
        for gpu in record.gpus
        if gpu.uuid in record.used_gpus()
    }
    return len(domains) == 1 and all(cluster for cluster, _ in domains)


def _peer_level(hosts: Iterable[Pairs]) -> str | None:
    """The longest NCCL_P2P_LEVEL within which every pair passed the data check; None if one is unknown."""
    links = [link for host in hosts for link in host.values()]
    reach: dict[bool, set[int]] = {True: set(), False: set()}
    for link in links:
        if link is None or link.peer_works is None or link.ancestor not in DISTANCE:
            return None
        reach[link.peer_works].add(DISTANCE[link.ancestor])
    nearest_failure = min(reach[False], default=len(_LEVELS))
    return _LEVELS[max((far for far in reach[True] if far < nearest_failure), default=0)] if links else None


def _share(hosts: Iterable[Pairs], judge: Callable[[Link], bool | None]) -> str | None:
    """How many pairs satisfy ``judge``: none, some, all; None if one is unknown."""
    verdicts = _verdicts(hosts, judge)
    if None in verdicts:
        return None
    if verdicts == {True}:
        return "all"
    return "some" if True in verdicts else "none"


def _verdicts(hosts: Iterable[Pairs], judge: Callable[[Link], bool | None]) -> set[bool | None]:
    return {None if link is None else judge(link) for host in hosts for link in host.values()}


def _lowest(texts: Iterable[str]) -> str | None:
    return min((text for text in texts if text), key=version, default=None)


def word(value: Any) -> str:
    return {None: "unknown", True: "true", False: "false"}.get(value, str(value))
