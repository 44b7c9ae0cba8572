"""The probe on a made-up machine: NVML and the file tree are stand-ins."""

import ctypes
import sys
import time
import types

from ep_backend.probe import probe

PRODUCT = "NVIDIA Test"
CLUSTER = list(range(16))


class FakeError(Exception):
    def __init__(self, value):
        super().__init__(f"error {value}")
        self.value = value


class FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_v2_t, as the module makes it: not filled yet."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint32),
        ("state", ctypes.c_uint8),
    )


def fake_nvml(count=2, *, start=None, status=0, state=1, peer=2, hang_s=0.0, broken=(), fabric=None):
    """A stand-in for the module pynvml. ``broken``: functions that answer "not supported".

    ``fabric``: (state, status, cluster, clique) of every GPU.
    """
    module = types.ModuleType("pynvml")
    module.NVMLError = FakeError
    module.NVML_ERROR_LIBRARY_NOT_FOUND, module.NVML_ERROR_DRIVER_NOT_LOADED = 12, 9
    module.NVML_ERROR_NOT_SUPPORTED, module.NVML_ERROR_INVALID_ARGUMENT = 3, 2
    module.NVML_NVLINK_MAX_LINKS, module.NVML_P2P_CAPS_INDEX_NVLINK, module.NVML_P2P_STATUS_OK = 3, 2, 0

    def init():
        time.sleep(hang_s)
        if start is not None:
            raise FakeError(start)

    def link_state(handle, link):
        if link == 0:
            raise FakeError(3)
        return state

    def fabric_info(handle, pointer):
        """As the real one, which hands on what it is given: NVML crashes on anything but a pointer."""
        info = pointer._obj
        if fabric is None:
            raise FakeError(3)
        info.state, info.status, cluster, info.cliqueId = fabric
        info.clusterUuid[:] = cluster
        return 0

    module.NVML_P2P_CAPS_INDEX_READ = (0,)  # a mistake of the real module
    module.c_nvmlGpuFabricInfoV_t = FabricInfo
    answers = {
        "nvmlInit": init,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13020,
        "nvmlSystemGetDriverVersion": lambda: b"580.65.06",
        "nvmlDeviceGetCount": lambda: count,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}a",
        "nvmlDeviceGetName": lambda handle: PRODUCT,
        "nvmlDeviceGetPciInfo": lambda handle: types.SimpleNamespace(
            busId=f"0000000{handle}:01:00.0".encode()
        ),
        "nvmlDeviceGetMigMode": lambda handle: (0, 0),
        "nvmlDeviceGetNvLinkState": link_state,
        "nvmlDeviceGetNvLinkRemoteDeviceType": lambda handle, link: peer,
        "nvmlDeviceGetP2PStatus": lambda a, b, index: status if index in (0, 1, 2) else 5,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=141 << 30),
        "nvmlDeviceGetBAR1MemoryInfo": lambda handle: types.SimpleNamespace(bar1Total=256 << 20),
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 8,
        "nvmlDeviceGetVirtualizationMode": lambda handle: 1,
        "nvmlDeviceGetGpuFabricInfoV": fabric_info,
        "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: 40,
    }

    def refuse(*arguments):
        raise FakeError(3)

    for name, answer in answers.items():
        setattr(module, name, refuse if name in broken else answer)
    return module


def made_up(monkeypatch, tmp_path):
    """Run the probe over a made-up NVML and file tree, with a torch that is built for CUDA."""
    monkeypatch.setattr(
        "ep_backend.probe._versions", lambda root, environ, problems: {"versions": {"torch": "2.13.0"}}
    )

    def run(module=None, environ=None, device=None, deadline_s=5.0, files=None, **more):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        for name, text in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        more = {"checks": "never", **more}
        return probe(device, environ=environ or {}, deadline_s=deadline_s, root=tmp_path, **more)

    return run
