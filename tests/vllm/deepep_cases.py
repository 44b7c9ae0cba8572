"""vLLM's own deepep modes on the stand-in for DeepEP, on two ranks with CPU tensors, against a dense sum. Run
by test_seam.py, once per version of vLLM's sources.

vLLM's managers and its classes for prepare and finalize are the real ones; what quantises on GPUs is
replaced.
"""

import importlib
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from harness import fresh_ranks

HIDDEN = 2048  # the smallest that vLLM takes for low_latency
EXPERTS, TOP_K, MOST = 8, 3, 16
WORLD = 2
LAYERS = "vllm.model_executor.layers.fused_moe"


@pytest.fixture(scope="module")
def ranks():
    """As vLLM's workers: the plug-in first, then its groups."""
    with fresh_ranks(WORLD, {"EP_BACKEND_PROVIDE_DEEP_EP": "1"}) as group:
        group.run(start_vllm, timeout=240)
        yield group


def start_vllm(rank, group):
    import ep_backend_vllm

    ep_backend_vllm.register()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import has_deep_ep

    assert has_deep_ep()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world_size=WORLD, rank=rank, local_rank=rank, distributed_init_method="env://", backend="gloo"
        )
        parallel_state.initialize_model_parallel(WORLD)
    # vLLM imports its classes for DeepEP on GPUs only.
    with patch.object(type(current_platform), "is_cuda_alike", return_value=True):
        importlib.import_module(f"{LAYERS}.all2all_utils")


def inputs(rank, tokens, seed):
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K, dim=1).indices
    return x, ids, torch.rand(tokens, TOP_K, generator=generator)


def experts():
    """What each multiplies rows with, [EXPERTS, HIDDEN]."""
    return torch.rand(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0)) + 0.5


def dense(x, ids, weights):
    return (weights[..., None] * experts()[ids] * x.float()[:, None]).sum(1)


