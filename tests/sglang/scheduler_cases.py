"""What the plug-in does to a process that serves. Run by test_seam.py, once per version of SGLang's
sources."""

import inspect
import logging
from types import SimpleNamespace

import plug_in
import pytest
import sglang.srt.managers.scheduler as scheduler  # what such a process has imported when plug-ins are loaded
import sglang.srt.models.qwen3_moe as qwen3_moe
import torch
from ep_backend_sglang import NAME, seam
from sglang.kernels.ops.moe import ep_moe_kernels
from sglang.kernels.ops.quantization import fp8_kernel
from sglang.srt.batch_overlap import operations, two_batch_overlap
from sglang.srt.layers import dp_attention
from sglang.srt.layers.moe.fused_moe_triton import layer
from sglang.srt.layers.moe.moe_runner.base import FusedOpPool, MoeRunnerConfig
from sglang.srt.layers.moe.utils import MoeA2ABackend
from sglang.srt.runtime_context import get_flags

STOCK_MEMBERS = list(MoeA2ABackend)
QUESTIONS = [name for name in vars(MoeA2ABackend) if name.startswith("is_")]


def places():
    """What serving needs and other backends must not notice."""
    return [
        fp8_kernel.sglang_per_token_group_quant_fp8,
        operations.execute_overlapped_operations,
        qwen3_moe.Qwen3MoeSparseMoeBlock.forward,
        scheduler.Scheduler.process_batch_result,
        scheduler.Scheduler.run_event_loop,
    ]


STOCK_PLACES = places()


@pytest.fixture(scope="module", autouse=True)
def _registered():
    plug_in.load()


@pytest.fixture(autouse=True)
def _options(monkeypatch):
    """Those of a server without copies of experts: none are published here."""
    from ep_backend_sglang import process

    monkeypatch.setattr(process, "has_copies_of_experts", lambda: False)


@pytest.fixture
def chosen():
    moe = get_flags().moe
    moe.a2a_backend = MoeA2ABackend(NAME)
    moe.tbo_enabled = False
    yield
    moe.a2a_backend = MoeA2ABackend.NONE


def create(config):
    """Later versions pass the layer's quantisation, too."""
    others = len(inspect.signature(layer.create_moe_dispatcher).parameters) - 1
    return layer.create_moe_dispatcher(config, *[None] * others)


def config(**changes):
    return MoeRunnerConfig(
        **{
            "num_experts": 8,
            "num_local_experts": 4,
            "hidden_size": 64,
            "top_k": 2,
            "num_fused_shared_experts": 0,
            "params_dtype": torch.bfloat16,
            **changes,
        }
    )


def test_the_member_is_found_by_name_and_others_are_as_before():
    member = MoeA2ABackend(NAME)
    assert member.value == NAME
    assert isinstance(member, MoeA2ABackend)
    assert list(MoeA2ABackend) == [*STOCK_MEMBERS, member]
    with pytest.raises(ValueError, match="ep_backened"):
        MoeA2ABackend("ep_backened")


def test_our_member_alone_behaves_as_flashinfer_s():
    assert [name for name in QUESTIONS if getattr(MoeA2ABackend(NAME), name)()] == ["is_flashinfer"]
    for member in STOCK_MEMBERS:
        assert member.is_flashinfer() == (member is MoeA2ABackend.FLASHINFER)


def test_other_backends_get_their_own_dispatcher_and_kernels(monkeypatch):
    get_flags().moe.a2a_backend = MoeA2ABackend.NONE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    monkeypatch.setattr(StandardDispatcher, "__init__", lambda self, config: None)
    assert type(create(config())) is StandardDispatcher
    assert FusedOpPool.get_fused_func("none", "triton") is not None
    assert FusedOpPool.get_fused_func("deepep", "triton") is None
    stock = SimpleNamespace()  # no dispatcher: it is not looked at
    assert seam._bind_dispatcher(None, stock) is None


def test_nothing_more_is_replaced_until_a_layer_uses_us():
    assert places() == STOCK_PLACES


def test_our_dispatcher_and_the_kernels_of_the_standard_format(chosen):
    from ep_backend_sglang.dispatcher import EpDispatcher

    made = create(config())
    assert type(made) is EpDispatcher
    assert FusedOpPool.get_fused_func(NAME, "triton") is FusedOpPool.get_fused_func("none", "triton")
    assert FusedOpPool.get_fused_func(NAME, "triton") is not None
    assert FusedOpPool.get_fused_func(NAME, "deep_gemm") is None, "prepared for, then run"
    assert layer.FusedMoE.__init__.__wrapped__ is not None


