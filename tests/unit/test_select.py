"""Decisions from the records of made-up machines."""

import itertools
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_backend import profiles
from ep_backend.checks import Direction
from ep_backend.errors import EpConfigError
from ep_backend.facts import neighbours, unchecked
from ep_backend.nvml import Gpu, Link
from ep_backend.probe import Record, probe
from ep_backend.select import apply_env, check_agreement, decide, gather, select, unmet

KNOWN = profiles.shipped()
VERSIONS = {"ep_backend": "0.1", "torch": "2.13.0", "nccl": "2.28.3"}
EVERYTHING = frozenset(profiles.TRANSPORTS)


def cpu_rank(**changes):
    fields = {"host": "laptop", "boot_id": "b0", "shared_memory": "27:1", "versions": {"torch": "2.13.0+cpu"}}
    return Record(**{**fields, **changes})


def gpu_machine(count=4, host="node0", nvlink=lambda a, b: True, used=None, **changes):
    """Records of ranks with one GPU each, on a machine where ``nvlink(a, b)`` says how GPUs are joined."""
    uuids = [f"GPU-{host}-{index}" for index in range(count)]
    links = tuple(
        Link(a=uuids[a], b=uuids[b], nvlink=nvlink(a, b), ancestor="NODE")
        for a, b in itertools.combinations(range(count), 2)
    )
    fields = {
        "host": host,
        "boot_id": f"boot-{host}",
        "shared_memory": "27:1",
        "versions": VERSIONS,
        "cuda_driver": "13.0",
        "gpus": tuple(Gpu(uuid=uuid) for uuid in uuids),
        "visible": tuple(uuids),
        "links": links,
    }
    ranks = range(count) if used is None else used
    return [Record(**{**fields, "device": uuids[rank], **changes}) for rank in ranks]


def pcie_machine(count=8, works=True, ancestor="PXB", **changes):
    """Records of ranks on a machine without NVLink. ``works``: whether the data check of a pair passed."""
    records = gpu_machine(count, nvlink=lambda a, b: False, **changes)
    return with_peer_access(records, works, ancestor)


def with_peer_access(records, works, ancestor):
    links = tuple(
        msgspec.structs.replace(link, peer_works=works, ancestor=ancestor) for link in records[0].links
    )
    return [msgspec.structs.replace(record, links=links) for record in records]


def fabric_machine(count=4, cluster="c1", clique=1, **changes):
    """Records of ranks on a machine whose GPUs belong to an NVLink fabric across machines."""
    records = gpu_machine(count, **{"fabric_works": True, **changes})
    gpus = tuple(
        msgspec.structs.replace(gpu, fabric_cluster=cluster, fabric_clique=clique, fabric_state="completed")
        for gpu in records[0].gpus
    )
    return [msgspec.structs.replace(record, gpus=gpus) for record in records]


def pairs(a, b):
    """NVLink bridges between GPUs 0 and 1, 2 and 3, ..."""
    return a // 2 == b // 2


def one_bad_pair(records):
    """The same machine with one pair whose data check failed."""
    links = list(records[0].links)
    links[0] = msgspec.structs.replace(links[0], peer_works=False)
    return [msgspec.structs.replace(record, links=tuple(links)) for record in records]


def partial_machine(count=4, near="PIX", **changes):
    """Peer access works between GPUs 0 and 1, 2 and 3, ..., which are near to each other, and only there."""
    records = pcie_machine(count, **changes)
    links = tuple(
        msgspec.structs.replace(
            link,
            peer_works=pairs(*(int(uuid[-1]) for uuid in (link.a, link.b))),
            ancestor=near if pairs(*(int(uuid[-1]) for uuid in (link.a, link.b))) else "SYS",
        )
        for link in records[0].links
    )
    return [msgspec.structs.replace(record, links=links) for record in records]


def two(machine, *arguments, **changes):
    return machine(*arguments, **changes) + machine(*arguments, host="node1", **changes)


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
    decision = decide(gpu_machine(8), available=frozenset({"cpu", "collective"}))
    assert (decision.profile, decision.transport) == ("nvswitch", "collective")
    assert "passed over: peer, because it is not in this build" in decision.reason


def test_nvswitch_with_a_build_that_has_everything():
    machine = gpu_machine(8)
    assert decide(machine, available=EVERYTHING).transport == "peer"
    two = machine + gpu_machine(8, host="node1")
    assert decide(two, available=EVERYTHING).transport == "hier"
    assert decide(two).transport == "collective"


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
        assert (decision.profile, decision.transport, decision.env) == (None, "collective", ())
        assert f"nvlink must be all and is {word}" in decision.reason


