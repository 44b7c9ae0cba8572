"""Finds the installed PyTorch whose headers and libraries the build uses, without importing it.

CMake runs this file (it prints the folder); the PEP 517 backend imports it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 11)
HOW_TO_INSTALL = "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"


def _candidates() -> Iterator[Path]:
    """Folders that may be an installed torch, nearest first."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # pip hides the surrounding environment from an isolated build, but runs its interpreter: the paths still
    # say where it is. Other front ends make an environment of their own; then the activated one or the base
    # one is meant.
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for prefix in (os.environ.get("VIRTUAL_ENV"), sys.base_prefix):
        if prefix:
            folders.append(f"{prefix}/lib/{version}/site-packages")
    folders += site.getsitepackages()
    if site.ENABLE_USER_SITE is not False:
        folders.append(site.getusersitepackages())
    for folder in dict.fromkeys(folders):
        yield Path(folder) / "torch"


def torch_version(folder: Path) -> str | None:
    """The version that `folder`/version.py states, None if it states none."""
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return found.group(1) if found else None


def find_torch() -> Path:
    """The folder of a usable torch. Raises SystemExit with one sentence if there is none."""
    seen = []
    for folder in _candidates():
        version = torch_version(folder)
        if version is None or not (folder / "include/torch/csrc/stable").is_dir():
            if version is not None:
                seen.append(f"{version} at {folder}")
            continue
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers >= OLDEST:
            return folder
        seen.append(f"{version} at {folder}")
    raise SystemExit(
        f"ep-backend builds against an installed PyTorch {OLDEST[0]}.{OLDEST[1]} or newer and found "
        f"{', '.join(seen) or 'none'} for {sys.executable}: install one first, for a CPU machine with "
        f"`{HOW_TO_INSTALL}`."
    )


if __name__ == "__main__":
    print(find_torch())