def test_a_dispatcher_is_bound_when_its_layer_is_complete(chosen):
    bound = []
    made = SimpleNamespace(dispatcher=SimpleNamespace(bind=bound.append))
    seam._bind_dispatcher(None, made, num_experts=8)
    assert bound == [made]


def test_a_layer_replaces_what_serving_needs_once(chosen):
    create(config())
    create(config())
    assert [function.__wrapped__ for function in places()] == STOCK_PLACES
    holders = [vars(module).get("per_token_group_quant_fp8") for module in (fp8_kernel, ep_moe_kernels)]
    assert fp8_kernel.sglang_per_token_group_quant_fp8.__wrapped__ not in holders


def test_rows_that_came_quantised_are_not_quantised_again(chosen):
    from ep_backend_sglang.token_format import QUANTIZED

    create(config())
    rows, pair = torch.zeros(2, 128), (object(), object())
    setattr(rows, QUANTIZED, pair)
    assert fp8_kernel.sglang_per_token_group_quant_fp8(rows, 128, scale_ue8m0=False) == pair
    with pytest.raises(AssertionError, match="divi"):
        fp8_kernel.sglang_per_token_group_quant_fp8(torch.zeros(2, 100), 128)


def test_qwen3_takes_the_way_that_knows_physical_experts(chosen):
    create(config())
    block = SimpleNamespace(forward_deepep=lambda *a: ("deepep", *a), _use_mega_moe=False)
    forward = qwen3_moe.Qwen3MoeSparseMoeBlock.forward
    assert forward(block, "rows", "batch") == ("deepep", "rows", "batch")
    source = inspect.getsource(qwen3_moe.Qwen3MoeSparseMoeBlock.forward_deepep)
    assert "all_reduce" not in source, "rows come back finished"


def test_a_model_that_does_not_say_where_copies_are_is_refused(chosen, monkeypatch):
    """Later versions find out by themselves and always say it."""
    from ep_backend_sglang import install, process
    from sglang.srt.layers.moe import topk

    original = topk.select_experts
    assert "expert_location_dispatch_info" in inspect.signature(original).parameters
    monkeypatch.setattr(process, "has_copies_of_experts", lambda: True)
    monkeypatch.setattr(topk, "select_experts", original)  # to be put back
    install._refuse_unknown_copies()
    with pytest.raises(ValueError, match="--enable-eplb"):
        topk.select_experts(hidden_states=None, router_logits=None, expert_location_dispatch_info=None)
    with pytest.raises(TypeError):  # SGLang's own function, which wants more
        topk.select_experts(expert_location_dispatch_info="known")


def test_overlapping_halves_know_the_counts_of_their_batch(chosen, monkeypatch):
    from ep_backend_sglang import step

    create(config())
    dp_attention.set_dp_buffer_len(14, 5, False, [5, 9])
    seen = []
    monkeypatch.setattr(
        operations, "_resolve_tbo_child_contexts", lambda: seen.append(step._whole_batch) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        two_batch_overlap.execute_overlapped_operations([{}, {}], [[], []], [0, 2])
    assert seen == [[5, 9]]
    assert step._whole_batch is None


def test_overlapping_halves_need_no_deep_ep(chosen):
    from sglang.srt.batch_overlap import operations_strategy

    create(config())
    assert operations_strategy.DeepEPConfig.get_instance().num_sms == 0


def test_a_failed_exchange_is_raised_before_its_tokens_leave(chosen, monkeypatch):
    from ep_backend_sglang import process

    create(config())
    happened = []
    monkeypatch.setattr(process, "check", lambda: happened.append("checked"))
    result = SimpleNamespace(copy_done=SimpleNamespace(synchronize=lambda: happened.append("waited")))
    with pytest.raises(AttributeError):  # SGLang's own method, which wants a real scheduler
        scheduler.Scheduler.process_batch_result(SimpleNamespace(), SimpleNamespace(reqs=[]), result)
    assert happened == ["waited", "checked"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_fused_shared_experts": 1}, "--disable-shared-experts-fusion"), ({}, "128x128")],
)
def test_layers_that_cannot_be_served_are_refused(chosen, changes, said):
    made = create(config(**changes))
    with pytest.raises(ValueError, match=said):
        made.bind(SimpleNamespace(quant_method=object()))


def test_a_missing_place_is_said_loudly(monkeypatch, caplog):
    monkeypatch.delattr(layer, "create_moe_dispatcher")
    with caplog.at_level(logging.ERROR):
        plug_in.load()
    assert "NOT AVAILABLE" in caplog.text
    assert "create_moe_dispatcher" in caplog.text
