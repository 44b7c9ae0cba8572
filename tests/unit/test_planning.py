"""`ep-backend plan`: the seed facts, measurements on H200, sizes of models, and the command."""

import json
import re

import pytest
from measurements import RESULTS, WITHIN, documents, host_cases, peer_cases, ranks_of, shape_of

from ep_backend import cli, profiles
from ep_backend.bench.engines import models
from ep_backend.doctor import advice, plan
from ep_backend.doctor.plan import Shape
from ep_backend.errors import EpConfigError
from ep_backend.planning import hardware, memory, model, predict, words
from ep_backend.planning.hardware import LINKS, PLACES

PROFILES = {profile.name: profile for profile in profiles.shipped()}

MIXTRAL = {
    "hidden_size": 4096,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "vocab_size": 32000,
}
DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def parameters(config):
    one = memory.expert_parallel(model.of_config("m", config, "m"), 1, "bf16")
    return one.total / 2


def planned(name, profile, gpus, tokens, *, links=None, memory_bytes=None, dtypes=("bf16",)):
    place = PLACES[profile]
    chosen = [LINKS[link] for link in (links or place.links[: place.usual])]
    return predict.make(model.read(name), PROFILES[profile], chosen, gpus, tokens, dtypes, memory_bytes)


def rows(found, way, link=None):
    return [row for row in found.rows if row.way == way and link in (None, row.link)]


def test_the_seed_facts():
    assert LINKS["nvlink5"].one_way.value * 2 == 1.8e12
    assert LINKS["nvlink4"].one_way.value * 2 == 900e9
    assert LINKS["pcie5"].one_way.value == LINKS["pcie5-host"].one_way.value == 64e9
    assert LINKS["pcie4"].one_way.value == LINKS["pcie4-host"].one_way.value == 32e9
    for name in ("consumer", "consumer-memcpy"):  # two RTX 5070 Ti on PCIe 4.0 x16
        assert LINKS[name].one_way.value == 32e9
        assert [one.value for one in LINKS[name].staging] == [
            one.value for one in LINKS["pcie4-host"].staging
        ]
        assert "sglang/pull/39605" in LINKS[name].all_reduces_source
    seen = json.loads((RESULTS / "doctor-2h200.json").read_text())["machine"]["directions"]
    for direction in seen:
        assert LINKS["nvlink4"].stores.value == pytest.approx(direction["store_bytes_per_s"], rel=0.005)
        assert LINKS["nvlink4"].flag.value == pytest.approx(direction["latency_s"], rel=0.005)
    assert len(seen) == 2
    assert LINKS["pcie5-host"].flag.value == 2.23e-6  # raw data not kept
    assert [number.value for number in LINKS["pcie5-host"].staging] == [33e9, pytest.approx(33e9 * 39 / 52.6)]


def test_the_rate_of_host_memory_is_what_was_measured():
    document = json.loads((RESULTS / "host-memory-2h200.json").read_text())
    [both] = [
        one
        for one in document["results"]
        if (one["gpus"], one["by"], one["blocks"]) == (2, "SMs", 66) and min(*one["write"], *one["read"])
    ]
    assert min(*both["write"], *both["read"]) * 1e9 == hardware.HOST_BOTH_WAYS
    alone = [one["write"] for one in document["results"] if one["gpus"] == 1 and one["by"] == "SMs"]
    assert max(rate for (rate,) in alone) * 1e9 == hardware.HOST_STORES_ONE


def test_the_rate_of_host_memory_goes_by_the_pcie_link():
    (rate, flag), (shared, _) = hardware.host_of(5, 16, 2), hardware.host_of(5, 16, 4)
    assert (rate.value, rate.kind, flag.value) == (33e9, "measured", 2.23e-6)
    assert (shared.value / rate.value, shared.kind) == (pytest.approx(39 / 52.6), "model")
    for generation, width in ((4, 16), (5, 8)):
        half, _ = hardware.host_of(generation, width, 2)
        assert (half.value, half.kind) == (rate.value / 2, "model")
    for generation, width in ((None, 16), (5, None), (6, 16), (5, 32)):
        assert hardware.host_of(generation, width, 2) is None


