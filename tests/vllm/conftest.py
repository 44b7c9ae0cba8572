"""These tests need vLLM (the CPU build is enough) and ep_backend installed beside it."""

import importlib.util
import sys
from pathlib import Path

MARKERS = (
    "engine: starts a serving engine (minutes)",
    "engine_long: starts several serving engines (part of make check)",
    "seam: fetches the sources of vLLM releases (part of make check)",
)

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# The helper modules of this folder, which is no package.
sys.path.append(str(Path(__file__).parent))


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
