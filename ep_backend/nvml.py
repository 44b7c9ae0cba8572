"""GPUs and the links between them, asked of NVIDIA's management library (optional package nvidia-ml-py)."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

Ask = Callable[..., Any]  # (default, question, *arguments)


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU. What NVML does not tell stays empty."""

    uuid: str
    name: str = ""
    bus_id: str = ""
    mig: bool | None = None
    nvlinks: int = 0  # active NVLinks
    nvlink_peer: str = ""  # what they lead to: "switch", "gpu", or empty
    memory_bytes: int | None = None
    bar1_bytes: int | None = None  # of the window through which PCIe devices reach the memory
    pcie_generation: int | None = None  # the most that GPU and slot can do; a sleeping link does less
    pcie_width: int | None = None  # the most lanes that GPU and slot can do
    pcie_width_now: int | None = None  # fewer where, say, a riser or another slot takes some
    numa_node: int | None = None
    virtualization: str = ""  # none, passthrough, vgpu, host vgpu, host vsga
    fabric_cluster: str = (
        ""  # UUID of the NVLink fabric across machines; empty if there is none, or only zeros
    )
    fabric_clique: int | None = None
    fabric_state: str = ""  # not supported, not started, in progress, completed, or failed

    @property
    def lanes(self) -> int | None:
        """PCIe lanes to reckon with. Of generations the greatest counts: a sleeping link takes a lower one
        and keeps its lanes."""
        known = [width for width in (self.pcie_width, self.pcie_width_now) if width]
        return min(known, default=None)


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of GPUs of a machine, by UUID. ``None`` means that it is not known."""

    a: str
    b: str
    nvlink: bool | None = None  # NVML: peer-to-peer over NVLink works
    nvml_read: bool | None = None  # NVML's word on peer-to-peer over whatever there is; it promises too much
    nvml_write: bool | None = None
    nvml_atomics: bool | None = None
    ancestor: str = ""  # nearest common PCIe ancestor, in NCCL's words: LOC, PIX, PXB, PHB, NODE, SYS
    peer_works: bool | None = None  # data written on one was read on the other, both ways; None: not tried


# Values of nvmlGpuTopologyLevel_t, in the words that NCCL_P2P_LEVEL uses.
BEHIND_A_SWITCH = ("LOC", "PIX", "PXB")
_ANCESTORS = {0: "LOC", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
_PEERS = {0: "gpu", 2: "switch"}  # nvmlIntNvLinkDeviceType_t
_VIRTUALIZATION = {0: "none", 1: "passthrough", 2: "vgpu", 3: "host vgpu", 4: "host vsga"}
_FABRIC_STATES = {0: "not supported", 1: "not started", 2: "in progress", 3: "completed"}
# nvmlGpuP2PCapsIndex_t. The module's NVML_P2P_CAPS_INDEX_READ is a tuple by mistake.
_READ, _WRITE, _NVLINK, _ATOMICS = 0, 1, 2, 3


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
    def ask(default: Any, question: str, *arguments: Any) -> Any:
        try:
            answer = getattr(pynvml, question)(*arguments)
        except (pynvml.NVMLError, AttributeError):  # an older module does not know every question
            return default
        return answer.decode() if isinstance(answer, bytes) else answer

    version = ask(0, "nvmlSystemGetCudaDriverVersion_v2")
    handles: dict[str, Any] = {}
    gpus = []
    for index in range(ask(0, "nvmlDeviceGetCount")):
        handle = ask(None, "nvmlDeviceGetHandleByIndex", index)
        name = ask("", "nvmlDeviceGetUUID", handle) if handle is not None else ""
        if not name:
            # It keeps its place, since CUDA_VISIBLE_DEVICES counts it, and without links it fits no profile.
            problems.append(f"NVML lists a GPU {index} and does not describe it")
            gpus.append(Gpu(uuid=f"undescribed-{index}"))
            continue
        handles[name] = handle
        gpus.append(_gpu(pynvml, ask, handle, name))
    bare = {name for name, handle in handles.items() if _has_no_nvlink(pynvml, handle)}
    return {
        "gpus": tuple(gpus),
        "links": tuple(
            _link(pynvml, ask, handles, bare, a, b) for a, b in itertools.combinations(handles, 2)
        ),
        "driver": ask("", "nvmlSystemGetDriverVersion"),
        "cuda_driver": f"{version // 1000}.{version % 1000 // 10}" if version else "",
    }


def _gpu(pynvml: Any, ask: Ask, handle: Any, name: str) -> Gpu:
    mig = ask(None, "nvmlDeviceGetMigMode", handle)
    active = 0
    peers = set()
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        state = ask(None, "nvmlDeviceGetNvLinkState", handle, link)
        if state == 1:  # a link that does not exist on this board answers "not supported"
            active += 1
            peers.add(_PEERS.get(ask(None, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, link), ""))
    return Gpu(
        uuid=name,
        name=ask("", "nvmlDeviceGetName", handle),
        bus_id=_bus_id(ask(None, "nvmlDeviceGetPciInfo", handle)),
        mig=None if mig is None else bool(mig[0]),
        nvlinks=active,
        nvlink_peer=peers.pop() if len(peers) == 1 else "",
        memory_bytes=getattr(ask(None, "nvmlDeviceGetMemoryInfo", handle), "total", None),
        bar1_bytes=getattr(ask(None, "nvmlDeviceGetBAR1MemoryInfo", handle), "bar1Total", None),
        pcie_generation=ask(None, "nvmlDeviceGetMaxPcieLinkGeneration", handle) or None,
        pcie_width=ask(None, "nvmlDeviceGetMaxPcieLinkWidth", handle) or None,
        pcie_width_now=ask(None, "nvmlDeviceGetCurrPcieLinkWidth", handle) or None,
        virtualization=_VIRTUALIZATION.get(ask(None, "nvmlDeviceGetVirtualizationMode", handle), ""),
        **_fabric(pynvml, ask, handle),
    )


def _has_no_nvlink(pynvml: Any, handle: Any) -> bool:
    """Whether it is known that no NVLink of this GPU is active: each one is off or does not exist."""
    absent = (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT)
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, link) != 0:
                return False
        except AttributeError:  # an older module
            return False
        except pynvml.NVMLError as error:
            if error.value not in absent:
                return False
    return True


def _fabric(pynvml: Any, ask: Ask, handle: Any) -> dict[str, Any]:
    """The NVLink fabric across machines. Machines without one may say that theirs is complete, with a cluster
    of zeros."""
    structure = getattr(pynvml, "c_nvmlGpuFabricInfoV_t", None)
    if structure is None:
        return {}
    info = structure()  # sets its own version
    # The module hands this argument on as it is; a structure by value would crash the process.
    if ask(None, "nvmlDeviceGetGpuFabricInfoV", handle, ctypes.byref(info)) is None:
        return {}
    state = _FABRIC_STATES.get(info.state, "")
    if state == "completed" and info.status != 0:  # ready with an error
        state = "failed"
    cluster = bytes(info.clusterUuid)
    if not any(cluster):
        return {"fabric_state": state}
    return {
        "fabric_state": state,
        "fabric_cluster": str(uuid.UUID(bytes=cluster)),
        "fabric_clique": int(info.cliqueId),
    }


def _bus_id(pci: Any) -> str:
    bus_id = getattr(pci, "busId", "")
    return bus_id.decode() if isinstance(bus_id, bytes) else str(bus_id)


def _link(pynvml: Any, ask: Ask, handles: dict[str, Any], bare: set[str], a: str, b: str) -> Link:
    def ok(capability: int) -> bool | None:
        status = ask(None, "nvmlDeviceGetP2PStatus", handles[a], handles[b], capability)
        return None if status is None else bool(status == pynvml.NVML_P2P_STATUS_OK)

    nvlink = ok(_NVLINK)
    if nvlink is None and bare.intersection((a, b)):  # NVML does not tell, and there is nothing it could be
        nvlink = False
    level = ask(None, "nvmlDeviceGetTopologyCommonAncestor", handles[a], handles[b])
    return Link(
        a=a,
        b=b,
        nvlink=nvlink,
        nvml_read=ok(_READ),
        nvml_write=ok(_WRITE),
        nvml_atomics=ok(_ATOMICS),
        ancestor=_ANCESTORS.get(level, ""),
    )