def test_every_profile_has_a_place_with_known_links():
    assert set(PLACES) == set(PROFILES)
    for place in PLACES.values():
        assert set(place.links) <= set(LINKS)
        assert bool(place.links) or place.why or place is PLACES["cpu"]


def test_a_link_that_peers_do_not_reach_has_no_rate_of_stores_and_the_others_lose_some():
    for link in LINKS.values():
        assert (link.stores is None) == (link.staging is not None)
        for number in (link.stores, *(link.staging or ())):
            assert number is None or (number.value < link.one_way.value and number.source)


@pytest.mark.parametrize(
    ("way", "cases", "link", "profile", "groups"),
    [
        ("peer", peer_cases, "nvlink4", "nvswitch", {2, 4}),
        ("host", host_cases, "pcie5-host", "pcie_blackwell", {2}),
    ],
)
def test_the_plan_is_within_30_percent_of_every_measurement_on_h200(way, cases, link, profile, groups):
    """Through the plan itself, for the runs that used all SMs."""
    seen = set()
    for name, shape, ranks, tokens, dtype, sms, measured_us in cases():
        if not name.startswith(way) or sms is not None:
            continue
        config = {**MIXTRAL, "hidden_size": shape.hidden, "num_local_experts": shape.experts}
        config = {**config, "num_experts_per_tok": shape.topk}
        size = model.of_config("measured", config, name)
        found = predict.of_link(size, PROFILES[profile], LINKS[link], ranks, [tokens], dtype)
        (row,) = [row for row in found if row.way == f"EP over {way}"]
        assert row.basis == plan.CHECKED
        assert abs(row.seconds * 1e6 / measured_us - 1) < WITHIN, (name, ranks, tokens, dtype, row.seconds)
        seen.add((ranks, dtype, tokens))
    assert seen >= {(gpus, dtype, t) for gpus in groups for dtype in plan.DTYPES for t in (1, 128, 4096)}


@pytest.mark.parametrize(
    ("link", "file"),
    [("nvlink4", "doctor-2h200.json"), ("pcie5-host", "doctor-2h200-no-peer-access.json")],
)
def test_all_reduces_of_two_h200_are_those_that_doctor_measured(link, file):
    document = json.loads((RESULTS / file).read_text())
    times = hardware.all_reduces_of(LINKS[link], 2)
    assert document["warm_up"]["all_reduces"]
    for one in document["warm_up"]["all_reduces"]:
        assert times(one["bytes"]) == pytest.approx(one["seconds"], rel=1e-3)


def test_more_than_two_gpus_share_host_memory_whoever_moves_the_bytes():
    link, many = LINKS["pcie5-host"], 1 << 28
    two, half_of_four = hardware.all_reduces_of(link, 2), hardware.all_reduces_of(link, 2, busy=4)
    assert half_of_four(many) == pytest.approx(two(many) / hardware.HOST_SHARED)
    assert half_of_four.launch_s == two.launch_s
    for name in ("nvlink4", "consumer"):  # there something else is the limit
        assert hardware.all_reduces_of(LINKS[name], 2, busy=4)(many) == (
            hardware.all_reduces_of(LINKS[name], 2)(many)
        )
    (ours,) = rows(planned("deepseek-v3", "pcie_blackwell", 4, [4096], links=["pcie5-host"]), "EP over host")
    slower = plan.host_s(model.read("deepseek-v3").shape, 4, 4096, "bf16", bytes_per_s=33e9, latency_s=0)
    assert ours.seconds == pytest.approx(slower / hardware.HOST_SHARED, rel=0.01)


