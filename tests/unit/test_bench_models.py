"""Of `bench-engine`: model folders of known shapes, and what several measurements say together."""

import io
import json
import random

import pytest
from rich.console import Console

from ep_backend.bench.engines import models, plot, summary
from ep_backend.errors import EpConfigError

SIZES = ("hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_hidden_layers")


def shown(results):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary.table(summary.summarise(results), "title"))
    rows = console.export_text().split("─\n")[-1].splitlines()
    return [row.split() for row in rows if not row.strip().startswith("TPOT ratio")]


def measured(backend, tpots, concurrency=4, tokens_per_s=100.0):
    """One result per round; all times but TPOT are 1 ms."""
    return [
        {"backend": backend, "round": number, "concurrency": concurrency}
        | dict.fromkeys(summary.METRICS, 1.0)
        | {"tpot_median_ms": tpot, "output_tokens_per_s": tokens_per_s}
        for number, tpot in enumerate(tpots)
    ]


@pytest.mark.parametrize(
    ("text", "kind", "sizes"),
    [
        ("qwen3-30b-a3b", "Qwen3MoeConfig", (2048, 128, 8, 768, 48)),
        ("qwen3-30b-a3b,layers=24,fp8", "Qwen3MoeConfig", (2048, 128, 8, 768, 24)),
        ("deepseek-v3,fp8", "Qwen3MoeConfig", (7168, 256, 8, 2048, 61)),
        ("qwen1.5-moe-a2.7b,layers=2", "Qwen2MoeConfig", (2048, 60, 4, 1408, 2)),
    ],
)
def test_transformers_reads_the_config(tmp_path, text, kind, sizes):
    transformers = pytest.importorskip("transformers")
    models.write(models.parse(text), tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == kind
    assert tuple(getattr(config, name) for name in SIZES) == sizes
    assert hasattr(config, "quantization_config") == ("fp8" in text)
    if kind == "Qwen2MoeConfig":
        assert config.shared_expert_intermediate_size == 5632


def test_fp8_is_by_blocks_and_spares_the_routers():
    config = models.config_of(models.parse("qwen1.5-moe-a2.7b,fp8,layers=2"))
    quantisation = config["quantization_config"]
    spared = quantisation.pop("modules_to_not_convert")
    assert quantisation == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    assert spared == ["lm_head"] + [
        f"model.layers.{layer}.mlp.{gate}" for layer in (0, 1) for gate in ("gate", "shared_expert_gate")
    ]
    assert "quantization_config" not in models.config_of(models.parse("qwen1.5-moe-a2.7b"))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_sizes_divide_by_the_blocks_of_fp8(name):
    config = models.config_of(models.parse(f"{name},fp8"))
    for size in ("hidden_size", "moe_intermediate_size", "intermediate_size"):
        assert config[size] % models.FP8_BLOCK == 0


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_text_has_as_many_tokens_as_the_ids_it_was_made_of(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    models.write(models.parse(name), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert tokenizer.vocab_size == len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    plain = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.all_special_ids))
    ids = [plain[0], plain[-1], *random.Random(0).choices(plain, k=5000)]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.encode("The end") == [tokenizer.unk_token_id] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qwen4", "no shape 'qwen4'; there are qwen3-30b-a3b, deepseek-v3, qwen1.5-moe-a2.7b"),
        ("", "no shape ''"),
        ("deepseek-v3,int4", "'int4' is no option; there are layers=N, fp8"),
        ("deepseek-v3,layers=0", "'layers=0' is no option.*N from 1; deepseek-v3 has 61 layers"),
        ("deepseek-v3,layers", "'layers' is no option"),
        ("deepseek-v3,fp8=1", "'fp8=1' is no option"),
        ("deepseek-v3,layers=2,layers=3", "layers is given twice"),
        ("deepseek-v3,", "'' is no option"),
    ],
)
def test_wrong_shapes_are_refused_with_what_there_is(text, said):
    with pytest.raises(EpConfigError, match=said):
        models.parse(text)


def test_the_name_of_deepseek_misleads_nobody():
    (other, note) = (models.ARCHITECTURES[name].note for name in ("qwen3-30b-a3b", "deepseek-v3"))
    assert not other
    assert "no MLA" in note


def test_the_table_has_medians_spreads_and_ratios():
    lines = shown(measured("ep_backend", (10.0, 30.0, 20.0)) + measured("stock", (40.0, 40.0, 90.0)))
    (ours,) = (line for line in lines if line[0] == "ep_backend")
    (stock,) = (line for line in lines if line[0] == "stock")
    assert "20.0" in ours
    assert "10.0-30.0" in ours
    assert ours[-1] == "0.50"
    assert stock[-1] == "1.00"


def test_one_round_has_no_spread_and_one_backend_no_ratio():
    (line,) = (line for line in shown(measured("ep_backend", (10.0,))) if line[0] == "ep_backend")
    assert line[-1] == "100"
    assert "10.0-10.0" not in line
    assert summary.ratios(summary.summarise(measured("ep_backend", (10.0,)))) == []


def test_ratios_are_of_medians_at_the_same_concurrency():
    results = measured("ep_backend", (10.0, 12.0, 99.0)) + measured("base", (24.0, 1.0, 24.0))
    results += measured("ep_backend", (30.0,), 64, tokens_per_s=50.0) + measured("base", (20.0,), 64)
    small, large = summary.ratios(summary.summarise(results))
    assert (small["concurrency"], small["tpot_median_ratio"], small["output_tokens_ratio"]) == (4, 0.5, 1.0)
    # Slower is not hidden.
    assert (large["concurrency"], large["tpot_median_ratio"], large["output_tokens_ratio"]) == (64, 1.5, 0.5)
    assert {ratio["backend"] for ratio in (small, large)} == {"ep_backend"}


@pytest.mark.parametrize(
    ("backends", "baseline"),
    [
        (["deepep", "allgather_reducescatter", "ep_backend"], "allgather_reducescatter"),
        (["ep_backend", "naive", "deepep"], "naive"),
        (["ep_backend"], None),
    ],
)
def test_the_baseline_is_the_engines_own_default_or_the_first_other(backends, baseline):
    assert summary.baseline_of(backends) == baseline


def test_answers_of_one_token_have_no_ratio_of_tpot():
    results = measured("ep_backend", (0.0,)) + measured("base", (0.0,))
    (ratio,) = summary.ratios(summary.summarise(results))
    assert ratio["tpot_median_ratio"] is None
    (line,) = (line for line in shown(results) if line[0] == "ep_backend")
    assert line[-1] == "-"


@pytest.mark.parametrize(("name", "start"), [("bars.png", b"\x89PNG"), ("new/bars.svg", b"<?xml")])
def test_the_picture_is_written(tmp_path, name, start):
    pytest.importorskip("matplotlib")
    results = []
    for concurrency in (4, 64):
        results += measured("ep_backend", (10.0, 11.0, 14.0), concurrency)
        results += measured("allgather_reducescatter", (20.0, 19.0, 21.0), concurrency)
    plot.write(summary.summarise(results), "title", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
