"""GPUs and the links between them, asked of NVIDIA's management library (optional package nvidia-ml-py)."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU. What NVML does not tell stays empty."""

    uuid: str
    name: str = ""
    bus_id: str = ""
    mig: bool | None = None
    nvlinks: int = 0  # active NVLinks
    nvlink_peer: str = ""  # what they lead to: "switch", "gpu", or empty


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of GPUs of a machine, by UUID. ``None`` means that it is not known."""

    a: str
    b: str
    nvlink: bool | None = None  # NVML: peer-to-peer over NVLink works
    ancestor: str = ""  # nearest common PCIe ancestor, in NCCL's words: LOC, PIX, PXB, PHB, NODE, SYS
    peer_works: bool | None = None  # data written on one was read on the other, both ways; None: not tried


# Values of nvmlGpuTopologyLevel_t, in the words that NCCL_P2P_LEVEL uses.
_ANCESTORS = {0: "LOC", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
_PEERS = {0: "gpu", 2: "switch"}  # nvmlIntNvLinkDeviceType_t


def query(problems: list[str]) -> dict[str, Any]:
    """``gpus``, ``links``, ``driver`` and ``cuda_driver``; no GPUs and no problem on a machine without NVML.

    Asks question by question, since many are answered with "not supported" on some boards. May hang with a
    sick driver: the caller runs it under a deadline.
    """
    found: dict[str, Any] = {"gpus": (), "links": ()}
    try:
        pynvml = importlib.import_module("pynvml")  # optional, and without type hints
    except ImportError:
        return found
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        # The usual answer of a machine without a driver; a driver that is there and broken deserves a word.
        if error.value not in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
            problems.append(f"NVML does not start: {error}")
        return found
    try:
        return _query(pynvml, problems)
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _query(pynvml: Any, problems: list[str]) -> dict[str, Any]:
    def ask(default: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            answer = function(*arguments)
        except pynvml.NVMLError:
            return default
        return answer.decode() if isinstance(answer, bytes) else answer

    version = ask(0, pynvml.nvmlSystemGetCudaDriverVersion_v2)
    handles: dict[str, Any] = {}
    gpus = []
    for index in range(ask(0, pynvml.nvmlDeviceGetCount)):
        handle = ask(None, pynvml.nvmlDeviceGetHandleByIndex, index)
        uuid = ask("", pynvml.nvmlDeviceGetUUID, handle) if handle is not None else ""
        if not uuid:
            # It keeps its place, since CUDA_VISIBLE_DEVICES counts it, and without links it fits no profile.
            problems.append(f"NVML lists a GPU {index} and does not describe it")
            gpus.append(Gpu(uuid=f"undescribed-{index}"))
            continue
        handles[uuid] = handle
        gpus.append(_gpu(pynvml, ask, handle, uuid))
    return {
        "gpus": tuple(gpus),
        "links": tuple(_link(pynvml, ask, handles, a, b) for a, b in itertools.combinations(handles, 2)),
        "driver": ask("", pynvml.nvmlSystemGetDriverVersion),
        "cuda_driver": f"{version // 1000}.{version % 1000 // 10}" if version else "",
    }


def _gpu(pynvml: Any, ask: Callable[..., Any], handle: Any, uuid: str) -> Gpu:
    mig = ask(None, pynvml.nvmlDeviceGetMigMode, handle)
    active = 0
    peers = set()
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        state = ask(None, pynvml.nvmlDeviceGetNvLinkState, handle, link)
        if state == 1:  # a link that does not exist on this board answers "not supported"
            active += 1
            peers.add(_PEERS.get(ask(None, pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link), ""))
    return Gpu(
        uuid=uuid,
        name=ask("", pynvml.nvmlDeviceGetName, handle),
        bus_id=_bus_id(ask(None, pynvml.nvmlDeviceGetPciInfo, handle)),
        mig=None if mig is None else bool(mig[0]),
        nvlinks=active,
        nvlink_peer=peers.pop() if len(peers) == 1 else "",
    )


def _bus_id(pci: Any) -> str:
    bus_id = getattr(pci, "busId", "")
    return bus_id.decode() if isinstance(bus_id, bytes) else str(bus_id)


def _link(pynvml: Any, ask: Callable[..., Any], handles: dict[str, Any], a: str, b: str) -> Link:
    over_nvlink = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
    status = ask(None, pynvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], over_nvlink)
    level = ask(None, pynvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b])
    return Link(
        a=a,
        b=b,
        nvlink=None if status is None else status == pynvml.NVML_P2P_STATUS_OK,
        ancestor=_ANCESTORS.get(level, ""),
    )
