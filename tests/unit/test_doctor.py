"""``ep-backend doctor``: its text, JSON, picture and exit status, for made-up machines and for this one."""

import json
import os
import subprocess
import sys

import msgspec
import pytest
from doctor_machines import BROKEN, EVERYTHING, PROFILES, SMALL, cpus, examined, gpus, none, uuid, warmed

from ep_backend import cli, env, profiles
from ep_backend.bench.engines import models
from ep_backend.checks import OrderRates
from ep_backend.doctor import command, picture, report, shapes, text, warmup
from ep_backend.errors import EpConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(env.PREFIX) or name in {v.name for v in env.VARIABLES}:
            monkeypatch.delenv(name)


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Run the command on a made-up machine, with a made-up warm-up."""

    def run(record, *arguments, warm_up=None):
        warmed_up = []

        def fake(ranks, environ, *, deadline_s):
            warmed_up.append((ranks, environ, deadline_s))
            return warm_up or warmed(ranks)

        def probe(*, checks):
            assert checks == "fresh"
            return record

        monkeypatch.setattr(report, "probe", probe)
        monkeypatch.setattr(report.choice, "available", lambda: EVERYTHING)
        monkeypatch.setattr(warmup, "run", fake)
        status = cli.main(["doctor", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err, warmed_up

    return run


def shown(record, *arguments, **more):
    return "\n".join(text.lines(examined(record, *arguments, **more)))


# --- text ---


def test_there_is_a_machine_of_every_profile():
    assert set(PROFILES) == {profile.name for profile in profiles.shipped()}


@pytest.mark.parametrize("name", PROFILES)
def test_text_of_every_profile(name):
    record, transport = PROFILES[name]
    said = shown(record)
    assert f"\nprofile      {name}\n" in said
    assert f"\ntransport    {transport}\n" in said
    assert f"Profile {name}:" in said
    for gpu in record.gpus:
        assert gpu.uuid in said
    assert said.endswith("wrong.")
    assert max(map(len, said.splitlines())) <= 130  # sources of settings are addresses and stay whole


def test_text_of_an_nvswitch_machine():
    said = shown(gpus(4, container="docker", iommu="translated"))
    for words in (
        "machine      node, 64 CPUs, container (docker), IOMMU translated",
        "/dev/shm     64 GiB",
        "network      mlx5_0:1",
        "torch 2.11.0+cu130, driver 580.65.06 (CUDA 13.0)",
        "GPU 3        NVIDIA H200, GPU-0003, 03:00.0",
        "141 GiB of memory, BAR1 256 GiB, PCIe 5.0 x16, NUMA node 1, 18 NVLinks to NVSwitches, MIG off",
        "NCCL_CUMEM_ENABLE=1  [will be set]",
        "vllm: --all2all-backend ep_backend",
        "Native atomics between GPUs: all pairs",
        "NCCL warm-up over 4 GPUs: ok, 8.5 s, all sums right. An all-reduce takes:",
        "  4 GPUs: 4 KiB 20.0 us, 1 MiB 30.5 us, 64 MiB 691.1 us",
        "  2 GPUs in each half, both at the same time: 4 KiB",
        "within 30% of what was measured on as many H200 with this shape",
        "EP is faster than TP 4",
    ):
        assert words in said, words
    assert said.count("350") == 12  # GB/s, each direction
    assert said.count("1.24") == 12  # us
    assert said.endswith("\n\nNothing is wrong.")


def test_text_of_a_gpu_with_fewer_lanes_than_it_could_have():
    assert "PCIe 5.0 x8 of x16," in shown(gpus(2, gpu={"pcie_width_now": 8}))
    assert "PCIe 5.0 x16," in shown(gpus(2, gpu={"pcie_width_now": 16}))


def test_text_of_failed_and_missing_checks():
    record = gpus(3, nvlink=none, works=lambda a, b: (a, b) != (0, 1), ancestor="PHB", rate=50e9)
    lines = shown(record).splitlines()
    row = next(line for line in lines if line.startswith("  GPU 0") and "FAILED" in line)
    assert row.split() == ["GPU", "0", "-", "FAILED", "ok"]
    assert "PHB" in "\n".join(lines)
    assert lines[-1] == "1 thing is wrong."
    assert "no access" not in "\n".join(lines)
    row = next(line for line in shown(PROFILES["pcie_blackwell"][0]).splitlines() if "no access" in line)
    assert row.split() == ["GPU", "0", "-", "no", "access"]
    unknown = shown(gpus(2, directions=()))
    assert "not tried" in unknown
    assert "no expectation: the links were not measured" in unknown


def test_text_of_the_orders_of_stores():
    def of(staggered, count=4):
        rates = {"together_bytes_per_s": 6.5e9, "staggered_bytes_per_s": staggered}
        orders = (OrderRates(gpus=tuple(map(uuid, range(count))), **rates),)
        return shown(gpus(4, nvlink=none, ancestor="PHB", rate=50e9, orders=orders))

    found = of(49e9)
    line = "All at the same time, GB/s of each: 6.5 to all in turn (together), 49 GPU after GPU (staggered)"
    assert f"\n{line}\n" in found
    assert "\norder        staggered: a rank stores all to one rank, then all to the next\n" in found
    assert "each store 49.0 GB/s rank after rank and 6.5 GB/s to all in turn" in " ".join(found.split())
    assert "\norder " not in of(6.6e9)
    assert "All at the same time" not in of(49e9, count=3), "of other GPUs"


def test_text_of_a_failed_warm_up():
    failed = warmup.WarmUp(outcome="hang", why="no end after 60 s.", ranks=4, took_s=60.1, log=("NCCL WARN",))
    said = shown(gpus(4), failed)
    assert "NCCL warm-up over 4 GPUs: FAILED. no end after 60 s.\n  | NCCL WARN" in said
    assert "WRONG: NCCL hangs in its warm-up" in said


def test_gpus_are_called_by_their_names_in_the_reason_and_in_findings():
    report = examined(PROFILES["pcie_blackwell"][0])
    assert "between GPU-0000 and GPU-0001" in report.decision.reason
    said = " ".join("\n".join(text.lines(report)).split())
    assert "offers no peer access between GPU 0 and GPU 1." in said
    assert said.count("GPU-0001") == 1  # where it is listed
    slow = " ".join(shown(gpus(2, nvlink=none, ancestor="PHB", rate=3.5e9)).split())
    assert "stores of GPU 0 into GPU 1 arrive at" in slow


def test_conflicts_are_shown_as_env_shows_them():
    said = shown(gpus(4), environ={"NCCL_NVLS_ENABLE": "1", "NCCL_CUMEM_ENABLE": "1"})
    assert "NCCL_NVLS_ENABLE=0  [conflict]" in said
    assert "NCCL_CUMEM_ENABLE=1  [already so]" in said
    assert "conflict: NCCL_NVLS_ENABLE=1 is kept as it was found" in said


def test_a_model_is_called_one_where_nothing_was_measured():
    assert "peer: model, not measured" in shown(gpus(4, name="NVIDIA H100"))
    assert "peer: model, not measured" in shown(gpus(8))  # 2 and 4 were measured
    assert "model, not measured" not in shown(gpus(2))


def test_one_gpu_has_nobody_to_send_to():
    said = shown(gpus(1))
    assert "Expected dispatch + combine: none, since one rank alone sends nothing." in said
    assert "Nothing is wrong." in said


def test_a_transport_without_a_formula_says_so():
    found = examined(cpus(environment={"EP_BACKEND_TRANSPORT": "collective"}))
    assert {one.seconds for one in found.expected} == {None}
    assert "there is no formula for collective" in "\n".join(text.lines(found))


# --- the command ---


@pytest.mark.parametrize(
    ("option", "file"),
    [("--json", "/proc/nowhere/found.json"), ("--json", "/proc/x.json"), ("--plot", "/proc/x.png")],
)
def test_a_file_that_cannot_be_written_is_noticed_first(doctor, monkeypatch, option, file):
    monkeypatch.setattr(command.pictures, "check_matplotlib", lambda: None)
    status, out, err, warm_ups = doctor(gpus(2), option, file)
    assert (status, out, warm_ups) == (2, "", [])
    assert f"{option} {file} cannot be written" in err


def test_wrong_usage_leaves_no_file_and_keeps_what_was_there(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr(command.pictures, "check_matplotlib", lambda: None)
    there = tmp_path / "found.json"
    there.write_text("kept")
    files = ("--json", str(there), "--plot", str(tmp_path / "new.png"))
    assert doctor(gpus(2), "--ranks", "3", *files)[0] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]
    assert there.read_text() == "kept"


def test_the_command_on_a_made_up_machine(doctor):
    status, out, err, [(ranks, environ, deadline_s)] = doctor(gpus(4), "--deadline", "7", "--tokens", "3,1")
    assert (status, ranks, deadline_s) == (0, 4, 7)
    assert environ["NCCL_CUMEM_ENABLE"] == "1"
    assert "profile      nvswitch" in out
    assert "warming NCCL up on 4 GPUs" in err
    assert "NCCL_CUMEM_ENABLE" not in os.environ
    assert "qwen3-30b-a3b, peer, bf16" in out
    assert "deepseek-v3, NCCL all-gather + reduce-scatter, fp8" in out


def test_json_alone_and_beside_the_text(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "provenance", lambda: {"command": "typed", "date": "today"})
    record, _ = PROFILES["pcie_p2p"]
    status, out, _, _ = doctor(record, "--json")
    answer = json.loads(out)
    assert (status, answer["status"], answer["ranks"]) == (0, 0, 4)
    assert (answer["choice"]["profile"], answer["choice"]["transport"]) == ("pcie_p2p", "peer")
    assert {one["name"]: one["status"] for one in answer["choice"]["environment"]}[
        "NCCL_P2P_LEVEL"
    ] == "will be set"
    assert len(answer["machine"]["directions"]) == 12
    assert answer["warm_up"]["outcome"] == "ok"
    assert {(one["way"], one["dtype"]) for one in answer["expected"]} == {
        (way, dtype) for way in ("peer", "nccl") for dtype in ("bf16", "fp8")
    }
    assert {one["shape"] for one in answer["comparisons"]} == {"qwen3-30b-a3b"}  # the other does not fit
    assert len(answer["comparisons"]) == len(shapes.TOKENS)
    file = tmp_path / "new" / "doctor.json"
    _, beside, _, _ = doctor(record, "--json", str(file))
    assert json.loads(file.read_text()) == answer
    assert "profile      pcie_p2p" in beside


def test_fewer_ranks_than_gpus(doctor):
    status, out, _, [(ranks, environ, _)] = doctor(gpus(4), "--ranks", "2", "--json")
    assert (status, ranks, json.loads(out)["ranks"]) == (0, 2, 2)
    assert environ["CUDA_VISIBLE_DEVICES"] == f"{uuid(0)},{uuid(1)}"


def test_something_wrong_is_status_1(doctor):
    failed = warmup.WarmUp(outcome="crash", why="a rank ended.", ranks=4, took_s=1.0)
    assert doctor(gpus(4), warm_up=failed)[0] == 1
    blackwell, _ = PROFILES["pcie_blackwell"]
    assert doctor(blackwell)[0] == 0
    assert doctor(msgspec.structs.replace(blackwell, shared_memory_bytes=1 << 20))[0] == 1
    assert doctor(cpus(shared_memory_bytes=1 << 20))[0] == 0
    status, out, _, warmed_up = doctor(gpus(2, environment={"EP_BACKEND_PROFILE": "nonesuch"}))
    assert (status, warmed_up) == (1, [])
    assert "profile      none: nothing can be chosen" in out
    assert "NCCL warm-up: skipped" in out
    assert "nonesuch" in out


def test_no_sentence_ends_twice():
    said = shown(cpus(), environ={"EP_BACKEND_TIMOUT_S": "3"}).splitlines()
    assert any(line.endswith("did you mean 'EP_BACKEND_TIMEOUT_S'?") for line in said)
    broken = warmup.WarmUp(outcome="crash", why="a rank ended with an error.", ranks=4, took_s=1.0)
    assert "NCCL does not start: a rank ended with an error.\n" in shown(gpus(4), broken)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ranks", "5"), "--ranks 5, but 4 GPUs can be used here"),
        (("--ranks", "0"), "whole number from 1"),
        (("--ranks", "5000"), "'5000' is not a whole number from 1 to 72"),
        (("--hidden", "8"), "--experts and --topk, too"),
        (("--hidden", "8", "--experts", "4", "--topk", "5"), "more than --experts 4"),
        (("--shape", "qwen3-30b-a3b", "--hidden", "8"), "either --shape or"),
        (("--shape", "gpt"), "--shape gpt: no shape 'gpt'"),
        (("--shape", "deepseek-v3,fp8"), "--shape deepseek-v3,fp8: here fp8 is a dtype: leave it out"),
        (("--layers", "3"), "--layers goes with"),
        (("--experts", "70000", "--topk", "1", "--hidden", "8"), "at most 65536"),
        (("--plot", "x.pdf"), "does not end in"),
    ],
)
def test_wrong_usage_is_status_2(doctor, arguments, words):
    status, out, err, warmed_up = doctor(gpus(4), *arguments)
    assert (status, out, warmed_up) == (2, "", [])
    assert words in err
    assert "--model" not in err
    assert "--dtype" not in err


def test_shapes_are_those_of_bench_engine(doctor):
    _, out, _, _ = doctor(gpus(2), "--shape", "qwen1.5-moe-a2.7b,layers=3", "--tokens", "8", "--json")
    answer = json.loads(out)
    config = models.ARCHITECTURES["qwen1.5-moe-a2.7b"].config
    assert {one["shape"] for one in answer["expected"]} == {"qwen1.5-moe-a2.7b"}
    assert [(one["layers"], one["tokens"]) for one in answer["comparisons"]] == [(3, 8)]
    parser = command.argparse.ArgumentParser()
    shapes.add_options(parser)
    [shape] = shapes.chosen(parser.parse_args(["--shape", "qwen1.5-moe-a2.7b"]))
    assert (shape.hidden, shape.experts, shape.topk) == (
        config["hidden_size"],
        config["num_experts"],
        config["num_experts_per_tok"],
    )
    sizes = "--hidden 64 --experts 9 --topk 2 --layers 5".split()  # noqa: SIM905
    [own] = shapes.chosen(parser.parse_args(sizes))
    assert (own.name, own.layers) == ("hidden 64, 9 experts, top-2", 5)


def test_more_ranks_than_gpus_is_said_by_limited():
    with pytest.raises(EpConfigError, match="--ranks 3, but 2 GPUs"):
        report.limited(gpus(2), 3)
    assert report.limited(cpus(), 3) == cpus()


def test_long_times_keep_their_distance():
    found = examined(cpus(cpus=2), shapes=(SMALL,), tokens=(1, 128), copy_bytes_per_s=1e7)
    said = "\n".join(text.lines(found))
    [row] = [line for line in said.splitlines() if line.startswith("  small, cpu, bf16")]
    assert len(row.removeprefix("  small, cpu, bf16").split()) == 2


# --- pictures ---


@pytest.mark.parametrize("name", [*PROFILES, "broken"])
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_pictures(doctor, tmp_path, name, suffix):
    pytest.importorskip("matplotlib")
    broken = gpus(4, nvlink=none, works=lambda a, b: (a, b) != (0, 1), rate=50e9)
    record = {**{key: value for key, (value, _) in PROFILES.items()}, "broken": broken}[name]
    file = tmp_path / f"picture{suffix}"
    doctor(record, "--plot", str(file))
    content = file.read_bytes()
    assert content.startswith({".svg": b"<?xml", ".png": b"\x89PNG"}[suffix])
    if suffix == ".svg":
        # Texts are comments beside their outlines.
        assert content.count(b"<!-- GPU ") == len(record.gpus)
        assert content.count(b'id="axes_') == 1 + bool(record.gpus)  # no panel stays empty
        assert (b"data check FAILED" in content) == (name in ("broken", *BROKEN))


def test_what_the_lines_of_a_picture_mean():
    record = gpus(2, works=lambda a, b: (a, b) == (0, 1), rate=50e9)
    assert picture.kind(record, record.links[0]) == picture.FAILED
    assert picture.rate(record, record.links[0]) is None
    assert picture.rate(gpus(2), gpus(2).links[0]) == 350.0

    def kind(**changes):
        made = gpus(2, **changes)
        return picture.kind(made, made.links[0])

    assert kind() == "NVLink"
    assert kind(nvlink=none, access=none, ancestor="PHB") == "root complex"
    assert [kind(nvlink=none, ancestor=a) for a in ("PIX", "PHB", "SYS", "")] == [
        "PCIe switch",
        "root complex",
        "NUMA",
        "NUMA",
    ]
    assert {kind(nvlink=none, ancestor=a) for a in ("LOC", "PXB", "NODE")} <= set(picture.COLOURS)


def test_no_matplotlib_is_one_sentence(doctor, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out, err, _ = doctor(cpus(), "--plot", "x.svg")
    assert (status, out) == (2, "")
    assert "pip install matplotlib" in err


# --- this machine ---


def run_here(*arguments, **environ):
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [sys.executable, "-m", "ep_backend.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path), **environ},
    )


def test_end_to_end_without_gpus():
    ended = run_here("--json")
    answer = json.loads(ended.stdout)
    assert ended.returncode == answer["status"] == any(one["wrong"] for one in answer["findings"])
    assert answer["choice"]["transport"] == "cpu"
    assert answer["warm_up"]["outcome"] == "skipped"
    assert answer["command"] == "ep-backend doctor --json"
    assert answer["date"].endswith("+00:00")
    assert answer["copy_bytes_per_s"] > 1e8
    assert all(one["seconds"] > 0 for one in answer["expected"])
    assert msgspec.convert(answer["machine"], report.Record).cpus >= 1
    said = run_here("--hidden", "64", "--experts", "8", "--topk", "2")
    assert said.returncode == ended.returncode
    assert "NCCL warm-up: skipped" in said.stdout
    assert "hidden 64, 8 experts, top-2, cpu, bf16" in said.stdout


def test_end_to_end_with_a_misspelt_variable():
    ended = run_here(EP_BACKEND_TIMOUT_S="3")
    assert ended.returncode == 1
    assert "WRONG: EP_BACKEND_TIMOUT_S is set but means nothing" in ended.stdout


def test_doctor_needs_no_torch():
    """As on a machine where torch is broken, which is when a doctor is called."""
    code = (
        "import sys; sys.modules['torch'] = None\nfrom ep_backend.cli import main\nsys.exit(main(['doctor']))"
    )
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environ
    )
    assert "profile      cpu" in ended.stdout, ended.stderr


def test_examining_changes_nothing():
    before = dict(os.environ)
    examined(gpus(4), shapes=(SMALL,))
    assert dict(os.environ) == before