def make_layer(mode, quant_config, routing_tables=None):
    """vLLM's manager for ``mode``, and what it then makes for a layer of experts."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.device_communicators import all2all

    names = {"ht": "DeepEPHTAll2AllManager", "ll": "DeepEPLLAll2AllManager"}
    with set_current_vllm_config(VllmConfig()):
        manager = getattr(all2all, names[mode])(torch.distributed.group.WORLD)
    moe = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(use_all2all_kernels=True, use_passthrough_all2all=False),
        use_deepep_ht_kernels=mode == "ht",
        use_deepep_ll_kernels=mode == "ll",
        dp_size=manager.dp_world_size,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS // WORLD,
        max_num_tokens=MOST,
        hidden_dim=HIDDEN,
    )
    utils = importlib.import_module(f"{LAYERS}.all2all_utils")
    with patch.object(utils, "get_ep_all2all_manager", lambda *_: manager):
        layer = utils.maybe_make_prepare_finalize(moe, quant_config, routing_tables)
    return manager, layer


def make_v2_layer(rank, group):
    """vLLM makes it only where it finds a new NCCL. The buffer, and what prepares and finalizes."""
    import deep_ep

    module = importlib.import_module(f"{LAYERS}.prepare_finalize.deepep_v2")
    buffer = deep_ep.ElasticBuffer(
        group, num_max_tokens_per_rank=MOST, hidden=HIDDEN, num_topk=TOP_K, explicitly_destroy=True
    )
    first = rank * EXPERTS // WORLD
    return buffer, module.DeepEPV2PrepareAndFinalize(buffer, WORLD, 1, first, EXPERTS, TOP_K)


def quant_config(block_fp8):
    from vllm.model_executor.layers.fused_moe import config

    if not block_fp8:
        return config.FUSED_MOE_UNQUANTIZED_CONFIG
    nothing = torch.ones(1)
    return config.fp8_w8a8_moe_quant_config(nothing, nothing, block_shape=[128, 128])


def run_rows(rank, rows, ids, weights):
    """As experts on rows of rank order do: [R, HIDDEN] weighted and added up over this rank's experts."""
    first = rank * EXPERTS // WORLD
    here = (ids >= first) & (ids < first + EXPERTS // WORLD)
    return (torch.where(here, weights, 0.0)[..., None] * experts()[ids] * rows[:, None]).sum(1).bfloat16()


def run_batches(rank, rows, counts):
    """As experts on rows by expert do; what lies behind the counts is never read."""
    mine = experts().view(WORLD, -1, 1, HIDDEN)[rank]
    out = (rows * mine).bfloat16()
    for expert, count in enumerate(counts.tolist()):
        out[expert, count:] = float("nan")
    return out


def values(rows, scales):
    """float32; scales may be exponents, four to an int32."""
    if scales is None:
        return rows.float()
    if scales.dtype == torch.int32:
        exponents = scales.contiguous().view(torch.uint8).int()
        scales = (exponents << 23).view(torch.float32)
    return rows.float() * scales.repeat_interleave(128, dim=-1)


def check(output, x, ids, weights, fp8):
    tolerance = {"rtol": 0.1, "atol": 0.1} if fp8 else {"rtol": 0.02, "atol": 0.03}
    torch.testing.assert_close(output.float(), dense(x, ids, weights), **tolerance)


def run_halves(module, prepare, finish):
    """Two-batch overlap: the second half's exchange is opened before the first one's is over."""
    opened = []
    for half in (0, 1):
        with patch.object(module, "dbo_current_ubatch_id", return_value=half):
            opened.append(prepare(10 + half))
    for half in (0, 1):
        with patch.object(module, "dbo_current_ubatch_id", return_value=half):
            finish(*opened[half])


def high_throughput(rank, group, mode, fp8, tokens):
    """Two layers, then two halves of a batch."""
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    from ep_backend import reference

    config = quant_config(fp8)
    if mode == "ht":
        maker, layer = make_layer(mode, config)
        maker.set_num_sms(16)
        assert maker.get_handle({}) is layer.buffer, "one for all layers"
    else:
        maker, layer = make_v2_layer(rank, group)
    module = importlib.import_module(f"{LAYERS}.prepare_finalize.deepep_{mode}")

    def prepare(seed):
        x, ids, weights = inputs(rank, tokens[rank], seed)
        with patch.object(module, "moe_kernel_quantize_input", lambda x, *_, **__: reference.quantize_fp8(x)):
            receive = layer.prepare_async(x, weights, ids, EXPERTS, None, False, config, not fp8)
        return (x, ids, weights), receive

    def finish(given, receive):
        rows, scales, meta, row_ids, row_weights = receive()
        assert rows.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
        first = rank * EXPERTS // WORLD
        counts = torch.bincount(row_ids.flatten(), minlength=EXPERTS)[first : first + EXPERTS // WORLD]
        assert meta.expert_num_tokens.tolist() == meta.expert_num_tokens_cpu.tolist() == counts.tolist()
        y = run_rows(rank, values(rows, scales), row_ids, row_weights)
        output = torch.full_like(given[0], float("nan"))
        done = layer.finalize_async(output, y, row_weights, row_ids, False, TopKWeightAndReduceNoOP())
        done()
        check(output, *given, fp8)

    for seed in range(2):
        finish(*prepare(seed))
    run_halves(module, prepare, finish)
    maker.destroy()


def low_latency(rank, group, fp8, tokens, exponents, physical):
    """As `high_throughput`; halves of a batch have their hooks open."""
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

    config = quant_config(fp8)
    # With redundant experts (EPLB) the router's ids are not those of the exchange.
    table = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1)) if physical else None
    manager, layer = make_layer("ll", config, None if table is None else (table, table.argsort(), table))
    layer.post_init_setup(SimpleNamespace(supports_packed_ue8m0_act_scales=lambda: exponents))
    module = importlib.import_module(f"{LAYERS}.prepare_finalize.deepep_ll")

    def prepare(seed):
        x, ids, weights = inputs(rank, tokens[rank], seed)
        hook, receive = layer.prepare_async(x, weights, ids, EXPERTS, None, False, config)
        return (x, ids if table is None else table[ids], weights), ids, hook, receive

    def finish(given, ids, hook, receive):
        hook()
        rows, scales, meta, none_ids, none_weights = receive()
        assert (none_ids, none_weights, meta.expert_num_tokens_cpu) == (None, None, None)
        assert rows.shape == (EXPERTS // WORLD, WORLD * MOST, HIDDEN)
        assert rows.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
        if fp8:
            assert scales.dtype == (torch.int32 if exponents else torch.float32)
        y = run_batches(rank, values(rows, scales), meta.expert_num_tokens)
        output = torch.full_like(given[0], float("nan"))
        arguments = (output, y, given[2], ids, False, TopKWeightAndReduceDelegate())
        hook, receive = layer.finalize_async(*arguments)
        hook()
        receive()
        check(output, *given, fp8)
        again = torch.full_like(output, float("nan"))
        layer.finalize(again, *arguments[1:])
        assert torch.equal(again, output)

    for seed in range(2):
        finish(*prepare(seed))
    run_halves(module, prepare, finish)
    manager.destroy()


@pytest.mark.parametrize("tokens", [(9, 5), (0, 16), (0, 0)])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("mode", ["ht", "v2"])
def test_high_throughput(ranks, mode, fp8, tokens):
    ranks.run(high_throughput, mode, fp8, tokens)


@pytest.mark.parametrize(
    ("fp8", "exponents", "physical", "tokens"),
    [
        (False, False, False, (9, 5)),
        (False, False, True, (0, 16)),
        (True, False, False, (3, 16)),
        (True, True, False, (7, 1)),
        (True, True, True, (0, 0)),
    ],
)
def test_low_latency(ranks, fp8, exponents, physical, tokens):
    ranks.run(low_latency, fp8, tokens, exponents, physical)
