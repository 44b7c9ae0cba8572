"""What the probe tries out about peer access, and what it says of it."""

import pytest
from probing import CLUSTER, fake_nvml, made_up

from ep_backend import checks
from ep_backend.checks import Direction
from ep_backend.select import decide


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return made_up(monkeypatch, tmp_path)


def direction(a, b, works, **more):
    return Direction(source=f"GPU-{a}a", target=f"GPU-{b}a", works=works, **more)


@pytest.fixture
def tried(monkeypatch):
    """`checks.results` replaced: what it is asked for, and what it answers."""
    asked = []

    def answer(results):
        def fake(gpus, links, driver, boot_id, **more):
            asked.append({"driver": driver, "boot_id": boot_id, **more})
            return results

        monkeypatch.setattr(checks, "results", fake)
        return asked

    return answer


def pcie(count=2):
    return fake_nvml(count, status=5, state=0)


def test_pcie_machines_try_out_what_they_use(machine, tried):
    asked = tried(checks.Results(directions=(direction(0, 1, True), direction(1, 0, True))))
    record = machine(
        pcie(), checks="auto", checks_deadline_s=7, files={"proc/sys/kernel/random/boot_id": "b"}
    )
    (call,) = asked
    assert (call["among"], call["fresh"], call["deadline_s"]) == (["GPU-0a", "GPU-1a"], False, 7)
    assert (call["driver"], call["boot_id"]) == ("580.65.06", "b")
    assert record.links[0].peer_works is True
    assert len(record.directions) == 2
    assert decide([record]).profile == "pcie_p2p"


@pytest.mark.parametrize(
    ("directions", "works", "profile"),
    [
        ((direction(0, 1, True), direction(1, 0, False)), False, "pcie_blackwell"),
        ((direction(0, 1, None), direction(1, 0, False)), False, "pcie_blackwell"),
        ((direction(0, 1, True), direction(1, 0, None)), None, None),
        ((direction(0, 1, True),), None, None),
        ((), None, None),
    ],
)
def test_both_ways_must_work(machine, tried, directions, works, profile):
    tried(checks.Results(directions=directions, problems=("a problem",)))
    record = machine(pcie(), checks="auto")
    assert record.links[0].peer_works is works
    assert "a problem" in record.problems
    assert decide([record]).profile == profile


def test_nvlink_everywhere_starts_nothing_and_takes_what_is_known(machine, tried):
    asked = tried(checks.Results(directions=(direction(0, 1, True), direction(1, 0, False))))
    record = machine(fake_nvml(), checks="auto")
    assert (asked[0]["among"], asked[0]["fresh"]) == ((), False)
    decision = decide([record])
    assert (decision.profile, decision.transport) == ("nvswitch", "host")
    assert "data check of peer access failed between GPU-0a and GPU-1a" in decision.reason


def test_unknown_links_start_nothing(machine, tried):
    asked = tried(checks.Results())
    machine(fake_nvml(broken=("nvmlDeviceGetP2PStatus",)), checks="auto")
    assert asked[0]["among"] == ()


def test_a_rank_with_a_device_tries_out_the_gpus_of_its_group(machine, tried):
    asked = tried(checks.Results())
    machine(pcie(4), checks="auto", device="cuda:1")
    machine(pcie(4), checks="auto", device="cuda:1", neighbours=("GPU-1a", "GPU-3a"))
    machine(pcie(4), {"CUDA_VISIBLE_DEVICES": "GPU-2a"}, checks="auto", neighbours=("GPU-3a",))
    machine(pcie(4), {"CUDA_VISIBLE_DEVICES": "3,GPU-2a"}, checks="auto")
    assert [call["among"] for call in asked] == [
        (), ["GPU-1a", "GPU-3a"], ["GPU-2a", "GPU-3a"], ["GPU-3a", "GPU-2a"],
    ]  # fmt: skip


def test_fresh_and_never(machine, tried):
    asked = tried(checks.Results())
    machine(fake_nvml(), checks="fresh")
    assert (asked[0]["among"], asked[0]["fabric"], asked[0]["fresh"]) == (None, None, True)
    machine(pcie(), checks="never")
    assert len(asked) == 1
    machine(fake_nvml(hang_s=30), checks="auto", deadline_s=0.2, files={"dev/nvidia0": ""})
    assert len(asked) == 1, "a driver that hangs is asked nothing more"


def test_a_fabric_counts_when_its_handles_work(machine, tried):
    module = fake_nvml(fabric=(3, 0, CLUSTER, 5))
    for works, profile in ((True, "nvl72"), (False, "nvswitch"), (None, "nvswitch")):
        asked = tried(checks.Results(fabric_works=works))
        record = machine(module, checks="auto", device="cuda:0")
        assert asked[-1]["fabric"] == ["GPU-0a"]
        assert (record.fabric_works, decide([record]).profile) == (works, profile)


@pytest.mark.parametrize("module", [fake_nvml, lambda: fake_nvml(fabric=(3, 0, CLUSTER, 5)), pcie])
def test_the_users_veto(machine, tried, module):
    good = checks.Results(directions=(direction(0, 1, True), direction(1, 0, True)), fabric_works=True)
    asked = tried(good)
    veto = {"EP_BACKEND_PEER_ACCESS": "0"}
    record = machine(module(), veto, checks="auto")
    assert asked == []
    assert (record.links[0].nvlink, record.links[0].peer_works, record.fabric_works) == (False, False, False)
    assert record.environment == veto
    decision = decide([record])
    assert (decision.profile, decision.transport) == ("pcie_blackwell", "host")
    record = machine(module(), veto, checks="fresh")
    assert record.directions == good.directions, "what was measured is shown all the same"
    assert decide([record]) == decision


def test_a_veto_that_cannot_be_read_is_a_problem(machine, tried):
    tried(checks.Results())
    record = machine(fake_nvml(), {"EP_BACKEND_PEER_ACCESS": "no"}, checks="auto")
    assert any("wanted one of auto, 0" in problem for problem in record.problems)
    assert record.links[0].nvlink is True


def test_directions_of_gpus_that_are_not_here_change_nothing(machine, tried):
    elsewhere = Direction(source="GPU-0a", target="GPU-gone", works=False, store_bytes_per_s=1.0)
    tried(checks.Results(directions=(elsewhere,)))
    assert machine(pcie(), checks="auto").links[0].peer_works is None


def test_slow_peer_access_is_spoken_of(machine, tried):
    slow = {"store_bytes_per_s": 3.6e9}
    tried(checks.Results(directions=(direction(0, 1, True, **slow), direction(1, 0, True, **slow))))
    record = machine(pcie(), checks="auto")
    assert sum("stage peer access through the host" in problem for problem in record.problems) == 2


def test_gpus_without_links_have_no_nvlink_even_where_nvml_does_not_say(machine, tried):
    """Some boards refuse the question about pairs; without a link there is nothing to ask."""
    asked = tried(checks.Results())
    module = fake_nvml(broken=("nvmlDeviceGetP2PStatus", "nvmlDeviceGetNvLinkState"))
    record = machine(module, checks="auto")
    assert record.links[0].nvlink is False
    assert asked[0]["among"] == ["GPU-0a", "GPU-1a"], "so peer access is tried out"
    one_has_links = fake_nvml(broken=("nvmlDeviceGetP2PStatus",))
    one_has_links.nvmlDeviceGetNvLinkState = lambda handle, link: handle
    assert machine(one_has_links).links[0].nvlink is False
