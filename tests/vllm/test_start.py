"""What is refused, said and set when an engine's configuration is complete."""

import dataclasses

import pytest
from ep_backend_vllm import TESTED_VERSIONS
from ep_backend_vllm.start import Launch, refusal, unused_note

from ep_backend.engines.start import MAX_TOKENS_PER_RANK, version_note

GOOD = Launch(
    expert_parallel=True,
    data_parallel=2,
    tensor_parallel=1,
    context_parallel=1,
    is_moe=True,
    device="cpu",
    max_tokens_per_rank=2048,
)


def but(**changes):
    return dataclasses.replace(GOOD, **changes)


def test_a_good_launch_is_neither_refused_nor_commented():
    assert refusal(GOOD) is None
    assert unused_note(GOOD) is None


@pytest.mark.parametrize(
    ("changes", "instead"),
    [
        ({"ubatches": 2}, "neither on a CPU"),
        ({"ubatches": 3, "device": "cuda"}, "--enable-dbo without --ubatch-size"),
        ({"elastic": True}, "without --enable-elastic-ep"),
        ({"fault_tolerance": True}, "without --enable-fault-tolerance"),
        ({"context_parallel": 2}, "--prefill-context-parallel-size 1"),
        ({"lora": True}, "allgather_reducescatter"),
        ({"device": "xpu"}, "allgather_reducescatter"),
        ({"max_tokens_per_rank": MAX_TOKENS_PER_RANK + 1}, f"--max-num-batched-tokens {MAX_TOKENS_PER_RANK}"),
    ],
)
def test_refusals_say_what_to_use_instead(changes, instead):
    assert instead in (refusal(but(**changes)) or "")
    unused = but(**changes, expert_parallel=False)
    assert refusal(unused) is None, "an option cannot hurt where the all-to-all is never called"


def test_two_batches_may_overlap_on_gpus():
    assert refusal(but(ubatches=2, device="cuda")) is None


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"expert_parallel": False}, ["--enable-expert-parallel"]),
        ({"data_parallel": 1}, ["--data-parallel-size N"]),
        ({"data_parallel": 1, "tensor_parallel": 4}, ["--data-parallel-size N"]),
        (
            {"expert_parallel": False, "data_parallel": 1},
            ["--enable-expert-parallel", "--data-parallel-size N"],
        ),
    ],
)
def test_a_launch_that_never_calls_us_is_told_what_to_add(changes, added):
    note = unused_note(but(**changes))
    assert "\n" not in note
    assert [
        option for option in ("--enable-expert-parallel", "--data-parallel-size N") if option in note
    ] == added


def test_a_model_without_experts_is_named_as_the_reason():
    assert "no experts" in unused_note(but(is_moe=False))


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.9", "0.33.0rc1", "0.30.1+cpu", "dev"])
def test_versions_that_are_tested_or_unreadable_pass_silently(version):
    assert version_note("vLLM", version, TESTED_VERSIONS) is None


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "0.8.5"])
def test_other_versions_get_one_warning_with_the_range(version):
    note = version_note("vLLM", version, TESTED_VERSIONS)
    assert "0.26 to 0.33" in note
    assert version in note
