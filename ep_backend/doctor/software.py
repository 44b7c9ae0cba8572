"""Versions of the engines and of what they use, read from their packages; nothing is imported."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("vllm", "sglang", "flashinfer-python", "nvidia-ml-py")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
