"""Greedy tokens of the tiny model through vLLM on GPUs with ep_backend, against transformers on the CPU."""

import json
import re

import pytest
import torch
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

GPUS = torch.cuda.device_count()
WORLD = 4 if GPUS >= 4 else 2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, {GPUS} found"),
]

# Triton multiplies float32 in tf32 unless told otherwise, and that changes tokens.
EXACT = (("TRITON_F32_DEFAULT", "ieee"),)
UNTESTED = (("EP_BACKEND_ALLOW_UNTESTED", "1"),)
MEMORY = ("--gpu-memory-utilization", "0.2")


def compiled(mode, graphs):
    return ("--compilation-config", json.dumps({"mode": mode, "cudagraph_mode": graphs}))


OVERLAP = ("--enable-dbo", "--dbo-decode-token-threshold", "2", "--dbo-prefill-token-threshold", "2")
EPLB = json.dumps({"num_redundant_experts": 4, "window_size": 16, "step_interval": 24})
CASES = {
    "eager": {"extra": ("--enforce-eager",)},
    "full decode graphs": {"extra": compiled(0, "FULL_DECODE_ONLY")},
    "compiled, full and piecewise graphs": {"extra": compiled(3, "FULL_AND_PIECEWISE")},
    "two-batch overlap": {"extra": ("--enforce-eager", *OVERLAP), "environ": (*EXACT, *UNTESTED)},
    "two-batch overlap, full decode graphs": {
        "extra": (*compiled(0, "FULL_DECODE_ONLY"), *OVERLAP),
        "environ": (*EXACT, *UNTESTED),
    },
    "chunked prefill": {"extra": (*compiled(0, "FULL_DECODE_ONLY"), "--max-num-batched-tokens", "16")},
    "redundant experts": {
        "extra": (*compiled(0, "FULL_DECODE_ONLY"), "--enable-eplb", "--eplb-config", EPLB)
    },
    "sequence parallel": {
        "extra": compiled(0, "FULL_DECODE_ONLY"),
        "tensor_parallel_size": 2,
        "data_parallel_size": WORLD // 2,
    },
}


def on_gpus(**changes):
    options = {"device": "cuda", "data_parallel_size": WORLD, "environ": EXACT, **changes}
    return {**options, "extra": (*MEMORY, *options.get("extra", ()))}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.engine if name == "full decode graphs" else pytest.mark.engine_long
        )
        for name in CASES
    ],
)
def test_float32_tokens_equal_transformers(tmp_path, reference, name):
    if name == "sequence parallel" and WORLD < 4:
        pytest.skip("needs 4 GPUs")
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    got, log = generate(tmp_path, prompts, **on_gpus(dtype="float32", **CASES[name]))
    assert went_through_ep_backend(log, WORLD)
    assert "transport peer" in log
    assert differences_fp32(got, want) == []


@pytest.mark.engine_long
def test_float32_tokens_of_one_gpu_equal_transformers(tmp_path, reference):
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    got, log = generate(tmp_path, prompts, **on_gpus(dtype="float32", **ALONE))
    assert not went_through_ep_backend(log, WORLD)
    assert differences_fp32(got, want) == []


@pytest.mark.engine_long
def test_bfloat16_tokens_differ_only_at_near_ties(tmp_path, reference):
    want = reference("bfloat16")
    prompts = [record["prompt"] for record in want]
    got, log = generate(tmp_path, prompts, **on_gpus(extra=compiled(0, "FULL_DECODE_ONLY")))
    assert went_through_ep_backend(log, WORLD)
    assert differences_bf16(got, want) == []


@pytest.mark.engine_long
def test_a_wrong_combine_is_noticed(tmp_path, reference):
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    scaled = on_gpus(dtype="float32", environ=(*EXACT, *SCALED["environ"]))
    got, log = generate(tmp_path, prompts, **scaled)
    assert "THE MODEL'S OUTPUT IS WRONG" in log
    assert differences_fp32(got, want) != []


@pytest.mark.engine_long
@pytest.mark.parametrize("name", ["eager", "full decode graphs"])
def test_a_stalled_rank_ends_the_engine_with_a_message(tmp_path, name):
    """In a replayed graph nothing of ours runs on the host; the failure is noticed when the step's tokens are
    fetched."""
    options = on_gpus(environ=(("EP_BACKEND_TIMEOUT_S", "5"),), **CASES[name])
    log = log_of_a_stalled_rank(tmp_path, serving(**options), max_tokens=400)
    assert re.search(r"EpTimeoutError: rank \d waited \d+\.\d s in (dispatch|combine) for rank 1", log)
