"""The probe, on this machine and on made-up ones. It never raises and never hangs."""

import os
import subprocess
import sys
import time
import types

import pytest

from ep_backend import __version__, nvml
from ep_backend.probe import Record, probe
from ep_backend.select import decide

PRODUCT = "NVIDIA Test"


class FakeError(Exception):
    def __init__(self, value):
        super().__init__(f"error {value}")
        self.value = value


def fake_nvml(count=2, *, start=None, status=0, state=1, peer=2, hang_s=0.0, broken=()):
    """A stand-in for the module pynvml. ``broken``: functions that answer "not supported"."""
    module = types.ModuleType("pynvml")
    module.NVMLError = FakeError
    module.NVML_ERROR_LIBRARY_NOT_FOUND, module.NVML_ERROR_DRIVER_NOT_LOADED = 12, 9
    module.NVML_NVLINK_MAX_LINKS, module.NVML_P2P_CAPS_INDEX_NVLINK, module.NVML_P2P_STATUS_OK = 3, 2, 0

    def init():
        time.sleep(hang_s)
        if start is not None:
            raise FakeError(start)

    def link_state(handle, link):
        if link == 0:
            raise FakeError(3)
        return state

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
        "nvmlDeviceGetP2PStatus": lambda a, b, index: status,
        "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: 40,
    }

    def refuse(*arguments):
        raise FakeError(3)

    for name, answer in answers.items():
        setattr(module, name, refuse if name in broken else answer)
    return module


@pytest.fixture
def machine(monkeypatch, tmp_path):
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


def test_this_machine():
    record = probe("cpu")
    assert record.host
    assert record.cpus >= 1
    assert record.device == "cpu"
    assert record.versions["ep_backend"] == __version__
    assert record.used_gpus() == ()
    assert decide([record], requested_profile="auto").profile == "cpu"


def test_no_torch_is_imported_and_no_cuda_started():
    code = "import sys, ep_backend.probe as p; p.probe(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_gpus_and_links(machine):
    record = machine(fake_nvml())
    assert (record.driver, record.cuda_driver) == ("580.65.06", "13.2")
    assert record.gpus[0] == nvml.Gpu(
        uuid="GPU-0a", name=PRODUCT, bus_id="00000000:01:00.0", mig=False, nvlinks=2, nvlink_peer="switch"
    )
    assert record.links == (nvml.Link(a="GPU-0a", b="GPU-1a", nvlink=True, ancestor="NODE"),)
    assert record.visible == record.used_gpus() == ("GPU-0a", "GPU-1a")
    assert decide([record]).profile == "nvswitch"


def test_nvlink_that_does_not_work(machine):
    record = machine(fake_nvml(status=5, state=0))
    assert record.links[0].nvlink is False
    assert (record.gpus[0].nvlinks, record.gpus[0].nvlink_peer) == (0, "")
    assert decide([record]).profile is None


def test_nvlink_bridges_between_pairs(machine):
    module = fake_nvml(4, peer=0)
    module.nvmlDeviceGetP2PStatus = lambda a, b, index: 0 if a // 2 == b // 2 else 5
    record = machine(module)
    assert sum(link.nvlink is True for link in record.links) == 2
    assert decide([record]).profile == "nvlink_pairs"


def test_two_pcie_machines_with_ports(machine):
    port = {"sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n"}
    records = [
        machine(fake_nvml(status=5, state=0), files={"proc/sys/kernel/random/boot_id": boot_id, **port})
        for boot_id in ("first", "second")
    ]
    assert decide(records).profile == "pcie_rdma"
    assert decide(records[:1]).profile is None, "peer access inside one machine is not known"


@pytest.mark.parametrize("name", [n for n in vars(fake_nvml()) if n.startswith("nvmlDevice")])
def test_any_question_may_go_unanswered(machine, name):
    record = machine(fake_nvml(broken=(name,)))
    assert isinstance(record, Record)
    if name == "nvmlDeviceGetP2PStatus":
        assert record.links[0].nvlink is None
        assert decide([record]).profile is None
    if name in ("nvmlDeviceGetUUID", "nvmlDeviceGetHandleByIndex"):
        assert record.visible == ("undescribed-0", "undescribed-1")
        assert record.links == ()
        assert any("NVML lists a GPU 0" in problem for problem in record.problems)
        assert decide([record]).profile is None


def test_an_unexpected_error_is_a_problem_and_not_a_crash(machine):
    module = fake_nvml()
    module.nvmlDeviceGetCount = lambda: 1 / 0
    record = machine(module, files={"dev/nvidia0": ""})
    assert any("ZeroDivisionError" in problem for problem in record.problems)
    assert record.visible == ("nvidia0",), "the machine must not be taken for one without GPUs"


