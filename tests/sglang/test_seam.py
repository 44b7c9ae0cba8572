"""The seam cases under the sources of the oldest and newest supported release, one process per file of cases:
they change SGLang for their whole process. No GPU and no CUDA library is needed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_sources import fetch

HERE = Path(__file__).parent
RELEASES = ("0.5.17", "0.5.23")
TRITON = "3.6.0"


def wanted(name):
    # SGLang looks for the folder of its kernels' sources when it is imported.
    return name.startswith("sglang/") and (name.endswith((".py", ".json")) or "sglang/kernels/jit/" in name)


def needed_of_triton(name):
    return name.startswith("triton/") and name.endswith((".py", "libtriton.so"))


@pytest.mark.seam
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "cases",
    ["launcher_cases.py", "scheduler_cases.py", "exchange_cases.py", "overlap_cases.py", "deepep_cases.py"],
)
@pytest.mark.parametrize("version", RELEASES)
def test_seam_of_the_sources_of(version, cases):
    pytest.importorskip("transformers")
    sources = fetch("sglang", version, "manylinux_2_34_x86_64", wanted)
    path = [str(sources), str(HERE), os.environ.get("PYTHONPATH")]
    if importlib.util.find_spec("triton") is None:  # SGLang's modules define kernels when they are imported
        path.append(str(fetch("triton", TRITON, "manylinux_2_27_x86_64", needed_of_triton)))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    # A CUDA build of PyTorch brings NCCL along; these tests have gloo only.
    environ |= {"SGLANG_NCCL_SO_PATH": "no-nccl-here", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environ if name.startswith("EP_BACKEND_")]:
        del environ[name]
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles the sources again
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-p", "stand_ins", str(HERE / cases)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
