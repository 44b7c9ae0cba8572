"""The Python sources of a vLLM release (a download of 0.3 GB, once)."""

from functools import partial
from pathlib import Path

from engine_sources import fetch as fetch_engine


def fetch(version: str) -> Path:
    """A folder to put on the import path; see `engine_sources.fetch`."""
    return fetch_engine("vllm", version, "manylinux_2_28_x86_64", _wanted, partial(_name_platform, version))


def _wanted(name: str) -> bool:
    return name.startswith("vllm/") and name.endswith((".py", ".json"))


def _name_platform(version: str, folder: Path) -> None:
    """vLLM asks its own metadata which platform it was built for."""
    metadata = folder / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
