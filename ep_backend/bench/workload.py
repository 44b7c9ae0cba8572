"""What the exchange benchmark moves, what must come out, and how many bytes that costs at least."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from ep_backend import EpConfig, reference
from ep_backend.config import SCALE_BLOCK
from ep_backend.errors import EpConfigError

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,  # combine returns bf16
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of the benchmark, with one dtype and one number of SMs; equal on all ranks."""

    device: str
    ranks: int
    tokens: tuple[int, ...]
    """Tokens per rank, one case each."""
    hidden: int
    experts: int
    topk: int
    dtype: str
    layout: str
    routing: str
    contenders: tuple[str, ...]
    num_sms: int | None
    """SMs that an exchange may use; None: as a communicator chooses."""
    warmup: int
    iters: int
    seed: int
    chunk_scale: float | None = None
    """Size of chunks against the kernels' own choice; None: as a communicator chooses."""

    def config(self, transport: str) -> EpConfig:
        """What the library's communicator is made for. Raises EpConfigError if the shapes do not fit."""
        return EpConfig(
            num_experts=self.experts,
            top_k=self.topk,
            hidden_size=self.hidden,
            max_tokens_per_rank=max(self.tokens),
            payload=self.result_dtype if self.quantizes else DTYPES[self.dtype],
            quantization="fp8_block128" if self.quantizes else None,
            layout=self.layout,
            num_sms=self.num_sms,
            chunk_scale=self.chunk_scale,
            transport=transport,
        )

    def check(self) -> None:
        """Raises EpConfigError if something does not fit together."""
        ranks = self.config("auto").expert_ranks(self.ranks)
        if self.routing == "one_rank" and ranks.count(0) < self.topk:
            raise EpConfigError(
                f"--routing one_rank: rank 0 holds {ranks.count(0)} experts, fewer than --topk {self.topk}"
            )

    @property
    def quantizes(self) -> bool:
        """Whether dispatch turns rows into fp8, in the measured time; else fp8 rows are made beforehand."""
        return self.dtype == "fp8" and self.device == "cuda"

    @property
    def result_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "fp8" else DTYPES[self.dtype]


@dataclass(frozen=True)
class Inputs:
    """One rank's tokens, and what combine must return for them."""

    x: torch.Tensor  # [tokens, hidden]: what dispatch is given
    scales: torch.Tensor | None  # [tokens, hidden / 128] float32, of fp8 x only
    sent: torch.Tensor  # [tokens, hidden]: what travels; x, or x quantised
    sent_scales: torch.Tensor | None
    ids: torch.Tensor  # [tokens, topk] int32
    weights: torch.Tensor  # [tokens, topk] float32
    expected: torch.Tensor  # [tokens, hidden] float32
    tolerance: torch.Tensor  # [tokens, hidden] float32: the most that rounding may change

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    def to(self, device: str) -> Inputs:
        moved = {name: t.to(device) for name, t in vars(self).items() if t is not None}
        return replace(self, **moved)

    def accepts(self, out: torch.Tensor) -> bool:
        """Whether ``out`` is the sum over the experts but for rounding.

        Not bit by bit as `ep_backend.reference` has it: libraries may round at other places.
        """
        return out.shape == self.expected.shape and bool(
            ((out.float() - self.expected).abs() <= self.tolerance).all()
        )


@functools.lru_cache(maxsize=1)
def expert_factors(experts: int, hidden: int, seed: int) -> torch.Tensor:
    """[experts, hidden] float32: expert e multiplies its rows with row e, so no misplaced value survives."""
    return torch.rand(experts, hidden, generator=torch.Generator().manual_seed(seed)) + 0.5


