"""Two overlapping halves of a batch through our dispatcher for SGLang, against a dense sum. Run by
test_seam.py, once per version of SGLang's sources."""

import contextlib
from types import SimpleNamespace

import pytest
import sglang.srt.layers.moe.topk as topk_module
import sglang.srt.models.qwen3_moe as qwen3_moe
import torch
from ep_backend_sglang import step
from ranks import (
    EXPERTS,
    TOP_K,
    agree,
    dense,
    inputs,
    make_dispatcher,
    on_ranks,
    run_experts,
    start_parallel,
    weights,
)
from sglang.srt.batch_overlap import operations
from sglang.srt.layers import dp_attention
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.model_executor.forward_batch_info import ForwardMode


def halves(rank, dp, sizes):
    """SGLang's order of a step's operations on two halves, in which they take turns."""
    start_parallel(2, dp)
    dispatcher, config = make_dispatcher(2)
    w = weights()
    agree(rank, 2, dp, [sum(each) for each in sizes])
    whole = dp_attention.get_dp_global_num_tokens()
    dp_attention.set_dp_buffer_len(None, None, False, None)  # what a half sees
    mine = sizes[rank % dp]
    parts = [inputs(10 * rank + part, mine[part]) for part in range(2)]
    done = []
    with step.two_halves(whole):
        dispatcher.dispatch_a(*parts[0], tbo_subbatch_index=0)
        dispatcher.dispatch_a(*parts[1], tbo_subbatch_index=1)
        for part in range(2):
            got = dispatcher.dispatch_b(tbo_subbatch_index=part)
            dispatcher.combine_a(run_experts(got, rank, 2, w, config), tbo_subbatch_index=part)
        done = [dispatcher.combine_b(tbo_subbatch_index=part) for part in range(2)]
    for part in range(2):
        torch.testing.assert_close(done[part], dense(*parts[part], w), rtol=1e-4, atol=1e-4)
    # A step that is not cut in two takes the same halves without an index.
    agree(rank, 2, dp, [sum(each) for each in sizes])
    x, topk = inputs(77 + rank, sum(mine) if dp == 2 else sum(mine) // 2)
    dispatcher.dispatch_a(hidden_states=x, topk_output=topk)
    dispatcher.combine_a(combine_input=run_experts(dispatcher.dispatch_b(), rank, 2, w, config))
    torch.testing.assert_close(dispatcher.combine_b(), dense(x, topk, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dp", "sizes"),
    [(2, [(3, 4), (1, 2)]), (2, [(5, 0), (0, 0)]), (1, [(4, 4)])],
    ids=["", "idle", "tp only"],
)
def test_two_overlapping_halves_equal_the_dense_sum(dp, sizes):
    on_ranks(2, halves, dp, sizes)


def model_steps(rank, part, x, topk, dispatcher, run):
    """A half's operations of Qwen3's MoE block, SGLang's own, up to what follows each wait."""
    router = SimpleNamespace(top_k=TOP_K, num_fused_shared_experts=0, num_shared_topk_slots=0)
    block = SimpleNamespace(
        layer_id=0,
        ep_size=2,
        gate=lambda rows: (rows.new_empty(len(rows), EXPERTS), None),
        topk=_Router(router, topk),
        experts=SimpleNamespace(dispatcher=dispatcher, run_moe_core=run),
    )
    state = operations._StateDict()
    state.update({"hidden_states_mlp_input": x, "tbo_subbatch_index": part})
    # Rank 1 has no request: its rows are padding.
    state.forward_batch = SimpleNamespace(
        forward_mode=ForwardMode.IDLE if rank == 1 else ForwardMode.DECODE, num_token_non_padded=None
    )
    names = ("gate", "select_experts", "dispatch_a", "dispatch_b", "experts", "combine_a", "combine_b")
    for name in (*names, "output"):
        if name == "select_experts" and rank == 1:
            assert state.router_logits is None, "SGLang does not ask the router"
        getattr(qwen3_moe.Qwen3MoeSparseMoeBlock, f"op_{name}")(block, state)
        if name in ("dispatch_a", "combine_a"):
            yield None
    yield state.pop("hidden_states_mlp_output")


class _Router:
    """Answers as given, and as SGLang's where it is not asked."""

    layer_id, is_draft = 0, False
    empty_topk_output = TopK.empty_topk_output

    def __init__(self, config, answer):
        self.topk_config, self.answer = config, answer

    def __call__(self, **kwargs):
        return self.answer

    def _apply_waterfill(self, answer, rows):
        return answer


def an_idle_rank_in_two_halves(rank, sizes):
    start_parallel(2, 2)
    dispatcher, config = make_dispatcher(2)
    if hasattr(qwen3_moe, "ExpertLocationDispatchInfo"):  # asks the configuration, and there is none here
        qwen3_moe.ExpertLocationDispatchInfo = SimpleNamespace(init_new=lambda **kwargs: None)
    topk_module.is_allocation_symmetric = lambda: False
    topk_module.use_symmetric_memory = lambda *args, **kwargs: contextlib.nullcontext()
    agree(rank, 2, 2, [sum(sizes)] * 2)
    whole = dp_attention.get_dp_global_num_tokens()
    w = weights()
    parts = [inputs(10 * rank + part, size) for part, size in enumerate(sizes)]

    def experts(dispatch_output):
        return run_experts(dispatch_output, rank, 2, w, config)

    with step.two_halves(whole):
        running = [model_steps(rank, n, *parts[n], dispatcher, experts) for n in range(2)]
        for _ in range(2):
            for each in running:
                assert next(each) is None
        done = [next(each) for each in running]
    for (x, topk), rows in zip(parts, done, strict=True):
        assert rows.shape == x.shape, "the residual has as many"
        want = torch.zeros_like(x) if rank == 1 else dense(x, topk, w)
        torch.testing.assert_close(rows, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(0, 1), (2, 3)], ids=["", "both halves"])
def test_rows_of_padding_of_an_idle_rank_have_no_experts(sizes):
    """A decode step without graphs: SGLang pads the idle rank to as many rows as the other has."""
    on_ranks(2, an_idle_rank_in_two_halves, sizes)
