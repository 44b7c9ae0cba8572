"""Decisions from the records of made-up machines."""

import itertools
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import (
    EVERYTHING,
    KNOWN,
    broken,
    cpu_rank,
    fabric_machine,
    gpu_machine,
    one_bad_pair,
    pairs,
    partial_machine,
    pcie_machine,
    two,
    with_peer_access,
)

from ep_backend import env, profiles
from ep_backend.errors import EpConfigError
from ep_backend.facts import DISTANCE, parts, reaches
from ep_backend.probe import Record, probe
from ep_backend.select import apply_env, check_agreement, decide, gather, select, unmet

# --- profiles and transports ---


def test_cpu_ranks_of_one_machine_share_memory():
    decision = decide([cpu_rank()] * 4)
    assert (decision.profile, decision.transport, decision.env) == ("cpu", "cpu", ())
    assert "gpus is none" in decision.reason
    assert "inside one machine" in decision.reason


def test_cpu_ranks_of_two_machines_use_the_collective():
    decision = decide([cpu_rank(), cpu_rank(host="other", boot_id="b1")])
    assert (decision.profile, decision.transport) == ("cpu", "collective")
    assert "across 2 machines" in decision.reason


def test_cpu_ranks_of_two_machines_can_ask_for_hier():
    machines = [cpu_rank(), cpu_rank(boot_id="b1"), cpu_rank(boot_id="b1"), cpu_rank()]
    assert decide(machines, "hier").transport == "hier"
    with pytest.raises(EpConfigError, match="asks for transport 'hier', but the nodes have 1, 2 ranks"):
        decide(machines[:3], "hier")


def test_containers_with_their_own_shared_memory_use_the_collective():
    decision = decide([cpu_rank(), cpu_rank(shared_memory="53:1")])
    assert (decision.profile, decision.transport) == ("cpu", "collective")
    assert "--ipc=host" in decision.reason


def test_containers_of_one_machine_that_share_memory_are_one_machine():
    assert decide([cpu_rank(), cpu_rank(host="pod-2")]).transport == "cpu"


def test_nvswitch_uses_peer():
    decision = decide(gpu_machine(8))
    assert (decision.profile, decision.transport) == ("nvswitch", "peer")
    assert {item.name: item.value for item in decision.env} == {
        "NCCL_CUMEM_ENABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
    }
    assert all(item.source and item.why for item in decision.env)


def test_nvswitch_without_peer_says_why_it_is_not_used():
    decision = decide(gpu_machine(8), available=frozenset({"cpu", "collective", "host"}))
    assert (decision.profile, decision.transport) == ("nvswitch", "host")
    assert "passed over: peer, because it is not in this build" in decision.reason


@pytest.mark.parametrize("transport", ["peer", "host", "mixed"])
def test_transports_of_gpus_are_not_for_cpus(transport):
    built = frozenset({"cpu", "collective", "hier"})
    with pytest.raises(EpConfigError, match="it moves GPU tensors and no rank computes on a GPU"):
        decide([cpu_rank()], transport, available=built)


def test_what_a_build_has_is_a_list():
    built = frozenset({"hier", "collective", "cpu", "host"})
    with pytest.raises(EpConfigError, match="which has cpu, host, collective and hier"):
        decide(gpu_machine(8), "peer", available=built)


def test_a_build_without_kernels_has_nothing_for_gpus():
    with pytest.raises(EpConfigError, match="collective, because this build has no CUDA kernels"):
        decide(gpu_machine(8), available=frozenset({"cpu", "collective", "hier"}))


def test_transport_cpu_is_not_for_a_machine_whose_gpus_are_used():
    # Doctor's record does not say where ranks compute.
    asked = [
        msgspec.structs.replace(record, device="", environment={"EP_BACKEND_TRANSPORT": "cpu"})
        for record in gpu_machine(2)
    ]
    with pytest.raises(EpConfigError, match="it moves CPU tensors and the ranks compute on GPUs"):
        decide(asked, available=EVERYTHING)


def test_nvswitch_with_a_build_that_has_everything():
    machine = gpu_machine(8)
    assert decide(machine, available=EVERYTHING).transport == "peer"
    two = machine + gpu_machine(8, host="node1")
    assert decide(two, available=EVERYTHING).transport == "collective"
    assert decide(two, "hier", available=EVERYTHING).transport == "hier"


