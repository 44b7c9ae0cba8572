"""The probe, on this machine and on made-up ones. It never raises and never hangs."""

import os
import subprocess
import sys
import time

import msgspec
import pytest
from probing import CLUSTER, PRODUCT, FakeError, fake_nvml, made_up

from ep_backend import __version__, checks, facts, nvml
from ep_backend.errors import EpConfigError
from ep_backend.probe import Record, probe
from ep_backend.select import decide


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return made_up(monkeypatch, tmp_path)


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
        uuid="GPU-0a",
        name=PRODUCT,
        bus_id="00000000:01:00.0",
        mig=False,
        nvlinks=2,
        nvlink_peer="switch",
        memory_bytes=141 << 30,
        bar1_bytes=256 << 20,
        pcie_generation=5,
        pcie_width=16,
        pcie_width_now=8,
        virtualization="passthrough",
    )
    link = nvml.Link(
        a="GPU-0a",
        b="GPU-1a",
        nvlink=True,
        nvml_read=True,
        nvml_write=True,
        nvml_atomics=False,
        ancestor="NODE",
    )
    assert record.links == (link,)
    assert record.visible == record.used_gpus() == ("GPU-0a", "GPU-1a")
    assert decide([record]).profile == "nvswitch"


@pytest.mark.parametrize(
    ("fabric", "state", "cluster", "clique"),
    [
        ((3, 0, CLUSTER, 5), "completed", "00010203-0405-0607-0809-0a0b0c0d0e0f", 5),
        ((3, 0, [0] * 16, 5), "completed", "", None),  # H100 without a fabric
        ((3, 999, CLUSTER, 5), "failed", "00010203-0405-0607-0809-0a0b0c0d0e0f", 5),
        ((2, 0, [0] * 16, 0), "in progress", "", None),
        ((0, 0, [0] * 16, 0), "not supported", "", None),
        (None, "", "", None),
    ],
)
def test_the_fabric_that_nvml_reports(machine, fabric, state, cluster, clique):
    gpu = machine(fake_nvml(fabric=fabric)).gpus[0]
    assert (gpu.fabric_state, gpu.fabric_cluster, gpu.fabric_clique) == (state, cluster, clique)
    assert checks.has_fabric(gpu) == (state == "completed" and cluster != "")


def test_an_older_module_knows_fewer_questions(machine):
    module = fake_nvml()
    for name in ("c_nvmlGpuFabricInfoV_t", "nvmlDeviceGetVirtualizationMode", "nvmlDeviceGetMemoryInfo"):
        delattr(module, name)
    gpu = machine(module).gpus[0]
    assert (gpu.memory_bytes, gpu.virtualization, gpu.fabric_state) == (None, "", "")
    assert gpu.pcie_generation == 5


def test_the_lanes_that_count(machine):
    assert machine(fake_nvml()).gpus[0].lanes == 8
    assert machine(fake_nvml(broken=("nvmlDeviceGetCurrPcieLinkWidth",))).gpus[0].lanes == 16
    assert nvml.Gpu(uuid="GPU-a").lanes is None


def test_nvlink_that_does_not_work(machine):
    record = machine(fake_nvml(status=5, state=0))
    assert record.links[0].nvlink is False
    assert (record.gpus[0].nvlinks, record.gpus[0].nvlink_peer) == (0, "")
    assert decide([record]).profile is None


@pytest.mark.parametrize("error", [999, 4, None])
def test_links_that_cannot_be_asked_about_are_not_absent(machine, error):
    module = fake_nvml(broken=("nvmlDeviceGetP2PStatus",))

    def fail(handle, link):
        raise FakeError(error)

    module.nvmlDeviceGetNvLinkState = fail
    if error is None:
        del module.nvmlDeviceGetNvLinkState
    assert machine(module).links[0].nvlink is None


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
    assert time.monotonic() - begin < 20
    assert any("no answer within 0.2 s" in problem for problem in record.problems)
    assert record.visible == ("nvidia0",)
    assert decide([record]).transport == "peer", "one GPU has no peers to reach"
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


