"""What helps NCCL where its warm-up failed, or where it is slow without peer access. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ep_backend import checks
from ep_backend.checks import Direction
from ep_backend.doctor.warmup import WarmUp
from ep_backend.facts import reaches
from ep_backend.planning.hardware import CONSUMER
from ep_backend.probe import Record
from ep_backend.select import Decision

_NEVER = "export NCCL_P2P_DISABLE=1 (never direct access); then ep-backend doctor again"
_PIX_FIRST = (
    "export NCCL_P2P_LEVEL=PIX (direct access only behind one PCIe switch), or if that fails too, " + _NEVER
)
CUMEM_HOST = "https://github.com/NVIDIA/nccl/issues/1838"
SLOW = 8  # times less than PCIe carries; a server without peer access reaches half of it
MEMCPY = (
    "without peer access its kernels read host memory, which is slow on some boards. "
    "NCCL_SHM_USE_CUDA_MEMCPY=1 took two RTX 5070 Ti from 1.9 to 12.5 GB/s in all-reduces of 20 MB "
    f"(prefill), and from 39 to 81 us in those of 10 KB (decode): {CONSUMER}"
)


def reaches_broken(level: str, record: Record, directions: Sequence[Direction]) -> bool:
    """Whether NCCL_P2P_LEVEL=``level`` makes NCCL use one of ``directions`` whose data check failed."""
    broken = {frozenset((one.source, one.target)) for one in directions if one.broken}
    return any(frozenset((link.a, link.b)) in broken and reaches(level, link) for link in record.links)


def less_access(record: Record, directions: Sequence[Direction]) -> str:
    """What to export so that NCCL uses less peer access between the GPUs in use: level PIX only where that
    leaves some out and keeps none that is broken."""
    used = set(record.used_gpus())
    closed = {frozenset((one.source, one.target)) for one in directions if one.access is False}
    farther = any(
        used.issuperset((link.a, link.b))
        and frozenset((link.a, link.b)) not in closed
        and not reaches("PIX", link)
        for link in record.links
    )
    return _PIX_FIRST if farther and not reaches_broken("PIX", record, directions) else _NEVER


def cure(
    record: Record, decision: Decision | None, directions: Sequence[Direction], environ: Mapping[str, str]
) -> str:
    """What to try after a warm-up that failed: less peer access, if NCCL could have used any.

    ``directions``: between the GPUs in use.
    """
    level = _level(decision, environ)
    reachable = not directions or any(one.access is not False for one in directions)
    if level != "LOC" and reachable:
        # PIX would loosen these.
        return _NEVER if level in ("NVL", "PIX") else less_access(record, directions)
    size = record.shared_memory_bytes
    found = "size unknown" if size is None else f"{size >> 20} MiB here"
    tries = [f"a larger /dev/shm ({found}; docker run --ipc=host)"]
    if environ.get("NCCL_CUMEM_HOST_ENABLE", "").strip() != "0":
        tries.append(f"export NCCL_CUMEM_HOST_ENABLE=0 ({CUMEM_HOST})")
    return (
        "peer access is not the cause, since NCCL uses none here. Read what NCCL_DEBUG=INFO ep-backend "
        f"doctor logs; then try, one by one, {', '.join(tries)}, a newer driver"
    )


def slow(record: Record, warm_up: WarmUp, directions: Sequence[Direction], environ: Mapping[str, str]) -> str:
    """A sentence if large all-reduces without peer access are far slower than PCIe; else an empty text."""
    used = set(record.used_gpus())
    carried = [checks.pcie_rate(gpu) for gpu in record.gpus if gpu.uuid in used]
    known = [rate for rate in carried if rate is not None]
    measured = [one for one in warm_up.all_reduces if one.ranks == warm_up.ranks]
    asked = environ.get("NCCL_SHM_USE_CUDA_MEMCPY", "").strip()
    if not measured or not known or not directions or any(one.works for one in directions) or asked:
        return ""
    largest = max(measured, key=lambda one: one.bytes)
    # What a ring sends from each GPU.
    rate = largest.bytes * 2 * (warm_up.ranks - 1) / warm_up.ranks / largest.seconds
    if rate > min(known) / SLOW:
        return ""
    carries = f"{min(known) / 1e9:.0f} GB/s"
    return f"NCCL moves {rate / 1e9:.1f} GB/s in large all-reduces, where PCIe carries {carries}"


def _level(decision: Decision | None, environ: Mapping[str, str]) -> str:
    """NCCL_P2P_LEVEL as the warm-up had it; LOC, which is never, where peer access was disabled."""
    if environ.get("NCCL_P2P_DISABLE", "").strip() == "1":
        return "LOC"
    wanted = {item.name: item.value for item in decision.env} if decision else {}
    return environ.get("NCCL_P2P_LEVEL", wanted.get("NCCL_P2P_LEVEL", "")).strip()
