"""`ep-backend bench --device cuda` on the GPUs there are: small runs and their JSON, also under torchrun."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ep_backend.bench import report

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
SMALL = ["--hidden", "512", "--experts", "16", "--topk", "4", "--tokens", "1,70,1030", "--iters", "40"]
COMMAND = [sys.executable, "-m", "ep_backend.cli", "bench", "--device", "cuda"]


@pytest.fixture(autouse=True)
def enough_gpus():
    if not GPUS:
        pytest.skip("needs a GPU")


def run(command, tmp_path, **environ):
    file = tmp_path / "results.json"
    without = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environ = {**{k: v for k, v in os.environ.items() if k not in without}, **environ}
    done = subprocess.run(
        [*command, *SMALL, "--json", str(file)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())
    assert report.problems(found) == []
    assert all(result["correct"] for result in found["results"]), done.stdout
    return found, done.stdout


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_small_run(tmp_path, ranks):
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs, {GPUS} found")
    picture = tmp_path / "curves.svg"
    more = ["--ranks", str(ranks), "--dtype", "bf16,fp8", "--num-sms", "16,64"]
    plot = ["--plot", str(picture)] if have_matplotlib() else []
    found, out = run([*COMMAND, *more, *plot], tmp_path)
    assert "windows of" in out
    assert len(found["machine"]["gpus"]) == ranks
    seen = [(r["transport"], r.get("num_sms"), r["dtype"], r["tokens"], r["phase"]) for r in found["results"]]
    assert sorted(seen, key=str) == sorted(
        (
            (transport, sms, dtype, tokens, phase)
            for transport, sms in (("peer", 16), ("peer", 64), ("host", 16), ("host", 64), ("nccl", None))
            for dtype in ("bf16", "fp8")
            for tokens in (1, 70, 1030)
            for phase in report.PHASES
        ),
        key=str,
    )
    for result in found["results"]:
        assert 0 < result["min_us"] <= result["median_us"] <= result["p99_us"]
        assert ("vs_baseline" in result) == (result["transport"] != "nccl")
        if result["phase"] == "round_trip":
            assert result["exchanges_per_graph"] == (4 if result["tokens"] == 1030 else 20)
    if ranks > 1:
        written = found["machine"]["peer_write_bytes_per_s"]  # null where peers do not reach each other
        assert written is None or written > found["machine"]["host_copy_bytes_per_s"] > 1e9
        assert all(r["limit_us"] > 0 for r in found["results"] if r["tokens"] > 1)
    assert bool(plot) == picture.exists()


def test_peers_are_not_written_to_where_that_is_refused(tmp_path):
    if GPUS < 2:
        pytest.skip(f"needs 2 GPUs, {GPUS} found")
    refused = {"EP_BACKEND_PEER_ACCESS": "0", "EP_BACKEND_TRANSPORT": "host"}
    found, _ = run([*COMMAND, "--ranks", "2"], tmp_path, **refused)
    assert found["machine"]["peer_write_bytes_per_s"] is None
    assert refused.items() < found["environment"].items()
    assert found["environment"]["NCCL_P2P_LEVEL"] == "LOC"  # NCCL was told, too
    limited = {r["transport"] for r in found["results"] if "of_limit" in r}
    assert limited == {"host"}


def test_all_to_all_is_right_and_timed_without_a_graph(tmp_path):
    more = ["--ranks", str(min(GPUS, 2)), "--transports", "peer", "--peers", "nccl,nccl_all_to_all"]
    found, _ = run([*COMMAND, *more], tmp_path)
    theirs = [r for r in found["results"] if r["transport"] == "nccl_all_to_all"]
    assert len(theirs) == 3 * len(report.PHASES)
    assert all("vs_baseline" in r and "exchanges_per_graph" not in r for r in theirs)


def test_under_torchrun(tmp_path):
    ranks = min(GPUS, 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    found, _ = run([*torchrun, *COMMAND[1:]], tmp_path)
    assert found["settings"]["ranks"] == ranks


def have_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True