def route(settings: Settings, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[tokens, topk] int32 expert ids, none twice in a token.

    uniform: all experts alike; zipf: the n-th expert with a weight of 1 / n, in a shuffled order that is the
    same on all ranks; one_rank: experts of rank 0 only.
    """
    experts = settings.experts
    chance = torch.ones(experts)
    if settings.routing == "zipf":
        order = torch.randperm(experts, generator=torch.Generator().manual_seed(experts))
        chance[order] = 1.0 / torch.arange(1, experts + 1)
    elif settings.routing == "one_rank":
        ranks = settings.config("auto").expert_ranks(settings.ranks)
        chance = torch.tensor([float(rank == 0) for rank in ranks])
    ids = torch.multinomial(chance.expand(tokens, experts), settings.topk, generator=generator)
    return ids.to(torch.int32)


def generator_of(settings: Settings, rank: int, tokens: int, number: int) -> torch.Generator:
    """A state of its own for each rank, number of tokens and input set; the first use must be `route`."""
    seed = settings.seed * 1_000_003 + rank * 10_007 + tokens * 101 + number
    return torch.Generator().manual_seed(seed)


def make(settings: Settings, rank: int, tokens: int, number: int) -> Inputs:
    """Inputs of one rank; ``number`` tells sets apart, so that old data in a window is not taken for new."""
    generator = generator_of(settings, rank, tokens, number)
    ids = route(settings, tokens, generator)
    weights = torch.rand(tokens, settings.topk, generator=generator)
    weights /= weights.sum(1, keepdim=True)
    exact = torch.randn(tokens, settings.hidden, generator=generator)
    x = exact.to(settings.result_dtype)
    sent, sent_scales = x, None
    if settings.dtype == "fp8":
        sent, sent_scales = reference.quantize_fp8(x if settings.quantizes else exact)
    x, scales = (x, None) if settings.quantizes else (sent, sent_scales)
    plain = dequantize(sent, sent_scales)
    factors = expert_factors(settings.experts, settings.hidden, settings.seed)
    mixed = torch.zeros_like(plain)
    size = torch.zeros_like(plain)
    for k in range(settings.topk):
        term = weights[:, k, None] * factors[ids[:, k].long()] * plain
        mixed += term
        size += term.abs()
    # Rounded once each: the experts' result, the sum that travels, the total on each hop of a ring, the
    # result.
    unit = torch.finfo(settings.result_dtype).eps / 2
    tolerance = size * ((settings.ranks + 3) * unit + (settings.topk + 1) * 2.0**-23)
    inputs = Inputs(x, scales, sent, sent_scales, ids, weights, mixed, tolerance)
    return inputs if settings.device == "cpu" else inputs.to(settings.device)


def dequantize(rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Rows as float32; ``rows`` [..., hidden], ``scales`` [..., hidden / 128] or None."""
    if scales is None:
        return rows.float()
    blocks = rows.float().unflatten(-1, (-1, SCALE_BLOCK))
    return (blocks * scales[..., None]).flatten(-2)


def weighted_sums(
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local_experts: tuple[int, ...],
    settings: Settings,
) -> torch.Tensor:
    """What this rank's experts make of ``rows`` [R, hidden] with local ``ids`` [R, topk] (below 0: not here):
    [R, hidden] of the result's dtype. Rows without a local expert are not read and give zeros."""
    factors = expert_factors(settings.experts, settings.hidden, settings.seed)[list(local_experts)]
    factors = factors.to(rows.device)
    y = torch.zeros(rows.shape[0], settings.hidden, dtype=settings.result_dtype, device=rows.device)
    here = (ids >= 0).any(1).nonzero().flatten()
    for part in here.split(256):  # bounds the memory of [rows, topk, hidden]
        local = ids[part].long()
        share = weights[part].masked_fill(local < 0, 0.0)
        mixed = torch.einsum("rk,rkh->rh", share, factors[local.clamp(min=0)])
        part_scales = None if scales is None else scales[part]
        y[part] = (mixed * dequantize(rows[part], part_scales)).to(y.dtype)
    return y


@dataclass(frozen=True)
class LeastBytes:
    """Bytes that an exchange must move. Ids, weights and flags are left out; so is what caches save.

    With b bytes in a row with its scales and w bytes in a row of the result:

    CPUs: what all ranks together must read and write in the memory that they share. With M tokens of all
    ranks and R pairs of a token and a rank that has one of its experts (its own rank too):

        dispatch  (M + R) b    read every row once, write it to each of its ranks
        combine   (3 R + M) w  read every sum, write it to the token's rank, read it there, write the total

    GPUs: what must cross the link of the busiest GPU in one direction. With L rows that a GPU must send to
    others or receive from them, whichever is more, and the GPU where that is the most:

        dispatch  L b
        combine   L w
    """

    dispatch: int
    combine: int

    @property
    def round_trip(self) -> int:
        return self.dispatch + self.combine


def least_bytes(settings: Settings, tokens_per_rank: int, number: int) -> LeastBytes:
    """For input set ``number`` of all ranks."""
    config, ranks = settings.config("auto"), settings.ranks
    rank_of = torch.tensor(config.expert_ranks(ranks))
    rows = torch.zeros(ranks, ranks, dtype=torch.int64)  # from rank, to rank
    for rank in range(ranks):
        ids = route(settings, tokens_per_rank, generator_of(settings, rank, tokens_per_rank, number))
        goes = torch.zeros(tokens_per_rank, ranks, dtype=torch.bool)
        rows[rank] = goes.scatter_(1, rank_of[ids.long()], True).sum(0)
    row, back = config.row_bytes + config.row_scale_bytes, config.wire_row_bytes
    if settings.device == "cuda":
        away = rows.fill_diagonal_(0)
        most = int(torch.maximum(away.sum(0), away.sum(1)).max())
        return LeastBytes(most * row, most * back)
    tokens, pairs = ranks * tokens_per_rank, int(rows.sum())
    return LeastBytes((tokens + pairs) * row, (3 * pairs + tokens) * back)
