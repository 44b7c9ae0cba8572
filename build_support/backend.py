"""PEP 517 build backend: scikit-build-core, told where the installed torch and NVIDIA's compiler are.

torch is no build requirement, because pip would then download a CUDA build of several gigabytes into the
build environment. The library uses PyTorch's stable ABI, so the torch that it is built against need not be
the one that it runs on.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from find_torch import find_torch
from scikit_build_core import build as _build

build_sdist = _build.build_sdist
get_requires_for_build_sdist = _build.get_requires_for_build_sdist
prepare_metadata_for_build_editable = _build.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = _build.prepare_metadata_for_build_wheel

Settings = dict[str, list[str] | str]

# CUDA 13.0 is what driver 580 brings; a later minor version would emit PTX which that driver cannot compile.
CUDA_WHEELS = [
    f"{name}==13.0.*"
    for name in (
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-crt",
        "nvidia-cuda-runtime",
        "nvidia-cuda-cccl",
    )
]


def _cuda_mode() -> str:
    """EP_BACKEND_CUDA: "auto" (CUDA if nvcc is found), "0" (CPU only), "1" (NVIDIA's compiler wheels)."""
    mode = os.environ.get("EP_BACKEND_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"EP_BACKEND_CUDA={mode!r} was given; auto, 0 or 1 was wanted.")
    return mode


def _wheel_toolkit() -> Path:
    """The CUDA toolkit which NVIDIA's wheels make up. Raises SystemExit if they are not installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        toolkit = Path(folder) / "cu13"
        if (toolkit / "bin" / "nvcc").is_file():
            return toolkit
    wheels = " ".join(f"'{wheel}'" for wheel in CUDA_WHEELS)
    raise SystemExit(
        "EP_BACKEND_CUDA=1 compiles with NVIDIA's wheels, which this environment lacks: build with isolation "
        f"or first `pip install {wheels}`."
    )


def _settings(given: Settings | None) -> Settings:
    """The caller's settings, completed. What the caller set wins."""
    mode = _cuda_mode()
    define = {"EP_BACKEND_CUDA": mode}
    if "cmake.define.EP_TORCH_DIR" not in (given or {}):
        define["EP_TORCH_DIR"] = str(find_torch())
    if mode == "1":
        toolkit = _wheel_toolkit()
        define["CMAKE_CUDA_COMPILER"] = str(toolkit / "bin" / "nvcc")
        # The wheels keep their libraries in lib; nvcc looks in lib64.
        define["CMAKE_CUDA_FLAGS"] = f"-L{toolkit}/lib"
    settings: Settings = {f"cmake.define.{name}": value for name, value in define.items()}
    return settings | (given or {})


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    wheels = CUDA_WHEELS if _cuda_mode() == "1" else []
    return _build.get_requires_for_build_wheel(config_settings) + wheels


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    wheels = CUDA_WHEELS if _cuda_mode() == "1" else []
    return _build.get_requires_for_build_editable(config_settings) + wheels


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    return _build.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    return _build.build_editable(wheel_directory, _settings(config_settings), metadata_directory)
