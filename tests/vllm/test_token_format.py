"""What travels for experts of each number format. vLLM's own quantisation kernels need GPUs, some of them
Blackwell: simple ones of the same shapes and dtypes stand in for them here."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ep_backend_vllm import token_format
from harness import fresh_ranks

HIDDEN = 256
FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def quant_config(**fields):
    usual = {
        "quant_dtype": FP8,
        "per_act_token_quant": False,
        "block_shape": None,
        "a1_scale": None,
        "a1_gscale": None,
        "is_scale_swizzled": False,
    }
    return SimpleNamespace(**{**usual, **fields})


CONFIGS = {
    "per-token fp8": quant_config(per_act_token_quant=True),
    "static per-tensor fp8": quant_config(a1_scale=torch.tensor([0.5])),
    "block fp8": quant_config(block_shape=[128, 128]),
    "block fp8, packed scales": quant_config(block_shape=[128, 128], a1_gscale="packed"),
    "block fp8, scales rounded": quant_config(block_shape=[128, 128], a1_gscale="rounded"),
    "nvfp4": quant_config(quant_dtype="nvfp4", a1_gscale=torch.tensor([2.0]), is_scale_swizzled=True),
    "mxfp8": quant_config(quant_dtype="mxfp8", block_shape=[1, 32]),
}


def stand_in(a, scale, *, quant_dtype, per_act_token_quant, block_shape, is_scale_swizzled):
    """Rows and scales in the shapes and dtypes of vLLM's moe_kernel_quantize_input."""
    assert not is_scale_swizzled, "swizzling mixes rows, so it has to wait until they have arrived"
    if quant_dtype == "nvfp4":
        assert scale is not None
        amax = a.float().unflatten(1, (-1, 16)).abs().amax(2)
        return (a[:, ::2].float() * 10).to(torch.int8).view(torch.uint8), amax.to(FP8)
    if quant_dtype == "mxfp8":
        return a.to(FP8), a.unflatten(1, (-1, 32)).abs().amax(2).float().log2().to(torch.int8).view(
            torch.uint8
        )
    if per_act_token_quant:
        return a.to(FP8), a.abs().amax(1, keepdim=True).float()
    if block_shape is None:
        return a.to(FP8), torch.ones(1) if scale is None else scale
    return a.to(FP8), a.unflatten(1, (-1, 128)).abs().amax(2).float() / 448


def rounded(a, scale, **kwargs):
    """As vLLM does for DeepGEMM: powers of two, still float32."""
    rows, scales = stand_in(a, None, **kwargs)
    return rows, scales.log2().ceil().exp2()


def packed(a, scale, **kwargs):
    """As on Blackwell: four scales in an int32."""
    rows, scales = stand_in(a, None, **kwargs)
    return rows, (scales * 448).to(torch.int32)


QUANTISERS = {"packed": packed, "rounded": rounded}


def quantiser(config):
    return QUANTISERS.get(config.a1_gscale, stand_in) if isinstance(config.a1_gscale, str) else stand_in


def chosen(monkeypatch, config, deferred=False):
    if config is not None:
        monkeypatch.setattr(token_format, "moe_kernel_quantize_input", quantiser(config))
    return token_format.choose_format(config, deferred, torch.bfloat16, HIDDEN, CPU)


@pytest.mark.parametrize("config", [None, quant_config(quant_dtype=None), CONFIGS["per-token fp8"]])
def test_experts_that_are_not_quantised_or_do_it_themselves_get_plain_rows(monkeypatch, config):
    found = chosen(monkeypatch, config, deferred=config is CONFIGS["per-token fp8"])
    assert found.fields == {"payload": torch.bfloat16}


def test_dispatch_quantises_fp8_blocks(monkeypatch):
    found = chosen(monkeypatch, CONFIGS["block fp8"])
    assert found.fields == {"payload": torch.bfloat16, "quantization": "fp8_block128"}
    x = torch.ones(3, HIDDEN)
    assert found.encode(x) == (x, None)


