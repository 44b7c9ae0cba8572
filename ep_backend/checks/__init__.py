"""Whether GPUs really reach each other's memory: tried out in a child process and remembered until the next
boot.

`results` never raises, is bounded in time, and initialises neither torch nor CUDA in the calling process.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ep_backend.checks import cache, supervise
from ep_backend.checks.data import Direction, OrderRates, Results
from ep_backend.nvml import BEHIND_A_SWITCH, Gpu, Link

__all__ = [
    "DEADLINE_S",
    "Direction",
    "OrderRates",
    "Results",
    "has_fabric",
    "order_matters",
    "results",
    "staged",
    "switch_group",
    "testable",
]

DEADLINE_S = 90.0  # for everything, waiting for another process that does the same included
RETRY_S = 600.0  # what could not be tried is not tried again before that: other ranks ask, too

# Bytes per second of one PCIe lane, by generation, after its encoding.
_LANE = {1: 250e6, 2: 500e6, 3: 985e6, 4: 1969e6, 5: 3938e6, 6: 7563e6}


def results(
    gpus: Sequence[Gpu],
    links: Sequence[Link],
    driver: str,
    boot_id: str,
    *,
    among: Iterable[str] | None = None,
    fabric: Iterable[str] | None = None,
    fresh: bool = False,
    deadline_s: float = DEADLINE_S,
    environ: Mapping[str, str] | None = None,
) -> Results:
    """What is known of this machine's GPUs; what is asked for and not known yet is tried out. Never raises.

    ``gpus``, ``links``: all of the machine. ``among``: UUIDs between which every direction must be known and,
    if all work and it matters, which order of stores is faster; ``fabric``: those whose fabric handles must
    be; None: all that can be tested, so that () and () only look up. ``fresh``: try it out again whatever is
    known.
    """
    try:
        environ = dict(os.environ) if environ is None else environ
        can = testable(gpus)
        some = set(can if among is None else among)
        some_fabric = set(can if fabric is None else fabric)
        wanted = [uuid for uuid in can if uuid in some]
        with_fabric = [
            gpu.uuid for gpu in gpus if has_fabric(gpu) and gpu.uuid in some_fabric.intersection(can)
        ]
        # Without a boot id nobody could tell whether a machine was started anew.
        place = cache.folder(environ) if boot_id and (len(can) > 1 or with_fabric) else None
        store = cache.Cache(place, gpus, cache.identity(gpus, links, driver, boot_id))
        asked = _Asked(
            pairs=tuple(itertools.permutations(wanted, 2)),
            fabric=tuple(with_fabric),
            order=OrderRates(gpus=tuple(wanted), group=switch_group(wanted, links))
            if order_matters(wanted, links)
            else None,
        )
        return _results(store, asked, fresh, time.monotonic() + deadline_s, environ)
    except Exception as error:
        return Results(problems=(f"the checks of peer access broke: {type(error).__name__}: {error}",))


def testable(gpus: Sequence[Gpu]) -> list[str]:
    """UUIDs of the GPUs that CUDA can be asked for by UUID and that can have peers: not in slices (MIG)."""
    return [gpu.uuid for gpu in gpus if gpu.uuid.startswith("GPU-") and not gpu.mig]


def order_matters(gpus: Sequence[str], links: Iterable[Link]) -> bool:
    """Whether it may matter in which order these GPUs, by UUID, store into each other: with two there is but
    one, and NVLink has the bandwidth for any."""
    return len(gpus) > 2 and any(link.nvlink is False for link in links if {link.a, link.b} <= set(gpus))


def switch_group(gpus: Sequence[str], links: Iterable[Link]) -> int:
    """How many GPUs, one after another in ``gpus``, are behind one PCIe switch, if as many are behind each; 1
    if not, or if all are behind one."""
    near = {frozenset((link.a, link.b)) for link in links if link.ancestor in BEHIND_A_SWITCH}
    for size in range(2, len(gpus) // 2 + 1):
        if len(gpus) % size == 0 and all(
            (frozenset((gpus[i], gpus[j])) in near) == (i // size == j // size)
            for i, j in itertools.combinations(range(len(gpus)), 2)
        ):
            return size
    return 1


def has_fabric(gpu: Gpu) -> bool:
    """Whether the driver says that the GPU belongs to an NVLink fabric across machines.

    Machines without one may report that theirs is complete, with a cluster of zeros.
    """
    return gpu.fabric_state == "completed" and bool(gpu.fabric_cluster)


def pcie_rate(gpu: Gpu) -> float | None:
    """Bytes per second that the GPU's PCIe link carries, one way; None if the link is not known."""
    if gpu.pcie_generation not in _LANE or not gpu.lanes:
        return None
    return _LANE[gpu.pcie_generation] * gpu.lanes


