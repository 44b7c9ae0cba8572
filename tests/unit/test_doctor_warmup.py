"""NCCL's warm-up: processes that do well, hang, crash and sum wrongly; real sums with gloo."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doctor_machines import cpus, examined, gpus, none

from ep_backend import cli
from ep_backend.doctor import warmup
from ep_backend.select import decide

# Stands in for the launcher: FOLDER RANKS SECONDS. "{body}" is run for each rank.
FAKE = """
import json, os, subprocess, sys, time
from pathlib import Path
folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
def stage(rank, words): (folder / f"rank-{rank}.stage").write_text(words)
def leave(rank, seconds=(), wrong=""):
    (folder / f"rank-{rank}.json").write_text(json.dumps({"wrong": wrong, "seconds": list(seconds)}))
for rank in range(ranks):
    stage(rank, "an all-reduce of 4096 bytes over 2 GPUs")
"""

# The real ranks on CPUs: gloo in place of NCCL, the host's clock in place of the GPU's.
ON_CPUS = """
import sys, time
from pathlib import Path
from ep_backend.doctor import warmup_ranks
def clock(call, calls):
    call()
    start = time.perf_counter()
    for _ in range(calls): call()
    return (time.perf_counter() - start) / calls
warmup_ranks.SIZES = (4096, 16384)
folder, ranks, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
if len(sys.argv) == 5:
    rank = int(sys.argv[4])
    {before}
    sys.exit(warmup_ranks.rank_main(folder, ranks, rank, seconds, "cpu", clock))
import subprocess
started = [subprocess.Popen([sys.executable, *sys.argv, str(rank)]) for rank in range(ranks)]
sys.exit(max(process.wait() for process in started))
"""

CORRUPT = """
    import torch.distributed as dist
    real = dist.all_reduce
    def all_reduce(tensor, **options):
        real(tensor, **options)
        if rank == 1: tensor[7] += 1
    dist.all_reduce = all_reduce