@pytest.mark.parametrize(
    ("name", "payload_bytes", "scale_bytes"),
    [
        ("per-token fp8", HIDDEN, 4),
        ("static per-tensor fp8", HIDDEN, 0),
        ("block fp8, packed scales", HIDDEN, 8),
        ("block fp8, scales rounded", HIDDEN, 8),
        ("nvfp4", HIDDEN // 2, HIDDEN // 16),
        ("mxfp8", HIDDEN, HIDDEN // 32),
    ],
)
def test_other_formats_travel_byte_for_byte(monkeypatch, name, payload_bytes, scale_bytes):
    found = chosen(monkeypatch, CONFIGS[name])
    assert found.fields == {
        "payload": torch.uint8,
        "payload_bytes": payload_bytes,
        "scale_bytes": scale_bytes,
        "out_dtype": torch.bfloat16,
    }
    assert found.ran_in_an_engine == name.startswith("block fp8")
    for count in (0, 1, 5):
        x, scales = found.encode(torch.randn(count, HIDDEN).bfloat16())
        assert x.shape == (count, payload_bytes)
        assert (0 if scales is None else scales.shape[1]) == scale_bytes


def test_one_dynamic_scale_for_all_rows_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="one dynamic scale per tensor"):
        chosen(monkeypatch, quant_config())


def experts_get(rank, group, name):
    """As bytes: rows and scales as the experts get them; which rows have an expert here; the layer's output
    if every expert returns ones. The CPU transport plays the GPUs' part."""
    from ep_backend_vllm import prepare_finalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.utils import flashinfer

    from ep_backend import Communicator, EpConfig

    config = CONFIGS[name]
    token_format.moe_kernel_quantize_input = quantiser(config)
    flashinfer.nvfp4_block_scale_interleave = lambda scales: scales.flip(1)
    on_cpu = token_format.choose_format(config, False, torch.bfloat16, HIDDEN, CPU)
    prepare_finalize.choose_format = lambda *args: on_cpu
    made = []

    def get_handle(fields):
        made.append(Communicator(dist.group.WORLD, EpConfig(**fields, timeout_s=60)))
        return made[-1]

    manager = SimpleNamespace(
        device=torch.device("cuda"),
        rank=rank,
        world_size=2,
        scheduler_limit=8,
        num_channels=1,
        get_handle=get_handle,
    )
    moe = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(sp_size=1),
        num_experts=4,
        experts_per_token=2,
        hidden_dim=HIDDEN,
        in_dtype=torch.bfloat16,
        max_num_tokens=8,
    )
    layer = prepare_finalize.make_prepare_finalize(moe, manager, monolithic=False)
    layer.post_init_setup(SimpleNamespace(quant_config=config, expects_unquantized_inputs=False))
    x, ids, weights = inputs(rank)
    rows, scales, meta, row_ids, _ = layer.prepare(x, weights, ids, 4, None, False, config)
    assert meta is None
    mine = (row_ids // 2 == rank).any(1)
    got = rows.view(torch.uint8).clone(), scales.view(torch.uint8).clone()
    output = torch.zeros_like(x)
    ones = torch.ones(len(rows), HIDDEN).bfloat16()
    layer.finalize(output, ones, None, row_ids, False, TopKWeightAndReduceNoOP())
    made[0].destroy()
    return *got, mine, output


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3 + rank, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(len(x), 4, generator=generator).topk(2, dim=1).indices.int()
    return x, ids, torch.ones(len(x), 2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", ["per-token fp8", "block fp8, packed scales", "block fp8, scales rounded", "nvfp4", "mxfp8"]
)
def test_experts_get_what_the_senders_quantised(name):
    with fresh_ranks(2) as group:
        answers = group.run(experts_get, name, timeout=200)
    config = CONFIGS[name]
    quantise = quantiser(config)
    for rank, (rows, scales, mine, output) in enumerate(answers):
        assert mine.any()
        slots = len(mine) // 2
        for source in range(2):
            x, ids, _ = inputs(source)
            want_rows, want_scales = quantise(
                x,
                config.a1_gscale if config.quant_dtype == "nvfp4" else None,
                quant_dtype=config.quant_dtype,
                per_act_token_quant=config.per_act_token_quant,
                block_shape=config.block_shape,
                is_scale_swizzled=False,
            )
            if name == "nvfp4":
                want_scales = want_scales.view(torch.uint8).flip(1)
            local = (ids // 2 == rank).any(1)
            here = slice(source * slots, source * slots + len(x))
            assert torch.equal(mine[here], local)
            assert torch.equal(rows[here][local], want_rows.view(torch.uint8)[local])
            assert torch.equal(scales[here][local], want_scales.view(torch.uint8)[local])
        _, ids, _ = inputs(rank)
        ranks_of_token = torch.stack([(ids // 2 == r).any(1) for r in range(2)]).sum(0)
        assert torch.equal(output, ranks_of_token[:, None].expand_as(output).bfloat16())
