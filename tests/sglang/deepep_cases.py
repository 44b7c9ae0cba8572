"""SGLang's own deepep modes on the stand-in for DeepEP, on two ranks with CPU tensors, against a dense sum.
Run by test_seam.py, once per version of SGLang's sources.

SGLang's dispatchers are the real ones, made as a layer makes them; what quantises and what asks for a GPU is
replaced.
"""

import inspect
import os
from types import SimpleNamespace

os.environ["EP_BACKEND_PROVIDE_DEEP_EP"] = "1"  # before `ranks` loads the plug-in

import pytest
import torch
from ranks import EXPERTS, HIDDEN, TOP_K, dense, inputs, on_ranks, start_parallel, weights
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.layers.moe import utils
from sglang.srt.layers.moe.fused_moe_triton import layer
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher import deepep
from sglang.srt.layers.moe.utils import DeepEPMode, MoeA2ABackend
from sglang.srt.runtime_context import get_flags

from ep_backend import reference
from ep_backend.compat.deep_ep import Buffer

WORLD, MOST = 2, 128  # SGLang's default of the most tokens in low_latency
ALIGNMENT = 128  # of an expert's rows, for DeepGEMM


def make_dispatchers(mode, fp8):
    """Of two layers."""
    start_parallel(WORLD, WORLD)
    moe = get_flags().moe
    moe.a2a_backend, moe.deepep_mode, moe.deepep_config = MoeA2ABackend.DEEPEP, DeepEPMode(mode), ""
    options = SimpleNamespace(deepep_dispatcher_output_dtype="fp8" if fp8 else "bf16")
    utils.get_server_args = utils.get_exec = lambda: SimpleNamespace(moe=options)
    deepep.deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
    deepep.sglang_per_token_group_quant_fp8 = lambda x, group, **_: reference.quantize_fp8(x)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    config = MoeRunnerConfig(
        num_experts=EXPERTS,
        num_local_experts=EXPERTS // WORLD,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        params_dtype=torch.bfloat16,
    )
    others = len(inspect.signature(layer.create_moe_dispatcher).parameters) - 1
    return [layer.create_moe_dispatcher(config, *[None] * others) for _ in range(2)]


def run_experts(got, rank, fp8):
    """As SGLang's DeepGEMM experts do."""
    rows, scales = got.hidden_states, got.hidden_states_scale
    assert rows.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
    values = rows.float()
    if fp8:
        assert scales.dtype == torch.float32
        values = values * scales.repeat_interleave(128, dim=-1)
    mine = weights().view(WORLD, -1, HIDDEN, HIDDEN)[rank]
    if got.format.is_deepep_ll():
        assert rows.shape == (EXPERTS // WORLD, WORLD * MOST, HIDDEN)
        assert got.expected_m >= 1
        out = (values @ mine).bfloat16()
        for expert, count in enumerate(got.masked_m.tolist()):
            out[expert, count:] = float("nan")
        return deepep.DeepEPLLCombineInput(out, got.topk_ids, got.topk_weights)
    counts = [int((got.topk_ids == expert).sum()) for expert in range(EXPERTS // WORLD)]
    assert got.num_recv_tokens_per_expert == [-(-count // ALIGNMENT) * ALIGNMENT for count in counts]
    out = torch.zeros(values.shape)
    for row, slot in (got.topk_ids >= 0).nonzero().tolist():
        out[row] += got.topk_weights[row, slot] * (values[row] @ mine[got.topk_ids[row, slot]])
    return deepep.DeepEPNormalCombineInput(out.bfloat16(), got.topk_ids, got.topk_weights)


def check(done, x, topk, fp8):
    tolerance = 0.15 if fp8 else 0.05
    torch.testing.assert_close(done.float(), dense(x, topk, weights()), rtol=0.02, atol=tolerance)


def steps(rank, mode, fp8):
    """Prompts and decode steps in turn, as in mode auto; two layers each."""
    dispatchers = make_dispatchers(mode, fp8)
    for number, tokens in enumerate([(6, 40), (4, 3), (0, 17), (1, 0), (0, 0)]):
        set_is_extend_in_batch(number % 2 == 0)
        for index, dispatcher in enumerate(dispatchers):
            x, topk = inputs(100 * number + 10 * index + rank, tokens[rank], torch.bfloat16)
            got = dispatcher.dispatch(hidden_states=x, topk_output=topk)
            low_latency = mode == "low_latency" or (mode == "auto" and number % 2 == 1)
            assert got.format.is_deepep_ll() == low_latency
            check(dispatcher.combine(combine_input=run_experts(got, rank, fp8)), x, topk, fp8)
    assert type(deepep.DeepEPBuffer._state().buffer) is Buffer


def halves(rank, mode, fp8):
    """Two-batch overlap: both halves are under way at once."""
    dispatcher = make_dispatchers(mode, fp8)[0]
    set_is_extend_in_batch(mode == "normal")
    given = [inputs(10 * half + rank, 5 + half, torch.bfloat16) for half in (0, 1)]
    for half, (x, topk) in enumerate(given):
        dispatcher.dispatch_a(hidden_states=x, topk_output=topk, tbo_subbatch_index=half)
    for half in (0, 1):
        got = dispatcher.dispatch_b(tbo_subbatch_index=half)
        dispatcher.combine_a(combine_input=run_experts(got, rank, fp8), tbo_subbatch_index=half)
    for half, (x, topk) in enumerate(given):
        check(dispatcher.combine_b(tbo_subbatch_index=half), x, topk, fp8)


def test_the_scheduler_s_dispatcher_found_the_stand_in():
    assert deepep.use_deepep
    assert deepep.Buffer is Buffer


@pytest.mark.parametrize("mode", ["normal", "low_latency", "auto"])
@pytest.mark.parametrize("fp8", [False, True])
def test_steps(mode, fp8):
    on_ranks(WORLD, steps, mode, fp8)


@pytest.mark.parametrize(("mode", "fp8"), [("normal", True), ("low_latency", True), ("low_latency", False)])
def test_two_batch_overlap(mode, fp8):
    on_ranks(WORLD, halves, mode, fp8)
