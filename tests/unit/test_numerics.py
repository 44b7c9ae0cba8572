"""Number formats and sums of the compiled code, against torch's own conversions and against libm."""

import ctypes

import pytest
import torch
from harness import ranks

import ep_backend as ep
from ep_backend import reference

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def same_values(got, want):
    """The same bits, but any NaN for a NaN: which bits a NaN has is not promised."""
    assert got.dtype == want.dtype
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    zero = torch.zeros((), dtype=got.dtype)
    a, b = (torch.where(nan, zero, t) for t in (got, want)) if nan.any() else (got, want)
    assert reference.same_bits(a, b), f"{(a != b).sum()} of {a.numel()} differ"


def all_bits_16(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def random_bits_32(count, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=g).to(torch.int32).view(torch.float32)


# ---- fp8 ----


def dispatch_job(rank, group, rows, **config):
    """What one rank receives of its own rows."""
    settings = ep.EpConfig(
        num_experts=1,
        top_k=1,
        hidden_size=rows.shape[1],
        max_tokens_per_rank=max(1, len(rows)),
        payload=rows.dtype,
        layout="compact",
        **config,
    )
    with ep.Communicator(group, settings) as c:
        zeros = torch.zeros(len(rows), 1, dtype=torch.int32)
        received, _ = c.dispatch(rows, zeros, torch.ones(len(rows), 1))
        return received.rows, received.scales


def quantise_job(rank, group, rows):
    return dispatch_job(rank, group, rows, quantization="fp8_block128")


def quantised(rows):
    return ranks(1).run(quantise_job, rows)[0]


def with_scale_one(values):
    """Blocks of 127 values of at most 448 and one 448: their scale is 448 / 448 = 1."""
    values = torch.cat([values, values.new_zeros(-len(values) % 127)]).reshape(-1, 127)
    return torch.cat([values, values.new_full((len(values), 1), 448.0)], 1)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_fp8_of_all_16_bit_numbers(name):
    values = all_bits_16(FLOATS[name])
    values = values[~(values.abs() > 448)]  # NaN stays in
    rows = with_scale_one(values)
    q, scales = quantised(rows)
    assert torch.equal(scales, torch.ones_like(scales))
    same_values(q, rows.float().to(torch.float8_e4m3fn))


def test_fp8_of_float32_around_every_tie():
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448, rising
    ties = (codes[1:] + codes[:-1]) / 2
    edges = torch.cat([codes, ties]).view(torch.int32)
    values = torch.cat([edges + d for d in (-2, -1, 0, 1, 2)]).view(torch.float32)
    g = torch.Generator().manual_seed(2)
    values = torch.cat([values, torch.rand(500_000, generator=g) * 448])
    values = torch.cat(
        [values, torch.rand(500_000, generator=g) * 2.0 ** torch.randint(-14, 8, (500_000,), generator=g)]
    )
    values = values[(values <= 448)]
    rows = with_scale_one(torch.cat([values, -values]))
    q, scales = quantised(rows)
    assert torch.equal(scales, torch.ones_like(scales))
    same_values(q, rows.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("name", FLOATS)
def test_fp8_scales(name):
    """Any magnitude of blocks; scale and quotient as the formula says, computed by torch."""
    g = torch.Generator().manual_seed(3)
    magnitude = 2.0 ** torch.randint(-40, 16, (4000, 2, 1), generator=g)
    blocks = (torch.randn(4000, 2, 128, generator=g) * magnitude).to(FLOATS[name]).float()
    blocks[:50] = 0.0
    rows = blocks.flatten(1).to(FLOATS[name])
    q, scales = quantised(rows)
    amax = rows.float().abs().reshape(4000, 2, 128).max(-1).values
    amax = torch.where(amax > 1e-10, amax, torch.tensor(1e-10))
    same_values(scales, amax / torch.tensor(448.0))
    quotient = (rows.float().reshape(4000, 2, 128) / scales[..., None]).clamp(-448, 448)
    same_values(q, quotient.flatten(1).to(torch.float8_e4m3fn))
    assert torch.equal(q[:50].float(), torch.zeros(50, 256))


def test_fp8_of_nan_and_infinity():
    """NaN stays NaN and does not count for the scale; an infinity makes its block's scale infinite."""
    rows = torch.ones(4, 256)
    rows[0, 5], rows[1, 3], rows[2, 200] = torch.nan, torch.inf, -torch.inf
    rows[3, :128] = torch.nan
    q, scales = quantised(rows)
    one = torch.tensor(1.0) / 448
    assert q.float()[0].isnan().nonzero().flatten().tolist() == [5]
    assert torch.equal(scales[0], one.repeat(2))
    assert scales[1].tolist() == [torch.inf, one.item()]
    assert q.float()[1].isnan().nonzero().flatten().tolist() == [3]
    assert not q.float()[1, :3].any()
    assert torch.equal(q.float()[1, 128:], torch.full((128,), 448.0))
    assert scales[2].tolist() == [one.item(), torch.inf]
    assert q.float()[3, :128].isnan().all()
    assert scales[3, 0] == torch.tensor(1e-10) / torch.tensor(448.0)
    same_values(q, reference.quantize_fp8(rows)[0])
    same_values(scales, reference.quantize_fp8(rows)[1])


# ---- rounding on the way back ----


def combine_job(rank, group, y, wire, out):
    settings = ep.EpConfig(
        num_experts=1,
        top_k=1,
        hidden_size=y.shape[1],
        max_tokens_per_rank=len(y),
        payload=torch.float32,
        wire_dtype=wire,
        out_dtype=out,
    )
    with ep.Communicator(group, settings) as c:
        zeros = torch.zeros(len(y), 1, dtype=torch.int32)
        _, handle = c.dispatch(torch.zeros(y.shape), zeros, torch.ones(len(y), 1))
        return c.combine(y, handle)


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("wire", FLOATS)
def test_roundings(wire, out):
    """float32 of any bits: once to the wire, added to 0, once to the result; ties included."""
    every = all_bits_16(FLOATS[wire]).float()
    values = torch.cat(
        [random_bits_32(200_000, 5), every, (every.view(torch.int32) | 0x8000).view(torch.float32)]
    )
    halves = all_bits_16(torch.float16).float().view(torch.int32)
    values = torch.cat([values, *((halves + d).view(torch.float32) for d in (0xFFF, 0x1000, 0x1001))])
    y = values[: len(values) // 64 * 64].reshape(-1, 64)
    got = ranks(1).run(combine_job, y, FLOATS[wire], FLOATS[out])[0]
    same_values(got, (torch.zeros(()) + y.to(FLOATS[wire]).float()).to(FLOATS[out]))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_all_16_bit_numbers_come_back(name):
    y = all_bits_16(FLOATS[name]).reshape(-1, 64)
    got = ranks(1).run(combine_job, y, FLOATS[name], FLOATS[name])[0]
    same_values(got, (torch.zeros(()) + y.float()).to(FLOATS[name]))


# ---- sums ----


def sums_job(rank, group, ids, weights, y):
    """Expert-major: expert e of this one rank answers y[e] for every token."""
    settings = ep.EpConfig(
        num_experts=len(y),
        top_k=ids.shape[1],
        hidden_size=y.shape[1],
        max_tokens_per_rank=len(ids),
        payload=torch.float32,
        layout="expert_major",
    )
    with ep.Communicator(group, settings) as c:
        _, handle = c.dispatch(torch.zeros(len(ids), y.shape[1]), ids, weights)
        return c.combine(y[:, None, :].expand(-1, len(ids), -1), handle)


def hard_products(count, seed):
    """a * b that lies in the middle of two float32 numbers, and a small c that says which one is nearer."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(2**11, 2**12, (count,), generator=g) * 2 + 1  # 13 bits, odd
    b = torch.randint(2**11, 2**12, (count,), generator=g) * 2 + 1
    signs = torch.randint(0, 2, (count,), generator=g) * 2.0 - 1
    return a.float(), b.float(), signs * 2.0**-40


def libm_fma(a, b, c):
    function = ctypes.CDLL("libm.so.6").fmaf
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return torch.tensor(
        [function(*values) for values in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    )


def test_reference_fma_is_libms():
    for a, b, c in (
        hard_products(20_000, 1),
        (random_bits_32(20_000, 2), random_bits_32(20_000, 3), random_bits_32(20_000, 4)),
    ):
        same_values(reference.fma(a, b, c), libm_fma(a, b, c))


def test_hard_products_are_hard():
    """Both ways of doing without fma are wrong for some of them, so the test below can tell."""
    a, b, c = hard_products(20_000, 1)
    right = libm_fma(a, b, c)
    assert (a * b + c != right).any()
    assert ((a.double() * b.double() + c.double()).float() != right).any()


def test_sums_are_fused_and_in_order_of_k():
    """out = fma(w1, y1, fma(w0, y0, 0)): the first product is small, the second one needs the fma."""
    a, b, c = hard_products(64 * 16, 7)
    a = a[:64]  # one weight per token
    b, c = b[:16], c[:16]
    ids = torch.tensor([[0, 1]]).repeat(64, 1)
    weights = torch.stack([torch.ones(64), a], 1)
    y = torch.stack([c, b])
    got = ranks(1).run(sums_job, ids, weights, y)[0]
    want = torch.stack([libm_fma(a[t].repeat(16), b, c) for t in range(64)])
    same_values(got, want)
    back_to_front = ranks(1).run(sums_job, ids.flip(1), weights.flip(1), y)[0]
    assert not torch.equal(got, back_to_front)  # so the order is that of k, not that of experts
    want = torch.stack([libm_fma(torch.ones(16), c, a[t] * b) for t in range(64)])
    same_values(back_to_front, want)


def rank_order_job(rank, group, values, transport):
    """Rank r answers values[r]; k asks for the ranks in another order."""
    world = len(values)
    settings = ep.EpConfig(
        num_experts=world,
        top_k=world,
        hidden_size=8,
        max_tokens_per_rank=2,
        payload=torch.float32,
        transport=transport,
    )
    with ep.Communicator(group, settings) as c:
        ids = torch.arange(world).flip(0).repeat(2, 1)
        received, handle = c.dispatch(torch.zeros(2, 8), ids, torch.ones(2, world))
        return c.combine(torch.full((len(received.rows), 8), values[rank]), handle)


@pytest.mark.parametrize("transport", ["cpu", "collective"])
def test_total_is_in_order_of_rank(transport):
    values = [1.0, 1e8, -1e8]  # (1 + 1e8) - 1e8 = 0; from behind it would be 1
    for out in ranks(3).run(rank_order_job, values, transport):
        assert torch.equal(out, torch.zeros(2, 8))
    for out in ranks(3).run(rank_order_job, values[::-1], transport):
        assert torch.equal(out, torch.ones(2, 8))


def special_job(rank, group, transport):
    """Token 0 meets NaN, token 1 both infinities, token 2 no expert at all; token 3 a number."""
    settings = ep.EpConfig(
        num_experts=2,
        top_k=2,
        hidden_size=8,
        max_tokens_per_rank=4,
        payload=torch.float32,
        transport=transport,
    )
    with ep.Communicator(group, settings) as c:
        ids = torch.tensor([[0, 1], [0, 1], [-1, -1], [1, -1]])
        _, handle = c.dispatch(torch.full((4, 8), torch.nan), ids, torch.full((4, 2), torch.nan))
        y = torch.ones(2, 4, 8)
        y[:, 0], y[:, 1] = torch.nan, torch.inf if rank else -torch.inf
        y[:, 2] = torch.nan  # nobody may read it
        return c.combine(y.flatten(0, 1), handle, out=torch.full((4, 8), 7.0))


@pytest.mark.parametrize("transport", ["cpu", "collective"])
def test_nan_infinity_and_tokens_without_experts(transport):
    for out in ranks(2).run(special_job, transport):
        assert out[:2].isnan().all()
        assert reference.same_bits(out[2], torch.zeros(8))
        assert torch.equal(out[3], torch.ones(8))