def test_all_reduces_of_more_gpus_send_more_in_more_steps():
    link = LINKS["nvlink4"]
    two, four = (hardware.all_reduces_of(link, gpus) for gpus in (2, 4))
    assert four.launch_s - two.launch_s == pytest.approx(4 * 0.73e-6)
    assert four(1 << 26) == pytest.approx(two(1.5 * (1 << 26)) + 4 * 0.73e-6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "profile", "gpus", "links", "tokens", "checked"),
    [
        ("qwen3-30b-a3b", "nvswitch", 2, None, 4096, True),
        ("deepseek-v3", "nvswitch", 4, None, 8, True),
        ("qwen3-30b-a3b", "nvswitch", 2, None, 4097, False),
        ("qwen3-30b-a3b", "nvswitch", 4, None, 8, False),  # hidden 2048 was measured on two
        ("qwen1.5-moe-a2.7b", "nvswitch", 2, None, 8, False),
        ("deepseek-v3", "nvswitch", 8, None, 8, False),
        ("deepseek-v3", "nvswitch", 4, ["nvlink5"], 8, False),
        ("deepseek-v3", "pcie_p2p", 2, None, 8, False),
        ("deepseek-v3", "pcie_blackwell", 2, ["pcie5-host"], 8, True),
        ("qwen3-30b-a3b", "pcie_blackwell", 2, ["pcie5-host"], 4097, False),
        ("qwen1.5-moe-a2.7b", "pcie_blackwell", 2, ["pcie5-host"], 8, False),
        ("deepseek-v3", "pcie_blackwell", 2, ["consumer"], 8, False),
        ("deepseek-v3", "pcie_blackwell", 2, ["pcie4-host"], 8, False),
        ("deepseek-v3", "pcie_blackwell", 4, ["pcie5-host"], 8, False),
    ],
)
def test_nothing_but_what_was_measured_is_called_checked(name, profile, gpus, links, tokens, checked):
    way = "EP over host" if profile == "pcie_blackwell" else "EP over peer"
    (found,) = rows(planned(name, profile, gpus, [tokens], links=links), way)
    shared = f"; {predict.SHARED}" if way == "EP over host" and gpus > 2 else ""
    assert found.basis == (plan.CHECKED if checked else predict.MODEL + shared)


@pytest.mark.parametrize(("way", "cases"), [("peer", peer_cases), ("host", host_cases)])
def test_the_shapes_that_are_called_checked_are_those_of_the_kept_files(way, cases):
    found = [case for case in cases() if case[0].startswith(way)]
    kept = {(ranks, of.hidden, of.experts, of.topk) for _, of, ranks, *_ in found}
    assert kept == plan.KEPT[way]
    for of in kept:
        tokens = [case[3] for case in found if (case[2], case[1].hidden) == of[:2]]
        assert max(tokens) == plan.KEPT_TOKENS


def nccl_against_plan(pattern, link):
    """Measured / planned, of single calls (dispatch and combine) and of graphs (round trip)."""
    calls, graphs = [], []
    for name, document in documents(pattern):
        gpus = ranks_of(document)
        times = hardware.all_reduces_of(LINKS[link], gpus)
        phases = {}
        for one in document["results"]:
            if one["transport"].startswith(("nccl", "baseline")):
                found = phases.setdefault((one["tokens"], one["dtype"]), {})
                found[one["phase"]] = one["median_us"] / 1e6
        for (tokens, dtype), took in phases.items():
            planned_s = plan.nccl_s(shape_of(document), gpus, tokens, dtype, times)
            graphs.append(took["round_trip"] / planned_s)
            if name != "peer-4h200.json":  # which has graphs only
                calls.append((took["dispatch"] + took["combine"]) / planned_s)
    return calls, graphs


def test_the_known_error_of_ep_over_nccl_is_that_of_the_kept_files():
    calls, graphs = nccl_against_plan("peer-*.json", "nvlink4")
    assert plan.NCCL_IN_GRAPH - 0.1 < max(graphs) <= plan.NCCL_IN_GRAPH
    assert plan.NCCL_TOO_FAST - 0.05 < 1 - 1 / max(calls) < plan.NCCL_TOO_FAST
    calls, graphs = nccl_against_plan("host-2h200*.json", "pcie5-host")  # docs/planning.md
    assert round(max(graphs), 1) == 2.7
    assert round(1 - 1 / max(calls), 2) == 0.26


def test_published_sizes_of_models():
    """Numbers of parameters as the makers state them."""
    assert parameters(models.config_of(models.parse("qwen3-30b-a3b"))) == pytest.approx(30.5e9, rel=0.01)
    assert parameters(models.config_of(models.parse("qwen1.5-moe-a2.7b"))) == pytest.approx(14.3e9, rel=0.01)
    assert parameters(MIXTRAL) == pytest.approx(46.7e9, rel=0.01)
    assert parameters(DEEPSEEK_V3) == pytest.approx(671e9, rel=0.01)


