"""These tests need vLLM (the CPU build is enough) and ep_backend installed beside it."""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# The helper modules of this folder, which is no package.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def reference(tiny_reference):
    """Its records for the tiny model, once per dtype."""
    from engine_runs import MODEL, NEW_TOKENS

    records = {}

    def get(dtype):
        if dtype not in records:
            prompts = tiny_reference.read_prompts()
            records[dtype] = tiny_reference.greedy(MODEL, prompts, NEW_TOKENS, dtype)
        return records[dtype]

    return get
