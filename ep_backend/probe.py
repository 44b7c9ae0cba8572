"""What one rank finds out about its machine: `probe() -> Record`.

The probe never raises and never takes longer than its deadline allows: what cannot be found out is left
empty, with a sentence in ``Record.problems``. It does not import torch and does not initialise CUDA.
Everything is keyed by GPU UUID, since ordinals mean different GPUs in different processes. Decisions are made
elsewhere, from the records of all ranks (`ep_backend.select`).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ep_backend import __version__, env, nvml, profiles

DEADLINE_S = 5.0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's view, as plain data: it can be pickled, sent as JSON, compared, and written by hand."""

    host: str = ""
    boot_id: str = ""  # one per running kernel: equal in all containers of one machine
    # Identity of the mounted /dev/shm and of the network namespace, in which the sockets are named that hand
    # windows over: ranks that differ here share no memory.
    shared_memory: str = ""
    shared_memory_bytes: int | None = None
    cpus: int = 0  # CPUs this process may run on
    versions: dict[str, str] = {}  # ep_backend, torch, nccl: must be equal on all ranks
    driver: str = ""  # NVIDIA kernel driver, for example "580.65.06"
    cuda_driver: str = ""  # CUDA version that the driver serves, for example "13.0"
    # "cpu", or the UUID of the GPU this rank uses ("cuda:1" where the UUID cannot be told); empty: not known
    device: str = ""
    gpus: tuple[nvml.Gpu, ...] = ()  # every GPU of the machine that the driver shows us
    visible: tuple[str, ...] = ()  # UUIDs of the GPUs this process may use
    links: tuple[nvml.Link, ...] = ()  # every pair of ``gpus`` that could be asked about
    hcas: tuple[str, ...] = ()  # active InfiniBand/RoCE ports, as "device:port"
    fabric_works: bool | None = None  # a fabric handle was really exported and imported; None: not tried
    environment: dict[str, str] = {}  # registered variables that steer the choice, as they were found
    profiles_digest: str = ""  # of the profile files this rank would read
    problems: tuple[str, ...] = ()

    def used_gpus(self) -> tuple[str, ...]:
        """UUIDs of the GPUs that count for this rank: its device if that is known, else all it may use."""
        if self.device == "cpu":
            return ()
        return (self.device,) if self.device else self.visible