def test_layers_without_experts():
    found = model.of_config("v3", DEEPSEEK_V3, "v3")
    assert (found.layers, found.moe_layers, found.shared_width, found.shape.layers) == (61, 58, 2048, 58)
    sparse = {**MIXTRAL, "decoder_sparse_step": 2, "mlp_only_layers": [1], "moe_intermediate_size": 8}
    assert model.of_config("m", sparse, "m").moe_layers == 15  # 1, 3, ... but not 1
    with pytest.raises(EpConfigError, match="no layer has experts"):
        model.of_config("m", {**MIXTRAL, "first_k_dense_replace": 32}, "m")


def test_a_model_inside_another():
    assert model.of_config("m", {"text_config": MIXTRAL}, "m").hidden == 4096


@pytest.mark.parametrize("key", [key for key in MIXTRAL if key not in ("num_key_value_heads", "head_dim")])
def test_a_missing_key_is_named(key):
    with pytest.raises(EpConfigError, match=rf"f\.json: .*{key} is missing"):
        model.of_config("m", {name: value for name, value in MIXTRAL.items() if name != key}, "f.json")


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, 10**12])
def test_a_wrong_value_is_named(value):
    with pytest.raises(EpConfigError, match="hidden_size is"):
        model.of_config("m", {**MIXTRAL, "hidden_size": value}, "m")


def test_weights_by_hand():
    size = model.Model(
        name="m",
        hidden=10,
        experts=5,
        topk=1,
        expert_width=2,
        shared_width=3,
        dense_width=4,
        layers=4,
        moe_layers=2,
        early_moe_layers=1,
        attention=model.Attention(heads=4, kv_heads=2, heads_share=80, kv_share=40, whole=8),
        vocabulary=100,
        tied=False,
    )
    ep = memory.expert_parallel(size, 4, "bf16")  # two of five experts on the fullest
    assert (ep.experts, ep.attention, ep.embeddings) == (2 * 2 * 2 * 60, 2 * 4 * 128, 2 * 2000)
    assert ep.rest == 2 * (3 * 10 * (2 * 4 + 2 * 3) + 2 * 50)
    tp = memory.tensor_parallel(size, 4, "bf16")
    assert (tp.experts, tp.attention, tp.embeddings) == (2 * 2 * 5 * 60 / 4, 2 * 4 * (20 + 20 + 8), 1000)
    pp = memory.tensor_parallel(size, 4, "bf16", stages=2)
    assert (pp.way, pp.experts, pp.attention) == ("TP 2 x PP 2", tp.experts, 2 * 2 * (40 + 20 + 8))
    assert memory.expert_parallel(size, 4, "fp8").experts == pytest.approx(ep.experts / 2, rel=1e-3)


def test_the_fuller_half_of_a_pipeline_counts():
    """Of DeepSeek-V3's 61 layers the first 3 have no experts: 31 and 30 layers, 28 and 30 of them with."""
    v3 = model.of_config("v3", DEEPSEEK_V3, "v3")
    assert (v3.early_moe_layers, v3.moe_layers) == (28, 58)
    pp, tp = memory.tensor_parallel(v3, 8, "bf16", stages=2), memory.tensor_parallel(v3, 8, "bf16")
    assert pp.experts / tp.experts == pytest.approx(2 * 30 / 58)
    odd = model.read("deepseek-v3")  # 61 layers with experts
    pp, tp = memory.tensor_parallel(odd, 8, "bf16", stages=2), memory.tensor_parallel(odd, 8, "bf16")
    assert pp.experts / tp.experts == pytest.approx(2 * 31 / 61)


def test_bytes_by_hand():
    found = planned("qwen3-30b-a3b", "nvswitch", 4, [16])
    away, _ = plan.rows_per_token(Shape(name="", hidden=2048, experts=128, topk=8), 4)
    (peer,), (nccl,) = rows(found, "EP over peer"), rows(found, "EP over NCCL")
    (tp,), (pp,) = rows(found, "TP 4"), rows(found, "TP 2 x PP 2")
    assert peer.sent_bytes == pytest.approx(16 * away * 8192)
    assert nccl.sent_bytes == 3 * 16 * 8192
    assert tp.sent_bytes == 2 * 1.5 * 64 * 4096
    assert pp.sent_bytes == 2 * 1.0 * 32 * 4096
    assert tp.seconds == found.comparisons[0].tp_s
    assert pp.seconds == found.comparisons[0].tp_pp_s


