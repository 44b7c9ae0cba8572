"""What the records of a group say together, and what follows where peer access was tried out."""

import msgspec
import pytest
from machines import (
    cpu_rank,
    fabric_machine,
    gpu_machine,
    one_bad_pair,
    pairs,
    pcie_machine,
    two,
    with_orders,
    with_peer_access,
)

from ep_backend import profiles
from ep_backend.checks import Direction
from ep_backend.errors import EpConfigError
from ep_backend.facts import neighbours, unchecked
from ep_backend.nvml import Gpu
from ep_backend.select import decide, gather, unmet

# --- facts and conditions ---


def test_facts_take_the_lowest_version_and_every_host():
    group = gpu_machine(2, hcas=("mlx5_0:1",)) + gpu_machine(2, host="node1", cuda_driver="12.8")
    facts = gather(group)
    assert (facts.cuda_driver, facts.nccl, facts.hca, facts.several_hosts) == ("12.8", "2.28.3", False, True)
    condition = profiles.Condition(
        cuda_driver_below="13.0", several_hosts=True, hca=False, nccl_at_least="2.28"
    )
    assert unmet(condition, facts) == []
    assert unmet(profiles.Condition(cuda_driver_below="12.8"), facts)
    assert not unmet(profiles.Condition(cuda_driver_at_least="12.8"), facts)


def test_an_unknown_fact_never_holds():
    facts = gather([cpu_rank()])
    assert facts.fabric is None
    assert facts.cuda_driver is None
    for condition in (
        profiles.Condition(fabric=True),
        profiles.Condition(fabric=False),
        profiles.Condition(cuda_driver_below="13.0"),
        profiles.Condition(cuda_driver_at_least="13.0"),
    ):
        assert len(unmet(condition, facts)) == 1


def test_every_fact_that_a_condition_can_ask_for_is_gathered():
    facts = gather([cpu_rank()])
    for name in profiles.Condition.__struct_fields__:
        assert hasattr(facts, name.removesuffix("_below").removesuffix("_at_least"))


def test_peer_access_counts_only_when_it_was_seen_to_work():
    machine = gpu_machine(4, nvlink=lambda a, b: False)
    assert gather(machine).peer_access is None
    assert gather(with_peer_access(machine, True, "PIX")).peer_access == "all"
    assert gather(with_peer_access(machine, False, "PIX")).peer_access == "none"
    assert gather(with_peer_access(machine, True, "PXB")).pcie_switch == "all"
    assert gather(with_peer_access(machine, True, "SYS")).pcie_switch == "none"
    assert gather(with_peer_access(machine, True, "")).pcie_switch is None


@pytest.mark.parametrize(
    ("works", "ancestors", "level"),
    [
        ((True, True, False), ("PIX", "PIX", "SYS"), "PIX"),
        ((True, True, True), ("PIX", "PXB", "NODE"), "PHB"),
        ((True, False, False), ("PXB", "SYS", "SYS"), "PXB"),
        ((True, False, True), ("LOC", "PHB", "SYS"), "PIX"),
        ((True, True, False), ("PIX", "PIX", "PIX"), "LOC"),
        ((False, False, False), ("PIX", "PIX", "PIX"), "LOC"),
        ((True, None, False), ("PIX", "PIX", "SYS"), None),
        ((True, True, False), ("PIX", "", "SYS"), None),
    ],
)
def test_the_level_within_which_every_pair_works(works, ancestors, level):
    records = gpu_machine(3, nvlink=lambda a, b: False)
    links = tuple(
        msgspec.structs.replace(link, peer_works=w, ancestor=a)
        for link, w, a in zip(records[0].links, works, ancestors, strict=True)
    )
    assert gather([msgspec.structs.replace(record, links=links) for record in records]).peer_level == level


# --- what was tried out ---


def test_peer_access_that_is_advertised_and_broken():
    """The driver promises it everywhere; the data check saw otherwise, and counts."""
    records = with_peer_access(gpu_machine(2, nvlink=lambda a, b: False), False, "PHB")
    promised = tuple(msgspec.structs.replace(r, nvml_read=True, nvml_write=True) for r in records[0].links)
    records = [msgspec.structs.replace(record, links=promised) for record in records]
    decision = decide(records)
    assert (decision.profile, decision.transport) == ("pcie_blackwell", "host")
    assert "data check of peer access failed between GPU-node0-0 and GPU-node0-1" in decision.reason
    with pytest.raises(EpConfigError, match="asks for transport 'peer', but the data check of peer access"):
        decide(records, "peer")


def test_peer_access_that_is_not_offered_has_not_failed():
    """Such pairs are in the records as pairs that do not work; the words for them are others."""
    a, b = "GPU-node0-0", "GPU-node0-1"
    closed = {"access": False, "works": False, "problem": "the driver offers no peer access"}
    directions = (Direction(source=a, target=b, **closed), Direction(source=b, target=a, **closed))
    records = [msgspec.structs.replace(r, directions=directions) for r in pcie_machine(2, works=False)]
    decision = decide(records)
    assert (decision.profile, decision.transport) == ("pcie_blackwell", "host")
    assert f"The driver offers no peer access between {a} and {b}." in decision.reason
    assert "data check" not in decision.reason
    with pytest.raises(EpConfigError, match=f"but the driver offers no peer access between {a} and {b}"):
        decide(records, "peer")
    broken = (directions[0], Direction(source=b, target=a, access=True, works=False))
    told = [records[0], msgspec.structs.replace(records[1], directions=broken)]
    assert "The data check of peer access failed between" in decide(told).reason


