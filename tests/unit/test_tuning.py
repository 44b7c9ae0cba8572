"""`ep-backend tune`: the stages and the choice with made-up times, the command with made-up measurements."""

import json
import random
from collections import Counter

import pytest
import torch
from harness import ranks
from hypothesis import given
from hypothesis import strategies as st
from machines import gpu_machine

from ep_backend import cli, env, tuned
from ep_backend.launch import processes
from ep_backend.probe import Record
from ep_backend.tuning import choice, command, measure
from ep_backend.tuning.choice import Sample, candidates, choose, final, search

MOST = 132


def samples(times, rounds=choice.ROUNDS, scale=1.0):
    """``times``: by number of SMs, pairs (exchange, lost) in us for 8, 64, ... tokens."""
    return [
        Sample(num_sms, 8 << 3 * i, exchange, lost, scale)
        for num_sms, pairs in times.items()
        for _ in range(rounds)
        for i, (exchange, lost) in enumerate(pairs)
    ]


def chosen(times, weight=1.0):
    return final(samples(times), weight).num_sms


# --- the choice ---


def test_cost_is_the_geometric_mean_of_exchange_and_weighted_loss():
    times = {None: [(10, 10), (100, 100)], 8: [(10, 0), (160, 80)]}
    by = {one.num_sms: one for one in candidates(samples(times), 0.5)}
    assert by[None].cost == pytest.approx(1)
    assert by[8].cost == pytest.approx(((10 / 15) * (200 / 150)) ** 0.5)
    assert by[8].slowest == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("times", "weight", "best"),
    [
        ({None: [(100, 50)], 24: [(102, 10)]}, 1, 24),
        ({None: [(100, 50)], 24: [(102, 10)]}, 0, None),  # exchanges alone: 2 % is no tie
        ({None: [(100, 50)], 24: [(104, 0)]}, 1, None),  # slower by more than 3 %, whatever it saves
        ({None: [(100, 50)] * 2, 24: [(50, 0), (104, 0)]}, 1, None),  # for any number of tokens
        ({None: [(100, 0)], 24: [(100.5, 0)], 48: [(100, 0)]}, 0, 24),  # equal: fewer
        ({None: [(100, 9)], 24: [(100, 9)]}, 1, 24),
        ({None: [(100, 9)], 24: [(90, 9)], 48: [(80, 9)], 96: [(79.9, 9)]}, 1, 48),
        ({None: [(100, 9)]}, 1, None),
        ({None: [(100, -5)], 24: [(101.5, -50)]}, 1, None),  # nothing is gained by noise
    ],
)
def test_choice(times, weight, best):
    assert chosen(times, weight) == best


@pytest.mark.parametrize(
    ("other", "scale"),
    [
        ({24: [(70, 10), (70, 10)]}, 2.0),
        ({24: [(79, 10), (79, 10)]}, 1.0),  # better, but not clearly
        ({24: [(50, 0), (104, 0)]}, 1.0),  # too slow for one number of tokens
        ({None: [(70, 0), (70, 0)]}, 1.0),  # not with the chosen number of SMs
    ],
)
def test_other_chunks_must_be_clearly_better_with_the_chosen_number_of_sms(other, scale):
    own = samples({None: [(100, 20)] * 2, 24: [(80, 10)] * 2})
    best = final(own + samples(other, scale=2.0), 1)
    assert (best.num_sms, best.chunk_scale) == (24, scale)
    once = final(own + samples(other, rounds=1, scale=2.0), 1)
    assert (once.num_sms, once.chunk_scale) == (24, 1.0), "measured once"


def test_what_was_measured_once_is_not_chosen():
    good = samples({None: [(100, 50)]}) + samples({24: [(90, 0)]}, rounds=choice.ROUNDS - 1)
    assert choose(candidates(good, 1)).num_sms == 24
    assert final(good, 1).num_sms is None


def test_one_lucky_round_does_not_count():
    lucky = samples({None: [(100, 0)], 24: [(110, 0)]}) + samples({24: [(50, 0)]}, rounds=1)
    assert final(lucky, 1).num_sms is None


# --- the stages ---


