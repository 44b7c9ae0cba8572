"""What the probe reads in files of the machine."""

import pytest
from probing import fake_nvml, made_up

from ep_backend import surroundings


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return made_up(monkeypatch, tmp_path)


DEVICE = "sys/bus/pci/devices/0000:01:00.0"


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({f"{DEVICE}/iommu_group/type": "DMA\n"}, "translated"),
        ({f"{DEVICE}/iommu_group/type": "DMA-FQ\n"}, "translated"),
        ({f"{DEVICE}/iommu_group/type": "identity\n"}, "passthrough"),
        ({f"{DEVICE}/iommu_group/type": "unheard of\n"}, ""),
        ({f"{DEVICE}/vendor": "0x10de"}, "off"),
        ({}, ""),
    ],
)
def test_iommu(machine, files, kind):
    assert machine(fake_nvml(1), files=files).iommu == kind


def test_one_translated_gpu_counts(tmp_path):
    for bus_id, kind in (("0000:01:00.0", "identity"), ("0000:02:00.0", "DMA")):
        path = tmp_path / "sys/bus/pci/devices" / bus_id / "iommu_group" / "type"
        path.parent.mkdir(parents=True)
        path.write_text(kind)
    assert surroundings.iommu(tmp_path, ["00000000:01:00.0", "00000000:02:00.0"]) == "translated"


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("-1\n", None), ("x", None)])
def test_numa_node(machine, text, node):
    assert machine(fake_nvml(1), files={f"{DEVICE}/numa_node": text}).gpus[0].numa_node == node


@pytest.mark.parametrize(
    ("files", "environ", "kind"),
    [
        ({".dockerenv": ""}, {}, "docker"),
        ({".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({"run/.containerenv": ""}, {}, "podman"),
        ({"proc/1/cgroup": "0::/kubepods/besteffort/pod1"}, {}, "kubernetes"),
        ({"proc/1/cgroup": "4:cpu:/docker/123"}, {}, "docker"),
        ({"proc/1/cgroup": "0::/lxc/box"}, {}, "other"),
        ({"proc/1/cgroup": "0::/init.scope"}, {}, ""),
        ({}, {}, ""),
    ],
)
def test_container(machine, files, environ, kind):
    assert machine(files=files, environ=environ).container == kind


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8\n", {0, 1, 2, 3, 8}), ("5\n", {5}), ("\n", set()), ("some\n", set()), (None, set())],
)
def test_cpus_next_to_a_gpu(tmp_path, text, cpus):
    place = tmp_path / "sys/bus/pci/devices/0000:1b:00.0"
    place.mkdir(parents=True)
    if text is not None:
        (place / "local_cpulist").write_text(text)
    for bus_id in ("0000:1b:00.0", "00000000:1B:00.0"):
        assert surroundings.local_cpus(tmp_path, bus_id) == cpus
