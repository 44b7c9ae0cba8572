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
def reference():
    """`greedy` of the tiny model's own reference.py, by transformers on the CPU, once per dtype."""
    import torch
    from engine_runs import MODEL, NEW_TOKENS

    spec = importlib.util.spec_from_file_location("tiny_moe_reference", MODEL / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    records = {}

    def get(dtype):
        if dtype not in records:
            records[dtype] = module.greedy(MODEL, module.read_prompts(), NEW_TOKENS, dtype)
        return records[dtype]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: more threads wait for each other
    yield get
    torch.set_num_threads(threads)
