"""Installs a CPU build of torch into the running interpreter's environment, and never a CUDA build.

usage: install_cpu_torch.py VERSION INDEX

Asks pip what it would install before anything is downloaded. Where the machine's own package index has only a
CUDA build (several gigabytes), takes the CPU build from INDEX, PyTorch's public one.
"""

from __future__ import annotations

import json
import subprocess
import sys


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments], text=True, capture_output=True, check=False
    )


def offered(version: str, *source: str) -> tuple[str | None, str]:
    """The version pip would install if that is a CPU build, else None; and what was found instead."""
    options = ("--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--report", "-")
    found = pip("install", *options, *source, f"torch=={version}")
    if found.returncode != 0:
        return None, (found.stderr.strip().splitlines() or ["pip found nothing"])[-1]
    metadata = json.loads(found.stdout)["install"][0]["metadata"]
    needs = " ".join(metadata.get("requires_dist", []))
    if "nvidia-" in needs or "cuda-" in needs:
        return None, f"{metadata['version']} is a CUDA build"
    return metadata["version"], ""


def main() -> None:
    version, index = sys.argv[1:]
    reasons = []
    for source in ((), ("--index-url", index)):
        name = source[1] if source else "the machine's own index"
        build, reason = offered(version, *source)
        if build is not None:
            print(f"torch {build} from {name}", flush=True)
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "--quiet", *source, f"torch=={build}"], check=True
            )
            return
        reasons.append(f"{name}: {reason}")
    raise SystemExit(
        f"No CPU build of torch {version} was found ({'; '.join(reasons)}). Name an index that has one: "
        "make TORCH_INDEX=https://... "
    )


if __name__ == "__main__":
    main()
