"""What the user asks for: a profile, a transport, a file, variables of their own."""

import pytest
from machines import EVERYTHING, cpu_rank, gpu_machine, pcie_machine

from ep_backend.errors import EpConfigError
from ep_backend.select import apply_env, decide

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
        (gpu_machine(2) + gpu_machine(1, host="node1"), "hier", "the nodes have 2, 1 ranks"),
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


KEPT = (
    "NCCL_P2P_DISABLE=1 is kept as it was found; ep_backend would set NCCL_P2P_LEVEL=PHB. "
    "NCCL_P2P_LEVEL means nothing while NCCL_P2P_DISABLE is 1. Peer access was seen to work"
)


def test_the_users_switch_beside_a_level_of_the_profile_is_a_conflict():
    decision, environ = decide(pcie_machine(4)), {"NCCL_P2P_DISABLE": "1"}
    (conflict,) = apply_env(decision, environ)
    assert str(conflict).startswith(KEPT)
    assert environ["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_LEVEL" not in environ
    assert apply_env(decision, environ) == (conflict,), "a second time changes nothing"


@pytest.mark.parametrize(
    ("works", "environ"),
    [
        (False, {"NCCL_P2P_DISABLE": "1"}),  # the profile's LOC says the same
        (True, {"NCCL_P2P_DISABLE": "0"}),
        (True, {"NCCL_P2P_DISABLE": ""}),
        (True, {"NCCL_P2P_DISABLE": "1", "EP_BACKEND_APPLIED": "NCCL_P2P_DISABLE=1"}),
    ],
)
def test_a_switch_that_changes_nothing_is_no_conflict(works, environ):
    assert apply_env(decide(pcie_machine(4, works=works)), environ) == ()
    assert environ["NCCL_P2P_LEVEL"] == ("PHB" if works else "LOC")


def test_a_profiles_switch_does_not_take_the_users_level_away(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        OWN.format(name="mine") + '[environment.NCCL_P2P_DISABLE]\nvalue = "1"\nwhy = "w"\nsource = "s"\n'
    )
    decision, environ = decide(pcie_machine(2), requested_profile=str(file)), {"NCCL_P2P_LEVEL": "PIX"}
    (conflict,) = apply_env(decision, environ)
    assert "NCCL_P2P_LEVEL=PIX is kept as it was found; ep_backend would set NCCL_P2P_DIS" in str(conflict)
    assert "NCCL_P2P_DISABLE" not in environ


def test_apply_env_to_this_process(monkeypatch):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    monkeypatch.setenv("EP_BACKEND_APPLIED", "")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    import os

    assert apply_env(decide(gpu_machine(2))) == ()
    assert os.environ["NCCL_CUMEM_ENABLE"] == "1"
    monkeypatch.delenv("NCCL_CUMEM_ENABLE")
