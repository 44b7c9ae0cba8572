"""Rows through our dispatcher for SGLang, with real communicators on the CPU, against a dense sum. Run by
test_seam.py, once per version of SGLang's sources.

Ranks are forked from a process that has imported SGLang, which takes seconds.
"""

import inspect
import multiprocessing
import socket
import traceback
from types import SimpleNamespace

import plug_in
import pytest
import sglang.srt.managers.scheduler  # noqa: F401 - what a serving process has imported
import torch
import torch.distributed as dist
from ep_backend_sglang import process, step, token_format
from sglang.srt.distributed import parallel_state
from sglang.srt.layers import dp_attention
from sglang.srt.layers.moe.fused_moe_triton import layer
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.runtime_context import get_flags, get_parallel

from ep_backend import reference

HIDDEN, EXPERTS, TOP_K = 128, 8, 3
torch.set_num_threads(1)
plug_in.load()


def on_ranks(world, job, *args):
    """job(rank, *args) in ``world`` forked processes; fails with their tracebacks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, world, port, failures, job, args)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    late = [rank.pid for rank in ranks if rank.is_alive()]
    for rank in ranks:
        rank.kill()
    said = []
    while not failures.empty():
        said.append(failures.get())
    assert not late, f"{len(late)} ranks did not come to an end; {said}"
    assert not said, "\n".join(said)
    assert [rank.exitcode for rank in ranks] == [0] * world


def _rank(rank, world, port, failures, job, args):
    try:
        parallel_state.init_distributed_environment(
            world_size=world,
            rank=rank,
            local_rank=rank,
            distributed_init_method=f"tcp://127.0.0.1:{port}",
            backend="gloo",
        )
        job(rank, *args)
        dist.barrier()
    except BaseException:
        failures.put(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None


def start_parallel(world, dp):
    """SGLang's groups; attention in ``dp`` data-parallel groups."""
    if "tensor_model_parallel_size" in inspect.signature(parallel_state.initialize_model_parallel).parameters:
        parallel_state.initialize_model_parallel(
            world, world, attention_data_parallel_size=dp, backend="gloo"
        )
        dp_attention._ATTN_DP_SIZE = dp  # by what else needs a published configuration
    else:  # later versions read the sizes from the published configuration
        ones = dict.fromkeys(("pp_size", "attn_cp_size", "moe_dp_size", "attn_dcp_size", "moe_tp_size"), 1)
        get_parallel().override_permanently(
            tp_size=world,
            moe_ep_size=world,
            attn_dp_size=dp,
            attn_tp_size=world // dp,
            shared_experts_tp_size=None,
            **ones,
        )
        parallel_state.initialize_model_parallel(backend="gloo")
    get_flags().dp.enabled = dp > 1
    moe = get_flags().moe
    moe.a2a_backend, moe.runner_backend = MoeA2ABackend("ep_backend"), MoeRunnerBackend.TRITON
    moe.tbo_enabled, moe.sbo_enabled = True, False
    process.get_schedule = lambda: SimpleNamespace(chunked_prefill_size=64, max_running_requests=8)
    process.captures_graphs = process.has_copies_of_experts = lambda: False


def quant_method(config, fp8, deep_gemm=False):
    """Of SGLang's classes, without the weights that their constructors want."""
    method = object.__new__(Fp8MoEMethod if fp8 else UnquantizedFusedMoEMethod)
    if isinstance(method, torch.nn.Module):
        torch.nn.Module.__init__(method)
    runner = MoeRunnerBackend.DEEP_GEMM if deep_gemm else MoeRunnerBackend.TRITON
    method.runner = SimpleNamespace(runner_backend=runner, config=config)
    if fp8:
        method.block_quant = True
        method.quant_config = SimpleNamespace(weight_block_size=[128, 128])
    return method


def make_dispatcher(world, fp8=False, deep_gemm=False, dtype=torch.float32, experts=EXPERTS):
    config = MoeRunnerConfig(
        num_experts=experts,
        num_local_experts=experts // world,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        num_fused_shared_experts=0,
        params_dtype=dtype,
    )
    others = len(inspect.signature(layer.create_moe_dispatcher).parameters) - 1
    dispatcher = layer.create_moe_dispatcher(config, *[None] * others)
    made = SimpleNamespace(quant_method=quant_method(config, fp8, deep_gemm), moe_runner_config=config)
    dispatcher.bind(made)
    return dispatcher, config


def inputs(seed, rows, dtype=torch.float32, experts=EXPERTS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    ids = torch.rand(rows, experts, generator=generator).topk(TOP_K, dim=1).indices.int()
    ids[::4, 0] = -1  # padding has no experts, and neither have some slots
    return x, StandardTopKOutput(torch.rand(rows, TOP_K, generator=generator), ids, None)


def weights(experts=EXPERTS):
    return torch.randn(experts, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5


def dense(x, topk, w):
    out = torch.zeros(x.shape)
    for row in range(len(x)):
        for expert, weight in zip(topk.topk_ids[row].tolist(), topk.topk_weights[row].tolist(), strict=True):
            if expert >= 0:
                out[row] += weight * (x[row].float() @ w[expert])
    return out


def run_experts(got, rank, world, w, config):
    """As SGLang's kernels do: local ids, -1 is skipped, rows without an expert get anything."""
    assert got.format.is_standard()
    rows, local = got.hidden_states, len(w) // world
    values = rows
    if got.hidden_states_pre_quant is not None:
        q, scales = got.hidden_states_pre_quant
        assert q.dtype == torch.float8_e4m3fn
        assert q.is_contiguous()
        assert scales.shape == (len(rows), HIDDEN // 128)
        assert getattr(rows, token_format.QUANTIZED) == (q, scales)
        values = q.float() * scales.repeat_interleave(128, dim=1)
    out = rows if config.inplace else torch.full_like(rows, float("nan"))
    ids, topk_weights = got.topk_output.topk_ids, got.topk_output.topk_weights
    assert int(ids.max() if ids.numel() else -1) < local
    sums = {}
    for row, slot in (ids >= 0).nonzero().tolist():
        mine = w[rank * local + int(ids[row, slot])]
        sums[row] = sums.get(row, 0) + float(topk_weights[row, slot]) * (values[row].float() @ mine)
    for row, total in sums.items():
        out[row] = total.to(out.dtype)
    return StandardCombineInput(out)


def agree(rank, world, dp, counts):
    """Publish the data-parallel ranks' counts; returns the rows of this rank after attention."""
    attention = world // dp
    padded = [-(-count // attention) * attention for count in counts]
    mine = padded[rank // attention]
    dp_attention.set_dp_buffer_len(sum(padded), mine, False, padded)
    return mine // attention


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