def test_without_peer_access_ep_over_nccl_loses_to_tp_and_pp_in_decode_and_ep_over_host_does_not():
    found = planned("qwen3-30b-a3b", "pcie_blackwell", 4, [2, 8, 64])
    assert [link.name for link in found.links] == ["pcie5-host", "consumer", "consumer-memcpy"]
    for link in found.links:
        theirs = [row.seconds for row in rows(found, "TP 2 x PP 2", link.name)]
        nccl = [row.seconds for row in rows(found, "EP over NCCL", link.name)]
        ours = [row.seconds for row in rows(found, "EP over host", link.name)]
        assert all(one > other for one, other in zip(nccl, theirs, strict=True))
        assert all(one < 0.9 * other for one, other in zip(ours, theirs, strict=True))
    assert any("Choose EP over host at 2, 8, 64 tokens per GPU (pcie5-host" in line for line in found.advice)
    faster = "EP over host (pcie5-host, bf16) is faster than TP 2 x PP 2 for qwen3-30b-a3b at 2, 8, 64 tokens"
    assert any(line.startswith(faster) for line in found.advice)
    assert {one.ep for one in found.comparisons} == {
        f"EP over host ({link.name}, bf16)" for link in found.links
    }


def test_what_is_in_doubt_of_consumer_boards_is_said_first_and_in_every_sentence(run):
    for name, link in LINKS.items():
        assert bool(link.unsure) == name.startswith("consumer")
    found = planned("qwen3-30b-a3b", "pcie_blackwell", 4, [1, 64], links=["consumer"])
    first, *others, last = found.advice
    assert (first, last) == (f"consumer: {predict.UNSURE}", predict.NOT_WEIGHED)
    assert len(others) == 3
    assert all(line.startswith(advice.IF_HOST) for line in others)
    assert ": choose EP over host at 1, 64 tokens" in others[0]
    _, out, _ = run(*H200[:4], "--profile", "pcie_blackwell", "--link", "consumer")
    assert "note         consumer: EP over host was measured on a server only." in out
    server = planned("qwen3-30b-a3b", "pcie_blackwell", 4, [1, 64], links=["pcie5-host"])
    assert not [line for line in server.advice if advice.IF_HOST in line or predict.UNSURE in line]


def test_without_peer_access_tp_and_pp_win_with_many_tokens_on_a_server():
    found = planned("deepseek-v3", "pcie_blackwell", 4, [4096], links=["pcie5-host"])
    assert found.advice[0].startswith("Choose TP 2 x PP 2 at 4096 tokens")


def test_host_is_no_way_where_peers_reach_each_other():
    """Profiles fall back on it if they do not."""
    for profile in ("nvswitch", "pcie_p2p", "nvl72"):
        assert not rows(planned("qwen3-30b-a3b", profile, 4, [8]), "EP over host")


def test_peer_access_makes_ep_the_choice_on_nvlink():
    found = planned("deepseek-v3", "nvswitch", 4, [8, 128])
    assert found.advice[0].startswith("Choose EP over peer at 8, 128 tokens per GPU (nvlink4, bf16): at ")
    (peer,) = [row for row in rows(found, "EP over peer") if row.tokens == 128]
    assert any(f"{peer.seconds * 1e6:.1f} us" in line for line in found.advice)


def test_what_does_not_fit_is_not_chosen():
    deepseek = {"name": "deepseek-v3", "profile": "nvswitch", "gpus": 8, "tokens": [8]}
    found = planned(**deepseek, memory_bytes=180e9)
    assert {one.way: one.fits for one in found.weights} == {
        "EP + DP": False,
        "TP 8": True,
        "TP 4 x PP 2": True,
    }
    assert found.advice[0].startswith("Choose TP")
    assert not [line for line in found.advice if "EP over" in line]
    assert "do not fit in any way" in planned(**deepseek, memory_bytes=1e9).advice[0]
    nothing = planned("deepseek-v3", "pcie_blackwell", 4, [8], memory_bytes=1e9)
    assert len(nothing.links) == 3
    assert [one.split(":")[0] for one in nothing.advice] == ["No choice"]


