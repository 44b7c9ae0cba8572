"""The seam cases under the installed vLLM, and the sources of the oldest and newest supported release."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sources import fetch

HERE = Path(__file__).parent
RELEASES = ("0.26.0", "0.33.0")


def run_cases(first_on_path: str | None, cases: str = "seam_cases.py") -> None:
    path = [first_on_path, os.environ.get("PYTHONPATH"), str(HERE.parent)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles the sources again
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command.append(str(HERE / cases))
    with tempfile.TemporaryDirectory() as sockets:  # vLLM leaves those of its message queues behind
        environ["TMPDIR"] = sockets
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.timeout(400)
def test_seam_of_the_installed_release():
    run_cases(None)


@pytest.mark.seam
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("version", RELEASES)
def test_seam_of_the_sources_of(version):
    run_cases(str(fetch(version)))


@pytest.mark.seam
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("version", RELEASES)
def test_deepep_modes_of_the_sources_of(version):
    run_cases(str(fetch(version)), "deepep_cases.py")
