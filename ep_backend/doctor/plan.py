"""Expected time of dispatch + combine for a model's shape, from what was measured on the machine. Pure.

The formulas count bytes and add what does not depend on bytes. Their constants were fitted to the kept
measurements (``benchmarks/results``: 2 and 4 H200 joined by NVLink, 2 through memory of the host, and CPUs),
which a test compares with them; docs/doctor.md says how far they carry. Everywhere else they are a model, and
``basis`` says so.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import msgspec

SCALE_BLOCK = 128  # elements of an fp8 row that share one fp32 scale
DTYPES = ("bf16", "fp8")

# Transport peer.
FLIGHTS = 4  # one-way latencies of a round trip: the rows' way out and back, and the flag's, in both phases
KERNELS_S = 7.3e-6  # launches, loads, routing and sums of a round trip
QUANTISE_S = 0.5e-6  # fp8 in dispatch
OWN_ROWS = 0.25  # work on a token inside its GPU, in rows on the link
SM_BYTES_PER_S = 11e9  # that one multiprocessor moves, if there are too few of them to fill the link

# Transport host: the same flights, through memory of the host.
HOST_KERNELS_S = 9.5e-6
HOST_QUANTISE_S = 2.5e-6
HOST_ROW_BYTES = 768  # what a token costs at each receiver beside its two rows, in bytes on the way

# By transport: GPUs, hidden size, experts and top-k, and tokens up to which measurements are kept (on H200).
KEPT = {
    "peer": frozenset({(2, 2048, 128, 8), (2, 4096, 128, 8), (2, 7168, 256, 8), (4, 7168, 256, 8)}),
    "host": frozenset({(2, 2048, 128, 8), (2, 7168, 256, 8)}),
}
KEPT_TOKENS = 4096
CHECKED = "model; within 30% of what was measured on as many H200 with this shape"
# The model of NCCL against the same files: the largest errors, all with peer access.
NCCL_TOO_FAST, NCCL_IN_GRAPH = 0.35, 4.4
NCCL_ERROR = (
    f"on H200 up to {NCCL_TOO_FAST:.0%} below single calls, and a CUDA graph took up to {NCCL_IN_GRAPH} "
    "times as long"
)
# Of transport collective on GPUs.
COLLECTIVE = "too few of NCCL's all-to-alls were measured to fit a formula"

# Transport cpu. With more ranks than cores, ranks wait for each other's turn on a core.
CPU_WAIT_S = 115e-6


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What counts of a model: elements of a row, experts of all ranks, experts of a token, MoE layers."""

    name: str
    hidden: int
    experts: int
    topk: int
    layers: int = 1


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """Time of one dispatch + combine of one layer. ``way``: a transport, or "nccl", which is all-gather
    + reduce-scatter, what engines do by themselves. ``seconds`` None: no formula or no measurement; ``basis``
    says what it rests on or what is missing."""

    shape: str
    tokens: int  # per rank
    dtype: str  # of dispatched rows
    way: str
    seconds: float | None
    basis: str


class AllReduces:
    """Time of an all-reduce of any size, between and beyond the sizes that were measured."""

    def __init__(self, measured: Sequence[tuple[float, float]]) -> None:
        """``measured``: at least one pair of bytes per rank and seconds."""
        self._bytes, self._seconds = zip(*sorted(measured), strict=True)

    @property
    def launch_s(self) -> float:
        """Of the smallest: what a collective costs without its bytes."""
        return float(self._seconds[0])

    def __call__(self, size: float) -> float:
        """Linear between two measured sizes; the smallest's below all, the largest's rate above all."""
        number = bisect.bisect_left(self._bytes, size)
        if number == 0:
            return self.launch_s
        if number == len(self._bytes):
            return float(self._seconds[-1] * size / self._bytes[-1])
        share = (size - self._bytes[number - 1]) / (self._bytes[number] - self._bytes[number - 1])
        return float(self._seconds[number - 1] + share * (self._seconds[number] - self._seconds[number - 1]))


def rows_per_token(shape: Shape, ranks: int) -> tuple[float, float]:
    """Other ranks, and all ranks, that hold one of a token's experts: expected with uniform routing.

    A rank with n of E experts holds none of a token's k with probability C(E-n, k) / C(E, k). Experts are
    dealt out as `EpConfig.expert_ranks` does it; averages over the token's own rank.
    """
    base, more = divmod(shape.experts, ranks)
    sizes = [base + (rank < more) for rank in range(ranks)]
    ways = math.comb(shape.experts, shape.topk)
    everywhere = sum(1 - math.comb(shape.experts - size, shape.topk) / ways for size in sizes)
    return everywhere * (ranks - 1) / ranks, everywhere