def test_without_a_size_of_memory_the_advice_says_that_nothing_was_weighed():
    """deepseek-v3 in bf16 takes 190 GB on each of eight GPUs, and an H200 has 141."""
    found = planned("deepseek-v3", "nvswitch", 8, [8])
    assert found.advice[0].startswith("Choose EP over peer")
    assert found.advice[-1] == predict.NOT_WEIGHED
    weighed = planned("deepseek-v3", "nvswitch", 8, [8], memory_bytes=141e9)
    assert weighed.advice[0].startswith("No choice")
    assert predict.NOT_WEIGHED not in weighed.advice


def test_between_machines_there_are_bytes_and_no_times():
    for profile, gpus in (("pcie_rdma", 4), ("nvswitch", 16)):
        found = predict.make(model.read("qwen3-30b-a3b"), PROFILES[profile], [], gpus, [8], ["bf16"])
        assert found.rows
        assert all(row.seconds is None and row.sent_bytes > 0 for row in found.rows)
        ways = {row.way for row in found.rows}
        assert ways >= {"EP over collective", "EP over NCCL"}
        assert "EP over hier" not in ways
        assert found.advice == (words.best(found.model, found.rows, set())[0],)


def test_heads_that_tp_cannot_split():
    found = planned("qwen3-30b-a3b", "nvswitch", 6, [8])
    assert not [row for row in found.rows if row.way.startswith("TP")]
    assert [one.way for one in found.weights] == ["EP + DP"]
    (whole, halves) = found.left_out
    assert whole.startswith("TP 6 left out: 32 attention heads")
    assert halves.startswith("TP 3 x PP 2 left out: 32 attention heads")


@pytest.mark.parametrize(
    ("gpus", "said"),
    [(2, ["TP 1 x PP 2 left out: a pipeline alone"]), (3, ["TP 3 left", "TP x PP 2 left"]), (4, [])],
)
def test_ways_that_are_left_out_are_named(gpus, said):
    found = memory.left_out(model.read("qwen3-30b-a3b"), gpus)
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said


