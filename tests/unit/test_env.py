"""The registry of environment variables."""

import re
from pathlib import Path

import pytest

import ep_backend.env as env
from ep_backend.errors import EpConfigError


def test_defaults_and_values():
    assert env.get("EP_BACKEND_TIMEOUT_S", {}) == 30.0
    assert env.get("EP_BACKEND_STARTUP_TIMEOUT_S", {}) == 300.0
    assert env.get("EP_BACKEND_TIMEOUT_S", {"EP_BACKEND_TIMEOUT_S": " 2.5 "}) == 2.5
    assert env.get("EP_BACKEND_TIMEOUT_S", {"EP_BACKEND_TIMEOUT_S": "  "}) == 30.0
    assert env.get("EP_BACKEND_PROFILE", {"EP_BACKEND_PROFILE": "hgx"}) == "hgx"


def test_get_reads_the_process_environment(monkeypatch):
    monkeypatch.setenv("EP_BACKEND_TIMEOUT_S", "7")
    assert env.get("EP_BACKEND_TIMEOUT_S") == 7.0
    monkeypatch.delenv("EP_BACKEND_TIMEOUT_S")
    assert env.get("EP_BACKEND_TIMEOUT_S") == 30.0


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "-inf", "1e9", "30s", "0x1e"])
def test_a_bad_number_says_what_came_and_what_was_wanted(text):
    with pytest.raises(EpConfigError) as error:
        env.get("EP_BACKEND_TIMEOUT_S", {"EP_BACKEND_TIMEOUT_S": text})
    assert f"EP_BACKEND_TIMEOUT_S={text!r}" in str(error.value)
    assert "a number from 0.001 to 86400" in str(error.value)


def test_a_bad_choice_names_the_nearest():
    with pytest.raises(EpConfigError, match="one of auto, 0, 1; did you mean 'auto'"):
        env.get("EP_BACKEND_CUDA", {"EP_BACKEND_CUDA": "Auto"})
    with pytest.raises(EpConfigError, match="PXB"):
        env.variable("NCCL_P2P_LEVEL").parse("PXBB")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("NCCL_IB_SL", ["0", "15"], ["16", "-1", "low", "1.5"]),
        ("NCCL_IB_TC", ["0", "255"], ["256"]),
        ("NCCL_CUMEM_ENABLE", ["0", "1"], ["2", "yes", ""]),
        ("NCCL_P2P_LEVEL", ["PIX", "NVL"], ["pix", "3"]),
        ("NCCL_SHM_DISABLE", ["0", "1"], ["2"]),
        ("NCCL_SOCKET_IFNAME", ["eth", "=eth0,eth1", "^=docker0"], ["", " ", "eth0, eth1", " eth0"]),
        ("NCCL_IB_HCA", ["mlx5_0:1,mlx5_1", "^=mlx5_3"], ["", "mlx5_0 mlx5_1"]),
        ("NCCL_IB_GID_INDEX", ["-1", "0", "3"], ["-2", "256", "v2", ""]),
        ("NCCL_PROTO", ["Simple", "^LL128", "^LL128;allreduce:LL128"], ["", "LL, LL128"]),
        ("NCCL_ALGO", ["Ring,Tree", "allreduce:tree,collnetdirect;broadcast:ring"], ["", "Ring Tree"]),
        ("GLOO_SOCKET_IFNAME", ["eth0", "eth0,eth1"], ["", "eth0 eth1"]),
    ],
)
def test_values_of_set_variables(name, good, bad):
    for text in good:
        env.variable(name).parse(text)
    for text in bad:
        with pytest.raises(EpConfigError, match=name):
            env.variable(name).parse(text)


def test_unknown_and_unreadable_names():
    with pytest.raises(EpConfigError, match="did you mean 'EP_BACKEND_TIMEOUT_S'"):
        env.get("EP_BACKEND_TIMEOUT")
    with pytest.raises(EpConfigError, match="set by profiles and not read"):
        env.get("NCCL_IB_SL")


def test_misspelt():
    found = env.misspelt({"EP_BACKEND_TIMOUT_S": "1", "EP_BACKEND_TRANSPORT": "cpu", "HOME": "/"})
    assert found == (
        "EP_BACKEND_TIMOUT_S is set but means nothing to ep_backend; did you mean 'EP_BACKEND_TIMEOUT_S'?",
    )


@pytest.mark.parametrize(
    ("environ", "ours"),
    [
        ({}, {}),
        ({"EP_BACKEND_APPLIED": "", "NCCL_IB_SL": "3"}, {}),
        ({"EP_BACKEND_APPLIED": "NCCL_IB_SL=3 NCCL_IB_TC=7", "NCCL_IB_SL": "3"}, {"NCCL_IB_SL": "3"}),
        ({"EP_BACKEND_APPLIED": "NCCL_IB_SL=3", "NCCL_IB_SL": "4"}, {}),
        ({"EP_BACKEND_APPLIED": "HOME=/ rubbish = NCCL_IB_SL", "HOME": "/", "NCCL_IB_SL": ""}, {}),
    ],
)
def test_what_ep_backend_has_set_is_remembered_while_it_holds(environ, ours):
    assert env.applied(environ) == ours


def test_registry_is_consistent():
    names = [variable.name for variable in env.VARIABLES]
    assert len(set(names)) == len(names)
    for variable in env.VARIABLES:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", variable.name)
        assert variable.help.endswith(".")
        if variable.default not in (None, ""):
            assert variable.parse(str(variable.default)) == variable.default
        # What is ours is read; what belongs to others is set, and has no default of ours.
        assert variable.kind == "read" or variable.default is None
        assert not (variable.name.startswith(env.PREFIX) and variable.kind == "set")


def test_the_documentation_lists_what_a_profile_may_set():
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    table = text.partition("### Variables that a profile may set")[2].partition("\n\n\\*")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = {name: row.rstrip().endswith("*") for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == {v.name: v.per_host for v in env.VARIABLES if v.kind == "set"}


def test_every_variable_that_the_code_names_is_registered():
    known = {variable.name for variable in env.VARIABLES}
    folders = [Path(env.__file__).parent]
    try:
        import ep_backend_vllm

        folders += [Path(path) for path in ep_backend_vllm.__path__]
    except ImportError:
        pass
    for folder in folders:
        for file in folder.rglob("*.py"):
            named = set(re.findall(r"[\"'](EP_BACKEND_[A-Z0-9_]*[A-Z0-9])[\"']", file.read_text()))
            assert named <= known, f"{file} uses {named - known}"
