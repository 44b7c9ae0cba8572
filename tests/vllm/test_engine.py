"""Greedy tokens of the tiny model through vLLM with ep_backend, against vLLM without it and against
transformers.

Between vLLM and transformers a step's arithmetic differs in its order only. In float32 that changes no
token here. In bfloat16 it may swap two tokens whose logits are nearly equal, and from there on the texts
differ.
"""

import re

import pytest
from engine_runs import (
    ALONE,
    SCALED,
    differences_bf16,
    differences_fp32,
    generate,
    log_of_a_stalled_rank,
    serving,
    went_through_ep_backend,
)

from ep_backend.bench.engines.vllm import is_cpu_build

pytestmark = pytest.mark.skipif(not is_cpu_build(), reason="this vLLM is not the CPU build")


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_float32_tokens_equal_one_rank_and_transformers(tmp_path, reference):
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    assert len(prompts) == 8
    spread, log = generate(tmp_path / "spread", prompts, dtype="float32")
    assert went_through_ep_backend(log)
    assert "every rank is ready, deadline of a wait is now 30 s" in log
    assert differences_fp32(spread, want) == []
    alone, log = generate(tmp_path / "alone", prompts, dtype="float32", **ALONE)
    assert not went_through_ep_backend(log)
    assert differences_fp32(alone, want) == []


@pytest.mark.engine_long
@pytest.mark.timeout(1200)
def test_bfloat16_tokens_differ_only_at_near_ties(tmp_path, reference):
    want = reference("bfloat16")
    prompts = [record["prompt"] for record in want]
    spread, log = generate(tmp_path / "spread", prompts, dtype="bfloat16")
    assert went_through_ep_backend(log)
    alone, _ = generate(tmp_path / "alone", prompts, dtype="bfloat16", **ALONE)
    assert differences_bf16(spread, want) == []
    assert differences_bf16(spread, alone) == []


@pytest.mark.engine_long
@pytest.mark.timeout(900)
def test_a_wrong_combine_is_noticed(tmp_path, reference):
    """By what is allowed to differ in bfloat16: in float32 nothing is."""
    want = reference("bfloat16")
    prompts = [record["prompt"] for record in want]
    scaled, log = generate(tmp_path, prompts, dtype="bfloat16", **SCALED)
    assert "THE MODEL'S OUTPUT IS WRONG" in log
    assert differences_bf16(scaled, want) != []


@pytest.mark.engine_long
@pytest.mark.timeout(600)
def test_a_stalled_rank_ends_the_engine_with_a_message(tmp_path):
    stalled = serving(environ=(("EP_BACKEND_TIMEOUT_S", "5"),))
    log = log_of_a_stalled_rank(tmp_path, stalled, max_tokens=150)
    assert "EngineDeadError" in log
    assert re.search(r"EpTimeoutError: rank 0 waited \d+\.\d s in (dispatch|combine) for rank 1", log)


@pytest.mark.engine_long
@pytest.mark.timeout(600)
def test_compiled_model_on_cpu(tmp_path, reference):
    """Without --enforce-eager torch.compile runs; the layers with the exchange stay opaque to it."""
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    compiled, log = generate(tmp_path, prompts, dtype="float32", extra=("--no-enforce-eager",))
    assert went_through_ep_backend(log)
    assert differences_fp32(compiled, want) == []