def test_the_rows_of_cpu_are_doctors_formula():
    found = planned("qwen3-30b-a3b", "cpu", 2, [8])
    (row,) = rows(found, "EP over cpu")
    rate = {"copy_bytes_per_s": 2 * hardware.CORE_COPY.value, "cpus": 2}
    assert row.seconds == plan.cpu_s(found.model.shape, 2, 8, "bf16", **rate)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = cli.main(["plan", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


H200 = ("--model", "qwen3-30b-a3b", "--gpus", "4", "--profile", "dgx")


def test_the_command(run, tmp_path):
    status, out, err = run(*H200, "--batch", "1,64", "--dtype", "bf16,fp8", "--memory", "141")
    assert (status, err) == (0, "")
    assert all(len(line) <= 110 for line in out.splitlines())
    for said in (
        "profile nvswitch",
        "EP over peer, fp8",
        "TP 2 x PP 2, bf16",
        "fits",
        "Choose EP over peer",
    ):
        assert said in out
    folder = tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    (tmp_path / "mixtral.json").write_text(json.dumps(MIXTRAL))
    for given in (folder, folder / "config.json", tmp_path / "mixtral.json"):
        status, out, _ = run("--model", str(given), "--gpus", "2", "--profile", "pcie_p2p", "--batch", "4")
        assert status == 0
        assert "mixtral: hidden 4096, 8 experts, top-2, 32 of 32 layers" in out


def test_a_way_without_a_time_is_one_line_and_no_row_of_times(run):
    _, out, _ = run(*H200, "--batch", "8")
    sent, times = out.split("Communication of one layer")
    assert "EP over collective, bf16" in sent
    assert "EP over collective, bf16" not in times
    assert f"EP over collective: no time, because {plan.COLLECTIVE}" in times
    _, out, _ = run("--model", "qwen3-30b-a3b", "--gpus", "16", "--profile", "dgx", "--batch", "8")
    assert re.search(r"Communication of one layer.*\n.*\n +EP over collective, bf16 +-\n", out)


def test_the_command_as_json(run):
    status, out, _ = run(*H200, "--batch", "64", "--json", "--link", "nvlink4,nvlink5")
    document = json.loads(out)
    assert status == 0
    assert [link["name"] for link in document["links"]] == ["nvlink4", "nvlink5"]
    assert document["links"][0]["stores"]["kind"] == "measured"
    peer = next(row for row in document["rows"] if row["way"] == "EP over peer")
    assert peer["step_seconds"] == pytest.approx(48 * peer["seconds"])
    assert document["weights"][0]["total"] > 14e9


def test_a_person_reads_about_one_link_and_how_to_tell_which(run):
    given = ("--model", "qwen3-30b-a3b", "--gpus", "4", "--profile", "pcie_blackwell", "--batch", "8")
    _, out, _ = run(*given)
    which = "2.3, consumer 35.4, consumer-memcpy 5.4, pcie4-host 4.7 (--link NAME)"
    assert f"64 MiB in ep-backend doctor, ms: pcie5-host {which}" in " ".join(out.split())
    assert re.findall(r"^link  +([^:]+)", out, flags=re.MULTILINE) == ["pcie5-host"]
    assert out.index("which link") < out.index("link         pcie5-host")
    assert out.count("Communication of one layer") == 1
    _, out, _ = run(*given, "--link", "consumer,pcie4-host")
    assert re.findall(r"^link  +([^:]+)", out, flags=re.MULTILINE) == ["consumer", "pcie4-host"]
    _, out, _ = run(*given, "--json")
    assert [one["name"] for one in json.loads(out)["links"]] == ["pcie5-host", "consumer", "consumer-memcpy"]
    assert "which link" not in run(*H200)[1]


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_profile_is_planned(run, profile):
    note = PLACES[profile].note
    status, out, err = run("--model", "qwen1.5-moe-a2.7b", "--gpus", "2", "--profile", profile)
    assert (status, err) == (0, "")
    assert f"profile {profile}" in out
    assert "Advice:" in out
    assert bool(note) == (profile in ("nvlink_pairs", "pcie_partial"))
    assert ("note         planned as if no pair of GPUs reached each other" in out) == bool(note)


def test_what_is_left_is_said_and_each_basis_names_its_link_and_tokens(run):
    given = ("--model", "qwen3-30b-a3b", "--batch", "8,8192", "--memory", "31")
    _, out, _ = run(*given, "--gpus", "2", "--profile", "nvswitch", "--link", "nvlink4,nvlink5")
    assert re.search(r"EP \+ DP, bf16 .* 32\.07  DOES NOT FIT, 1\.1 short", out)
    assert re.search(r"TP 2, bf16 .* 30\.53  fits, 0\.5 left", out)
    for basis in (
        "(nvlink4; 8 tokens): model; within",
        "EP over NCCL (nvlink5): model",
        "TP 2 (nvlink4): model",
    ):
        assert basis in out
    assert "TP 1 x PP 2 left out" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "qwen3-30b-a3"), "did you mean"),
        (("--model", "qwen3-30b-a3b,layers=0"), "--model qwen3-30b-a3b,layers=0: 'layers=0' is no option"),
        (("--model", "qwen3-30b-a3b,fp8"), "here fp8 is a dtype: --dtype fp8"),
        (("--profile", "auto"), "here a profile is named: nvl72"),
        (("--model", "/nonesuch"), "no known model"),
        (("--profile", "dgy"), "there is no hardware profile"),
        (("--profile", "./own.toml"), "--profile ./own.toml: a file is not taken here"),
        (("--gpus", "1"), "whole number from 2 on"),
        (("--gpus", "5000"), "at most 1024"),
        (("--batch", "0"), "whole number from 1 on"),
        (("--dtype", "int8"), "none of bf16, fp8"),
        (("--memory", "-3"), "no number of gigabytes"),
        (("--memory", "nan"), "no number of gigabytes"),
        (("--link", "pcie5"), "profile nvswitch has nvlink4, nvlink5"),
        (("--link", "string"), "none of nvlink5"),
    ],
)
def test_wrong_usage_is_status_2(run, arguments, said):
    status, out, err = run(*H200, *arguments)
    assert (status, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"hidden_size": 8}', "\ud800"])
def test_a_config_that_cannot_be_used_is_status_2(run, tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    status, out, err = run(*H200, "--model", str(file))
    assert (status, out) == (2, "")
    assert str(file) in err