"""


@pytest.fixture
def run(tmp_path):
    def start(script, ranks=2, deadline_s=20.0, environ=None):
        file = tmp_path / "fake.py"
        file.write_text(script)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environ or {})}
        return warmup.run(ranks, environ, deadline_s=deadline_s, command=(sys.executable, str(file)))

    return start


def test_the_slowest_rank_counts(run):
    found = run(
        FAKE
        + "for rank in range(ranks):\n"
        + "    leave(rank, [{'ranks': 2, 'bytes': 4096, 'seconds': (1 + rank) * 1e-5}])"
    )
    assert (found.outcome, found.why) == ("ok", "")
    assert found.all_reduces == (warmup.AllReduce(ranks=2, bytes=4096, seconds=2e-5),)
    assert found.times(2)(4096) == 2e-5
    assert found.times(1) is None


def test_a_hang_is_ended_with_all_its_processes(run, tmp_path):
    begin = time.monotonic()
    child = tmp_path / "child"
    found = run(
        FAKE
        + f"child = subprocess.Popen(['sleep', '600'])\nPath({str(child)!r}).write_text(str(child.pid))\n"
        "print('NCCL WARN something', flush=True)\ntime.sleep(600)",
        deadline_s=4.0,
    )
    assert time.monotonic() - begin < 30
    assert found.outcome == "hang"
    assert "no end after 4 s. rank 0, 1: an all-reduce of 4096 bytes over 2 GPUs." in found.why
    assert found.log == ("NCCL WARN something",)
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_crash_says_where_and_what(run):
    found = run(FAKE + "leave(0)\nstage(0, 'ended')\nraise SystemExit('ncclUnhandledCudaError')")
    assert found.outcome == "crash"
    assert "rank 0: ended; rank 1: an all-reduce" in found.why
    assert found.log[-1] == "ncclUnhandledCudaError"


def test_an_end_without_results_is_a_crash(run):
    assert run(FAKE + "leave(0)").outcome == "crash"


def test_a_wrong_sum_is_told_before_the_crash_that_follows(run):
    found = run(FAKE + "leave(1, wrong='7 of 2048 sums are wrong on rank 1')\nsys.exit(1)")
    assert (found.outcome, found.why) == ("wrong", "7 of 2048 sums are wrong on rank 1.")


def test_real_sums(run):
    found = run(ON_CPUS.replace("{before}", "pass"), ranks=2, deadline_s=120)
    assert (found.outcome, found.why) == ("ok", "")
    assert [(one.ranks, one.bytes) for one in found.all_reduces] == [(2, 4096), (2, 16384)]
    assert all(1e-6 < one.seconds < 10 for one in found.all_reduces)


def test_real_sums_in_halves_too(run):
    found = run(ON_CPUS.replace("{before}", "pass"), ranks=4, deadline_s=120)
    assert found.outcome == "ok", found
    assert {one.ranks for one in found.all_reduces} == {4, 2}


def test_real_sums_that_are_wrong(run):
    found = run(ON_CPUS.replace("    {before}", CORRUPT), ranks=2, deadline_s=120)
    assert found.outcome == "wrong"
    assert found.why == "an all-reduce of 4096 bytes over 2 GPUs: 1 of 2048 sums are wrong on rank 1."


def test_the_real_command_ends_with_a_word_where_there_is_no_gpu(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    # Not the checkout, of which the module must be importable in a process of its own.
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = warmup.run(2, environ, deadline_s=120)
    assert found.outcome == "crash"
    assert "connecting the ranks" in found.why or "loading PyTorch" in found.why
    assert found.log


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (cpus(), "no GPUs"),
        (gpus(1), "only one GPU"),
        (gpus(2, visible=("MIG-1", "MIG-2")), "MIG slices"),
        (gpus(2, gpus=(), visible=("nvidia0", "nvidia1")), "does not say which"),
        (gpus(2, versions={"ep_backend": "0.1"}), "PyTorch is not installed"),
    ],
)
def test_when_there_is_nothing_to_warm_up(record, words):
    assert words in warmup.skip(record)
    assert warmup.skip(gpus(2)) == ""


def test_the_ranks_get_the_chosen_environment_and_the_users_values_stay():
    record = gpus(2, nvlink=none, works=none, hcas=())
    given = {"NCCL_P2P_LEVEL": "PIX", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "1,0"}
    environ = warmup.environment(record, decide([record]), given)
    assert environ["NCCL_P2P_LEVEL"] == "PIX"
    assert environ["NCCL_IB_DISABLE"] == "1"
    assert environ["NCCL_DEBUG"] == "INFO"
    assert environ["CUDA_VISIBLE_DEVICES"] == "GPU-0000,GPU-0001"
    assert given["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert "NCCL_IB_DISABLE" not in given


@pytest.mark.parametrize(
    ("outcome", "words", "cure"),
    [
        ("hang", "NCCL hangs in its warm-up: no end", "NCCL_P2P_DISABLE=1"),
        ("wrong", "NCCL sums wrong data", "NCCL_P2P_DISABLE=1"),
        ("crash", "NCCL does not start", "read the lines of the log"),
    ],
)
def test_what_a_failure_becomes(outcome, words, cure):
    failed = warmup.WarmUp(outcome=outcome, why="no end after 60 s.", ranks=4, took_s=60.0)
    found = examined(gpus(4), failed)
    [finding] = [one for one in found.findings if one.wrong]
    assert words in finding.what
    assert cure in finding.next
    assert found.status == cli.FAILED
    assert not found.comparisons


def test_a_deadline_holds_for_ranks_that_nobody_ends(tmp_path):
    """Whose parent was killed with its whole session."""
    code = (
        "import torch.distributed;"  # which may take longer than the deadline
        "from pathlib import Path; from ep_backend.doctor import warmup_ranks as w; import sys;"
        "w.GRACE_S = 1.0; w.rank_main(Path(sys.argv[1]), 2, 0, 3.0, 'cpu', None)"
    )
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode != 0
    assert time.monotonic() - begin < 60
    assert (tmp_path / "rank-0.stage").read_text() == "connecting the ranks"
