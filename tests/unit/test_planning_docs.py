"""docs/planning.md: its samples are what the commands print, its tables what is planned and was measured."""

import json
import re
from pathlib import Path

import plans
import pytest
from measurements import RESULTS, host_cases, peer_cases
from plans import BATCHES

from ep_backend import cli
from ep_backend.doctor import plan
from ep_backend.planning import model
from ep_backend.planning.hardware import LINKS

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
SAMPLES = re.findall(r"`ep-backend (plan [^`]+)`:\n\n```\n(.*?)```", PAGE, flags=re.DOTALL)
USAGE = [line for line in PAGE.split("```")[1].splitlines() if line.startswith("ep-backend")]


@pytest.mark.parametrize(("command", "shown"), SAMPLES, ids=[command for command, _ in SAMPLES])
def test_samples_are_what_the_commands_print(capsys, command, shown):
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == shown


def test_there_are_samples_and_the_commands_on_top_run(capsys):
    assert len(SAMPLES) == 2
    named = [line.split()[1:] for line in USAGE if "path/to" not in line]
    assert len(named) == 2
    for arguments in named:
        assert cli.main(arguments) == 0
    assert capsys.readouterr().out


def seconds(name, *more, **options):
    return plans.seconds(model.read(name), *more, **options)


def shown(microseconds):
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def measured(cases, ranks, hidden):
    return {
        (tokens, dtype): us
        for name, of, of_ranks, tokens, dtype, sms, us in cases
        if not name.startswith("kernels") and sms is None and (of_ranks, of.hidden) == (ranks, hidden)
    }


def nccl(file):
    """Microseconds of bf16 by number of tokens and phase."""
    document = json.loads((RESULTS / file).read_text())
    return {
        (one["tokens"], one["phase"]): one["median_us"]
        for one in document["results"]
        if one["transport"].startswith(("nccl", "baseline")) and one["dtype"] == "bf16"
    }


def single_calls(times, tokens):
    return times[tokens, "dispatch"] + times[tokens, "combine"]


def test_the_table_of_peer_with_four_gpus():
    took = measured(peer_cases(), 4, 7168)
    for tokens in (1, 32, 128, 4096):
        cells = []
        for dtype in ("bf16", "fp8"):
            times = seconds("deepseek-v3", 4, [tokens], "nvlink4", "nvswitch", dtype)
            cells += [times["EP over peer", tokens] * 1e6, took[tokens, dtype]]
        assert f"| {tokens} | {' | '.join(map(shown, cells))} |" in PAGE


def host_beside_others(tokens):
    """For each hidden size: EP over host planned and measured, NCCL measured, TP 2."""
    for name, hidden, suffix in (("deepseek-v3", 7168, ""), ("qwen3-30b-a3b", 2048, "-hidden2048")):
        times = seconds(name, 2, [tokens])
        yield (
            times["EP over host", tokens] * 1e6,
            measured(host_cases(), 2, hidden)[tokens, "bf16"],
            single_calls(nccl(f"host-2h200{suffix}.json"), tokens),
            times["TP 2", tokens] * 1e6,
        )


def test_the_table_of_host_with_two_gpus_and_what_is_said_of_it():
    table = {tokens: list(host_beside_others(tokens)) for tokens in (1, 8, 32, 128, 512, 4096)}
    for tokens, cells in table.items():
        every = " | ".join(shown(cell) for of_size in cells for cell in of_size)
        assert f"| {tokens} | {every} |" in PAGE
    assert [round(of_nccl / tp, 1) for _, _, of_nccl, tp in table[1]] == [1.8, 1.9]
    assert [round(tp / host, 1) for _, host, _, tp in table[1]] == [1.3, 1.2]
    later = [of_size for tokens, cells in table.items() for of_size in cells if tokens >= 32]
    assert all(2.05 < tp / host < 2.85 and of_nccl < tp for _, host, of_nccl, tp in later)


def test_the_table_of_ep_over_nccl():
    two, four = nccl("peer-2h200.json"), nccl("peer-4h200.json")
    for tokens in (1, 128, 4096):
        planned = [
            seconds("deepseek-v3", gpus, [tokens], "nvlink4", "nvswitch")["EP over NCCL", tokens] * 1e6
            for gpus in (2, 4)
        ]
        cells = [planned[0], single_calls(two, tokens), two[tokens, "round_trip"]]
        cells += [planned[1], four[tokens, "round_trip"]]
        assert f"| {tokens} | {' | '.join(map(shown, cells))} |" in PAGE


MODELS = ("qwen3-30b-a3b", "deepseek-v3")


@pytest.mark.parametrize("link", ["pcie5-host", "consumer", "consumer-memcpy"])
@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_tp_against_ep_without_peer_access(name, link):
    cells = []
    for gpus in (2, 4, 8):
        times = seconds(name, gpus, BATCHES, link)
        for way in dict.fromkeys(way for way, _ in times if way.startswith("TP")):
            ratios = [times[way, tokens] / times["EP over host", tokens] for tokens in (1, 64, 4096)]
            cells.append(", ".join(f"{ratio:.1f}" for ratio in ratios))
            if "PP" in way:
                assert all(times["EP over NCCL", tokens] > times[way, tokens] for tokens in BATCHES)
            else:
                assert all(times["EP over host", tokens] < times[way, tokens] for tokens in BATCHES)
    assert f"| {name}, `{link}` | {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize(("name", "loses"), [(MODELS[0], 32), (MODELS[1], 8)])
def test_what_host_takes_if_its_loads_are_no_faster_than_those_of_nccl_on_consumer_boards(name, loses):
    def ratios(gpus, way):
        times, size = seconds(name, gpus, BATCHES, "consumer"), model.read(name).shape
        rate = {"bytes_per_s": 1.9e9, "latency_s": LINKS["consumer"].flag.value}
        return {t: times[way, t] / plan.host_s(size, gpus, t, "bf16", **rate) for t in BATCHES}

    assert min(ratios(2, "TP 2").values()) > 1.8
    assert [t for t, ratio in ratios(4, "TP 2 x PP 2").items() if ratio < 0.9] == [
        t for t in BATCHES if t >= loses
    ]


@pytest.mark.parametrize(("name", "wins", "loses"), [(MODELS[0], (2, 64), 256), (MODELS[1], (1, 16), 128)])
def test_where_ep_over_host_wins_and_loses_against_tp_and_pp_on_a_server(name, wins, loses):
    times = seconds(name, 4, BATCHES)
    ratios = {tokens: times["TP 2 x PP 2", tokens] / times["EP over host", tokens] for tokens in BATCHES}
    faster = [tokens for tokens, ratio in ratios.items() if ratio > 1 / 0.9]
    assert (faster[0], faster[-1]) == wins
    assert [tokens for tokens, ratio in ratios.items() if ratio < 0.9] == [t for t in BATCHES if t >= loses]
