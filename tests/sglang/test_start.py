"""What is refused and said when a server starts. Needs no SGLang."""

import dataclasses
import logging
import sys
from types import SimpleNamespace

import pytest
from ep_backend_sglang import TESTED_VERSIONS, register
from ep_backend_sglang.start import (
    MOST_REQUESTS,
    Launch,
    refusal,
    refuse_layer,
    rows_per_rank,
    unused_note,
)

from ep_backend.engines.start import MAX_TOKENS_PER_RANK, version_note

GOOD = Launch(tensor_parallel=4, attention_data_parallel=4, device="cuda", chunked_prefill=2048)


def but(**changes):
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_data_parallel": 2},
        {"attention_data_parallel": 1, "chunked_prefill": 8192},
        {"runner": "deep_gemm", "quantization": "fp8"},
        {"runner": "triton"},
        {"chunked_prefill": None},
    ],
)
def test_what_works_is_neither_refused_nor_commented(changes):
    assert refusal(but(**changes)) is None
    assert unused_note(but(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"device": "cpu"}, "--device cuda"),
        ({"runner": "flashinfer_cutlass"}, "--moe-runner-backend triton or deep_gemm"),
        ({"runner": "hpc_ops"}, "--moe-runner-backend triton or deep_gemm"),
        ({"quantization": "modelopt_fp4"}, "--quantization modelopt_fp4"),
        ({"quantization": "mxfp4"}, "block-fp8 checkpoint"),
        ({"single_batch_overlap": True}, "without --enable-single-batch-overlap"),
        ({"lora": True}, "without --enable-lora"),
        ({"speculative": "EAGLE"}, "without --speculative-algorithm"),
        ({"pipeline_parallel": 2}, "--pp-size 1"),
        ({"context_parallel": 2}, "--attn-cp-size 1"),
        ({"moe_data_parallel": 2}, "--moe-dp-size 1"),
        ({"elastic": True}, "without --elastic-ep-backend"),
        ({"compiled": True}, "--enable-torch-compile"),
        ({"offloaded": True}, "without --kt-weight-path"),
        ({"chunked_prefill": -1}, "--chunked-prefill-size 8192"),
        ({"chunked_prefill": MAX_TOKENS_PER_RANK + 1}, "lower --chunked-prefill-size (now 16385"),
    ],
)
def test_refusals_name_the_flag_in_one_sentence(changes, flag):
    said = refusal(but(**changes))
    assert flag in said
    assert "\n" not in said
    assert said.endswith(".")


@pytest.mark.parametrize(
    ("chunked", "requests", "data", "tensor", "rows"),
    [
        (8192, None, 4, 1, 8192),
        (2048, None, 4, 1, MOST_REQUESTS),
        (2048, 64, 4, 1, 2048),
        (16, 100, 2, 1, 50),
        (16, 10**6, 2, 1, MOST_REQUESTS),
        (8192, None, 1, 4, 2048),
        (8193, None, 2, 2, 4097),
    ],
)
def test_windows_hold_a_chunk_and_all_decoded_requests(chunked, requests, data, tensor, rows):
    assert rows_per_rank(chunked, requests, data, tensor) == rows


def test_one_rank_is_told_what_to_add():
    note = unused_note(but(tensor_parallel=1, attention_data_parallel=1))
    assert "--tp-size N" in note
    assert "--enable-dp-attention" in note


@pytest.mark.parametrize("version", ["0.5.17", "0.5.20", "0.5.23", "0.5.23+cu130", "0.0.0.dev0x", "dev"])
def test_versions_that_are_tested_or_unreadable_pass_silently(version):
    silent = version != "0.0.0.dev0x"
    assert (version_note("SGLang", version, TESTED_VERSIONS) is None) == silent


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0", "1.0.0"])
def test_other_versions_get_one_warning_with_the_range(version):
    note = version_note("SGLang", version, TESTED_VERSIONS)
    assert "0.5.17 to 0.5.23" in note
    assert version in note


def method(kind, runner=None, **attributes):
    made = type(kind, (), {})()
    if runner is not None:
        made.runner = SimpleNamespace(runner_backend=SimpleNamespace(value=runner))
    vars(made).update(attributes)
    return made


def fp8(runner, shape):
    config = SimpleNamespace(weight_block_size=shape)
    return method("Fp8MoEMethod", runner, block_quant=shape is not None, quant_config=config)


@pytest.mark.parametrize(
    "experts",
    [
        method("UnquantizedFusedMoEMethod", "triton"),
        method("UnquantizedFusedMoEMethod", "deep_gemm"),
        fp8("triton", [128, 128]),
        fp8("deep_gemm", [128, 128]),
    ],
)
def test_experts_that_can_be_served(experts):
    assert refuse_layer(experts, 0) is None
    assert "--disable-shared-experts-fusion" in refuse_layer(experts, 1)


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (method("UnquantizedFusedMoEMethod", "triton_kernel"), "(triton_kernel)"),
        (method("UnquantizedFusedMoEMethod"), "(one of its own)"),
        (fp8("triton", None), "128x128"),
        (fp8("triton", [1, 32]), "128x128"),
        (fp8("cutlass", [128, 128]), "(cutlass)"),
        (method("ModelOptNvFp4FusedMoEMethod", "triton"), "ModelOptNvFp4FusedMoEMethod"),
        (method("AWQMoEMethod", "marlin"), "AWQMoEMethod"),
    ],
)
def test_experts_that_cannot_are_named(experts, said):
    assert said in refuse_layer(experts, 0)


def test_registration_without_sglang_is_one_loud_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with caplog.at_level(logging.ERROR):
        register()
    (record,) = caplog.records
    assert "ep_backend IS NOT AVAILABLE" in record.getMessage()
    assert "sglang" in record.getMessage()
    assert "\n" not in record.getMessage()