def test_nvlink_whose_data_check_failed_is_not_used():
    decision = decide(one_bad_pair(gpu_machine(8)))
    assert (decision.profile, decision.transport) == ("nvswitch", "host")
    assert decision.reason.count("failed between GPU-node0-0 and GPU-node0-1") == 1
    elsewhere = one_bad_pair(gpu_machine(8, used=[2, 3, 4]))
    assert decide(elsewhere).transport == "peer", "the group does not use that pair"
    assert decide(one_bad_pair(gpu_machine(8, used=[0]))).transport == "peer"


def test_many_failed_pairs_are_not_all_named():
    reason = decide(pcie_machine(8, works=False)).reason
    assert "and 25 more pairs" in reason
    assert reason.count("GPU-node0-0") == 3


@pytest.mark.parametrize("machine", [gpu_machine, pcie_machine, fabric_machine])
def test_peer_access_can_be_refused_by_the_user(machine):
    """What the probe makes of EP_BACKEND_PEER_ACCESS=0, and the words for it."""
    asked = {"environment": {"EP_BACKEND_PEER_ACCESS": "0"}}
    records = [
        msgspec.structs.replace(
            record,
            links=tuple(msgspec.structs.replace(li, nvlink=False, peer_works=False) for li in record.links),
            fabric_works=False,
        )
        for record in machine(4, **asked)
    ]
    decision = decide(records)
    assert (decision.profile, decision.transport) == ("pcie_blackwell", "host")
    assert "EP_BACKEND_PEER_ACCESS=0: no peer access is used." in decision.reason
    with pytest.raises(EpConfigError, match="EP_BACKEND_PEER_ACCESS=0 forbids it"):
        decide(records, "peer")
    with pytest.raises(EpConfigError, match="EP_BACKEND_PEER_ACCESS: 0 on ranks 0-2, nothing on rank 3"):
        decide([*records[:3], msgspec.structs.replace(records[3], environment={})])


def test_a_wrong_wish_about_peer_access_is_an_error():
    with pytest.raises(
        EpConfigError, match="EP_BACKEND_PEER_ACCESS='no' is not usable: wanted one of auto, 0"
    ):
        decide(gpu_machine(2, environment={"EP_BACKEND_PEER_ACCESS": "no"}))


def test_slices_of_gpus_have_no_peers():
    sliced = [msgspec.structs.replace(r, gpus=tuple(Gpu(uuid=g.uuid, mig=True) for g in r.gpus))
              for r in gpu_machine(2)]  # fmt: skip
    for records in (sliced, gpu_machine(2, device="MIG-1", used=[0, 1])):
        with pytest.raises(EpConfigError, match="rank 0 uses a slice of a GPU"):
            decide(records, "peer")
        assert decide(records).transport == "host"
    assert decide(sliced[:1], "peer").transport == "peer", "alone it needs no peer"


def test_what_one_rank_found_out_counts_for_all():
    checked, blind = pcie_machine(4), pcie_machine(4, works=None)
    for records in ([checked[0], *blind[1:]], [*blind[:3], checked[3]]):
        assert decide(records).profile == "pcie_p2p"
    failed = pcie_machine(4, works=False)
    assert decide([checked[0], failed[1], *blind[2:]]).profile == "pcie_blackwell"


@pytest.mark.parametrize(
    ("records", "wanted"),
    [
        ([cpu_rank()] * 2, False),
        (gpu_machine(4), False),
        (pcie_machine(4, works=None), True),
        (pcie_machine(4), True),
        (with_orders(pcie_machine(4), (1e9, 1e9)), False),
        (with_orders(pcie_machine(4), (1e9, 1e9))[:3], True),
        (pcie_machine(2), False),
        (two(pcie_machine, 2), False),
        (pcie_machine(4, works=False), False),
        (pcie_machine(4, works=None, used=[1]), False),
        (gpu_machine(4, nvlink=lambda a, b: None), False),
        (gpu_machine(4, nvlink=pairs), True),
        (gpu_machine(4, nvlink=pairs, used=[0, 1]), False),
        (gpu_machine(4) + pcie_machine(2, works=None, host="node1"), True),
    ],
)
def test_when_a_group_tries_out_its_gpus(records, wanted):
    assert unchecked(records) == wanted


def test_neighbours_are_the_gpus_of_the_group_on_the_same_host():
    records = gpu_machine(4, used=[0, 2]) + gpu_machine(4, host="node1", used=[1])
    assert neighbours(records, 1) == ("GPU-node0-0", "GPU-node0-2")
    assert neighbours(records, 2) == ("GPU-node1-1",)


@pytest.mark.parametrize(
    ("records", "warned"),
    [
        (pcie_machine(2, works=False, shared_memory_bytes=64 << 20), True),
        (pcie_machine(2, works=False, shared_memory_bytes=8 << 30), False),
        (pcie_machine(2, works=False), False),
        (pcie_machine(2, shared_memory_bytes=64 << 20), False),
        (gpu_machine(2, shared_memory_bytes=64 << 20), False),
        ([cpu_rank(shared_memory_bytes=64 << 20)] * 2, False),
    ],
)
def test_a_tiny_dev_shm_is_spoken_of_where_it_matters(records, warned):
    assert ("/dev/shm has 64 MiB" in decide(records).reason) == warned