@pytest.mark.parametrize(
    ("listed", "told"),
    [("-1", False), ("0,-1,1", False), ("", False), ("0,7", True), ("-2", True), ("1-1", True)],
)
def test_hiding_gpus_on_purpose_is_no_problem(machine, listed, told):
    problems = machine(fake_nvml(), {"CUDA_VISIBLE_DEVICES": listed}).problems
    assert any("CUDA_VISIBLE_DEVICES" in problem for problem in problems) == told


def test_device_is_found_by_its_place_among_the_visible(machine):
    environ = {"CUDA_VISIBLE_DEVICES": "1,0"}
    assert machine(fake_nvml(), environ, device="cuda").device == "GPU-1a"
    assert machine(fake_nvml(), environ, device="cuda:1").device == "GPU-0a"
    beyond = machine(fake_nvml(), environ, device="cuda:2")
    assert beyond.device == "cuda:2"
    assert any("'cuda:2'" in problem for problem in beyond.problems)
    assert machine(fake_nvml(), environ, device="cpu").used_gpus() == ()


MIXED = ("NVIDIA Small", "NVIDIA Large")
BY_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    ("names", "environ", "device", "doubtful"),
    [
        (MIXED, {"CUDA_VISIBLE_DEVICES": "0"}, None, True),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, None, True),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "0", **BY_BUS}, None, False),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-0a"}, "cuda:0", False),
        (MIXED, {"CUDA_VISIBLE_DEVICES": ""}, None, False),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "0,1"}, "cuda:0", True),
        (MIXED, {}, None, False),  # all of them, in whatever order
        (MIXED, {}, "cuda:0", True),
        (MIXED, BY_BUS, "cuda:0", False),
        (MIXED, {}, "cpu", False),
        (MIXED[:1] * 2, {"CUDA_VISIBLE_DEVICES": "0"}, "cuda:0", False),
    ],
)
def test_numbers_of_different_gpus_may_mean_others(machine, names, environ, device, doubtful):
    module = fake_nvml()
    module.nvmlDeviceGetName = lambda handle: names[handle]
    problems = machine(module, environ, device=device).problems
    assert sum("CUDA_DEVICE_ORDER=PCI_BUS_ID" in problem for problem in problems) == doubtful


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


@pytest.mark.parametrize("boot_id", ["abc", ""])
def test_names_divide_a_machine_and_join_none(machine, boot_id):
    files = {"proc/sys/kernel/random/boot_id": boot_id} if boot_id else {}
    files |= {"dev/shm/x": "", "proc/self/ns/net": ""}
    here = [
        machine(files=files, environ={"EP_BACKEND_NODE": name} if name else {})
        for name in ("", "a", "b", "a")
    ]
    there = msgspec.structs.replace(here[1], host="there", boot_id=boot_id and "def")
    records = [*here, there]
    assert facts.nodes(records) == ((0,), (1, 3), (2,), (4,))
    assert facts.gather(records).hosts == 4
    assert not facts.gather(records).shares_memory
    assert len(set(map(facts.machine, records))) == 2
    assert {record.boot_id for record in here} == {boot_id}, "what was checked holds for all nodes"


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


def test_names_of_interfaces_may_differ_between_hosts(machine):
    """They are as many as there are hosts, and steer no choice."""
    here = machine(
        environ={"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_IB_HCA": "mlx5_0"}
    )
    there = machine(environ={"NCCL_SOCKET_IFNAME": "ens1", "NCCL_IB_GID_INDEX": "3"})
    assert here.environment == there.environment == {}
    decide([here, there])
    with pytest.raises(EpConfigError, match="NCCL_PROTO: Simple on rank 0, nothing on rank 1"):
        decide([machine(environ={"NCCL_PROTO": "Simple"}), there])


def test_what_ep_backend_set_itself_is_kept_apart(machine):
    environ = {"NCCL_IB_SL": "3", "NCCL_IB_TC": "7", "EP_BACKEND_APPLIED": "NCCL_IB_TC=7 NCCL_IB_SL=1"}
    record = machine(environ=environ)
    assert (record.environment, record.applied) == ({"NCCL_IB_SL": "3"}, {"NCCL_IB_TC": "7"})


def test_a_part_that_breaks_does_not_take_the_others_along(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: 1 / 0)
    record = machine(fake_nvml())
    assert record.cpus == 0
    assert len(record.gpus) == 2
    assert any(problem.startswith("host: ZeroDivisionError") for problem in record.problems)
