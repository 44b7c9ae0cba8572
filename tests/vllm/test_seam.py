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


def run_cases(first_on_path: str | None) -> None:
    environ = dict(os.environ)
    if first_on_path is not None:
        environ["PYTHONPATH"] = os.pathsep.join([first_on_path, *filter(None, [environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command.append(str(HERE / "seam_cases.py"))
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
