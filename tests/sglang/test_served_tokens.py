"""How the GPU tests compare what two servers say. Needs no SGLang."""

import random_models
import served_tokens
from served_tokens import ASKED, LIMIT, NEW_TOKENS, Answer, common_steps, differences, equal, read_answer


def answer(**changes):
    """Token n at step n, the others less likely by steps of 0.1; ``changes``: "tokens" and "likely"."""
    likely = [{token: -0.1 * ((token - n) % ASKED) for token in range(ASKED)} for n in range(NEW_TOKENS)]
    return Answer(**{"tokens": list(range(NEW_TOKENS)), "likely": likely, **changes})


def wrong(ours, limit=LIMIT, **how):
    return differences({"group": [answer(), ours]}, {"group": [answer(), answer()]}, limit, **how)


def shifted(steps, by):
    return [
        {token: logprob + by * (n in steps) for token, logprob in step.items()}
        for n, step in enumerate(answer().likely)
    ]


def test_equal_answers():
    assert wrong(answer()) == []


def test_other_probabilities_of_the_first_token_or_of_later_ones():
    assert wrong(answer(likely=shifted([0], 0.9 * LIMIT))) == []
    assert "differ by 0.165, later by 0.000" in wrong(answer(likely=shifted([0], 1.1 * LIMIT)))[0]
    later = range(1, NEW_TOKENS)
    assert wrong(answer(likely=shifted(later, 0.9 * LIMIT))) == []
    assert "group, prompt 1" in wrong(answer(likely=shifted(later, -1.1 * LIMIT)))[0]


def test_a_mean_over_prompts():
    """One of the two is as stock's."""

    def found(by):
        return wrong(answer(likely=shifted([0], by * LIMIT)), mean=True)

    assert found(1.9) == []
    assert found(2.1) == ["group: log-probabilities differ by 0.158, later by 0.000"]


def test_a_likely_token_that_is_not_among_ours_counts():
    likely = answer().likely
    likely[0] = {token + 5: logprob for token, logprob in likely[0].items()}
    assert len(wrong(answer(likely=likely))) == 1


def test_another_token_is_accepted_only_at_a_tie_of_stock_s():
    near, far = list(range(NEW_TOKENS)), list(range(NEW_TOKENS))
    near[3], far[3] = 4, 5  # stock finds them less likely by 0.1 and 0.2
    assert wrong(answer(tokens=near)) == []
    assert "token 4 is 5, 0.200 less likely than 3" in wrong(answer(tokens=far))[0]
    assert wrong(answer(tokens=far), limit=0.3) == []
    unknown = [ASKED, *range(1, NEW_TOKENS)]
    assert "inf less likely" in wrong(answer(tokens=unknown))[0]


def test_equal_prompts_are_counted():
    other = answer(tokens=[1, *range(1, NEW_TOKENS)])
    assert (
        equal({"a": [answer(), other], "b": [answer()] * 2}, {"a": [answer()] * 2, "b": [answer()] * 2})
        == 0.75
    )


def test_steps_after_another_token_are_not_compared():
    other = list(range(NEW_TOKENS))
    other[3:] = [4] * (NEW_TOKENS - 3)
    ours = answer(tokens=other, likely=shifted(range(4, NEW_TOKENS), 9.0))
    assert common_steps(ours, answer()) == 4
    assert wrong(ours) == []


def test_what_sglang_says_is_read():
    said = {
        "output_token_logprobs": [[-0.5, 7, None]] * NEW_TOKENS,
        "output_top_logprobs": [[[-0.5 - n, 7 + n, None] for n in range(ASKED)]] * NEW_TOKENS,
    }
    read = read_answer(said)
    assert read.tokens == [7] * NEW_TOKENS
    assert read.likely[0][9] == -2.5


def test_prompts_are_of_several_lengths():
    groups = served_tokens.groups_of_prompts()
    lengths = [len(prompt.split()) for prompt in groups["together"]]
    assert len(set(lengths)) == random_models.PROMPTS
    assert sum(lengths) == len(groups["long"][0].split())