def staged(direction: Direction, source: Gpu, target: Gpu) -> str:
    """A sentence if stores reach ``target`` far slower than PCIe could carry them; else an empty text.

    Some boards stage peer access through host memory without saying so, at a fifteenth of the speed.
    """
    rates = [rate for gpu in (source, target) if (rate := pcie_rate(gpu)) is not None]
    speed = direction.store_bytes_per_s
    if len(rates) < 2 or speed is None or speed > min(rates) / 8:
        return ""
    return (
        f"stores of {source.uuid} into {target.uuid} arrive at {speed / 1e9:.1f} GB/s, where PCIe carries "
        f"{min(rates) / 1e9:.0f} GB/s: this machine seems to stage peer access through the host"
    )


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be known. ``order``: of the GPUs between which all ``pairs`` are."""

    pairs: tuple[supervise.Pair, ...] = ()
    fabric: tuple[str, ...] = ()
    order: OrderRates | None = None

    @property
    def nothing(self) -> bool:
        return not (self.pairs or self.fabric or self.order)


def _results(
    store: cache.Cache, asked: _Asked, fresh: bool, end: float, environ: Mapping[str, str]
) -> Results:
    entry = store.load()
    if _unanswered(entry, asked, fresh).nothing:
        return _view(entry, asked.fabric)
    with store.locked(end) as mine:
        if not mine:
            problem = "another process was trying out peer access and did not finish in time"
            return _view(store.load(), asked.fabric, problem)
        entry = store.load()  # perhaps somebody else has just done it
        left = _unanswered(entry, asked, fresh)
        if not left.nothing:
            entry = _tried(entry, left, end, environ)
            store.save(entry)
    return _view(entry, asked.fabric)


def _unanswered(entry: cache.Entry, asked: _Asked, fresh: bool) -> _Asked:
    if fresh:
        return asked
    old = not 0 <= time.time() - entry.at < RETRY_S
    answered = {(d.source, d.target) for d in entry.directions if d.works is not None or not old}
    pairs = tuple(pair for pair in asked.pairs if pair not in answered)
    fabric = tuple(
        gpu for gpu in asked.fabric if entry.fabric.get(gpu) is None and (old or gpu not in entry.fabric)
    )
    measured = {one.gpus for one in entry.orders if one.failed or not one.problem or not old}
    may_work = {(d.source, d.target) for d in entry.directions if d.works}.union(pairs)
    order = asked.order
    if order is not None and (order.gpus in measured or not may_work.issuperset(asked.pairs)):
        order = None
    return _Asked(pairs=pairs, fabric=fabric, order=order)


def _tried(entry: cache.Entry, asked: _Asked, end: float, environ: Mapping[str, str]) -> cache.Entry:
    compared = asked.order.gpus if asked.order else ()
    gpus = list(dict.fromkeys([*itertools.chain.from_iterable(asked.pairs), *asked.fabric, *compared]))
    outcome = supervise.run(
        gpus, asked.pairs, asked.fabric, order=asked.order, environ=environ,
        deadline_s=max(end - time.monotonic(), 0.0),
    )  # fmt: skip
    directions = {(d.source, d.target): d for d in entry.directions} | outcome.directions
    orders = {one.gpus: one for one in (*entry.orders, outcome.order) if one is not None}
    return cache.Entry(
        identity=entry.identity,
        at=time.time(),
        directions=tuple(directions[pair] for pair in sorted(directions)),
        orders=tuple(orders[some] for some in sorted(orders)),
        fabric=entry.fabric | outcome.fabric,
        problems=tuple(outcome.problems),
    )


def _view(entry: cache.Entry, fabric: Iterable[str], *problems: str) -> Results:
    answers = {entry.fabric.get(gpu) for gpu in fabric}
    return Results(
        directions=entry.directions,
        orders=entry.orders,
        fabric_works=False if False in answers else None if None in answers or not answers else True,
        problems=(*entry.problems, *problems),
    )
