"""Forked ranks with SGLang's groups, our dispatcher on each, and what its answer is compared with: for the
cases that exchange rows.

Ranks are forked from a process that has imported SGLang, which takes seconds.
"""

import inspect
import multiprocessing
import socket
import traceback
from types import SimpleNamespace

import plug_in
import sglang.srt.managers.scheduler  # noqa: F401 - what a serving process has imported
import torch
import torch.distributed as dist
from ep_backend_sglang import process, token_format
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
