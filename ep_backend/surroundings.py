"""What files say about a machine: container, memory, IOMMU, place of its GPUs. Nothing raises."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Room(NamedTuple):
    """Bytes of memory that may still be taken, and the name of what limits them: equal for two processes if
    it is the same thing."""

    free: float
    limit: str


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


def memory_room(root: Path) -> Room:
    """By the tightest limit on this process's memory: the machine's, or that of a control group such as a
    container's. Caches of files count as free. Infinite if nothing is told."""
    machine = _numbers(root / "proc/meminfo").get("MemAvailable:", math.inf) * 1024
    return min([Room(machine, "this machine"), *_group_rooms(root)])


def _group_rooms(root: Path) -> Iterator[Room]:
    """Of the control groups that this process is in, inner and outer.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html: the names of the files.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if number == "0":
            base, names = root / "sys/fs/cgroup", ("max", "current", "")
        elif "memory" in kinds.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("limit_in_bytes", "usage_in_bytes", "total_")
        else:
            continue
        limit, used, prefix = names
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            # In a container the path may be the host's, of which only the top is seen here.
            with contextlib.suppress(ValueError, OSError):
                most = int(_text(folder / f"memory.{limit}"))
                taken = int(_text(folder / f"memory.{used}"))
                kept = _numbers(folder / "memory.stat")
                files = sum(kept.get(f"{prefix}{state}_file", 0) for state in ("active", "inactive"))
                name = f"control group {folder.name} (inode {os.stat(folder).st_ino})"
                yield Room(most - taken + files, name)
            if folder == base:
                break


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


def _numbers(path: Path) -> dict[str, int]:
    """Of lines that are a name, a number and perhaps a unit."""
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
