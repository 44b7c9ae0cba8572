"""docs/workstations.md: the sample is what the command prints, tables are the profile's and the planner's."""

import json
import re
from pathlib import Path

import pytest
from measurements import RESULTS
from plans import BATCHES, PROFILES, seconds

from ep_backend import cli
from ep_backend.planning import memory, model

PAGE = (Path(__file__).parents[2] / "docs" / "workstations.md").read_text()
SAMPLES = re.findall(r"`ep-backend (plan [^`]+)`:\n\n```\n(.*?)```", PAGE, flags=re.DOTALL)
# https://huggingface.co/Qwen/Qwen3-235B-A22B/blob/main/config.json
QWEN3_235B = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "vocab_size": 151936,
}
MODELS = {
    "Qwen3-30B-A3B, bf16": (model.read("qwen3-30b-a3b"), "bf16"),
    "Qwen3-235B-A22B, fp8": (model.of_config("Qwen3-235B-A22B", QWEN3_235B, "config.json"), "fp8"),
}
SHOWN = (1, 8, 64, 512)


def where(ratios, holds):
    """The batches at which ``holds``, which must follow each other."""
    found = [tokens for tokens in BATCHES if holds(ratios[tokens])]
    if not found:
        return "nowhere"
    assert found == [tokens for tokens in BATCHES if found[0] <= tokens <= found[-1]]
    if found == BATCHES:
        return "everywhere"
    return f"from {found[0]} on" if found[-1] == BATCHES[-1] else f"{found[0]} to {found[-1]}"


def table():
    """How many times as long as EP over host TP and TP x PP take, and where EP wins and loses."""
    for name, (of, dtype) in MODELS.items():
        ways = [(2, "TP 2"), (4, "TP 4"), (4, "TP 2 x PP 2")]
        for gpus, way in ways if dtype == "bf16" else ways[1:]:  # two GPUs do not hold the larger model
            for link in ("pcie5-host", "pcie4-host", "consumer", "consumer-memcpy"):
                times = seconds(of, gpus, BATCHES, link, dtype=dtype)
                ratios = {t: times[way, t] / times["EP over host", t] for t in BATCHES}
                wins = where(ratios, lambda ratio: ratio > 1 / 0.9)
                loses = where(ratios, lambda ratio: ratio < 0.9)
                shown = ", ".join(f"{ratios[tokens]:.1f}" for tokens in SHOWN)
                yield f"| {name} | {gpus} | {way} | `{link}` | {shown} | {wins} | {loses} |"


def test_the_sample_is_what_the_command_prints(capsys):
    [(command, shown)] = SAMPLES
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == shown


def test_the_table_of_ep_against_tp():
    assert "\n".join(table()) in PAGE


def test_the_larger_model_has_the_size_that_its_makers_state():
    of, _ = MODELS["Qwen3-235B-A22B, fp8"]
    assert memory.expert_parallel(of, 1, "bf16").total / 2 == pytest.approx(235e9, rel=0.01)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(("name", "gpus"), [("qwen3-30b-a3b", 2), ("qwen3-30b-a3b", 4), ("large", 4)])
def test_the_weights_on_a_gpu(name, gpus, dtype):
    of = MODELS["Qwen3-235B-A22B, fp8"][0] if name == "large" else model.read(name)
    shown = {"large": "Qwen3-235B-A22B"}.get(name, "Qwen3-30B-A3B")
    gigabytes = memory.expert_parallel(of, gpus, dtype).total / 1e9
    assert f"{shown} in {dtype} on {gpus} GPUs {gigabytes:.1f} GB" in " ".join(PAGE.split())


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("pcie_p2p", "the profile is `pcie_p2p` and rows go straight from GPU to GPU (transport `{}`)"),
        ("pcie_blackwell", "(also found as `pcie_no_p2p`), the subject of this page, with transport `{}`"),
        ("pcie_partial", "it is `pcie_partial` with transport `{}`"),
    ],
)
def test_the_transports_are_those_that_the_profiles_prefer(profile, words):
    assert words.format(PROFILES[profile].transport.inside[0]) in " ".join(PAGE.split())


def test_the_settings_are_those_of_the_profile():
    profile = PROFILES["pcie_blackwell"]
    settings = dict(profile.environment)
    for one in profile.conditional:
        settings.update(one.environment)
    assert settings
    for name, setting in settings.items():
        assert f"| `{name}={setting.value}` |" in PAGE
    assert PAGE.count("| `NCCL_") == len(settings)
    assert "pcie_no_p2p" in profile.aliases


RUNS = ("", "-traced", "-against-tp-1", "-against-tp-2")
SHOWN_AS = {
    "ep_backend": "`ep_backend` (`host`)",
    "allgather_reducescatter": "`allgather_reducescatter`",
    "tensor_parallel": "`tensor_parallel` (TP 2)",
}
METRICS = {"ttft_median_ms": ".1f", "tpot_median_ms": ".2f", "output_tokens_per_s": ",.0f"}


def test_what_an_engine_measured():
    """Run by run; the ratios of TPOT and of the time between tokens, too."""
    runs = []
    for name in RUNS:
        results = json.loads((RESULTS / f"vllm-host-2h200{name}.json").read_text())["results"]
        runs.append({(one["backend"], one["concurrency"]): one for one in results})
    for key in {key for run in runs for key in run}:
        cells = [
            ", ".join(f"{run[key][metric]:{form}}" if key in run else "-" for run in runs)
            for metric, form in METRICS.items()
        ]
        assert f"| {key[1]} | {SHOWN_AS[key[0]]} | {' | '.join(cells)} |" in PAGE
    text = " ".join(PAGE.split())

    def ratios(metric, concurrency):
        ours, theirs = ([run[name, concurrency][metric] for run in runs] for name in list(SHOWN_AS)[:2])
        *first, last = (f"{a / b:.2f}" for a, b in zip(ours, theirs, strict=True))
        return f"{', '.join(first)} and {last} "

    tpot, itl = ((ratios(metric, 4), ratios(metric, 64)) for metric in ("tpot_median_ms", "itl_median_ms"))
    assert f"was {tpot[0]}times as long at 4 requests, and {tpot[1]}at 64." in text
    assert f"the ratios are {itl[0]}at 4, and {itl[1]}at 64." in text
    slow = [round(one["ttft_p99_ms"]) for run in runs for one in run.values()]
    assert sorted(slow)[-6:] == [337, 1001, 1061, 1084, 1317, 2768]
    assert all(f"{ms:,}" in text for ms in sorted(slow)[-6:])
    ours, theirs = (runs[2][name, 4]["tpot_median_ms"] for name in ("tensor_parallel", "ep_backend"))
    assert f"{ours:.2f} against {theirs:.2f} ms in the same run" in text


def test_what_was_measured():
    for hidden, file in ((7168, "host-2h200.json"), (2048, "host-2h200-hidden2048.json")):
        times = {}
        for one in json.loads((RESULTS / file).read_text())["results"]:
            if one["dtype"] == "bf16":
                times[one["transport"].split(" ")[0], one["tokens"], one["phase"]] = one["median_us"]
        for tokens in (1, 8, 128, 4096):
            ours = times["host", tokens, "round_trip"]
            [nccl] = {name for name, *_ in times if name != "host"}
            single = times[nccl, tokens, "dispatch"] + times[nccl, tokens, "combine"]
            cells = [ours, single, times[nccl, tokens, "round_trip"]]
            numbers = " | ".join(f"{us:.1f}" if us < 100 else f"{us:,.0f}" for us in cells)
            assert f"| {hidden} | {tokens} | {numbers} |" in PAGE