@pytest.mark.parametrize("error", [12, 9])
def test_no_driver_is_no_problem(machine, error):
    record = machine(fake_nvml(start=error))
    assert record.gpus == ()
    assert not any("NVML" in problem for problem in record.problems)


def test_a_broken_driver_is_named(machine):
    record = machine(fake_nvml(start=999), files={"dev/nvidia0": ""})
    assert any("NVML does not start" in problem for problem in record.problems)
    assert record.visible == ("nvidia0",)


def test_a_driver_that_hangs(machine):
    begin = time.monotonic()
    record = machine(fake_nvml(hang_s=30), deadline_s=0.2, files={"dev/nvidia0": "", "dev/nvidiactl": ""})
    assert time.monotonic() - begin < 5
    assert any("no answer within 0.2 s" in problem for problem in record.problems)
    assert record.visible == ("nvidia0",)
    assert decide([record]).transport == "collective"
    record = machine(fake_nvml(hang_s=30), deadline_s=0.2, device="cuda:1")
    assert record.used_gpus() == ("cuda:1",)


def test_without_nvml_the_kernel_driver_lists_the_gpus(machine):
    information = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 17\nGPU UUID: \t GPU-12ab\nBus Type: \t PCIe\n"
    record = machine(None, files={"proc/driver/nvidia/gpus/0000:1b:00.0/information": information})
    assert record.gpus == (nvml.Gpu(uuid="GPU-12ab", name="NVIDIA H200", bus_id="0000:1b:00.0"),)
    assert any("links are unknown" in problem for problem in record.problems)


@pytest.mark.parametrize(
    ("listed", "visible"),
    [
        ("1,0", ("GPU-1a", "GPU-0a")),
        ("GPU-1a", ("GPU-1a",)),
        (" GPU-1 , 0", ("GPU-1a", "GPU-0a")),
        ("", ()),
        ("0,7,1", ("GPU-0a",)),
        ("-1", ()),
        ("GPU-", ()),
        ("MIG-77", ("MIG-77",)),
    ],
)
def test_cuda_visible_devices(machine, listed, visible):
    assert machine(fake_nvml(), {"CUDA_VISIBLE_DEVICES": listed}).visible == visible


def test_device_is_found_by_its_place_among_the_visible(machine):
    environ = {"CUDA_VISIBLE_DEVICES": "1,0"}
    assert machine(fake_nvml(), environ, device="cuda").device == "GPU-1a"
    assert machine(fake_nvml(), environ, device="cuda:1").device == "GPU-0a"
    beyond = machine(fake_nvml(), environ, device="cuda:2")
    assert beyond.device == "cuda:2"
    assert any("'cuda:2'" in problem for problem in beyond.problems)
    assert machine(fake_nvml(), environ, device="cpu").used_gpus() == ()


def test_a_torch_for_cpus_does_not_use_the_gpus(machine, monkeypatch):
    monkeypatch.setattr(
        "ep_backend.probe._versions", lambda root, environ, problems: {"versions": {"torch": "2.13.0+cpu"}}
    )
    record = machine(fake_nvml())
    assert len(record.gpus) == 2
    assert record.used_gpus() == ()
    assert any("built for CPUs only" in problem for problem in record.problems)


def test_files_of_the_machine(machine):
    record = machine(
        files={
            "proc/sys/kernel/random/boot_id": "abc\n",
            "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
            "dev/shm/x": "",
            "proc/self/ns/net": "",
        }
    )
    assert (record.boot_id, record.hcas) == ("abc", ("mlx5_0:1",))
    assert record.shared_memory
    assert record.shared_memory_bytes


def test_an_empty_file_tree(machine):
    record = machine()
    assert record.boot_id == ""
    assert len(record.problems) == 2


def test_what_the_user_chose_is_recorded(machine):
    environ = {
        "EP_BACKEND_PROFILE": "hgx",
        "NCCL_IB_SL": "3",
        "NCCL_P2P_LEVEL": "",
        "NCCL_DEBUG": "INFO",
        "HOME": "/",
    }
    record = machine(environ=environ)
    assert record.environment == {"EP_BACKEND_PROFILE": "hgx", "NCCL_IB_SL": "3"}
    assert record.profiles_digest


def test_a_part_that_breaks_does_not_take_the_others_along(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: 1 / 0)
    record = machine(fake_nvml())
    assert record.cpus == 0
    assert len(record.gpus) == 2
    assert any(problem.startswith("host: ZeroDivisionError") for problem in record.problems)