def machine(exchange, lost, noise=0.0, seed=0, tokens=(8, 4096), chunks=lambda scale: 1.0):
    """A measure of made-up times, functions of SMs and tokens, times one of the scale of chunks; and how
    often each number and scale was asked for."""
    g, asked = random.Random(seed), Counter()

    def take(num_sms, scale):
        asked[num_sms, scale] += 1
        n = num_sms or MOST
        times = [(t, exchange(n, t) * chunks(scale), lost(n, t)) for t in tokens]
        return [
            Sample(num_sms, t, *(us * g.uniform(1 - noise, 1 + noise) for us in both), scale)
            for t, *both in times
        ]

    return take, asked


def bandwidth(enough):
    """Large exchanges want ``enough`` SMs, small ones do not care; more make all of them a little faster."""
    return lambda n, t: (20 + t / 10 * max(1.0, enough / n)) * (1.02 - 0.02 * n / MOST)


def test_stages_go_from_far_apart_to_near_and_look_again():
    take, asked = machine(bandwidth(40), lambda n, t: n)
    best = final(search(take, MOST, 1.0), 1.0)
    numbers = {n for n, _ in asked}
    assert numbers >= {None, *(n for n in choice.COARSE if n < MOST)}
    assert 160 not in numbers
    assert {40, 56} < numbers, "half-way between 48 and its neighbours"
    assert (best.num_sms, best.chunk_scale) == (40, 1.0)
    assert asked[None, 1.0] == asked[40, 1.0] == choice.ROUNDS
    assert {n for n, scale in asked if scale != 1} == {40}, "chunks with the chosen number only"
    assert {scale: n for (_, scale), n in asked.items() if scale != 1} == dict.fromkeys(choice.SCALES, 1)
    assert sum(asked.values()) < 26


def test_the_best_chunks_are_measured_again_beside_the_own_ones():
    take, asked = machine(
        bandwidth(40), lambda n, t: n, chunks=lambda s: {2.0: 0.8, 4.0: 0.9}.get(s, 1.1 - 0.1 * (s == 1))
    )
    best = final(search(take, MOST, 1.0), 1.0)
    assert (best.num_sms, best.chunk_scale, best.rounds) == (40, 2.0, choice.ROUNDS)
    assert asked[40, 1.0] == asked[None, 1.0] == 2 * choice.ROUNDS - 1
    assert (asked[40, 2.0], asked[40, 4.0]) == (choice.ROUNDS, 1)


def test_a_gpu_with_few_sms():
    take, asked = machine(lambda n, t: 10, lambda n, t: 0)
    search(take, 4, 1.0)
    assert {n for n, _ in asked} == {None}


