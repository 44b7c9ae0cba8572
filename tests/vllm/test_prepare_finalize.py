"""prepare / experts / finalize in two processes, with real communicators, against a dense sum. No engine."""

import pytest
import torch
import torch.distributed as dist
from harness import fresh_ranks

from ep_backend.bench.engines.vllm import is_cpu_build

pytestmark = pytest.mark.timeout(300)

HIDDEN, INTER = 64, 32
WORLD = 2

CASES = {
    # name: (experts, top_k, tokens per rank, only these experts are chosen, dtype, weight on the input)
    "even": (8, 2, (5, 9), None, torch.float32, False),
    "uneven_experts": (5, 3, (7, 4), None, torch.float32, False),
    "a_rank_receives_nothing": (6, 2, (4, 3), range(0, 3), torch.float32, False),
    "a_rank_has_no_tokens": (6, 2, (0, 6), None, torch.float32, False),
    "one_token": (6, 4, (1, 1), None, torch.float32, False),
    "weight_on_the_input": (4, 1, (6, 2), None, torch.float32, True),
    "bfloat16": (8, 4, (32, 17), None, torch.bfloat16, False),
    "float16": (8, 4, (3, 2), None, torch.float16, False),
}


def make_inputs(case, seed=0):
    """Tokens, ids and weights of every rank and all experts' weights, the same in every process."""
    experts, top_k, tokens, chosen, dtype, _ = case
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    w13 = random(experts, 2 * INTER, HIDDEN, scale=HIDDEN**-0.5)
    w2 = random(experts, HIDDEN, INTER, scale=INTER**-0.5)
    ranks = []
    for count in tokens:
        x = random(count, HIDDEN)
        scores = torch.rand(count, experts, generator=generator)
        if chosen is not None:
            scores[:, [e for e in range(experts) if e not in chosen]] = -1
        weights, ids = scores.topk(top_k, dim=1)
        ranks.append((x, ids.int(), weights.float()))
    return w13, w2, ranks


def expert(x, w13, w2):
    gate, up = (x.double() @ w13.double().T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ w2.double().T


def dense(x, ids, weights, w13, w2, on_input):
    """The layer's output in float64 from all experts at once."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for e, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if on_input:
                out[token] += expert(x[token] * torch.tensor(weight).to(x.dtype), w13[e], w2[e])
            else:
                out[token] += weight * expert(x[token], w13[e], w2[e])
    return out


def vllm_cpu_experts(rows, ids, weights, w13, w2, on_input):
    """vLLM's own CPU kernel, which writes [R, H] weighted and summed."""
    import vllm._custom_ops as ops

    output = torch.empty_like(rows)
    packed = [ops.cpu_prepack_moe_weight(w.contiguous(), "vec") for w in (w13, w2)]
    ops.cpu_fused_moe(output, rows, *packed, None, None, weights, ids, "silu", "vec", on_input)
    return output


def gpu_like_experts(rows, ids, weights, w13, w2, on_input, expert_map):
    """As vLLM's GPU kernels see it: all rows, global ids, and expert_map to find the local ones."""
    output = torch.zeros_like(rows)
    local = expert_map[ids.long()]  # an id out of range fails here
    for row, k in (local >= 0).nonzero().tolist():
        result = expert(rows[row : row + 1], w13[local[row, k]], w2[local[row, k]])[0]
        output[row] += (result if on_input else result * weights[row, k]).to(rows.dtype)
    return output


FORMS = (*(["cpu"] if is_cpu_build() else []), "cuda")
"""What the experts get: what vLLM's CPU kernel can take, or what its GPU kernels take, here without a GPU."""


def all_layers(rank, group):
    """What every case gives on this rank."""
    return {(name, form): one_layer(rank, name, form) for name in CASES for form in FORMS}


def one_layer(rank, name, form):
    from types import SimpleNamespace

    import vllm._custom_ops  # noqa: F401 - the kernels
    from ep_backend_vllm.prepare_finalize import make_prepare_finalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.platforms import current_platform

    from ep_backend import Communicator, EpConfig

    current_platform.import_kernels()
    experts, top_k, _, _, dtype, on_input = case = CASES[name]
    w13, w2, ranks = make_inputs(case)
    x, ids, weights = ranks[rank]
    made = []

    def get_handle(fields):
        made.append(Communicator(dist.group.WORLD, EpConfig(**fields, timeout_s=60)))
        return made[-1]

    manager = SimpleNamespace(
        device=torch.device(form),
        rank=rank,
        world_size=WORLD,
        scheduler_limit=40,
        num_channels=1,
        get_handle=get_handle,
    )
    moe = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(sp_size=1),
        num_experts=experts,
        experts_per_token=top_k,
        hidden_dim=HIDDEN,
        in_dtype=dtype,
        max_num_tokens=8,
    )
    layer = make_prepare_finalize(moe, manager, monolithic=False)
    layer.post_init_setup(SimpleNamespace(quant_config=None, expects_unquantized_inputs=True))
    mine = torch.arange(experts).tensor_split(WORLD)[rank]  # the first experts % WORLD ranks hold one more
    expert_map = torch.full((experts,), -1)
    expert_map[mine] = torch.arange(len(mine))
    output = torch.full_like(x, float("nan"))
    for _ in range(3):  # consecutive layers share the communicator
        rows, scale, meta, row_ids, row_weights = layer.prepare(
            x, weights, ids, experts, None, on_input, None, defer_input_quant=True
        )
        assert scale is None
        assert meta is None
        y = torch.empty_like(rows)
        if form != "cpu":
            y = gpu_like_experts(rows, row_ids, row_weights, w13[mine], w2[mine], on_input, expert_map)
        elif rows.shape[0]:
            y = vllm_cpu_experts(rows, row_ids, row_weights, w13[mine], w2[mine], on_input)
        layer.finalize(output, y, row_weights, row_ids, on_input, TopKWeightAndReduceNoOP())
    made[0].destroy()
    alone = vllm_cpu_experts(x, ids, weights, w13, w2, on_input) if len(x) else x  # in one process
    return output.float().tolist(), alone.float().tolist()


@pytest.fixture(scope="module")
def outputs():
    """All cases in one pair of processes: starting vLLM's kernels takes longer than the cases."""
    with fresh_ranks(WORLD) as group:
        return group.run(all_layers, timeout=200)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_dense_sum(outputs, name, form):
    dtype = CASES[name][4]
    # Rounding of the kernel's intermediate values and of one partial sum per rank, at outputs of order 1.
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    w13, w2, ranks = make_inputs(CASES[name])
    for rank, (x, ids, weights) in enumerate(ranks):
        want = dense(x, ids, weights, w13, w2, CASES[name][5])
        both = outputs[rank][name, form]
        got, alone = (torch.tensor(each, dtype=torch.float64).view(want.shape) for each in both)
        if (name, form) == ("bfloat16", "cpu"):
            want = alone  # on a CPU without AVX-512 vLLM's kernel itself is off by 0.054
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
