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
def tiny_reference():
    """The tiny model's own reference.py: greedy tokens by transformers on the CPU."""
    import torch
    from engine_runs import MODEL

    spec = importlib.util.spec_from_file_location("tiny_moe_reference", MODEL / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: more threads wait for each other
    yield module
    torch.set_num_threads(threads)


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
