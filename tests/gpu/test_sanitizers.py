"""compute-sanitizer over small exchanges on one GPU: no wrong access to memory, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent
FOUND = 66  # exit status if the tool has found something
LIMIT_S = 240


def tool(name):
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip(f"needs {name}, which comes with the CUDA toolkit")
    return found


@pytest.fixture(autouse=True)
def a_gpu():
    if not torch.cuda.device_count():
        pytest.skip("needs a GPU")


def sanitize(checker, *command, ours=True):
    """The exit status and what was printed. ``ours``: only our kernels are watched."""
    options = ["--tool", checker, "--error-exitcode", str(FOUND), "--launch-timeout", "120"]
    if checker == "memcheck":
        # Memory of its own for each tensor, and nobody's behind it. The driver's complaints are PyTorch's.
        options += ["--padding", "4096", "--report-api-errors", "no"]
    if ours:
        options += ["--kernel-name", "kns=ep4cuda"]
    done = subprocess.run(
        [tool("compute-sanitizer"), *options, *map(str, command)],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer cannot watch this GPU")
    return done.returncode, done.stdout


@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.parametrize("plan", ["own", "bulk", "mixed", "staggered", "sums"])
@pytest.mark.parametrize("checker", ["memcheck", "racecheck"])
def test_nothing_is_found(checker, plan):
    status, said = sanitize(checker, sys.executable, HERE / "sanitized.py", plan)
    assert status == 0, said[-6000:]
    assert "exchanges, all right" in said
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said


@pytest.mark.timeout(LIMIT_S + 30)
def test_a_write_behind_the_end_is_found():
    status, said = sanitize("memcheck", sys.executable, HERE / "sanitized.py", "short")
    assert status != 0, said[-3000:]
    assert "Invalid __global__ write" in said


@pytest.mark.timeout(LIMIT_S + 30)
def test_a_race_is_found(tmp_path):
    program = tmp_path / "race"
    subprocess.run([tool("nvcc"), "-arch=native", "-o", program, HERE / "race.cu"], check=True, timeout=120)
    status, said = sanitize("racecheck", program, ours=False)
    assert status == FOUND, said[-3000:]
