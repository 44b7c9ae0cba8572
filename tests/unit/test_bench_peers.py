"""``ep-backend bench --peers`` on CPUs: all_to_all_single, and FlashInfer behind a library made here."""

import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import RanksError, ranks

from ep_backend.bench import contenders, flashinfer, workload
from ep_backend.errors import EpConfigError


def settings(**more):
    usual = {
        "device": "cpu",
        "ranks": 2,
        "tokens": (7, 3),
        "hidden": 256,
        "experts": 8,
        "topk": 4,
        "dtype": "bf16",
        "layout": "rank_major",
        "routing": "uniform",
        "contenders": ("flashinfer",),
        "num_sms": None,
        "warmup": 0,
        "iters": 1,
        "seed": 0,
    }
    return workload.Settings(**{**usual, **more})


class MoeAlltoAll:
    """What FlashInfer's does, with rows in another order each time and old values where no row came."""

    def __init__(self, mapping, max_num_tokens, top_k, num_experts, hidden_size, mnnvl_config):
        self.ranks, self.rank = mapping.ranks, mapping.rank
        self.of_rank, self.workspace_size_per_rank = num_experts // mapping.ranks, 1000
        self.chance = random.Random(mapping.rank)

    def dispatch(self, ids, payloads, most, invalid_token_expert_id, expert_id_payload_index):
        everybody = [None] * self.ranks
        dist.all_gather_object(everybody, (ids, payloads))
        self.places = []  # for each source the tokens that came, in order of slot
        received = [part.new_full((self.ranks, most, *part.shape[1:]), 3) for part in payloads]
        received[expert_id_payload_index][:] = invalid_token_expert_id
        for source, (theirs, parts) in enumerate(everybody):
            came = (theirs // self.of_rank == self.rank).any(1).nonzero().flatten().tolist()
            self.chance.shuffle(came)
            self.places.append(came)
            for into, part in zip(received, parts, strict=True):
                into[source, : len(came)] = part[came]
        self.tokens = len(ids)
        return received

    def combine(self, payload, most, output=None):
        back = [None] * self.ranks
        dist.all_gather_object(back, [(came, payload[s]) for s, came in enumerate(self.places)])
        total = torch.zeros(self.tokens, payload.shape[-1])
        for of_rank in back:
            came, rows = of_rank[self.rank]
            total[came] += rows[: len(came)].float()
        total = total.to(payload.dtype)
        return total if output is None else output.copy_(total)


class OlderMoeAlltoAll(MoeAlltoAll):
    def combine(self, payload, most):
        return super().combine(payload, most)


class Wrong(MoeAlltoAll):
    def combine(self, payload, most, output=None):
        return super().combine(payload, most, output).mul_(2)


def install(kind):
    """As if the package were there."""
    package, comm, mnnvl = (ModuleType(f"flashinfer{name}") for name in ("", ".comm", ".comm.mnnvl"))
    package.__version__ = "0.7"
    comm.MoeAlltoAll = kind
    comm.Mapping = lambda ranks, rank, gpus, tp_size, moe_ep_size: SimpleNamespace(ranks=ranks, rank=rank)
    mnnvl.TorchDistBackend = SimpleNamespace
    mnnvl.MnnvlConfig = SimpleNamespace
    sys.modules |= {module.__name__: module for module in (package, comm, mnnvl)}


def timed(contender, chosen, rank, tokens):
    """Prepares ``contender``, exchanges as a bench does, and returns whether the experts' results and the
    timed ones are right and a changed one is noticed; and the last one."""
    contender.prepare([workload.make(chosen, rank, tokens, number) for number in range(2)])
    right = [contender.verify()]
    for number in (0, 1, 0):
        out = torch.full((tokens, chosen.hidden), torch.nan, dtype=chosen.result_dtype)
        contender.dispatch(number)
        contender.combine(out)
        right.append(contender.accepts(number, out))
        out[-1, -1] += 1
        right.append(not contender.accepts(number, out))
    return right, out


def exchange_job(rank, group, kind, chosen):
    install(globals()[kind])
    contender = flashinfer.FlashInfer(chosen)
    right = []
    for tokens in chosen.tokens:
        right += timed(contender, chosen, rank, tokens)[0]
    return right, contender.details()


@pytest.mark.parametrize("kind", ["MoeAlltoAll", "OlderMoeAlltoAll"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_flashinfer_exchanges_and_is_checked(kind, dtype):
    for right, details in ranks(2).run(exchange_job, kind, settings(dtype=dtype)):
        assert right == [True] * 14
        assert details == {"flashinfer": "0.7", "window_bytes": 1000}


def test_wrong_sums_of_flashinfer_are_noticed():
    for right, _ in ranks(2).run(exchange_job, "Wrong", settings()):
        assert right[0] is False
        assert right[1] is False


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dtype": "fp32"}, "float32 rows"),
        ({"topk": 3}, "top-3"),
        ({"experts": 9}, "9 experts on 2 ranks"),
        ({"ranks": 72, "experts": 144}, "72 ranks"),
    ],
)
def test_what_flashinfer_cannot_exchange(more, words):
    with pytest.raises(EpConfigError, match=words):
        flashinfer.check(settings(**more))


def all_to_all_job(rank, group, chosen):
    """As `timed`, whether a sum that is left out is noticed, and how many rows came."""
    contender = contenders.start("gloo_all_to_all", chosen)
    right, came = [], []
    for tokens in chosen.tokens:
        answers, out = timed(contender, chosen, rank, tokens)
        right += answers
        came.append(len(contender.received()[0]))
        contender.results[0][:1] = 0
        contender.combine(out)
        wrong = torch.tensor(not contender.accepts(0, out))
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        right.append(bool(wrong))
    return right, came


@pytest.mark.parametrize(
    "more", [{}, {"dtype": "fp8"}, {"routing": "one_rank", "experts": 13}], ids=["bf16", "fp8", "one rank"]
)
def test_all_to_all_exchanges_and_is_checked(more):
    chosen = settings(ranks=3, tokens=(1, 40), **more)
    answers = ranks(3).run(all_to_all_job, chosen)
    for right, _ in answers:
        assert right == [True] * 16
    of_ranks = [came for _, came in answers]
    if more.get("routing"):
        assert of_ranks == [[3, 120], [0, 0], [0, 0]]
    else:
        assert all(0 < large < 120 for _, large in of_ranks), "a token goes only where it has an expert"


def absent_job(rank, group):
    sys.modules |= {"flashinfer": None}  # as if it were not there
    flashinfer.FlashInfer(settings())


def test_flashinfer_that_is_not_installed_is_said_on_all_ranks():
    with pytest.raises(RanksError) as caught:
        ranks(2).run(absent_job)
    for outcome in caught.value.outcomes:
        assert "pip install flashinfer-python" in outcome.error


def test_sums_that_are_sent_back_are_exact_in_any_order():
    rows = torch.stack([flashinfer.row_of(rank, 64) for rank in range(flashinfer.MAX_RANKS)])
    assert rows.abs().max() * max(flashinfer.TOP_KS) <= 256
    assert len({tuple(row.tolist()) for row in rows[:8]}) == 8
