"""The stand-in for V2's ElasticBuffer, on the CPU; tests/gpu/test_deep_ep_gpu.py runs the same jobs."""

import elastic_cases as cases
import pytest
from harness import ranks


@pytest.mark.parametrize(
    ("tokens", "routing", "fp8", "alignment", "events"),
    [
        ((17, 40), "uniform", False, 1, False),
        ((9, 33), "holes", True, 16, True),
        ((5, 0), "skewed", False, 128, True),
        ((3, 8), "nobody", True, 128, False),
    ],
)
def test_dispatch_and_combine(tokens, routing, fp8, alignment, events):
    ranks(2).run(cases.dispatch_and_combine, "cpu", tokens, routing, fp8, alignment, events)


def test_small_things():
    ranks(2).run(cases.small_things, "cpu")


def test_what_is_refused_says_what_was_wanted():
    for names, said in ranks(2).run(cases.refusals, "cpu"):
        assert sorted(said) == names
        assert "0 was wanted" in said["cpu memory"]
        assert "a handle" in said["experts"]
        assert "2 ranks" in said["uneven experts"]
        assert "num_max_tokens_per_rank = 3" in said["too many"]
        assert "do_cpu_sync" in said["unsynced"]
        assert "do_expand is True; False" in said["another layout"]
        assert "as previous_event" in said["epilogue"]
        assert "all_gather_into_tensor" in said["gather"]
