"""Shared by all tests: helper modules, hypothesis profiles, and the end of the rank processes."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Not the repository's root: tests run against the installed package.
sys.path.insert(0, str(Path(__file__).parent))

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the seam tests need no hypothesis
    settings = None

if settings is not None:
    common = {
        "deadline": None,  # a rank that is late for the first time starts its process
        "derandomize": False,
        "print_blob": True,
        "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    }
    settings.register_profile("quick", max_examples=25, **common)
    settings.register_profile("long", max_examples=150, **common)
    settings.load_profile(os.environ.get("EP_TEST_PROFILE", "quick"))


@pytest.fixture(autouse=True, scope="session")
def _no_rank_survives():
    yield
    harness = sys.modules.get("harness")
    if harness is not None:
        harness.stop_all()


@pytest.fixture(scope="session")
def tiny_reference():
    """The tiny model's own reference.py: greedy tokens by transformers on the CPU."""
    import torch
    import wide_models

    spec = importlib.util.spec_from_file_location("tiny_moe_reference", wide_models.TINY / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: more threads wait for each other
    yield module
    torch.set_num_threads(threads)