@given(
    seed=st.integers(0, 1 << 16),
    noise=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    better=st.sampled_from([0.7, 0.97, 1.0]),
    enough=st.integers(1, MOST),
    weight=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_never_slower_than_the_default_by_what_was_measured(seed, noise, better, enough, weight):
    take, _ = machine(
        bandwidth(enough), lambda n, t: n / 4, noise, seed, chunks=lambda s: better if s == 0.5 else 1.0
    )
    found = search(take, MOST, weight)
    best = final(found, weight)
    for tokens in (8, 4096):
        chosen, default = (
            choice.median(
                s.exchange_us for s in found if (s.num_sms, s.chunk_scale, s.tokens) == (*way, tokens)
            )
            for way in ((best.num_sms, best.chunk_scale), (None, 1.0))
        )
        assert chosen <= 1.03 * default
    assert best.is_default or best.rounds >= choice.ROUNDS
    assert best.cost <= choice.EQUAL


# --- what products lose ---


def lost_job(rank, group):
    """With made-up times: 20 exchanges end after 4 ms, and cost products 1 us each on rank 0, 2 on rank 1."""
    products, counts = object.__new__(measure._Products), []

    def timed(count, graph):
        counts.append(count)
        return count * 1e-4 + (20e-6 * (rank + 1) if graph else 0.0), count * 1e-4 >= 4e-3

    products._each_s, products._time = 1e-4, timed
    return products.lost("graph", 20, 50e-6), counts


def test_lost_by_the_slowest_rank_beside_all_exchanges():
    first, second = ranks(2).run(lost_job)
    assert first == second
    assert first[0] == pytest.approx(2e-6)
    assert first[1] == [30, 30] + [60] * 2 * measure.TURNS


# --- the command ---

RECORD = gpu_machine(2, driver="580.65.06")[0]
COMMAND = ["tune", "--hidden", "512", "--experts", "16", "--topk", "4", "--tokens", "8,4096"]


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """A machine with two GPUs on which ranks do not start: their measurements are made up."""
    for name in (v.name for v in env.VARIABLES if v.kind == "read"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(command, "probe", lambda *_, **given: RECORD)

    def run(job, arguments, *, count, speak):
        assert (job, count) == (command._rank, 2)
        take, _ = machine(bandwidth(40), lambda n, t: n, chunks=lambda s: 0.8 if s == 0.5 else 1.0)
        found = search(take, MOST, arguments[1])
        value = {"transport": "peer", "sms": MOST, "gpus": ["H200", "H200"], "samples": found}
        return [processes.Outcome(rank, "done", value) for rank in range(count)]

    monkeypatch.setattr(processes, "run", run)

    def stored():
        return tuned.load(RECORD.gpus, RECORD.driver, {"XDG_CACHE_HOME": str(tmp_path)})[0]

    return stored


def test_the_choice_is_stored_shown_and_drawn(two_gpus, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "tuned.json", tmp_path / "tuned.svg"
    assert cli.main([*COMMAND, "--json", str(file), "--plot", str(picture)]) == 0
    (entry,) = two_gpus()
    assert (entry.num_sms, entry.chunk_scale, entry.transport) == (40, 0.5, "peer")
    assert (entry.shape.ranks, entry.shape.hidden, entry.shape.tokens) == (2, 512, 4096)
    out = capsys.readouterr().out
    assert "chosen: 40, chunks x 0.5 (cost " in out
    assert "goes before" not in out
    document = json.loads(file.read_text())
    assert (document["chosen"]["num_sms"], document["chosen"]["chunk_scale"]) == (40, 0.5)
    assert document["chosen"]["slowest"] <= 1.03
    assert {(None, 1.0), (40, 1.0), (40, 0.25)} < {
        (s["num_sms"], s["chunk_scale"]) for s in document["samples"]
    }
    assert document["versions"]["driver"] == "580.65.06"
    assert document["stored"] in out
    assert "<svg" in picture.read_text()


def test_the_weight_counts(two_gpus):
    assert cli.main([*COMMAND, "--weight", "0"]) == 0
    without = two_gpus()[0].num_sms
    assert cli.main([*COMMAND, "--weight", "9"]) == 0
    assert len(two_gpus()) == 1
    assert two_gpus()[0].num_sms < without


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"EP_BACKEND_NUM_SMS": "8"}, "EP_BACKEND_NUM_SMS=8 is set here and goes before it."),
        ({"EP_BACKEND_NUM_SMS": " "}, ""),
        ({"EP_BACKEND_PROFILE": "nvswitch"}, ""),
    ],
)
def test_what_goes_first_is_said(two_gpus, capsys, monkeypatch, environment, words):
    (record,) = gpu_machine(2, used=[0], driver=RECORD.driver, environment=environment)
    monkeypatch.setattr(command, "probe", lambda *_, **given: record)
    assert cli.main(COMMAND) == 0
    out = capsys.readouterr().out
    assert (words in out) if words else ("goes before" not in out)


def test_nothing_to_tune_on_cpus(capsys):
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "there is nothing to tune on CPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "3"], "--ranks 3, but PyTorch finds 2 GPUs here"),
        (["--topk", "17"], "top_k"),
        (["--layout", "compact"], "invalid choice"),
        (["--weight", "-1"], "not a number from 0"),
    ],
)
def test_arguments_that_do_not_fit(two_gpus, capsys, arguments, words):
    assert cli.main([*COMMAND, *arguments]) in (1, 2)
    assert words in capsys.readouterr().err
    assert two_gpus() == ()


def test_gpus_that_nobody_can_tell_apart(two_gpus, capsys, monkeypatch):
    monkeypatch.setattr(command, "probe", lambda *_, **given: Record())
    assert cli.main(COMMAND) == 1
    assert "nvidia-ml-py" in capsys.readouterr().err


def test_a_rank_that_fails(two_gpus, capsys, monkeypatch):
    failed = processes.Outcome(
        1, "raised", text="a result was wrong with 8 SMs", error="EpError", details="..."
    )
    monkeypatch.setattr(processes, "run", lambda *_, **given: [failed])
    assert cli.main(COMMAND) == 1
    assert "rank 1: a result was wrong with 8 SMs" in capsys.readouterr().err
    assert two_gpus() == ()
