"""Greedy tokens of the tiny model through vLLM on GPUs with ep_backend, against transformers on the CPU.

With EP_TEST_SHARED_GPUS=1 and one GPU it serves two ranks as two nodes.
"""

import json
import re

import gpus
import pytest
import random_models
import wide_models
from engine_runs import (
    AGREED,
    ALONE,
    SCALED,
    continue_greedily,
    differences_bf16,
    differences_fp32,
    exchanged,
    generate,
    log_of_a_stalled_rank,
    on_two_nodes,
    serving,
    went_through_ep_backend,
)

from ep_backend.compat import STANDS_IN

WORLD = 4 if gpus.FOUND >= 4 else 2

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200 if gpus.shared(WORLD) else 400)]


@pytest.fixture(autouse=True, scope="module")
def _gpu_for_each_rank():
    gpus.needs(WORLD)


# Triton multiplies float32 in tf32 unless told otherwise, and that changes tokens.
EXACT = (("TRITON_F32_DEFAULT", "ieee"),)
# Little, and not measured: other programs may use these GPUs.
MEMORY = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "1G")


def compiled(mode, graphs):
    return ("--compilation-config", json.dumps({"mode": mode, "cudagraph_mode": graphs}))


OVERLAP = ("--enable-dbo", "--dbo-decode-token-threshold", "2", "--dbo-prefill-token-threshold", "2")
EPLB = json.dumps({"num_redundant_experts": 4, "window_size": 16, "step_interval": 24})
CASES = {
    "eager": {"extra": ("--enforce-eager",)},
    "full decode graphs": {"extra": compiled(0, "FULL_DECODE_ONLY")},
    "compiled, full and piecewise graphs": {"extra": compiled(3, "FULL_AND_PIECEWISE")},
    "two-batch overlap": {"extra": ("--enforce-eager", *OVERLAP)},
    "two-batch overlap, full decode graphs": {"extra": (*compiled(0, "FULL_DECODE_ONLY"), *OVERLAP)},
    "full decode graphs, through host memory": {
        "extra": compiled(0, "FULL_DECODE_ONLY"),
        "environ": (*EXACT, ("EP_BACKEND_TRANSPORT", "host")),
        "transport": "host",
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
    case = dict(CASES[name])
    transport = case.pop("transport", "peer")
    got, log = generate(tmp_path, prompts, **on_gpus(dtype="float32", **case))
    assert went_through_ep_backend(log, WORLD)
    assert exchanged(log, WORLD, transport)
    assert ("computed as two batches" in log) == ("overlap" in name)
    assert differences_fp32(got, want) == []


@pytest.mark.engine_long
@pytest.mark.parametrize("transport", ["collective", "hier"])
def test_float32_tokens_of_two_nodes_equal_transformers(tmp_path, reference, transport):
    """NCCL uses sockets between them. Two ranks on each, if ranks may share GPUs or there are four."""
    world = 4 if gpus.FOUND >= 4 or gpus.shared(4) else 2
    want = reference("float32")
    extra = ("--enforce-eager",) if transport == "hier" else compiled(0, "FULL_DECODE_ONLY")
    environ = (*EXACT, ("EP_BACKEND_TRANSPORT", transport))
    asked = serving(**on_gpus(dtype="float32", data_parallel_size=world, extra=extra, environ=environ))
    with on_two_nodes(asked, tmp_path, apart=True) as server:
        got = continue_greedily(server, [record["prompt"] for record in want])
        log = server.session.text()
    assert exchanged(log, world, transport)
    assert AGREED not in log  # nodes share no memory
    assert differences_fp32(got, want) == []


@pytest.mark.engine_long
def test_float32_tokens_of_one_gpu_equal_transformers(tmp_path, reference):
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    got, log = generate(tmp_path, prompts, **on_gpus(dtype="float32", **ALONE))
    assert not went_through_ep_backend(log, WORLD)
    assert differences_fp32(got, want) == []


@pytest.mark.engine_long
@pytest.mark.parametrize(
    "name", ["full decode graphs", "two-batch overlap", "two-batch overlap, full decode graphs"]
)
def test_bfloat16_tokens_differ_only_at_near_ties(tmp_path, reference, name):
    """With FlashAttention, which float32 has not: see ep_backend_vllm/overlap.py."""
    want = reference("bfloat16")
    prompts = [record["prompt"] for record in want]
    got, log = generate(tmp_path, prompts, **on_gpus(**CASES[name]))
    assert went_through_ep_backend(log, WORLD)
    assert ("computed as two batches" in log) == ("overlap" in name)
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


NO_DEEP_GEMM = (("VLLM_USE_DEEP_GEMM", "0"),)
# DeepGEMM compiles a kernel when it is first needed; compiling all that might be takes minutes.
DEEP_GEMM = (("VLLM_DEEP_GEMM_WARMUP", "skip"),)
FLOAT_SCALES = (("VLLM_USE_DEEP_GEMM_E8M0", "0"),)
# Ranks wait for each other while they compile.
STAND_IN = (("EP_BACKEND_PROVIDE_DEEP_EP", "1"), ("EP_BACKEND_TIMEOUT_S", "300"))
DEFAULT = "allgather_reducescatter"
BATCH = ("--max-num-batched-tokens", "512")
RANDOM = {
    "bfloat16": {"format": "torch.bfloat16"},
    "shared experts": {"architecture": "qwen1.5-moe-a2.7b", "dtype": "float32", "format": "torch.float32"},
    "block fp8, triton": {
        "fp8": "block",
        "experts": "triton",
        "format": "fp8_block128",
        "environ": NO_DEEP_GEMM,
    },
    "block fp8, deep_gemm": {
        "fp8": "block",
        "experts": "deep_gemm",
        "format": "fp8_block128",
        "environ": (*DEEP_GEMM, *FLOAT_SCALES),
    },
    "block fp8, deep_gemm, scales rounded": {
        "fp8": "block",
        "experts": "deep_gemm",
        "format": "torch.uint8",
        "environ": DEEP_GEMM,
    },
    "per-token fp8, triton": {"fp8": "token", "experts": "triton", "format": "torch.uint8"},
    "per-token fp8, CUTLASS": {
        "fp8": "token",
        "experts": "cutlass",
        "experts_of_the_other": "triton",  # its scratch memory is too small for CUTLASS
        "format": "torch.uint8",
    },
}


@pytest.mark.engine_long
@pytest.mark.parametrize("name", RANDOM)
def test_tokens_equal_those_of_the_default_backend(tmp_path, name):
    """Random weights: in float32 the same tokens; with fewer bits they may differ at near ties."""
    case = RANDOM[name]
    dtype, architecture = case.get("dtype", "bfloat16"), case.get("architecture", "qwen3-30b-a3b")
    model = random_models.write(tmp_path / "model", architecture, case.get("fp8"))
    experts = case.get("experts", "auto")
    answers = {}
    for backend, moe_backend in (
        ("ep_backend", experts),
        (DEFAULT, case.get("experts_of_the_other", experts)),
    ):
        extra = (*compiled(0, "FULL_DECODE_ONLY"), *BATCH, "--moe-backend", moe_backend)
        environ = (*EXACT, *case.get("environ", ()))
        options = on_gpus(model=model, dtype=dtype, backend=backend, extra=extra, environ=environ)
        answers[backend], log = generate(tmp_path / backend, random_models.prompts(), **options)
        assert went_through_ep_backend(log, WORLD) == (backend == "ep_backend")
        if backend == "ep_backend":
            assert f"{case['format']}, at most" in log
    differences = differences_fp32 if dtype == "float32" else differences_bf16
    assert differences(answers["ep_backend"], answers[DEFAULT]) == []


DEEPEP = {
    # Its exchange fits in no graph. vLLM switches them off itself, but not with compilation mode 0.
    "high_throughput": {"graphs": "NONE"},
    "high_throughput, block fp8": {"graphs": "NONE", "fp8": True},
    "low_latency": {},
    # Its roundings alone leave 5 prompts of 8 equal, with gaps up to 1.19; halved results leave none
    # (benchmarks/rounding.py).
    "low_latency, block fp8": {"fp8": True, "limits": {"least_equal": 4, "largest_gap": 1.5}},
    "low_latency, two-batch overlap": {"extra": OVERLAP},
}


@pytest.mark.engine_long
@pytest.mark.parametrize("name", DEEPEP)
def test_tokens_through_deepep_s_interface(tmp_path, name):
    """vLLM's own modes for DeepEP on ours. What low_latency rounds otherwise, each expert's result, changes
    most of what random weights say; so this is the trained model, of a width that vLLM need not pad."""
    case, mode = DEEPEP[name], f"deepep_{name.split(',')[0]}"
    model = wide_models.write(tmp_path / "model", fp8="fp8" in case)
    answers = {}
    for backend in (mode, DEFAULT):
        extra = (*compiled(0, case.get("graphs", "FULL_DECODE_ONLY")), *BATCH)
        environ = (*EXACT, *(NO_DEEP_GEMM if "fp8" in case else ()))
        if backend == mode:
            extra, environ = (*extra, *case.get("extra", ())), (*environ, *STAND_IN)
        options = on_gpus(model=model, backend=backend, extra=extra, environ=environ)
        answers[backend], log = generate(tmp_path / backend, wide_models.prompts(), **options)
        assert (STANDS_IN in log) == (backend == mode)
        assert not went_through_ep_backend(log, WORLD)
    assert differences_bf16(answers[mode], answers[DEFAULT], **case.get("limits", {})) == []