def checked(way: str, shape: Shape, ranks: int, tokens: int) -> bool:
    """Whether kept measurements of ``way`` on H200 hold this shape; the machine at hand may be another."""
    kept = KEPT.get(way, frozenset())
    return (ranks, shape.hidden, shape.experts, shape.topk) in kept and tokens <= KEPT_TOKENS


def row_bytes(hidden: int, dtype: str) -> tuple[int, int]:
    """Bytes of a dispatched row with its scales, and of a row that combine returns (bf16)."""
    back = 2 * hidden
    return (hidden + -(-hidden // SCALE_BLOCK) * 4 if dtype == "fp8" else back), back


def peer_s(
    shape: Shape,
    ranks: int,
    tokens: int,
    dtype: str,
    *,
    bytes_per_s: float,
    latency_s: float,
    sms: int | None = None,
) -> float:
    """Seconds of dispatch + combine over transport peer.

    FLIGHTS * latency_s + KERNELS_S [+ QUANTISE_S] + tokens * (r + OWN_ROWS) * (b + w) / rate, with r other
    ranks per token (`rows_per_token`), b and w bytes of a row (`row_bytes`), and rate = ``bytes_per_s``, at
    which a GPU stores into its peers, but no more than SM_BYTES_PER_S for each of ``sms`` multiprocessors
    (None: enough of them). ``latency_s``: of a flag, one way.
    """
    away, _ = rows_per_token(shape, ranks)
    rate = bytes_per_s if sms is None else min(bytes_per_s, sms * SM_BYTES_PER_S)
    fixed = FLIGHTS * latency_s + KERNELS_S + (QUANTISE_S if dtype == "fp8" else 0.0)
    return fixed + tokens * (away + OWN_ROWS) * sum(row_bytes(shape.hidden, dtype)) / rate


def host_s(
    shape: Shape, ranks: int, tokens: int, dtype: str, *, bytes_per_s: float, latency_s: float
) -> float:
    """Seconds of dispatch + combine over transport host.

    FLIGHTS * latency_s + HOST_KERNELS_S [+ HOST_QUANTISE_S] + tokens * r * (b + w + HOST_ROW_BYTES) / rate,
    with r, b and w as for `peer_s`; own rows do not leave the GPU. rate = ``bytes_per_s``: what the SMs of a
    GPU write into the host's memory and read from it at the same time, each way, while all GPUs do so (the
    slower way). ``latency_s``: of a flag through that memory, one way.
    """
    away, _ = rows_per_token(shape, ranks)
    fixed = FLIGHTS * latency_s + HOST_KERNELS_S + (HOST_QUANTISE_S if dtype == "fp8" else 0.0)
    return fixed + tokens * away * (sum(row_bytes(shape.hidden, dtype)) + HOST_ROW_BYTES) / bytes_per_s


def cpu_s(shape: Shape, ranks: int, tokens: int, dtype: str, *, copy_bytes_per_s: float, cpus: int) -> float:
    """Seconds of dispatch + combine over transport cpu.

    CPU_WAIT_S * s^2 + s * bytes / (2 * copy_bytes_per_s), with s = ranks / cpus, at least 1, and the bytes of
    docs/benchmarking.md: (M + R) b to dispatch, (3 R + M) w to combine, for M tokens and R rows of all ranks.
    ``copy_bytes_per_s``: of all cores together, large buffers; a copied byte is read and written.
    """
    _, everywhere = rows_per_token(shape, ranks)
    row, back = row_bytes(shape.hidden, dtype)
    total = ranks * tokens * ((1 + everywhere) * row + (3 * everywhere + 1) * back)
    crowded = max(1.0, ranks / cpus)
    return CPU_WAIT_S * crowded**2 + crowded * total / (2 * copy_bytes_per_s)


def nccl_s(shape: Shape, ranks: int, tokens: int, dtype: str, all_reduces: AllReduces) -> float:
    """Seconds of all-gather of rows, ids and weights + reduce-scatter of sums.

    A ring's all-reduce of n bytes is a reduce-scatter and an all-gather of n bytes, so the rows of all ranks
    cost what their all-reduce costs, in the share of the bytes that are left with fp8; the three other
    launches cost what the smallest all-reduce costs.
    """
    row, back = row_bytes(shape.hidden, dtype)
    return all_reduces(ranks * tokens * (row + back) / 2) + 3 * all_reduces.launch_s