def test_pcie_machines_whose_peer_access_nobody_checked_fit_no_profile():
    """What a PCIe machine is where the data check could not run: neither good nor bad is assumed."""
    decision = decide(pcie_machine(4, works=None))
    assert (decision.profile, decision.transport, decision.env) == (None, "collective", ())
    for name, word in (("pcie_p2p", "all"), ("pcie_blackwell", "none")):
        assert f"{name}: peer_access must be {word} and is unknown" in decision.reason


def test_gpus_that_nobody_describes_are_not_taken_for_a_cpu_machine():
    assert decide([cpu_rank(visible=("nvidia0",))]).profile is None
    assert decide([cpu_rank(device="cuda:0"), cpu_rank(device="cuda:1")]).transport == "collective"


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
OLD = {"cuda_driver": "12.8"}
OLD_HOST = {"NCCL_CUMEM_HOST_ENABLE": "0"}

# Name, records, profile, transport now and in a build that has all, environment, and words of the reason.
MACHINES = [
    ("laptop", [cpu_rank()] * 2, "cpu", "cpu", "cpu", {}, "gpus is none"),
    ("DGX", gpu_machine(8, **HCA), "nvswitch", "peer", "peer", NVSWITCH, "nvlink is all"),
    ("two DGX", two(gpu_machine, 8, **HCA), "nvswitch", "collective", "hier", NVSWITCH, "across 2 machines"),
    ("NVL72 tray", fabric_machine(), "nvl72", "peer", "peer", FABRIC, "fabric is true"),
    ("NVL72 trays", two(fabric_machine, 4), "nvl72", "collective", "collective", FABRIC,
     "peer, because this version maps GPU memory inside one machine only"),
    ("2 NVLink pairs", gpu_machine(4, nvlink=pairs), "nvlink_pairs", "collective", "host",
     {"NCCL_P2P_LEVEL": "NVL", **NO_IB}, "nvlink is some"),
    ("2 NVLink pairs and a port", gpu_machine(4, nvlink=pairs, **HCA), "nvlink_pairs", "collective", "host",
     {"NCCL_P2P_LEVEL": "NVL"}, "nvlink is some"),
    ("8 H100 PCIe", pcie_machine(8), "pcie_p2p", "peer", "peer",
     {"NCCL_P2P_LEVEL": "PHB", **PCIE, **NO_IB}, "nvlink is none, peer_access is all"),
    ("8 H100 PCIe and a port", pcie_machine(8, **HCA), "pcie_p2p", "peer", "peer",
     {"NCCL_P2P_LEVEL": "PHB", **PCIE}, "nvlink is none, peer_access is all"),
    ("two H100 PCIe machines without ports", two(pcie_machine, 8), "pcie_p2p", "collective", "collective",
     {"NCCL_P2P_LEVEL": "PHB", **PCIE, **NO_IB}, "across 2 machines"),
    ("two H100 PCIe machines with ports", two(pcie_machine, 8, **HCA), "pcie_rdma", "collective", "hier",
     {"NCCL_P2P_LEVEL": "PHB", **PCIE}, "several_hosts is true, hca is true"),
    ("two machines with ports, nothing checked", two(pcie_machine, 4, works=None, **HCA), "pcie_rdma",
     "collective", "hier", PCIE, "hca is true"),
    ("two machines with ports, no peer access, old driver",
     two(pcie_machine, 4, works=False, **HCA, **OLD), "pcie_rdma", "collective", "collective",
     {"NCCL_P2P_LEVEL": "LOC", **PCIE, **OLD_HOST}, "hca is true"),
    ("two machines with a port and one GPU each", two(pcie_machine, 1, **HCA, **OLD), "pcie_rdma",
     "collective", "hier", PCIE, "hca is true"),
    ("two machines with ports, peer access behind switches only",
     two(partial_machine, 4, **HCA), "pcie_rdma", "collective", "collective",
     {"NCCL_P2P_LEVEL": "PIX", **PCIE}, "hca is true"),
    ("peer access behind switches only", partial_machine(4), "pcie_partial", "collective", "host",
     {"NCCL_P2P_LEVEL": "PIX", **PCIE, **NO_IB}, "failed between GPU-node0-0 and GPU-node0-2"),
    ("peer access in one NUMA node only, old driver", partial_machine(4, near="NODE", **OLD), "pcie_partial",
     "collective", "host", {"NCCL_P2P_LEVEL": "PHB", **PCIE, **NO_IB, **OLD_HOST}, "peer_access is some"),
    ("one bad pair among eight", one_bad_pair(pcie_machine(8)), "pcie_partial", "collective", "host",
     {"NCCL_P2P_LEVEL": "LOC", **PCIE, **NO_IB}, "failed between GPU-node0-0 and GPU-node0-1."),
    ("RTX PRO 6000 Blackwell workstation", pcie_machine(2, works=False, ancestor="PHB"), "pcie_blackwell",
     "collective", "host", {"NCCL_P2P_LEVEL": "LOC", **PCIE, **NO_IB}, "peer_access is none"),
    ("the same with an old driver", pcie_machine(2, works=False, **OLD), "pcie_blackwell",
     "collective", "host", {"NCCL_P2P_LEVEL": "LOC", **PCIE, **NO_IB, **OLD_HOST}, "peer_access is none"),
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


# --- what the user asks for ---


def test_a_profile_can_be_forced_and_the_reason_says_what_does_not_fit():
    decision = decide([cpu_rank(environment={"EP_BACKEND_PROFILE": "hgx"})])
    assert decision.profile == "nvswitch"
    assert "asked for by EP_BACKEND_PROFILE" in decision.reason
    assert "gpus must be all and is none" in decision.reason
    assert decide([cpu_rank()], requested_profile="dgx").profile == "nvswitch"
    with pytest.raises(EpConfigError, match="did you mean 'dgx'"):
        decide([cpu_rank()], requested_profile="dgxx")


def test_the_cpu_profile_forced_on_gpus_does_not_move_gpu_tensors_through_the_cpu_transport():
    decision = decide(gpu_machine(2), requested_profile="cpu")
    assert decision.transport == "collective"
    assert "it moves CPU tensors" in decision.reason


def test_a_users_profile_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        name = "mine"
        description = "Mine."
        [transport]
        inside = ["collective"]
        across = ["collective"]
        source = "me"
        [sm_budget]
        sms = 16
        source = "me"
        [environment.NCCL_IB_SL]
        value = "3"
        why = "Ours."
        source = "me"
        [[conditional]]
        when = { hca = false }
        environment.NCCL_IB_DISABLE = { value = "1", why = "No port.", source = "me" }
        engine.vllm."--max-num-seqs" = { value = "4", why = "Small.", source = "me" }
        [[conditional]]
        when = { hca = true }
        environment.NCCL_IB_SL = { value = "5", why = "Ours, with ports.", source = "me" }
        """
    )
    asked = {"environment": {"EP_BACKEND_PROFILE": str(file)}}
    decision = decide([cpu_rank(**asked)])
    assert (decision.profile, decision.transport, decision.sms) == ("mine", "collective", 16)
    assert [(item.name, item.value) for item in decision.env] == [
        ("NCCL_IB_DISABLE", "1"),
        ("NCCL_IB_SL", "3"),
    ]
    assert [(item.engine, item.name, item.value) for item in decision.engine] == [
        ("vllm", "--max-num-seqs", "4")
    ]
    decision = decide([cpu_rank(hcas=("mlx5_0:1",), **asked)])
    assert [(item.name, item.value) for item in decision.env] == [("NCCL_IB_SL", "5")]
    assert decision.engine == ()


def test_the_transport_can_be_forced():
    decision = decide([cpu_rank(environment={"EP_BACKEND_TRANSPORT": "collective"})])
    assert (decision.profile, decision.transport) == ("cpu", "collective")
    assert "asked for by EP_BACKEND_TRANSPORT" in decision.reason
    # the communicator's own configuration goes before the environment
    decision = decide([cpu_rank(environment={"EP_BACKEND_TRANSPORT": "collective"})], "cpu")
    assert decision.transport == "cpu"
    assert "the communicator's configuration" in decision.reason


@pytest.mark.parametrize(
    ("records", "wish", "message"),
    [
        ([cpu_rank()], "colective", "unknown transport 'colective'; did you mean 'collective'"),
        ([cpu_rank()], "hier", "not in this build, which has collective and cpu"),
        ([cpu_rank(), cpu_rank(boot_id="b1")], "cpu", "the ranks share no memory"),
        (gpu_machine(2), "cpu", "it moves CPU tensors and rank 0 computes on GPU-node0-0"),
        (gpu_machine(2) + gpu_machine(2, host="node1"), "peer", "inside one machine only"),
    ],
)
def test_a_forced_transport_that_cannot_be_had(records, wish, message):
    with pytest.raises(EpConfigError, match=message):
        decide(records, wish)


def test_a_forced_gpu_transport_without_gpus():
    with pytest.raises(EpConfigError, match="it moves GPU tensors"):
        decide([cpu_rank()], "peer", available=EVERYTHING)


def test_no_transport_at_all():
    with pytest.raises(EpConfigError, match="no transport can serve this group"):
        decide([cpu_rank(), cpu_rank(boot_id="b1")], available=frozenset({"cpu"}))


# --- a profile in a file of the user's ---

OWN = """
name = "{name}"
description = "Mine."
[transport]
inside = ["collective"]
across = ["collective"]
source = "me"
"""
RECOGNITION = """
[recognition]
order = 500
require = {{ nvlink = "{nvlink}" }}
source = "me"
"""


def own_file(folder, name="mine", nvlink=None):
    file = folder / "own.toml"
    file.write_text(OWN.format(name=name) + (RECOGNITION.format(nvlink=nvlink) if nvlink else ""))
    return {"EP_BACKEND_PROFILE": str(file)}


def test_a_file_without_recognition_is_forced(tmp_path):
    decision = decide(gpu_machine(2, environment=own_file(tmp_path)))
    assert decision.profile == "mine"
    assert "asked for by EP_BACKEND_PROFILE" in decision.reason


def test_a_file_with_recognition_goes_before_the_others_where_it_fits(tmp_path):
    decision = decide(gpu_machine(2, environment=own_file(tmp_path, nvlink="all")))
    assert decision.profile == "mine"
    assert "Profile mine: nvlink is all." in decision.reason


@pytest.mark.parametrize(("name", "instead"), [("mine", "pcie_p2p"), ("pcie_p2p", None)])
def test_a_file_with_recognition_is_not_used_where_it_does_not_fit(tmp_path, name, instead):
    decision = decide(pcie_machine(2, environment=own_file(tmp_path, name=name, nvlink="all")))
    assert decision.profile == instead
    assert f"Profile {name}, named by EP_BACKEND_PROFILE, does not fit" in decision.reason
    assert "nvlink must be all and is none" in decision.reason


def test_a_file_with_recognition_from_the_command_line(tmp_path):
    path = own_file(tmp_path, nvlink="some")["EP_BACKEND_PROFILE"]
    decision = decide(gpu_machine(2), requested_profile=path)
    assert decision.profile == "nvswitch"
    assert "Profile mine, named by the command line, does not fit" in decision.reason


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
    assert (decision.profile, decision.transport) == ("pcie_blackwell", "collective")
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
    assert (decision.profile, decision.transport) == ("pcie_blackwell", "collective")
    assert f"The driver offers no peer access between {a} and {b}." in decision.reason
    assert "data check" not in decision.reason
    with pytest.raises(EpConfigError, match=f"but the driver offers no peer access between {a} and {b}"):
        decide(records, "peer")
    broken = (directions[0], Direction(source=b, target=a, access=True, works=False))
    told = [records[0], msgspec.structs.replace(records[1], directions=broken)]
    assert "The data check of peer access failed between" in decide(told).reason


def test_nvlink_whose_data_check_failed_is_not_used():
    decision = decide(one_bad_pair(gpu_machine(8)))
    assert (decision.profile, decision.transport) == ("nvswitch", "collective")
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
    assert (decision.profile, decision.transport) == ("pcie_blackwell", "collective")
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
        assert decide(records).transport == "collective"
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
        (pcie_machine(4), False),
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


# --- applying the environment ---


def test_apply_env_fills_in_and_never_overrides():
    decision = decide(gpu_machine(2))
    environ = {"NCCL_NVLS_ENABLE": "1", "HOME": "/"}
    conflicts = apply_env(decision, environ)
    assert environ == {
        "NCCL_NVLS_ENABLE": "1",
        "NCCL_CUMEM_ENABLE": "1",
        "EP_BACKEND_APPLIED": "NCCL_CUMEM_ENABLE=1",
        "HOME": "/",
    }
    assert [(c.name, c.found, c.wanted) for c in conflicts] == [("NCCL_NVLS_ENABLE", "1", "0")]
    assert "NCCL_NVLS_ENABLE=1 is kept" in str(conflicts[0])
    assert apply_env(decision, environ) == conflicts, "a second time changes nothing"


def test_what_a_process_above_set_stays_and_is_no_conflict():
    environ = {}
    assert apply_env(decide(pcie_machine(4)), environ) == ()
    before = dict(environ)
    assert apply_env(decide(pcie_machine(4, works=False)), environ) == ()
    assert environ == before
    environ["NCCL_P2P_LEVEL"] = "SYS"  # somebody has changed it: now it is theirs
    (conflict,) = apply_env(decide(pcie_machine(4)), environ)
    assert (conflict.name, conflict.found) == ("NCCL_P2P_LEVEL", "SYS")


def test_apply_env_to_this_process(monkeypatch):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    monkeypatch.setenv("EP_BACKEND_APPLIED", "")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    import os

    assert apply_env(decide(gpu_machine(2))) == ()
    assert os.environ["NCCL_CUMEM_ENABLE"] == "1"
    monkeypatch.delenv("NCCL_CUMEM_ENABLE")
