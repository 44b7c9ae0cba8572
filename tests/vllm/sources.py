"""The Python sources of a vLLM release, without its compiled modules and the libraries they need."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ep_backend" / "vllm-sources"


def fetch(version: str) -> Path:
    """A folder to put on the import path, with the package vllm of this release in it. Downloads once (0.3
    GB).

    Raises CalledProcessError if the package index cannot be reached or does not have the release.
    """
    folder = cache_folder() / version
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _download(version, Path(temporary) / "wheel")
            unpacked = Path(temporary) / "unpacked"
            _unpack(next((Path(temporary) / "wheel").glob("*.whl")), unpacked, version)
            unpacked.rename(folder)
    return folder


def _download(version: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--platform", "manylinux_2_28_x86_64", "--dest", str(target), f"vllm=={version}"]
    subprocess.run(command, check=True, timeout=900)


def _unpack(wheel: Path, target: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith((".py", ".json"))]
        archive.extractall(target, names)
    # vLLM asks its own metadata which platform it was built for.
    metadata = target / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