def probe(
    device: Any = None,
    *,
    environ: Mapping[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
    root: str | Path = "/",
) -> Record:
    """Find out what this rank's machine is. Never raises.

    ``device``: what the rank computes on, if known ("cpu", "cuda", "cuda:1" or a torch.device).
    ``deadline_s`` bounds the time spent on questions to the driver. ``environ`` and ``root`` (of /proc, /sys,
    /dev) are for tests.
    """
    environ = dict(os.environ) if environ is None else environ
    problems: list[str] = []
    # Each part fails alone: a machine with a strange /sys must still be recognised by its GPUs.
    found: dict[str, Any] = {}
    for part in (_host, _versions, _hcas, _choices):
        try:
            found.update(part(Path(root), environ, problems))
        except Exception as error:
            problems.append(f"{part.__name__.strip('_')}: {type(error).__name__}: {error}")
    wanted = "" if device is None else str(device)
    torch_version = found.get("versions", {}).get("torch", "")

    def about_gpus(notes: list[str]) -> dict[str, Any]:
        return _gpus(Path(root), environ, wanted, torch_version, notes)

    answer = _bounded(about_gpus, deadline_s, problems)
    if answer is None:  # nothing more is asked of a driver that hangs
        answer = {"device": wanted} if wanted else _use((), Path(root), environ, torch_version, problems)
    found.update(answer)
    return Record(**found, problems=tuple(problems))


def _host(root: Path, environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"host": socket.gethostname(), "cpus": len(os.sched_getaffinity(0))}
    try:
        found["boot_id"] = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        problems.append(f"the boot id cannot be read ({error}); machines are told apart by host name")
    try:
        shm = root / "dev/shm"
        status = shm.stat()
        network = (root / "proc/self/ns/net").stat()
        found["shared_memory"] = f"{status.st_dev}:{status.st_ino}:{network.st_ino}"
        space = os.statvfs(shm)
        found["shared_memory_bytes"] = space.f_blocks * space.f_frsize
    except OSError as error:
        problems.append(f"/dev/shm cannot be examined: {error}")
    return found


def _versions(root: Path, environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    names = {
        "torch": ("torch",),
        "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
    }
    versions = {"ep_backend": __version__}
    for key, distributions in names.items():
        for distribution in distributions:
            try:
                versions[key] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    torch = sys.modules.get("torch")
    if "torch" not in versions and torch is not None:
        versions["torch"] = str(torch.__version__)
    if torch is not None and getattr(getattr(torch, "version", None), "cuda", None):
        try:
            # The library that torch has loaded counts, not the package; asking it does not start CUDA.
            versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version()[:3])
        except Exception as error:
            problems.append(f"torch does not tell its NCCL version: {error}")
    if "nccl" in versions:
        versions["nccl"] = ".".join(re.findall(r"\d+", versions["nccl"])[:3])
    return {"versions": versions}


def _hcas(root: Path, environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    active = []
    for state in sorted((root / "sys/class/infiniband").glob("*/ports/*/state")):
        try:
            if "ACTIVE" in state.read_text():
                active.append(f"{state.parts[-4]}:{state.parts[-2]}")
        except OSError as error:
            problems.append(f"{state}: {error}")
    return {"hcas": tuple(active)}


def _choices(root: Path, environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    steering = {v.name for v in env.VARIABLES if v.kind == "set"} | {
        "EP_BACKEND_PROFILE",
        "EP_BACKEND_TRANSPORT",
    }
    return {
        "environment": {name: environ[name] for name in sorted(steering) if environ.get(name, "").strip()},
        "profiles_digest": profiles.digest(environ.get("EP_BACKEND_PROFILE", "")),
    }


def _gpus(
    root: Path, environ: Mapping[str, str], wanted: str, torch_version: str, problems: list[str]
) -> dict[str, Any]:
    found = nvml.query(problems)
    if not found["gpus"]:
        found["gpus"] = _gpus_of_proc(root)
        if found["gpus"]:
            problems.append(
                "GPUs are present but NVML does not describe them, so their links are unknown"
                " (is the package nvidia-ml-py installed?)"
            )
    found.update(_use(found["gpus"], root, environ, torch_version, problems))
    if wanted:
        found["device"] = "cpu" if wanted == "cpu" else _uuid_of(wanted, found.get("visible", ()), problems)
    return found


def _use(
    gpus: tuple[nvml.Gpu, ...],
    root: Path,
    environ: Mapping[str, str],
    torch_version: str,
    problems: list[str],
) -> dict[str, Any]:
    """Which GPUs this process may use. Device nodes count where the driver does not answer.

    A machine with a sick driver must not be taken for one without GPUs.
    """
    names = [gpu.uuid for gpu in gpus] or sorted(node.name for node in (root / "dev").glob("nvidia[0-9]*"))
    if names and torch_version.endswith("+cpu"):
        problems.append(
            f"torch {torch_version} is built for CPUs only: the GPUs of this machine are not used"
        )
        return {}
    return {"visible": _visible(names, environ, problems)}


def _gpus_of_proc(root: Path) -> tuple[nvml.Gpu, ...]:
    """GPUs as the kernel driver lists them: all that is known without NVML."""
    gpus = []
    for information in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", information.read_text(), re.MULTILINE))
        if fields.get("GPU UUID"):
            gpus.append(
                nvml.Gpu(uuid=fields["GPU UUID"], name=fields.get("Model", ""), bus_id=information.parts[-2])
            )
    return tuple(gpus)


def _visible(names: Sequence[str], environ: Mapping[str, str], problems: list[str]) -> tuple[str, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: in its order, ending at the first entry that names nothing."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(names)
    visible: list[str] = []
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        if entry.startswith("MIG-"):
            visible.append(
                entry
            )  # a slice of a GPU: it has no links to others, and no further description here
            continue
        if entry.isdecimal():
            matches = [names[int(entry)]] if int(entry) < len(names) else []
        else:
            matches = [name for name in names if name.startswith(entry)]
        if len(matches) != 1:
            problems.append(
                f"CUDA_VISIBLE_DEVICES: {entry!r} names no GPU here; it and what follows it is not used"
            )
            break
        visible.append(matches[0])
    return tuple(visible)


def _uuid_of(device: str, visible: tuple[str, ...], problems: list[str]) -> str:
    kind, _, ordinal = device.partition(":")
    if kind != "cuda":
        problems.append(f"device {device!r} is neither cpu nor cuda")
        return device
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
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


def _bounded(
    work: Callable[[list[str]], dict[str, Any]], deadline_s: float, problems: list[str]
) -> dict[str, Any] | None:
    """``work(notes)`` in a thread that is given up after ``deadline_s``: a sick driver can hang in a call.

    None if there was no answer: no time was left, or something broke.
    """
    results: list[dict[str, Any]] = []
    notes: list[str] = []

    def run() -> None:
        try:
            results.append(work(notes))
        except Exception as error:
            notes.append(f"GPUs: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name="ep_backend-probe", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        problems.append(f"the GPU driver gave no answer within {deadline_s:g} s")
        return None
    problems.extend(notes)
    return results[0] if results else None
