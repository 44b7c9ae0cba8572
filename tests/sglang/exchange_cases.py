"""Rows through our dispatcher for SGLang, with real communicators on the CPU, against a dense sum. Run by
test_seam.py, once per version of SGLang's sources."""

import pytest
import torch
from ep_backend_sglang import process, token_format
from ranks import (
    HIDDEN,
    agree,
    dense,
    inputs,
    make_dispatcher,
    on_ranks,
    run_experts,
    start_parallel,
    weights,
)
from sglang.srt.layers import dp_attention

from ep_backend import EpArgumentError, reference

STEPS = {
    2: [(3, 5), (4, 4), (0, 2), (7, 0), (0, 0), (40, 1)],
    1: [(6,), (1,), (0,), (33,)],
}


def exchange(rank, world, dp, fp8, deep_gemm):
    start_parallel(world, dp)
    if fp8:
        token_format._quantize = lambda x, deep_gemm: reference.quantize_fp8(x)
    dtype = torch.bfloat16 if fp8 else torch.float32
    layers = [make_dispatcher(world, fp8, deep_gemm, dtype) for _ in range(2)]
    assert layers[0][0]._communicator is layers[1][0]._communicator, "one for all layers"
    assert layers[0][0]._communicator.config.max_tokens_per_rank == -(-64 // (world // dp))
    w = weights()
    for number, counts in enumerate(STEPS[dp]):
        rows = agree(rank, world, dp, counts)
        for index, (dispatcher, config) in enumerate(layers):
            x, topk = inputs(100 * number + 10 * index + rank, rows, dtype)
            got = dispatcher.dispatch(hidden_states=x, topk_output=topk)
            most = max(1, max(agreed_rows(world, dp, counts)))
            assert got.hidden_states.shape == (world * most, HIDDEN)
            done = dispatcher.combine(combine_input=run_experts(got, rank, world, w, config))
            assert done.dtype == dtype
            tolerance = {"rtol": 0.1, "atol": 0.1} if fp8 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(done.float(), dense(x, topk, w), **tolerance)


def agreed_rows(world, dp, counts):
    attention = world // dp
    return [-(-count // attention) for count in counts]


@pytest.mark.parametrize(
    ("world", "dp", "fp8", "deep_gemm"),
    [
        (2, 2, False, False),
        (2, 1, False, False),
        (4, 2, False, False),
        (2, 2, True, False),
        (2, 2, True, True),
    ],
    ids=["dp equals tp", "attention by tp only", "dp below tp", "block fp8", "block fp8 for deep_gemm"],
)
def test_layers_equal_the_dense_sum(world, dp, fp8, deep_gemm):
    on_ranks(world, exchange, world, dp, fp8, deep_gemm)


def plain_rows_are_the_window(rank):
    start_parallel(2, 2)
    dispatcher, config = make_dispatcher(2)
    assert not config.inplace, "a window must not be written over"
    rows = agree(rank, 2, 2, (2, 3))
    x, topk = inputs(rank, rows)
    first = dispatcher.dispatch(x, topk).hidden_states.data_ptr()
    assert dispatcher.dispatch(x, topk).hidden_states.data_ptr() == first
    fp8_rows = token_format.BlockFp8(torch.bfloat16)
    assert fp8_rows.writes_into_rows


def test_plain_rows_are_read_in_the_window():
    on_ranks(2, plain_rows_are_the_window)


def more_routes_than_rows(rank):
    start_parallel(2, 2)
    dispatcher, _ = make_dispatcher(2)
    agree(rank, 2, 2, (4, 4))
    x, topk = inputs(rank, 2)
    for rows in (x[:1], torch.cat([x, x])):
        with pytest.raises(EpArgumentError, match="topk_ids is"):
            dispatcher.dispatch(rows, topk)


def test_another_number_of_routes_than_rows_is_refused():
    on_ranks(2, more_routes_than_rows)


def nothing_agreed(rank):
    start_parallel(2, 2)
    dispatcher, config = make_dispatcher(2)
    dp_attention.set_dp_buffer_len(None, None, False, None)
    x, topk = inputs(rank, 1 + rank)
    got = dispatcher.dispatch(x, topk)
    assert got.hidden_states.shape[0] == 2 * 64, "as many slots as there are"
    done = dispatcher.combine(run_experts(got, rank, 2, weights(), config))
    torch.testing.assert_close(done, dense(x, topk, weights()), rtol=1e-4, atol=1e-4)


def test_ranks_that_agreed_on_nothing_still_understand_each_other():
    on_ranks(2, nothing_agreed)


def physical_experts(rank):
    """With redundant experts, ids are those of physical ones, of which there are more."""
    start_parallel(2, 2)
    dispatcher, config = make_dispatcher(2, experts=12)
    assert dispatcher._communicator.config.num_experts == 12
    agree(rank, 2, 2, (4, 6))
    x, topk = inputs(rank, (4, 6)[rank], experts=12)
    done = dispatcher.combine(run_experts(dispatcher.dispatch(x, topk), rank, 2, weights(12), config))
    torch.testing.assert_close(done, dense(x, topk, weights(12)), rtol=1e-4, atol=1e-4)


def test_redundant_experts():
    on_ranks(2, physical_experts)


def scaled(rank):
    import os

    os.environ["EP_BACKEND_TEST_SCALE_COMBINE"] = "0.5"
    start_parallel(2, 2)
    dispatcher, config = make_dispatcher(2)
    agree(rank, 2, 2, (2, 2))
    x, topk = inputs(rank, 2)
    done = dispatcher.combine(run_experts(dispatcher.dispatch(x, topk), rank, 2, weights(), config))
    torch.testing.assert_close(2 * done, dense(x, topk, weights()), rtol=1e-4, atol=1e-4)


def test_the_negative_control_changes_the_result():
    on_ranks(2, scaled)


def graphs_need_a_capturable_transport(rank):
    start_parallel(2, 2)
    process.communicators().captures = True
    with pytest.raises(ValueError, match="cannot capture transport cpu: add --disable-cuda-graph"):
        make_dispatcher(2)


def test_graphs_are_refused_where_they_cannot_work():
    on_ranks(2, graphs_need_a_capturable_transport)


def deadlines(rank):
    import os

    start_parallel(2, 2)
    dispatcher, _ = make_dispatcher(2)
    set_to = []
    dispatcher._communicator.set_timeout = set_to.append
    process.serving()
    assert set_to == []
    os.environ["EP_BACKEND_TIMEOUT_S"] = "7"
    process.serving()
    assert set_to == [7.0]


def test_the_long_deadline_stays_unless_another_is_asked_for():
    on_ranks(2, deadlines)