def test_only_the_gpus_of_the_group_count():
    in_pairs = gpu_machine(4, nvlink=lambda a, b: a // 2 == b // 2)
    assert gather(in_pairs).nvlink == "some"
    assert decide(in_pairs).profile == "nvlink_pairs"
    one_pair = gpu_machine(4, nvlink=lambda a, b: a // 2 == b // 2, used=[2, 3])
    assert gather(one_pair).nvlink == "all"
    assert decide(one_pair).profile == "nvswitch"
    assert gather(gpu_machine(4, nvlink=lambda a, b: a // 2 == b // 2, used=[0, 2])).nvlink == "none"


def test_one_gpu_of_each_machine_is_judged_by_its_neighbours():
    group = gpu_machine(8, used=[3]) + gpu_machine(8, host="node1", used=[0])
    assert decide(group).profile == "nvswitch"


def test_without_links_no_profile_fits():
    for verdict, word in ((False, "none"), (None, "unknown")):
        decision = decide(gpu_machine(4, nvlink=lambda a, b, verdict=verdict: verdict))
        assert (decision.profile, decision.transport, decision.env) == (None, "host", ())
        assert f"nvlink must be all and is {word}" in decision.reason


def test_pcie_machines_whose_peer_access_nobody_checked_fit_no_profile():
    """What a PCIe machine is where the data check could not run: neither good nor bad is assumed."""
    decision = decide(pcie_machine(4, works=None))
    assert (decision.profile, decision.transport, decision.env) == (None, "host", ())
    for name, word in (("pcie_p2p", "all"), ("pcie_blackwell", "none")):
        assert f"{name}: peer_access must be {word} and is unknown" in decision.reason


def test_gpus_that_nobody_describes_are_not_taken_for_a_cpu_machine():
    assert decide([cpu_rank(visible=("nvidia0",))]).profile is None
    assert decide([cpu_rank(device="cuda:0"), cpu_rank(device="cuda:1")]).transport == "host"


def test_which_ranks_reach_each_other():
    assert parts(gpu_machine(4, nvlink=pairs)) == ((0, 1), (2, 3))
    assert parts(partial_machine(6)) == ((0, 1), (2, 3), (4, 5))
    assert parts(gpu_machine(4)) == parts(pcie_machine(4)) == ((0, 1, 2, 3),)
    assert parts(pcie_machine(3, works=None)) == parts(pcie_machine(3, works=False)) == ((0,), (1,), (2,))
    assert parts([cpu_rank(device="cuda:0"), cpu_rank(device="cuda:1")]) == ((0,), (1,))
    # GPUs count, whatever the ranks' order; a pair that failed has no part, whatever NVML says of its NVLink
    machine = gpu_machine(4, nvlink=pairs)
    assert parts([machine[2], machine[0], machine[3], machine[1]]) == ((1, 3), (0, 2))
    assert parts(one_bad_pair(machine)) == ((0,), (1,), (2, 3))


def test_a_gpu_that_reaches_only_some_of_a_part_is_left_out():
    def path(a, b):
        return b == a + 1

    assert parts(gpu_machine(4, nvlink=path)) == ((0, 1), (2, 3))
    assert parts(gpu_machine(3, nvlink=path)) == ((0, 1), (2,))
    assert parts(one_bad_pair(pcie_machine(4))) == ((0, 2, 3), (1,))


def test_parts_grow_from_nvlink():
    """Between 1 and 2 is NVLink; 0 reaches 1 over PCIe alone, and not 2."""
    machine = gpu_machine(3, nvlink=lambda a, b: (a, b) == (1, 2))
    links = list(machine[0].links)
    links[0] = msgspec.structs.replace(links[0], peer_works=True)
    records = [msgspec.structs.replace(record, links=tuple(links)) for record in machine]
    assert parts(records) == ((0,), (1, 2))
    decision = decide(records)
    assert decision.transport == "mixed"
    assert "from GPU to GPU between GPUs 1, 2, and" in decision.reason


def test_no_pair_is_used_directly_where_the_user_forbids_it():
    environment = {"EP_BACKEND_PEER_ACCESS": "0"}
    records = gpu_machine(4, nvlink=pairs, environment=environment)
    decision = decide(records)
    assert decision.transport == "host"
    assert "passed over: mixed, because EP_BACKEND_PEER_ACCESS=0 forbids it" in decision.reason
    with pytest.raises(EpConfigError, match="asks for transport 'mixed', but EP_BACKEND_PEER_ACCESS=0"):
        decide(records, "mixed")


def test_mixed_can_be_asked_for():
    assert decide(gpu_machine(2), "mixed").transport == "mixed"
    with pytest.raises(EpConfigError, match="asks for transport 'mixed', but no two of its GPUs"):
        decide(pcie_machine(2, works=False), "mixed")
    with pytest.raises(EpConfigError, match="asks for transport 'mixed', but the ranks share no memory"):
        decide(two(gpu_machine, 2), "mixed")


def test_mig_slices_have_no_links():
    decision = decide(gpu_machine(2, device="MIG-1", used=[0]) + gpu_machine(2, device="MIG-2", used=[0]))
    assert decision.profile is None


def test_the_worse_of_two_answers_counts():
    machine = gpu_machine(2)
    doubtful = msgspec.structs.replace(
        machine[1], links=(msgspec.structs.replace(machine[1].links[0], nvlink=False),)
    )
    assert gather([machine[0], doubtful]).nvlink == "none"
    assert gather([doubtful, machine[0]]).nvlink == "none"


def test_cpu_tensors_on_a_gpu_machine():
    decision = decide([msgspec.structs.replace(record, device="cpu") for record in gpu_machine(2)])
    assert (decision.profile, decision.transport) == ("cpu", "cpu")


# --- every kind of machine ---

HCA = {"hcas": ("mlx5_0:1",)}
NO_IB = {"NCCL_IB_DISABLE": "1"}
FABRIC = {"NCCL_CUMEM_ENABLE": "1", "NCCL_MNNVL_ENABLE": "1", "NVSHMEM_CUMEM_HANDLE_TYPE": "FABRIC"}
NVSWITCH = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
PCIE = {"NCCL_NVLS_ENABLE": "0"}

# Name, records, profile, transport now and in a build that has all, environment, and words of the reason.
MACHINES = [
    ("laptop", [cpu_rank()] * 2, "cpu", "cpu", "cpu", {}, "gpus is none"),
    ("DGX", gpu_machine(8, **HCA), "nvswitch", "peer", "peer", NVSWITCH, "nvlink is all"),
    ("two DGX", two(gpu_machine, 8, **HCA), "nvswitch", "collective", "collective", NVSWITCH,
     "nvlink is all"),
    ("NVL72 tray", fabric_machine(), "nvl72", "peer", "peer", FABRIC, "fabric is true"),
    ("NVL72 trays", two(fabric_machine, 4), "nvl72", "collective", "collective", FABRIC,
     "peer, because this version maps GPU memory inside one machine only"),
    ("2 NVLink pairs", gpu_machine(4, nvlink=pairs), "nvlink_pairs", "mixed", "mixed",
     {"NCCL_P2P_LEVEL": "NVL", **NO_IB},
     "from GPU to GPU between GPUs 0, 1 and between GPUs 2, 3, and through host memory everywhere else."),
    ("2 NVLink pairs and a port", gpu_machine(4, nvlink=pairs, **HCA), "nvlink_pairs", "mixed", "mixed",
     {"NCCL_P2P_LEVEL": "NVL"}, "nvlink is some"),
    ("2 NVLink pairs, both broken", broken(gpu_machine(4, nvlink=pairs), pairs), "nvlink_pairs", "host",
     "host", {"NCCL_P2P_LEVEL": "LOC", **NO_IB},
     "NCCL_P2P_LEVEL=LOC, because level NVL reaches GPUs between which the data check failed."),
    ("2 NVLink pairs, broken between them",
     broken(gpu_machine(4, nvlink=pairs), lambda a, b: not pairs(a, b)), "nvlink_pairs", "mixed", "mixed",
     {"NCCL_P2P_LEVEL": "NVL", **NO_IB}, "nvlink is some"),
    ("DGX with one bad pair", one_bad_pair(gpu_machine(8, **HCA)), "nvswitch", "host", "host",
     {"NCCL_P2P_LEVEL": "LOC", **NVSWITCH},
     "NCCL_P2P_LEVEL=LOC, because NCCL by itself reaches GPUs between which the data check failed."),
    ("8 H100 PCIe", pcie_machine(8), "pcie_p2p", "peer", "peer",
     {"NCCL_P2P_LEVEL": "PHB", **PCIE, **NO_IB}, "nvlink is none, peer_access is all"),
    ("8 H100 PCIe and a port", pcie_machine(8, **HCA), "pcie_p2p", "peer", "peer",
     {"NCCL_P2P_LEVEL": "PHB", **PCIE}, "nvlink is none, peer_access is all"),
    ("two H100 PCIe machines without ports", two(pcie_machine, 8), "pcie_p2p", "collective", "collective",
     {"NCCL_P2P_LEVEL": "PHB", **PCIE, **NO_IB}, "across 2 machines"),
    ("two H100 PCIe machines with ports", two(pcie_machine, 8, **HCA), "pcie_rdma",
     "collective", "collective", {"NCCL_P2P_LEVEL": "PHB", **PCIE}, "several_hosts is true, hca is true"),
    ("two machines with ports, nothing checked", two(pcie_machine, 4, works=None, **HCA), "pcie_rdma",
     "collective", "collective", PCIE, "hca is true"),
    ("two machines with ports, no peer access",
     two(pcie_machine, 4, works=False, **HCA), "pcie_rdma", "collective", "collective",
     {"NCCL_P2P_LEVEL": "LOC", **PCIE}, "hca is true"),
    ("two machines with a port and one GPU each", two(pcie_machine, 1, **HCA), "pcie_rdma",
     "collective", "collective", PCIE, "hca is true"),
    ("two machines with ports, peer access behind switches only",
     two(partial_machine, 4, **HCA), "pcie_rdma", "collective", "collective",
     {"NCCL_P2P_LEVEL": "PIX", **PCIE}, "hca is true"),
    ("peer access behind switches only", partial_machine(4), "pcie_partial", "mixed", "mixed",
     {"NCCL_P2P_LEVEL": "PIX", **PCIE, **NO_IB}, "failed between GPU-node0-0 and GPU-node0-2"),
    ("peer access in one NUMA node only", partial_machine(4, near="NODE"), "pcie_partial",
     "mixed", "mixed", {"NCCL_P2P_LEVEL": "PHB", **PCIE, **NO_IB}, "peer_access is some"),
    ("one bad pair among eight", one_bad_pair(pcie_machine(8)), "pcie_partial", "mixed", "mixed",
     {"NCCL_P2P_LEVEL": "LOC", **PCIE, **NO_IB}, "failed between GPU-node0-0 and GPU-node0-1."),
    ("RTX PRO 6000 Blackwell workstation", pcie_machine(2, works=False, ancestor="PHB"), "pcie_blackwell",
     "host", "host", {"NCCL_P2P_LEVEL": "LOC", **PCIE, **NO_IB}, "peer_access is none"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("records", "profile", "now", "later", "environment", "reason"),
    [machine[1:] for machine in MACHINES],
    ids=[machine[0] for machine in MACHINES],
)
def test_every_kind_of_machine(records, profile, now, later, environment, reason):
    decision = decide(records)
    assert (decision.profile, decision.transport) == (profile, now)
    assert {item.name: item.value for item in decision.env} == environment
    assert decision.reason.startswith(f"Profile {profile}: ")
    assert reason in decision.reason
    arguments = {(item.engine, item.name): item.value for item in decision.engine}
    assert arguments[("vllm", "--all2all-backend")] == "ep_backend"
    if now != later:
        assert "passed over: " in decision.reason
    assert decide(records, available=EVERYTHING).transport == later


@pytest.mark.parametrize("requested", ["auto", "peer", "host", "collective"])
def test_no_transport_for_gpus_works_with_an_old_driver(requested):
    for records in (pcie_machine(2, works=False, cuda_driver="12.8"), gpu_machine(8, cuda_driver="12.8")):
        with pytest.raises(EpConfigError, match=r"rank 0 has NVIDIA driver .* serves CUDA 12.8; driver 580"):
            decide(records, requested)


def test_every_profile_is_reached():
    assert {machine[2] for machine in MACHINES} == {profile.name for profile in KNOWN}


@pytest.mark.parametrize(
    ("not_this", "records", "instead"),
    [
        ("cpu", [cpu_rank(visible=("nvidia0",))], None),
        ("nvl72", gpu_machine(4), "nvswitch"),
        ("nvl72", fabric_machine(fabric_works=False), "nvswitch"),
        ("nvl72", fabric_machine(fabric_works=None), "nvswitch"),
        ("nvl72", fabric_machine()[:3] + gpu_machine(4)[3:], "nvswitch"),
        ("nvl72", fabric_machine() + fabric_machine(host="node1", clique=2), "nvswitch"),
        ("nvl72", fabric_machine() + fabric_machine(host="node1", cluster="c2"), "nvswitch"),
        # H100 machines may say that their fabric is complete, and name none (all zeros)
        ("nvl72", fabric_machine(cluster="", clique=None), "nvswitch"),
        ("nvswitch", gpu_machine(4, nvlink=lambda a, b: (a, b) != (0, 3)), "nvlink_pairs"),
        ("nvlink_pairs", gpu_machine(4, nvlink=pairs, used=[0, 1]), "nvswitch"),
        ("nvlink_pairs", gpu_machine(4, nvlink=pairs, used=[1, 2]), None),
        ("pcie_p2p", one_bad_pair(pcie_machine(4)), "pcie_partial"),
        ("pcie_partial", [r for r in partial_machine(4) if r.device[-1] in "01"], "pcie_p2p"),
        ("pcie_partial", [r for r in partial_machine(4) if r.device[-1] in "02"], "pcie_blackwell"),
        ("pcie_p2p", with_peer_access(gpu_machine(4, nvlink=pairs), True, "PIX"), "nvlink_pairs"),
        ("pcie_rdma", pcie_machine(4, **HCA) + pcie_machine(4, host="node1"), "pcie_p2p"),
        ("pcie_rdma", two(gpu_machine, 4, nvlink=lambda a, b: None, **HCA), None),
        ("pcie_blackwell", pcie_machine(1, works=False), None),
        ("pcie_blackwell", one_bad_pair(pcie_machine(4)), "pcie_partial"),
    ],
)
def test_what_a_profile_is_not(not_this, records, instead):
    decision = decide(records)
    assert decision.profile == instead
    fits = [p.name for p in KNOWN if not unmet(p.recognition.require, gather(records))]
    assert not_this not in fits


OWN = """
name = "own"
description = "Of a user."
[transport]
inside = ["host"]
across = ["collective"]
source = "me"
"""


@st.composite
def machines_with_failures(draw):
    """Ranks on machines with any links, of which the data check said anything."""
    records = []
    for host in ("node0", "node1")[: draw(st.integers(1, 2))]:
        machine = gpu_machine(
            draw(st.integers(1, 4)), host=host, hcas=draw(st.sampled_from([(), ("mlx5_0:1",)]))
        )
        links = tuple(
            msgspec.structs.replace(
                link,
                nvlink=draw(st.sampled_from([True, False, None])),
                ancestor=draw(st.sampled_from([*DISTANCE, ""])),
                peer_works=draw(st.sampled_from([False, False, True, None])),
            )
            for link in machine[0].links
        )
        records += [msgspec.structs.replace(record, links=links) for record in machine]
    return records


@st.composite
def profiles_and_wishes(draw):
    """The profiles, with one of a user's own that may set any level, and the one that is asked for."""
    own = profiles.loads(OWN.encode(), "own.toml")
    values = {"NCCL_P2P_LEVEL": env.variable("NCCL_P2P_LEVEL").choices, "NCCL_P2P_DISABLE": ("0", "1")}
    drawn = {name: draw(st.sampled_from([None, *some])) for name, some in values.items()}
    environment = {
        name: profiles.Setting(value=value, why="w", source="s") for name, value in drawn.items() if value
    }
    known = [*KNOWN, msgspec.structs.replace(own, environment=environment)]
    return known, draw(st.sampled_from(["auto", *(profile.name for profile in known)]))


@given(machines_with_failures(), profiles_and_wishes())
def test_no_decision_lets_nccl_reach_a_pair_whose_data_check_failed(records, wish):
    known, name = wish
    decision = select(records, known, profile=name)
    found = {item.name: item.value for item in decision.env}
    failed = [link for record in records for link in record.links if link.peer_works is False]
    disabled = found.get("NCCL_P2P_DISABLE") == "1"
    if failed and not disabled:
        assert not [link for link in failed if reaches(found["NCCL_P2P_LEVEL"], link)]
    # Nothing else is changed of what the profile asks for, and that only where it must be.
    wanted = {}
    for profile in [one for one in known if one.name == decision.profile]:
        for block in (profile, *(one for one in profile.conditional if not unmet(one.when, gather(records)))):
            wanted |= {key: setting.value for key, setting in block.environment.items()}
    level = wanted.get("NCCL_P2P_LEVEL")
    if failed and not disabled and (level is None or any(reaches(level, link) for link in failed)):
        assert found == {**wanted, "NCCL_P2P_LEVEL": "LOC"}
        assert "NCCL_P2P_LEVEL=LOC, because" in decision.reason
    else:
        assert found == wanted
        assert "NCCL_P2P_LEVEL=LOC, because" not in decision.reason


@pytest.mark.parametrize("name", ["nvswitch", "nvlink_pairs", "pcie_p2p", "own"])
def test_nccl_uses_no_peer_access_that_the_user_forbids(name):
    """The probe takes NVLink off the record then, so that a level's reach is not known."""
    machine = broken(gpu_machine(2, nvlink=lambda a, b: False), lambda a, b: True)
    machine = [
        msgspec.structs.replace(record, environment={"EP_BACKEND_PEER_ACCESS": "0"}) for record in machine
    ]
    decision = select(machine, [*KNOWN, profiles.loads(OWN.encode(), "own.toml")], profile=name)
    assert {item.value for item in decision.env if item.name == "NCCL_P2P_LEVEL"} == {"LOC"}
    assert "EP_BACKEND_PEER_ACCESS=0 forbids it." in decision.reason


def test_recognition_is_unambiguous():
    """Where two profiles fit, one stands before the other for a reason that its file gives."""
    before = {
        ("nvl72", name)
        for name in ("nvswitch", "nvlink_pairs", "pcie_rdma", "pcie_p2p", "pcie_partial", "pcie_blackwell")
    }
    before |= {("pcie_rdma", name) for name in ("pcie_p2p", "pcie_partial", "pcie_blackwell")}
    shares, truths = ("none", "some", "all", None), (False, True)
    base = gather(gpu_machine(2))
    for gpus, nvlink, peer, fabric, several, hca, hosts in itertools.product(
        ("none", "all"), shares, shares, (False, True, None), truths, truths, truths
    ):
        facts = msgspec.structs.replace(
            base, gpus=gpus, nvlink=nvlink, peer_access=peer, fabric=fabric, several_gpus=several, hca=hca,
            several_hosts=hosts,
        )  # fmt: skip
        fits = [p.name for p in KNOWN if not unmet(p.recognition.require, facts)]
        assert set(itertools.combinations(fits, 2)) <= before


def test_a_level_of_the_user_replaces_that_of_the_profile():
    decision = decide(pcie_machine(2, works=False))
    environ = {"NCCL_P2P_LEVEL": "PIX"}
    (conflict,) = apply_env(decision, environ)
    assert environ["NCCL_P2P_LEVEL"] == "PIX"
    assert "NCCL_P2P_DISABLE" not in environ
    assert "NCCL_P2P_LEVEL=PIX is kept" in str(conflict)


# --- ranks that disagree ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"torch": "2.11.0"}}, r"torch version: 2.13.0\+cpu on ranks 0, 2-3, 2.11.0 on rank 1"),
        (
            {"environment": {"EP_BACKEND_PROFILE": "cpu"}},
            "EP_BACKEND_PROFILE: nothing on ranks 0, 2-3, cpu on rank 1",
        ),
        (
            {"environment": {"NCCL_P2P_LEVEL": "PIX"}},
            "NCCL_P2P_LEVEL: nothing on ranks 0, 2-3, PIX on rank 1",
        ),
        (
            {"environment": {"EP_BACKEND_PEER_ORDER": "staggered"}},
            "EP_BACKEND_PEER_ORDER: nothing on ranks 0, 2-3, staggered on rank 1",
        ),
        ({"profiles_digest": "abc"}, "hardware profile files: nothing on ranks 0, 2-3, abc on rank 1"),
        ({"visible": ("GPU-1",)}, "computes on: the CPU on ranks 0, 2-3, a GPU on rank 1"),
    ],
)
def test_disagreement_is_an_error_with_the_difference(changes, message):
    records = [cpu_rank(), cpu_rank(**changes), cpu_rank(), cpu_rank()]
    with pytest.raises(EpConfigError, match=message):
        decide(records)
    with pytest.raises(EpConfigError, match="not set up alike"):
        select(records, KNOWN, "auto")


ON_TWO_HOSTS = "not set up alike: NCCL_IB_DISABLE: "


@pytest.mark.parametrize(
    ("here", "there", "difference"),
    [
        # what ep_backend itself set may differ between hosts, and be absent
        ({"applied": {"NCCL_IB_DISABLE": "1"}}, {}, None),
        ({"applied": {"NCCL_IB_DISABLE": "1"}}, {"applied": {"NCCL_IB_DISABLE": "0"}}, None),
        # a value of the user's own must hold everywhere, wherever it comes from
        ({"environment": {"NCCL_IB_DISABLE": "1"}}, {"applied": {"NCCL_IB_DISABLE": "1"}}, None),
        ({"environment": {"NCCL_IB_DISABLE": "1"}}, {"environment": {"NCCL_IB_DISABLE": "1"}}, None),
        ({"environment": {"NCCL_IB_DISABLE": "1"}}, {}, "1 on rank 0, nothing on rank 1"),
        ({"environment": {"NCCL_IB_DISABLE": "0"}}, {"applied": {"NCCL_IB_DISABLE": "1"}},
         r"0 on rank 0, 1 on rank 1 \(set by ep_backend\)"),
    ],
)  # fmt: skip
def test_what_ep_backend_set_itself_is_no_disagreement(here, there, difference):
    records = [cpu_rank(**here), cpu_rank(boot_id="b1", **there)]
    if difference is None:
        check_agreement(records)
    else:
        with pytest.raises(EpConfigError, match=ON_TWO_HOSTS + difference):
            check_agreement(records)


def test_two_hosts_of_which_one_has_a_port(tmp_path):
    """As in an engine: each host's first process decides alone, its workers inherit, the group decides."""
    machines = [pcie_machine(2, **HCA), pcie_machine(2, host="node1")]
    records = []
    for machine in machines:
        environ = {"NCCL_IB_SL": "3"}
        apply_env(decide([msgspec.structs.replace(machine[0], device="")]), environ)
        found = probe("cpu", environ=environ, root=tmp_path, checks="never")
        records += [
            msgspec.structs.replace(record, environment=found.environment, applied=found.applied)
            for record in machine
        ]
    assert [record.applied.get("NCCL_IB_DISABLE") for record in records] == [None, None, "1", "1"]
    assert {record.environment["NCCL_IB_SL"] for record in records} == {"3"}
    assert decide(records).profile == "pcie_p2p"
    wrong = msgspec.structs.replace(records[3], environment={"NCCL_IB_SL": "4"})
    with pytest.raises(EpConfigError, match="not set up alike: NCCL_IB_SL: 3 on ranks 0-2, 4 on rank 3"):
        decide([*records[:3], wrong])


def test_several_differences_are_all_named():
    other = cpu_rank(versions={"torch": "2.11.0"}, environment={"NCCL_IB_SL": "1"})
    with pytest.raises(EpConfigError, match=r"NCCL_IB_SL.*torch version"):
        check_agreement([cpu_rank(), other])


def test_hosts_may_differ_in_what_does_not_matter():
    decide([cpu_rank(cpus=2, driver="1"), cpu_rank(cpus=64, driver="2", problems=("odd",))])


def test_no_records():
    with pytest.raises(EpConfigError, match="no records"):
        decide([])


# --- purity and plain data ---


@given(st.permutations(range(4)), st.integers(1, 4))
def test_the_order_of_ranks_and_profiles_changes_nothing(order, used):
    machine = gpu_machine(4, nvlink=lambda a, b: a // 2 == b // 2, used=range(used))
    shuffled = [machine[rank] for rank in order if rank < used]
    assert select(shuffled, reversed(KNOWN), "auto") == select(machine, KNOWN, "auto")


def test_decisions_and_records_are_frozen_plain_data():
    record = gpu_machine(2)[0]
    decision = decide(gpu_machine(2))
    assert pickle.loads(pickle.dumps(record)) == record
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record
    assert pickle.loads(pickle.dumps(decision)) == decision
    with pytest.raises(AttributeError):
        decision.transport = "cpu"
