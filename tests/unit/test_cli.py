"""The console command, as a user runs it."""

import json
import os
import subprocess
import sys

import pytest

from ep_backend import __version__, cli, env, profiles


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(env.PREFIX) or name in {v.name for v in env.VARIABLES}:
            monkeypatch.delenv(name)
    # Made-up GPUs of the machine under test must not change what is asserted here.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def run(capsys, *arguments):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_env_as_text(capsys):
    status, out, err = run(capsys, "env")
    assert status == 0
    assert err == ""
    assert "profile      cpu" in out
    assert "transport    cpu" in out
    assert "reason " in out
    for variable in env.VARIABLES:
        if variable.kind == "read":
            assert variable.name in out


def test_env_as_json(capsys):
    status, out, _ = run(capsys, "env", "--json", "--profile", "hgx")
    answer = json.loads(out)
    assert status == 0
    assert (answer["profile"], answer["transport"]) == ("nvswitch", "collective")
    assert {item["name"]: item["status"] for item in answer["environment"]} == {
        "NCCL_CUMEM_ENABLE": "will be set",
        "NCCL_NVLS_ENABLE": "will be set",
    }
    assert {variable["name"] for variable in answer["variables"]} == {v.name for v in env.VARIABLES}
    assert answer["machine"]["cpus"] >= 1


@pytest.mark.parametrize("profile", [p for p in profiles.shipped() if p.name != "cpu"], ids=lambda p: p.name)
def test_env_and_list_show_every_profile(capsys, profile):
    for name in profile.names:
        status, out, _ = run(capsys, "env", "--json", "--profile", name)
        answer = json.loads(out)
        assert (status, answer["profile"], answer["transport"]) == (0, profile.name, "collective")
        shown = {item["name"]: (item["value"], item["source"]) for item in answer["environment"]}
        for variable, setting in profile.environment.items():
            assert shown[variable] == (setting.value, setting.source)
    _, out, _ = run(capsys, "profiles", "list")
    assert f"{profile.name}{' (also: ' if profile.aliases else ''}{', '.join(profile.aliases)}" in out
    assert profile.description in out


