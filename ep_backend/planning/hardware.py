"""What is known of links between GPUs: every number with its source and whether it was measured. No code
decides by these numbers but `ep-backend plan`; on a machine at hand `ep-backend doctor` measures its own.

Rates are bytes per second that one GPU sends, one way, unless a name says otherwise.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from ep_backend.doctor.plan import AllReduces

UNKEPT: Final = "measured, raw data not kept"
Kind = Literal["specification", "measured", "measured, raw data not kept", "published", "model"]

H200 = "H200, docs/doctor.md (On two H200)"
HOST_MEMORY = "pinned memory of the host of two H200, PCIe Gen5, benchmarks/results/host-memory-2h200.json"
HOST_FLAG = "through pinned memory of the host, H200, PCIe Gen5"
NO_P2P = "two H200, PCIe Gen5, no peer access, benchmarks/results/doctor-2h200-no-peer-access.json"
CONSUMER = "https://github.com/sgl-project/sglang/pull/39605"
SGLANG = f"{CONSUMER}: NCCL over shared memory, two RTX 5070 Ti, PCIe Gen4 x16 (26 GB/s each way there)"
UNSURE = (
    "EP over host was measured on a server only. SMs load from host memory there, too, and on a consumer "
    f"board such loads may be much slower: {CONSUMER} blames NCCL's 1.9 GB/s on them"
)


class Number(msgspec.Struct, frozen=True):
    """Bytes per second, or seconds."""

    value: float
    kind: Kind
    source: str


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A way between the GPUs of one machine, or of one NVLink domain.

    ``stores``: what SMs reach into a peer's memory, and ``flag``: a flag one way; ``stores`` None: GPUs do
    not reach each other. ``staging``: without peer access, what SMs write into the host's memory and read
    from it at the same time, each way, when up to two GPUs do so and when more do (`host_rate`).
    ``all_reduces``: bytes per rank and seconds on two GPUs (`all_reduces_of`); ``all_reduces_shared``: the
    share of that rate which is left to each of more than two. ``unsure``: why
    ``staging`` may be far from true.
    """

    name: str
    title: str
    one_way: Number
    stores: Number | None = None
    staging: tuple[Number, Number] | None = None
    flag: Number
    all_reduces: tuple[tuple[float, float], ...]
    all_reduces_kind: Kind
    all_reduces_source: str
    all_reduces_shared: float = 1.0
    unsure: str = ""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile means here: links, the usual first ones of which ``usual`` are taken if none is named,
    and GPUs that one machine (or NVLink domain) can have. No links: ``why``. ``note``: what it leaves out."""

    links: tuple[str, ...]
    usual: int = 1
    most_gpus: int = 8
    why: str = ""
    note: str = ""


# Seed facts. NVIDIA states NVLink for both directions together, and PCIe is stated for one.
NVLINK5_BOTH_WAYS = 1.8e12
NVLINK4_BOTH_WAYS = 900e9
PCIE5_ONE_WAY = 64e9
PCIE4_ONE_WAY = 32e9
LANES = 16

STORES_NVLINK4 = 370e9
FLAG_NVLINK4_S = 0.73e-6
FLAG_HOST_S = 2.23e-6
HOST_BOTH_WAYS = 33e9  # the slower way: reading, while two GPUs also write
HOST_STORES_ONE, HOST_STORES_FOUR = 52.6e9, 39e9  # only storing: one GPU, each of four (raw data not kept)
HOST_SHARED = HOST_STORES_FOUR / HOST_STORES_ONE  # of the rate that is left to each of more than two: a model
EFFICIENCY = STORES_NVLINK4 / (NVLINK4_BOTH_WAYS / 2)  # 0.82; into host memory over PCIe Gen5 also 0.82

# benchmarks/results/doctor-2h200.json and doctor-2h200-no-peer-access.json.
NVLINK4_ALL_REDUCES = (
    (4096, 6.768e-6),
    (16384, 7.312e-6),
    (65536, 7.635e-6),
    (262144, 8.853e-6),
    (1048576, 14.365e-6),
    (4194304, 32.808e-6),
    (16777216, 75.632e-6),
    (67108864, 250.248e-6),
)
NO_P2P_ALL_REDUCES = (
    (4096, 10.323e-6),
    (16384, 11.141e-6),
    (65536, 15.157e-6),
    (262144, 35.566e-6),
    (1048576, 61.584e-6),
    (4194304, 167.200e-6),
    (16777216, 596.624e-6),
    (67108864, 2349.144e-6),
)


def _from_nvlink4(one_way: float, flag_s: float) -> tuple[tuple[float, float], ...]:
    """All-reduces of two GPUs on a link at which NCCL reaches the same share of the rate as on NVLink 4 and
    waits for two flags that take ``flag_s``."""
    more_bytes = one_way / (NVLINK4_BOTH_WAYS / 2)
    return tuple((n * more_bytes, t + 2 * (flag_s - FLAG_NVLINK4_S)) for n, t in NVLINK4_ALL_REDUCES)


def _published(small_s: float, rate: float) -> tuple[tuple[float, float], ...]:
    """A message of 10 KB, and many bytes."""
    return (10e3, small_s), (1e9, small_s + 1e9 / rate)


def _staging(share: float, kind: Kind, source: str) -> tuple[Number, Number]:
    rate = HOST_BOTH_WAYS * share
    return Number(rate, kind, source), Number(rate * HOST_SHARED, "model", f"{HOST_SHARED:.2f} of {source}")


_NVLINK = "https://www.nvidia.com/en-us/data-center/nvlink/"
_PCIE = "PCI-SIG: 16 lanes"
_SCALED = f"{EFFICIENCY:.2f} of the link, as measured on H200"
_RING = "NVLink 4's, with the bytes in the ratio of the links' rates and two slower flags"

_LINKS = (
    Link(
        name="nvlink5",
        title="NVLink 5 through switches (B200, GB200 NVL72), 1.8 TB/s both ways together",
        one_way=Number(NVLINK5_BOTH_WAYS / 2, "specification", _NVLINK),
        stores=Number(EFFICIENCY * NVLINK5_BOTH_WAYS / 2, "model", _SCALED),
        flag=Number(FLAG_NVLINK4_S, "model", f"as NVLink 4: {H200}"),
        all_reduces=_from_nvlink4(NVLINK5_BOTH_WAYS / 2, FLAG_NVLINK4_S),
        all_reduces_kind="model",
        all_reduces_source=_RING,
    ),
    Link(
        name="nvlink4",
        title="NVLink 4 through NVSwitches (H100, H200), 900 GB/s both ways together",
        one_way=Number(NVLINK4_BOTH_WAYS / 2, "specification", _NVLINK),
        stores=Number(STORES_NVLINK4, "measured", H200),
        flag=Number(FLAG_NVLINK4_S, "measured", H200),
        all_reduces=NVLINK4_ALL_REDUCES,
        all_reduces_kind="measured",
        all_reduces_source="two H200, benchmarks/results/doctor-2h200.json",
    ),
    *(
        Link(
            name=f"pcie{generation}",
            title=f"PCIe Gen{generation} x16 with peer access, {rate / 1e9:.0f} GB/s one way",
            one_way=Number(rate, "specification", _PCIE),
            stores=Number(EFFICIENCY * rate, "model", _SCALED),
            flag=Number(FLAG_HOST_S, "model", f"as measured {HOST_FLAG}"),
            all_reduces=_from_nvlink4(rate, FLAG_HOST_S),
            all_reduces_kind="model",
            all_reduces_source=_RING,
        )
        for generation, rate in ((5, PCIE5_ONE_WAY), (4, PCIE4_ONE_WAY))
    ),
    Link(
        name="pcie5-host",
        title="PCIe Gen5 x16 without peer access, through host memory, a server",
        one_way=Number(PCIE5_ONE_WAY, "specification", _PCIE),
        staging=_staging(1.0, "measured", HOST_MEMORY),
        flag=Number(FLAG_HOST_S, UNKEPT, HOST_FLAG),
        all_reduces=NO_P2P_ALL_REDUCES,
        all_reduces_kind="measured",
        all_reduces_source=NO_P2P,
        all_reduces_shared=HOST_SHARED,
    ),
    Link(
        name="pcie4-host",
        title="PCIe Gen4 x16 without peer access, through host memory",
        one_way=Number(PCIE4_ONE_WAY, "specification", _PCIE),
        staging=_staging(0.5, "model", f"half of PCIe Gen5: {HOST_MEMORY}"),
        flag=Number(FLAG_HOST_S, "model", f"as measured {HOST_FLAG}"),
        all_reduces=tuple((n / 2, t) for n, t in NO_P2P_ALL_REDUCES),
        all_reduces_kind="model",
        all_reduces_source=f"half the bytes in the time of: {NO_P2P}",
        all_reduces_shared=HOST_SHARED,
    ),
    *(
        Link(
            name=name,
            title=f"PCIe Gen4 x16 without peer access, a consumer machine on which NCCL moves {words}",
            one_way=Number(PCIE4_ONE_WAY, "specification", _PCIE),
            staging=_staging(0.5, "model", f"as a server, half of PCIe Gen5: {HOST_MEMORY}"),
            flag=Number(FLAG_HOST_S, "model", f"as measured {HOST_FLAG}"),
            all_reduces=_published(small_s, rate),
            all_reduces_kind="published",
            all_reduces_source=SGLANG,
            unsure=UNSURE,
        )
        for name, words, small_s, rate in (
            ("consumer", "1.9 GB/s (its default)", 39e-6, 1.9e9),
            ("consumer-memcpy", "12.5 GB/s (NCCL_SHM_USE_CUDA_MEMCPY=1)", 81e-6, 12.5e9),
        )
    ),
)
LINKS = {link.name: link for link in _LINKS}

_WITHOUT_P2P = ("pcie5-host", "consumer", "consumer-memcpy", "pcie4-host")
_AS_IF_NONE = (
    "planned as if no pair of GPUs reached each other (transport host; mixed, which is used, has no formula)"
)
PLACES = {
    "nvl72": Place(links=("nvlink5",), most_gpus=72),
    "nvswitch": Place(links=("nvlink4", "nvlink5")),
    "nvlink_pairs": Place(links=_WITHOUT_P2P, note=f"{_AS_IF_NONE}: the NVLink inside the pairs is not used"),
    "pcie_p2p": Place(links=("pcie5", "pcie4")),
    "pcie_partial": Place(
        links=_WITHOUT_P2P, note=f"{_AS_IF_NONE}: the peer access that some pairs have is not used"
    ),
    "pcie_blackwell": Place(links=_WITHOUT_P2P, usual=3),
    "pcie_rdma": Place(links=(), why="no number for a network is known here"),
    "cpu": Place(links=(), most_gpus=1 << 20),
}

# Transport cpu: what a core copies (benchmarks/results/cpu-2ranks.json: 20.1 GB/s with two cores).
CORE_COPY = Number(10e9, "measured", "a core of an AMD EPYC, benchmarks/results/cpu-2ranks.json")


def all_reduces_of(link: Link, gpus: int, busy: int = 0) -> AllReduces:
    """Times of NCCL's all-reduce on ``gpus`` GPUs, from those of two; ``busy``: GPUs of the machine that send
    at the same time, if they are more.

    T(W, n) = T(2, n / share * 2 (W - 1) / W) + 2 (W - 2) * flag: a ring sends 2 (W - 1) / W of the bytes from
    each GPU, which is all of them on two, in 2 (W - 1) steps. share: ``all_reduces_shared`` of the link if
    more than two GPUs are busy, otherwise 1. Exact for two.
    """
    sent = 2 * (gpus - 1) / gpus
    if max(gpus, busy) > 2:
        sent /= link.all_reduces_shared
    more_s = 2 * (gpus - 2) * link.flag.value
    return AllReduces([(n / sent, t + more_s) for n, t in link.all_reduces])


def host_rate(link: Link, gpus: int) -> Number | None:
    """What `ep_backend.doctor.plan.host_s` wants to know; None where peers reach each other."""
    return None if link.staging is None else link.staging[gpus > 2]


def host_of(generation: int | None, width: int | None, gpus: int) -> tuple[Number, Number] | None:
    """The same and the latency of a flag for GPUs on such PCIe links; None for links that are not here. Half
    of the lanes move half as much."""
    link = LINKS.get(f"pcie{generation}-host")
    rate = None if link is None else host_rate(link, gpus)
    if link is None or rate is None or not width or width > LANES:
        return None
    if width == LANES:
        return rate, link.flag
    share = width / LANES
    return Number(rate.value * share, "model", f"{share:g} of {rate.source}"), link.flag
