"""Which GPUs a process may use, and which of them is its "cuda:1"."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ep_backend import env
from ep_backend.nvml import Gpu


def of_proc(root: Path) -> tuple[Gpu, ...]:
    """GPUs as the kernel driver lists them: all that is known without NVML."""
    gpus = []
    for information in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", information.read_text(), re.MULTILINE))
        if fields.get("GPU UUID"):
            gpus.append(
                Gpu(uuid=fields["GPU UUID"], name=fields.get("Model", ""), bus_id=information.parts[-2])
            )
    return tuple(gpus)


def visible(names: Sequence[str], environ: Mapping[str, str], problems: list[str]) -> tuple[str, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: in its order, ending at the first entry that names nothing.

    -1 is the usual way to say that on purpose, and no problem.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(names)
    found: list[str] = []
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        if entry.startswith("MIG-"):
            found.append(entry)  # a slice of a GPU: no links to others, and not described further
            continue
        if entry == "-1":
            break
        if entry.isdecimal():
            matches = [names[int(entry)]] if int(entry) < len(names) else []
        else:
            matches = [name for name in names if name.startswith(entry)]
        if len(matches) != 1:
            problems.append(
                f"CUDA_VISIBLE_DEVICES: {entry!r} names no GPU here; it and what follows it is not used"
            )
            break
        found.append(matches[0])
    return tuple(found)


def doubt(gpus: Sequence[Gpu], environ: Mapping[str, str], device: str) -> str:
    """A sentence if ``device`` ("cuda:1"; empty: all visible ones) may be another GPU than it is taken for.

    NVML numbers GPUs by their place on the bus. CUDA puts the fastest first, by a measure that it does not
    tell, so that the numbers agree for sure only among GPUs of one kind.
    """
    if len({gpu.name for gpu in gpus if gpu.name}) < 2 or device == "cpu":
        return ""
    if env.get("CUDA_DEVICE_ORDER", environ) == "PCI_BUS_ID" or (device and _running_cuda()):
        return ""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    numbers = device != "" if listed is None else any(part.strip().isdecimal() for part in listed.split(","))
    if not numbers:
        return ""
    return (
        "this machine has different GPUs, and CUDA may number them otherwise than by their place on the bus: "
        "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID in CUDA_VISIBLE_DEVICES"
    )


def _running_cuda() -> Any:
    """The module torch if it has started CUDA in this process; else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def uuid_of(device: str, visible: tuple[str, ...], problems: list[str]) -> str:
    """The UUID of "cuda" or "cuda:1"; ``device`` itself, with a problem, where it cannot be told."""
    kind, _, ordinal = device.partition(":")
    if kind != "cuda":
        problems.append(f"device {device!r} is neither cpu nor cuda")
        return device
    if torch := _running_cuda():
        # CUDA may number the GPUs otherwise than NVML does; once it runs, it can be asked.
        index = int(ordinal) if ordinal else torch.cuda.current_device()
        uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
        if uuid:
            return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    index = int(ordinal or 0)
    if index < len(visible):
        return visible[index]
    problems.append(f"device {device!r} is not among the {len(visible)} GPUs that this process may use")
    return device