def test_env_for_a_shell_can_be_evaluated(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    status, out, _ = run(capsys, "env", "--shell", "--profile", "hgx")
    assert status == 0
    assert "# conflict: NCCL_NVLS_ENABLE=1 is kept" in out
    shell = subprocess.run(
        ["sh", "-euc", out + '\necho "$NCCL_CUMEM_ENABLE $NCCL_NVLS_ENABLE"'], capture_output=True, text=True
    )
    assert (shell.returncode, shell.stdout, shell.stderr) == (0, "1 1\n", "")


def test_what_a_shell_was_given_is_known_as_ours(capsys, monkeypatch):
    _, out, _ = run(capsys, "env", "--shell", "--profile", "hgx")
    shell = subprocess.run(["sh", "-euc", out + "\nenv"], capture_output=True, text=True)
    given = dict(line.split("=", 1) for line in shell.stdout.splitlines() if "=" in line)
    assert env.applied(given) == {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    _, out, _ = run(capsys, "env", "--shell", "--profile", "cpu")
    assert "export" not in out


def test_what_was_set_for_another_profile_is_no_conflict(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_P2P_LEVEL", "LOC")
    monkeypatch.setenv("EP_BACKEND_APPLIED", "NCCL_P2P_LEVEL=LOC")
    _, out, _ = run(capsys, "env", "--profile", "pcie_p2p")
    assert "NCCL_P2P_LEVEL=PHB  [set before by ep_backend]" in out
    assert "conflict:" not in out


def test_env_changes_nothing(capsys):
    before = dict(os.environ)
    run(capsys, "env", "--profile", "hgx")
    assert dict(os.environ) == before


def test_env_reports_conflicts_and_agreement(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    status, out, _ = run(capsys, "env", "--profile", "nvswitch")
    assert status == 0
    assert "NCCL_NVLS_ENABLE=0  [conflict]" in out
    assert "NCCL_CUMEM_ENABLE=1  [already so]" in out
    assert "NCCL_NVLS_ENABLE=2 is kept as it was found" in out


def test_env_reports_a_switch_that_makes_a_level_meaningless(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    _, out, _ = run(capsys, "env", "--profile", "pcie_p2p")
    assert "NCCL_P2P_LEVEL=PHB  [conflict]" in out
    assert "conflict: NCCL_P2P_DISABLE=1 is kept as it was found; ep_backend would set NCCL_P2P_LEVEL" in out
    _, out, _ = run(capsys, "env", "--shell", "--profile", "pcie_p2p")
    assert "export NCCL_P2P_LEVEL" not in out
    assert "# conflict: NCCL_P2P_DISABLE=1 is kept" in out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EP_BACKEND_TRANSPORT", "cpuu", "did you mean 'cpu'"),
        ("EP_BACKEND_PROFILE", "nvswich", "did you mean 'nvswitch'"),
        ("EP_BACKEND_PROFILE", "/nonexistent.toml", "/nonexistent.toml: there is no such file"),
        ("EP_BACKEND_TIMEOUT_S", "soon", "wanted a number"),
        ("EP_BACKEND_TIMOUT_S", "3", "did you mean 'EP_BACKEND_TIMEOUT_S'"),
    ],
)
def test_a_wrong_environment_is_one_sentence_and_status_1(capsys, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    status, _, err = run(capsys, "env")
    assert status == 1
    assert message in err
    assert err.startswith("ep-backend: ")
    assert err.count("\n") == 1


def test_profiles_list(capsys):
    for arguments in (["profiles"], ["profiles", "list"]):
        status, out, _ = run(capsys, *arguments)
        assert status == 0
        assert "cpu  <- this machine" in out
        assert "nvswitch (also: dgx, hgx)" in out


def test_profiles_show(capsys):
    status, out, _ = run(capsys, "profiles", "show", "dgx")
    assert status == 0
    assert profiles.loads(out.encode(), "shown").name == "nvswitch"
    status, _, err = run(capsys, "profiles", "show", "dgy")
    assert status == 1
    assert "did you mean 'dgx'" in err


OWN = """
name = "mine"
aliases = ["my_own"]
description = "Mine."
[transport]
inside = ["collective"]
across = ["collective"]
source = "me"
"""
RECOGNISED = '[recognition]\norder = 500\nrequire = { gpus = "none" }\nsource = "me"\n'


def test_profiles_show_a_file(capsys, monkeypatch, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    assert run(capsys, "profiles", "show", str(file)) == (0, OWN, "")
    monkeypatch.setenv("EP_BACKEND_PROFILE", str(file))
    for name in ("mine", "my_own"):
        assert run(capsys, "profiles", "show", name) == (0, OWN, "")
    assert "NVLink" in run(capsys, "profiles", "show", "hgx")[1]
    file.write_text(OWN.replace("Mine.", ""))
    status, out, err = run(capsys, "profiles", "show", str(file))
    assert (status, out) == (1, "")
    assert "own.toml: description: must not be empty" in err


def test_an_sm_budget_is_shown(capsys, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN + '[sm_budget]\nsms = 16\nsource = "me"\n')
    _, out, _ = run(capsys, "env", "--profile", str(file))
    assert "\nSM budget    16; num_sms of a communicator goes first\n" in out
    assert json.loads(run(capsys, "env", "--json", "--profile", str(file))[1])["sms"] == 16
    assert "SM budget" not in run(capsys, "env")[1]


@pytest.mark.parametrize(("more", "here"), [("", "cpu"), (RECOGNISED, "mine")])
def test_profiles_list_has_a_users_own_file(capsys, monkeypatch, tmp_path, more, here):
    file = tmp_path / "own.toml"
    file.write_text(OWN + more)
    monkeypatch.setenv("EP_BACKEND_PROFILE", str(file))
    status, out, _ = run(capsys, "profiles", "list")
    assert status == 0
    assert f"mine (also: my_own) from {file}" in out
    (marked,) = [line for line in out.splitlines() if line.endswith("<- this machine")]
    assert marked.startswith(here)


def test_profiles_list_says_what_is_wrong_with_a_users_own_file(capsys, monkeypatch):
    monkeypatch.setenv("EP_BACKEND_PROFILE", "/nonexistent/own.toml")
    status, _, err = run(capsys, "profiles", "list")
    assert status == 1
    assert "there is no such file" in err


def test_profiles_validate(capsys, tmp_path):
    status, out, _ = run(capsys, "profiles", "validate")
    assert status == 0
    assert out.count(": valid") == len(profiles.shipped())
    wrong, right = tmp_path / "wrong.toml", tmp_path / "right.toml"
    wrong.write_text("nam = 'x'")
    right.write_bytes(dict(profiles.shipped_files())["cpu.toml"])
    status, out, err = run(capsys, "profiles", "validate", str(wrong), str(right), "/nonexistent")
    assert status == 1
    assert "unknown key 'nam'; did you mean 'name'" in err
    assert "/nonexistent" in err
    assert f"{right}: valid" in out


@pytest.mark.parametrize(
    ("name", "alias", "claimed"),
    [("dgx", "my_own", "dgx"), ("mine", "hgx", "hgx"), ("nvswitch", "hgx", ""), ("mine", "my_own", "")],
)
def test_profiles_validate_accepts_what_can_be_used(capsys, tmp_path, name, alias, claimed):
    """A file may take the place of a shipped profile, and not a name that another one keeps."""
    file = tmp_path / "own.toml"
    file.write_text(OWN.replace('"mine"', f'"{name}"').replace('"my_own"', f'"{alias}"'))
    status, out, err = run(capsys, "profiles", "validate", str(file))
    assert run(capsys, "env", "--profile", str(file))[0] == status == (1 if claimed else 0)
    if claimed:
        assert out == ""
        assert err.startswith(f"{file}: profiles ")
        assert f"both claim the name '{claimed}'" in err
    else:
        assert out == f"{file}: valid (profile {name})\n"


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["env", "--bogus"], ["env", "--shell", "--json"], ["profiles", "show"]]
)
def test_wrong_usage_is_status_2(capsys, arguments):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "usage: ep-backend" in err


def test_help_lists_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in cli.COMMANDS:
        assert command.name in out


def test_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert out == f"ep-backend {__version__}\n"


@pytest.mark.parametrize("module", ["ep_backend.nonexistent", "ep_backend.errors"])
def test_a_command_whose_module_cannot_be_used(capsys, monkeypatch, module):
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("broken", module, "h"),))
    status, _, err = run(capsys, "broken")
    assert status == 1
    assert "'broken' cannot start" in err


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_configuration_modules_need_no_torch():
    """As on a machine without torch: importing it fails, and `ep-backend env` still works."""
    result = python(
        "import sys; sys.modules['torch'] = None\n"
        "import ep_backend, ep_backend.env, ep_backend.profiles, ep_backend.select\n"
        "from ep_backend.cli import main\n"
        "sys.exit(main(['env']))"
    )
    assert result.returncode == 0, result.stderr
    assert "profile      cpu" in result.stdout


def test_a_misspelt_option_is_told_by_the_command(capsys):
    status, _, err = run(capsys, "env", "--josn")
    assert status == 2
    assert "usage: ep-backend env" in err
    assert "unrecognized arguments: --josn; did you mean '--json'?" in err


@pytest.mark.parametrize("found", [0, 1])
def test_a_reader_that_goes_away_changes_no_status(found):
    """If the command has come to its end by then."""
    act = f"cli._run = lambda arguments: print() or {found}"
    code = f"from ep_backend import cli; {act}; raise SystemExit(cli.main())"
    # The reader is gone before there is anything to read, and what is printed waits in a buffer.
    command = f"(sleep 1; {sys.executable} -c '{code}') | true"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (ended.returncode, ended.stderr) == (found, "")


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m ep_backend.cli env --json | head -c 1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120
    )
    assert (result.stdout, result.stderr) == ("{", "")
