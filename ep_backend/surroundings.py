"""What files say about a machine: its container, its IOMMU, the place of its GPUs. Nothing raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path


def container(root: Path, environ: Mapping[str, str]) -> str:
    """kubernetes, docker, podman, other, or empty outside containers."""
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    groups = _text(root / "proc/1/cgroup")
    for word, kind in (("kubepods", "kubernetes"), ("docker", "docker"), ("libpod", "podman")):
        if word in groups:
            return kind
    return "other" if any(word in groups for word in ("containerd", "lxc", "machine.slice")) else ""


def iommu(root: Path, bus_ids: Iterable[str]) -> str:
    """How the IOMMU treats the GPUs: "translated" (if any is), "passthrough", "off", or empty: not known.

    https://docs.kernel.org/admin-guide/abi-testing.html: /sys/kernel/iommu_groups/<group>/type
    """
    devices = [place for bus_id in bus_ids if (place := device(root, bus_id)).is_dir()]
    types = [_text(place / "iommu_group/type").strip() for place in devices]
    if any(kind.startswith("DMA") for kind in types):
        return "translated"
    if "identity" in types:
        return "passthrough"
    without = [place for place in devices if not (place / "iommu_group").exists()]
    return "off" if devices and len(without) == len(devices) else ""


def numa_node(root: Path, bus_id: str) -> int | None:
    """The NUMA node next to a GPU; None where there is one only, or none is told."""
    with contextlib.suppress(ValueError):
        node = int(_text(device(root, bus_id) / "numa_node"))
        return node if node >= 0 else None
    return None


def local_cpus(root: Path, bus_id: str) -> set[int]:
    """CPUs next to a GPU; empty where none are told.

    https://docs.kernel.org/admin-guide/abi-testing.html: local_cpulist, for example "0-15,32-47"
    """
    cpus: set[int] = set()
    with contextlib.suppress(ValueError):
        for part in _text(device(root, bus_id) / "local_cpulist").strip().split(","):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def device(root: Path, bus_id: str) -> Path:
    """The folder of a PCIe device. NVML writes eight digits of the domain, the kernel four."""
    domain, _, rest = bus_id.lower().partition(":")
    return root / "sys/bus/pci/devices" / f"{domain[-4:]}:{rest}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
