"""What one rank finds out about its machine: `probe() -> Record`.

The probe never raises and has two deadlines: one for its questions to the driver, and a longer one for trying
out peer access between GPUs, which it does only where the choice of a profile depends on it and nothing is
remembered from before (`ep_backend.checks`). What cannot be found out is left empty, with a sentence in
``Record.problems``. It does not import torch and does not initialise CUDA. Everything is keyed by GPU UUID,
since ordinals mean different GPUs in different processes. Decisions are made elsewhere, from the records of
all ranks (`ep_backend.select`).
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
from typing import Any, Literal

import msgspec

from ep_backend import __version__, checks, devices, env, nvml, profiles, surroundings, tuned
from ep_backend.errors import EpConfigError

DEADLINE_S = 5.0  # for questions to the driver
CHECKS_DEADLINE_S = checks.DEADLINE_S


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's view, as plain data: it can be pickled, sent as JSON, compared, and written by hand."""

    host: str = ""
    boot_id: str = ""  # one per running kernel: equal in all containers of one machine
    node: str = ""  # EP_BACKEND_NODE: divides a machine as if it were several
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
    directions: tuple[checks.Direction, ...] = ()  # what was tried out between ``gpus``
    orders: tuple[checks.OrderRates, ...] = ()  # and measured in groups of them
    # A fabric handle of each GPU that counts was really exported and imported; None: not tried
    fabric_works: bool | None = None
    iommu: str = ""  # off, passthrough, translated; empty: not known
    container: str = ""  # docker, podman, kubernetes, other; empty: none
    environment: dict[str, str] = {}  # registered variables that steer the choice, as the user has set them
    applied: dict[str, str] = {}  # and those that ep_backend itself has set before, here or in a parent
    profiles_digest: str = ""  # of the profile files this rank would read
    tuned_sms: tuple[tuned.Entry, ...] = ()  # what `ep-backend tune` has chosen on this machine
    tuned_problem: str = ""  # why that cannot be read; empty: nothing is wrong
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
    checks: Literal["auto", "fresh", "never"] = "auto",
    checks_deadline_s: float = CHECKS_DEADLINE_S,
    neighbours: Sequence[str] = (),
) -> Record:
    """Find out what this rank's machine is. Never raises.

    ``device``: what the rank computes on, if known ("cpu", "cuda", "cuda:1" or a torch.device).
    ``deadline_s`` bounds the time spent on questions to the driver, ``checks_deadline_s`` that spent on
    trying out peer access. ``checks``: "auto" takes what is remembered, and tries out what is not where the
    choice of a profile depends on it: some pair of the GPUs that count has no NVLink, or NVML reports a
    fabric; "fresh" tries out all GPUs of the machine now; "never" neither. ``neighbours``: UUIDs of GPUs of
    this machine that count because other ranks use them. ``environ`` and ``root`` (of /proc, /sys, /dev) are
    for tests.
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
        checks = "never"
    found.update(answer)
    if found.get("visible") and found.get("device") != "cpu":
        known = tuned.load(found.get("gpus", ()), found.get("driver", ""), environ)
        found["tuned_sms"], found["tuned_problem"] = known
    return _with_checks(
        Record(**found, problems=tuple(problems)), checks, checks_deadline_s, neighbours, environ
    )


def _with_checks(
    record: Record, mode: str, deadline_s: float, neighbours: Sequence[str], environ: Mapping[str, str]
) -> Record:
    """The record with what was tried out between the GPUs, and with the user's veto."""
    problems = list(record.problems)
    try:
        vetoed = env.get("EP_BACKEND_PEER_ACCESS", environ) == "0"
    except EpConfigError as error:  # `ep_backend.select` refuses it
        problems.append(str(error))
        vetoed = False
    used = list(dict.fromkeys([*record.used_gpus(), *neighbours]))
    results = checks.Results()
    if mode == "fresh":
        results = _results(record, None, None, True, deadline_s, environ)
    elif mode == "auto" and not vetoed:
        among = used if _depends_on_checks(record.links, used) else ()
        results = _results(record, among, used, False, deadline_s, environ)
    links = tuple(
        msgspec.structs.replace(link, nvlink=False, peer_works=False)
        if vetoed
        else msgspec.structs.replace(link, peer_works=_both_ways(link, results.directions))
        for link in record.links
    )
    gpus = {gpu.uuid: gpu for gpu in record.gpus}
    for direction in results.directions:
        if not {direction.source, direction.target} <= gpus.keys():
            continue
        if note := checks.staged(direction, gpus[direction.source], gpus[direction.target]):
            problems.append(note)
    return msgspec.structs.replace(
        record,
        links=links,
        directions=results.directions,
        orders=results.orders,
        fabric_works=False if vetoed else results.fabric_works,
        problems=(*problems, *results.problems),
    )


