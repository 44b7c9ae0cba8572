"""What the checks find out, and the lines in which the worker reports it. Needs no torch."""

from __future__ import annotations

import msgspec


class Direction(msgspec.Struct, frozen=True, kw_only=True):
    """One ordered pair of GPUs, by UUID: what ``source`` can do to the memory of ``target``."""

    source: str
    target: str
    access: bool | None = None  # the driver offers it (cudaDeviceCanAccessPeer)
    # What source stored, and announced by a flag, was read by target unchanged. None: not tried;
    # without access False
    works: bool | None = None
    problem: str = ""  # why it does not work or was not tried, in one sentence
    store_bytes_per_s: float | None = None  # stored by the SMs of source
    copy_bytes_per_s: float | None = None  # moved by a copy engine
    latency_s: float | None = None  # of a flag, one way: half a round trip
    atomics: bool | None = None  # cudaDevP2PAttrNativeAtomicSupported; recorded, never needed

    @property
    def broken(self) -> bool:
        """Whether the driver offers access and it does not work. Where it offers none, nothing is wrong."""
        return self.works is False and self.access is not False


class OrderRates(msgspec.Struct, frozen=True, kw_only=True):
    """How fast ``gpus`` store into each other's memory, all at the same time, in the two orders that
    transport ``peer`` knows: bytes per second of each GPU. Without rates: why not, in ``problem``."""

    gpus: tuple[str, ...]  # UUIDs, in the driver's order
    group: int = 1  # so many of them, one after another, are behind one PCIe switch
    together_bytes_per_s: float | None = None  # a piece to one GPU, the next piece to the next
    # All to one GPU, then all to the next, so that each is stored into by one other at a time, and all of a
    # group store into one group
    staggered_bytes_per_s: float | None = None
    failed: bool = False  # the process that measured it hung or died
    problem: str = ""

    @property
    def gain(self) -> float | None:
        """How many times faster the staggered order was."""
        if not self.together_bytes_per_s or self.staggered_bytes_per_s is None:
            return None
        return self.staggered_bytes_per_s / self.together_bytes_per_s


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a machine. ``fabric_works``: fabric handles were exported and imported; None: not
    tried."""

    directions: tuple[Direction, ...] = ()
    orders: tuple[OrderRates, ...] = ()
    fabric_works: bool | None = None
    problems: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is asked to do. ``gpus``: UUIDs in the order of CUDA_VISIBLE_DEVICES. ``order``: GPUs
    between which the orders of stores are compared, if all that is tried works; None: no comparison."""

    gpus: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    fabric: tuple[str, ...]
    order: OrderRates | None
    limit_s: float  # it ends by itself after this time


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The worker turns to a direction; with an empty ``target`` to the fabric handle of one GPU; with both
    empty to the orders of stores."""

    source: str = ""
    target: str = ""


class Done(msgspec.Struct, frozen=True, tag="done"):
    direction: Direction


class Fabric(msgspec.Struct, frozen=True, tag="fabric"):
    """``works`` None: not tried."""

    gpu: str
    works: bool | None
    problem: str = ""


class Order(msgspec.Struct, frozen=True, tag="order"):
    rates: OrderRates


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Why nothing can be tried here."""

    text: str


Line = Begin | Done | Fabric | Order | Note
