"""docs/planning.md: its samples are what the commands print, its tables what is planned and was measured."""

import json
import math
import re
from pathlib import Path

import plans
import pytest
from measurements import RESULTS, host_cases, nccl_times, peer_cases, single_calls
from plans import BATCHES

from ep_backend import cli
from ep_backend.doctor import plan
from ep_backend.planning import model
from ep_backend.planning.hardware import LINKS, PLACES

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
WORDS = " ".join(PAGE.replace("**", "").split())
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
            single_calls(nccl_times(f"host-2h200{suffix}.json"), tokens),
            times["TP 2", tokens] * 1e6,
        )


def test_the_table_of_host_with_two_gpus_and_what_is_said_of_it():
    table = {tokens: list(host_beside_others(tokens)) for tokens in (1, 8, 32, 128, 512, 4096)}
    for tokens, cells in table.items():
        every = " | ".join(shown(cell) for of_size in cells for cell in of_size)
        assert f"| {tokens} | {every} |" in PAGE
    nccl = [f"{of_nccl / tp:.1f}" for _, _, of_nccl, tp in table[1]]
    assert f"{nccl[0]} (hidden 7168) and {nccl[1]} times as long as TP 2 at 1 token per GPU, and" in WORDS
    first = [f"{tp / host:.1f}" for _, host, _, tp in table[1]]
    assert all(tp > host for cells in table.values() for _, host, _, tp in cells)
    later = [of_size for tokens, cells in table.items() for of_size in cells if tokens >= 32]
    assert all(of_nccl < tp for _, _, of_nccl, tp in later)
    low, high = (f"{bound(tp / host for _, host, _, tp in later):.1f}" for bound in (min, max))
    assert (
        "less than TP 2 at every batch; TP 2 takes "
        f"{first[0]} (hidden 7168) and {first[1]} times as long at 1 token per GPU, "
        f"and {low} to {high} times from 32 on."
    ) in WORDS


def test_the_table_of_ep_over_nccl():
    two, four = nccl_times("peer-2h200.json"), nccl_times("peer-4h200.json")
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


def loses_from(ratios):
    """The batch from which on EP is slower at every one."""
    slower = [tokens for tokens, ratio in ratios.items() if ratio < 0.9]
    assert slower == [tokens for tokens in BATCHES if tokens >= slower[0]]
    return slower[0]


def test_what_host_takes_if_its_loads_are_no_faster_than_those_of_nccl_on_consumer_boards():
    def ratios(name, gpus, way):
        times, size = seconds(name, gpus, BATCHES, "consumer"), model.read(name).shape
        rate = {"bytes_per_s": 1.9e9, "latency_s": LINKS["consumer"].flag.value}
        return {t: times[way, t] / plan.host_s(size, gpus, t, "bf16", **rate) for t in BATCHES}

    least = min(ratio for name in MODELS for ratio in ratios(name, 2, "TP 2").values())
    qwen, deepseek = (loses_from(ratios(name, 4, "TP 2 x PP 2")) for name in MODELS)
    assert (
        f"1.9 GB/s, TP 2 would take {math.floor(least * 10) / 10:.1f} times as long as EP or more, and with "
        f"four GPUs EP would be slower than TP 2 x PP 2 from {deepseek} (deepseek-v3) and from {qwen} tokens "
        "per GPU (qwen3-30b-a3b) on."
    ) in WORDS


def test_where_ep_over_host_wins_and_loses_against_tp_and_pp_on_a_server():
    wins, loses = [], []
    for name in MODELS:
        times = seconds(name, 4, BATCHES)
        ratios = {t: times["TP 2 x PP 2", t] / times["EP over host", t] for t in BATCHES}
        faster = [tokens for tokens, ratio in ratios.items() if ratio > 1 / 0.9]
        assert faster == [t for t in BATCHES if faster[0] <= t <= faster[-1]]
        wins.append(f"from {faster[0]} to {faster[-1]}")
        loses.append(f"from {loses_from(ratios)}")
    assert (
        f"TP 2 x PP 2 {wins[0]} tokens per GPU (qwen3-30b-a3b), {wins[1]} (deepseek-v3); TP 2 x PP 2, of "
        f"which a GPU sends fewer bytes, {loses[0]} and {loses[1]} on."
    ) in WORDS


def moved(link):
    """The column "SMs move"."""
    if link.stores is not None:
        return f"stores {link.stores.value / 1e9:.3g}, {link.stores.kind}"
    rate, shared = link.staging
    base = [LINKS[name].staging for name in ("pcie5-host", "pcie4-host")]
    if link.name == "pcie5-host":
        alone = f"host memory, both ways at once, {rate.value / 1e9:.3g}, {rate.kind}"
        return f"{alone}; more than two GPUs {shared.value / 1e9:.3g}, {shared.kind}"
    if link.name == "pcie4-host":
        assert [one.value for one in link.staging] == [one.value / 2 for one in base[0]]
        return f"half of that, {rate.kind}"
    assert [one.value for one in link.staging] == [one.value for one in base[1]]
    assert link.unsure
    return f"as `pcie4-host`, {rate.kind}, and [in doubt](#without-peer-access-does-ep-lose)"


def all_reduces(link):
    """The column "A(2, n)"."""
    if link.all_reduces_kind != "published":
        return link.all_reduces_kind
    (small, small_s), (large, large_s) = link.all_reduces
    rate = large / (large_s - small_s)
    return f"{small_s * 1e6:.0f} us for {small / 1e3:.0f} KB, {rate / 1e9:.3g} GB/s, published"


def profiles_of(link):
    """The column "profiles"."""
    bold = {name: link.name in place.links[: place.usual] for name, place in PLACES.items()}
    names = [name for name, place in PLACES.items() if link.name in place.links]
    first = sorted(names, key=lambda name: not bold[name])
    return ", ".join(f"**{name}**" if bold[name] else name for name in first)


def rates(words):
    return set(re.findall(r"[\d.]+ [GT]B/s|Gen\d", words))


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_the_table_of_links(link):
    [row] = re.findall(rf"^\| `{link.name}`: (.*) \|$", PAGE, flags=re.MULTILINE)
    title, *cells = row.split(" | ")
    assert rates(title) <= rates(link.title)
    flag = f"{link.flag.value * 1e6:.2f} us, {link.flag.kind}"
    assert cells == [f"{link.one_way.value / 1e9:g}", moved(link), flag, all_reduces(link), profiles_of(link)]


def test_what_is_said_of_the_rates_of_host_memory():
    document = json.loads((RESULTS / "host-memory-2h200.json").read_text())
    of_sms = [one for one in document["results"] if one["by"] == "SMs"]
    stores = max(max(one["write"]) for one in of_sms if one["gpus"] == 1)
    loads = max(max(one["read"]) for one in of_sms if one["gpus"] == 1)
    two = [one for one in of_sms if (one["gpus"], one["blocks"]) == (2, 66)]
    [both] = [one for one in two if min(*one["write"], *one["read"])]
    slower = f"{min(both['write']):.0f} and {min(both['read']):.0f}"
    assert (
        f"stores alone reach {stores:.1f} GB/s, loads alone {loads:.0f}; both at once with two GPUs "
        f"{slower}, of which the slower counts."
    ) in WORDS