def _results(
    record: Record,
    among: Sequence[str] | None,
    fabric: Sequence[str] | None,
    fresh: bool,
    deadline_s: float,
    environ: Mapping[str, str],
) -> checks.Results:
    return checks.results(
        record.gpus, record.links, record.driver, record.boot_id, among=among, fabric=fabric, fresh=fresh,
        deadline_s=deadline_s, environ=environ,
    )  # fmt: skip


def _depends_on_checks(links: Sequence[nvml.Link], used: Sequence[str]) -> bool:
    """Whether the GPUs that count are known to lack NVLink somewhere: then peer access decides."""
    verdicts = {link.nvlink for link in links if link.a in used and link.b in used}
    return False in verdicts and None not in verdicts


def _both_ways(link: nvml.Link, directions: Sequence[checks.Direction]) -> bool | None:
    verdicts = [
        direction.works
        for direction in directions
        if (direction.source, direction.target) in ((link.a, link.b), (link.b, link.a))
    ]
    if False in verdicts:
        return False
    return True if verdicts.count(True) == 2 else None


def _host(root: Path, environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"host": socket.gethostname(), "cpus": len(os.sched_getaffinity(0))}
    found["node"] = env.get("EP_BACKEND_NODE", environ)
    found["container"] = surroundings.container(root, environ)
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
    steering = {v.name for v in env.VARIABLES if v.kind == "set" and not v.per_host} | {
        "EP_BACKEND_PROFILE",
        "EP_BACKEND_TRANSPORT",
        "EP_BACKEND_PEER_ACCESS",
        "EP_BACKEND_PEER_ORDER",
        "EP_BACKEND_NUM_SMS",
    }
    ours = env.applied(environ)
    return {
        "environment": {
            name: environ[name] for name in sorted(steering - set(ours)) if environ.get(name, "").strip()
        },
        "applied": ours,
        "profiles_digest": profiles.digest(environ.get("EP_BACKEND_PROFILE", "")),
    }


def _gpus(
    root: Path, environ: Mapping[str, str], wanted: str, torch_version: str, problems: list[str]
) -> dict[str, Any]:
    found = nvml.query(problems)
    if not found["gpus"]:
        found["gpus"] = devices.of_proc(root)
        if found["gpus"]:
            problems.append(
                "GPUs are present but NVML does not describe them, so their links are unknown"
                " (is the package nvidia-ml-py installed?)"
            )
    found["gpus"] = tuple(
        msgspec.structs.replace(gpu, numa_node=surroundings.numa_node(root, gpu.bus_id))
        for gpu in found["gpus"]
    )
    found["iommu"] = surroundings.iommu(root, (gpu.bus_id for gpu in found["gpus"] if gpu.bus_id))
    found.update(_use(found["gpus"], root, environ, torch_version, problems))
    if note := devices.doubt(found["gpus"], environ, wanted) if found.get("visible") else "":
        problems.append(note)
    if wanted:
        found["device"] = (
            "cpu" if wanted == "cpu" else devices.uuid_of(wanted, found.get("visible", ()), problems)
        )
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
    return {"visible": devices.visible(names, environ, problems)}


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
