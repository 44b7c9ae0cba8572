"""The words of `ep-backend plan`: which way to choose, and when nothing is to be called faster."""

import pytest

from ep_backend.doctor import advice
from ep_backend.planning import model, words


def row_of(way, seconds, tokens=1):
    return words.Row(
        way=way,
        link="l",
        dtype="bf16",
        tokens=tokens,
        sent_bytes=1,
        seconds=seconds,
        basis="",
    )


@pytest.mark.parametrize(
    ("ours", "tp_s", "start"),
    [
        (
            "EP over peer",
            1.05e-5,
            "EP over peer or TP 4, about equal (less than 10% apart) at 1 token per GPU",
        ),
        ("EP over peer", 1.2e-5, "Choose EP over peer at 1 token per GPU"),
        ("EP over peer", 0.95e-5, "TP 4 or EP over peer, about equal"),
        ("EP over host", 1.2e-5, "Choose EP over host at 1 token per GPU"),
        (
            "EP over NCCL",
            1.2e-5,
            "EP over NCCL or TP 4, about equal (less than 10% apart; EP over NCCL is planned",
        ),
        ("EP over NCCL", 1.6e-5, "Choose EP over NCCL at 1 token"),
        ("EP over NCCL", 0.85e-5, "Choose TP 4 at 1 token"),
    ],
)
def test_small_differences_choose_nothing(ours, tp_s, start):
    made = [row_of(ours, 1e-5), row_of("TP 4", tp_s)]
    (said,) = words.best(model.read("qwen3-30b-a3b"), made, set())
    assert said.startswith(start)


def test_ways_that_are_about_equal_at_some_tokens_only_get_a_sentence_each():
    made = [row_of("A", 1e-5), row_of("B", 1e-5), row_of("A", 1e-5, 8), row_of("B", 3e-5, 8)]
    equal, chosen = words.best(model.read("qwen3-30b-a3b"), made, set())
    assert equal.startswith("A or B, about equal (less than 10% apart) at 1 token per GPU")
    assert chosen.startswith("Choose A at 8 tokens per GPU")


def test_doctors_sentences_know_the_error_of_ep_over_nccl():
    def said(ep, tp_s):
        one = advice.Comparison(
            shape="s", layers=1, ep=ep, tokens=1, ranks=4, ep_s=1e-5, tp_s=tp_s, tp_pp_s=None
        )
        (line,) = advice.sentences([one])
        return line

    assert "about equal" in said("EP over NCCL (l, bf16)", 1.4e-5)
    assert "is faster than TP 4" in said("EP over NCCL (l, bf16)", 1.6e-5)
    assert "is faster than TP 4" in said("EP", 1.4e-5)
    assert "is slower than TP 4" in said("EP over NCCL", 0.85e-5)
    assert "about equal" in said("EP", 0.95e-5)


def test_a_rival_that_is_impossible_gets_no_sentence():
    one = advice.Comparison(shape="s", layers=1, tokens=1, ranks=4, ep_s=1e-5, tp_s=3e-5, tp_pp_s=2e-5)
    assert len(advice.sentences([one])) == 2
    (line,) = advice.sentences([one], {"TP 4"})
    assert "TP 2 x PP 2" in line
