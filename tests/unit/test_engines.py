"""What the adapters of all engines share."""

import logging
import sys
import types

import pytest
import torch

from ep_backend import EpConfig, EpConfigError, env, reference
from ep_backend.engines import formats, patches, start
from ep_backend.engines.start import MAX_TOKENS_PER_RANK


def test_the_token_limit_is_the_library_s():
    common = {"num_experts": 4, "top_k": 2, "hidden_size": 64}
    EpConfig(**common, max_tokens_per_rank=MAX_TOKENS_PER_RANK)
    with pytest.raises(EpConfigError):
        EpConfig(**common, max_tokens_per_rank=MAX_TOKENS_PER_RANK + 1)
    assert start.capacity_refusal(MAX_TOKENS_PER_RANK, "x") is None
    assert start.capacity_refusal(None, "x") is None
    assert start.capacity_refusal(MAX_TOKENS_PER_RANK + 1, "add --y").endswith("16385: add --y.")


@pytest.mark.parametrize(("tokens", "ranks", "each"), [(8, 4, 2), (9, 4, 3), (0, 4, 0), (1, 1, 1)])
def test_tokens_are_spread_evenly(tokens, ranks, each):
    assert start.share(tokens, ranks) == each


@pytest.mark.parametrize(
    ("version", "tested", "silent"),
    [
        ("0.26.9", ("0.26", "0.33"), True),
        ("0.33.1+cpu", ("0.26", "0.33"), True),
        ("0.34.0", ("0.26", "0.33"), False),
        ("0.5.17", ("0.5.17", "0.5.23"), True),
        ("0.5.24", ("0.5.17", "0.5.23"), False),
        ("main", ("0.5.17", "0.5.23"), True),
    ],
)
def test_as_many_numbers_are_compared_as_the_range_has(version, tested, silent):
    assert (start.version_note("E", version, tested) is None) == silent


def test_a_wrong_value_of_a_variable_comes_first(monkeypatch):
    start.raise_first([None, None])
    with pytest.raises(ValueError, match="mine"):
        start.raise_first([None, "mine", "later"])
    monkeypatch.setenv("EP_BACKEND_TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match="EP_BACKEND_TIMEOUT_S='soon'"):
        start.raise_first([None, "mine"])


def test_a_test_s_scale_is_never_silent(monkeypatch):
    said = []
    monkeypatch.delenv("EP_BACKEND_TEST_SCALE_COMBINE", raising=False)
    assert start.scale_for_tests(said.append) == 1
    assert said == []
    monkeypatch.setenv("EP_BACKEND_TEST_SCALE_COMBINE", "0.5")
    assert start.scale_for_tests(said.append) == 0.5
    assert "OUTPUT IS WRONG" in said[0]


def test_the_profile_of_a_cpu_is_applied_in_words(caplog):
    with caplog.at_level(logging.INFO):
        start.apply_profile("cpu", logging.getLogger("engine"))
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def test_dispatch_quantises_where_the_engine_would_do_the_same():
    example = formats.example_rows(torch.bfloat16, 384, torch.device("cpu"))
    assert example.shape == (2, 384)
    rows, scales = reference.quantize_fp8(example)
    assert formats.dispatch_may_quantize([128, 128], example, rows, scales)
    powers = torch.exp2(torch.ceil(torch.log2(scales)))
    for shape, found, with_scales in (
        ([64, 128], rows, scales),
        (None, rows, scales),
        ([128, 128], rows, None),
        ([128, 128], rows, powers),
        ([128, 128], rows, scales.t()),
        ([128, 128], rows, scales.to(torch.bfloat16)),
        ([128, 128], rows.view(torch.uint8), scales),
    ):
        assert not formats.dispatch_may_quantize(shape, example, found, with_scales)
    odd = formats.example_rows(torch.bfloat16, 200, torch.device("cpu"))
    assert not formats.dispatch_may_quantize([128, 128], odd, odd, odd.float())


def test_a_function_is_replaced_under_every_name(monkeypatch):
    def old():
        return 1

    def new():
        return 2

    modules = [types.ModuleType("engine_a"), types.ModuleType("engine_b")]
    modules[0].work, modules[1].alias, modules[1].other = old, old, len
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert patches.replace_everywhere(old, new) == 2
    assert modules[0].work() == modules[1].alias() == 2
    assert modules[1].other is len
    assert patches.replace_everywhere(old, new) == 0


def test_an_empty_variable_is_not_set():
    assert env.is_set("EP_BACKEND_TIMEOUT_S", {"EP_BACKEND_TIMEOUT_S": "5"})
    assert not env.is_set("EP_BACKEND_TIMEOUT_S", {"EP_BACKEND_TIMEOUT_S": " "})
    assert not env.is_set("EP_BACKEND_TIMEOUT_S", {})
    with pytest.raises(EpConfigError):
        env.is_set("EP_BACKEND_TIMEOUTS", {})


def shared_pool(rank, group):
    """One communicator per configuration, made beside a model's default device and dtype."""
    import torch.distributed as dist

    from ep_backend.engines.pool import Communicators

    said = []
    log = logging.getLogger("engine")
    log.setLevel(logging.INFO)
    log.addHandler(logging.NullHandler())
    log.info = lambda text, *args: said.append(text % args)
    pool = Communicators(
        dist.group.WORLD, torch.device("cpu"), captures=False, without_graphs="add --eager", log=log
    )
    config = EpConfig(num_experts=4, top_k=2, hidden_size=64, max_tokens_per_rank=8)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        first = pool.get(config)
        assert torch.empty(1).dtype == torch.bfloat16
        assert torch.empty(1).device.type == "meta"
    torch.set_default_dtype(torch.float32)
    assert pool.get(config) is first
    assert "windows" in said[0]
    assert "at most 8 tokens per rank), deadline of a wait 300 s" in said[0]
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    received, handle = first.dispatch(x, torch.tensor([[0, 3]] * 2), torch.ones(2, 2), tokens_per_rank=2)
    done = first.combine(received.rows, handle)
    pool.engine_is_ready()
    assert said[1].endswith("deadline of a wait is now 30 s")
    pool.check()
    pool.captures = True
    try:
        pool.get(EpConfig(num_experts=4, top_k=1, hidden_size=64, max_tokens_per_rank=8))
    except EpConfigError as error:
        refused = str(error)
    pool.destroy()
    return done.float().tolist(), refused


def test_a_pool_shares_its_communicators():
    from harness import ranks

    for done, refused in ranks(2).run(shared_pool, timeout=60):
        assert done == [[2.0] * 64] * 2
        assert "CUDA graphs cannot capture transport cpu: add --eager. " in refused
