"""What is refused, said and set when an engine's configuration is complete."""

import dataclasses
import logging
import multiprocessing
import os
from pathlib import Path

import pytest
from ep_backend_vllm import TESTED_VERSIONS, start
from ep_backend_vllm.start import Launch, refusal, unused_note

from ep_backend import env
from ep_backend.engines.start import MAX_TOKENS_PER_RANK, apply_profile, version_note
from ep_backend.probe import Record, _choices
from ep_backend.select import Decision, EnvValue, check_agreement

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


# --- the settings of a machine's profile ---


@pytest.fixture
def process(monkeypatch):
    """A process of an engine, as `announce` finds it, and what it logs.

    ``process(wanted, first=..., **environ)``: what the decision asks for, whether nobody started it, and
    its environment.
    """

    class Log(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    lines, log = [], Log()
    start.logger.addHandler(log)
    monkeypatch.setattr(start.logger, "level", logging.INFO)
    monkeypatch.setattr("ep_backend.probe.probe", lambda device: Record())

    def run(wanted, *, first=True, environ=None):
        for variable in env.VARIABLES:
            monkeypatch.delenv(variable.name, raising=False)
        for name, value in (environ or {}).items():
            monkeypatch.setenv(name, value)
        values = tuple(EnvValue(name, value, "Because.", "here") for name, value in wanted.items())
        decision = Decision(profile="box", transport="collective", env=values, reason="")
        monkeypatch.setattr("ep_backend.select.decide", lambda records: decision)
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: None if first else object())
        start._announce_once.cache_clear()
        apply_profile.cache_clear()
        lines.clear()
        for limit in (2048, 4096):  # vLLM completes a configuration several times
            start._announce_once(but(max_tokens_per_rank=limit))
        return {v.name: os.environ[v.name] for v in env.VARIABLES if v.name in os.environ}, list(lines)

    yield run
    for variable in env.VARIABLES:
        os.environ.pop(variable.name, None)  # monkeypatch restores what was there before
    start.logger.removeHandler(log)
    start._announce_once.cache_clear()
    apply_profile.cache_clear()


WANTED = {"NCCL_IB_SL": "3", "NCCL_NVLS_ENABLE": "0"}


def test_the_first_process_reports_each_conflict_once_and_what_it_really_set(process):
    environ, lines = process(WANTED, environ={"NCCL_NVLS_ENABLE": "1"})
    assert (environ["NCCL_IB_SL"], environ["NCCL_NVLS_ENABLE"]) == ("3", "1")
    (conflict,) = [line for line in lines if "NCCL_NVLS_ENABLE" in line]
    assert "NCCL_NVLS_ENABLE=1 is kept" in conflict
    (told,) = [line for line in lines if "NCCL_IB_SL" in line]
    assert told == "ep_backend: profile box sets NCCL_IB_SL=3"


def test_a_switch_that_makes_a_level_meaningless_is_reported_once(process):
    environ, lines = process({"NCCL_P2P_LEVEL": "PHB"}, environ={"NCCL_P2P_DISABLE": "1"})
    assert "NCCL_P2P_LEVEL" not in environ
    (conflict,) = [line for line in lines if "NCCL_P2P_LEVEL" in line]
    assert "NCCL_P2P_DISABLE=1 is kept as it was found; ep_backend would set NCCL_P2P_LEVEL=PHB" in conflict


def test_nothing_is_said_where_nothing_was_set(process):
    environ, lines = process(WANTED, environ=WANTED)
    assert [line for line in lines if "NCCL" in line] == []
    assert env.applied(environ) == {}


def test_other_processes_are_given_the_settings_without_a_word(process):
    environ, lines = process(WANTED, first=False, environ={"NCCL_NVLS_ENABLE": "1"})
    assert (environ["NCCL_IB_SL"], environ["NCCL_NVLS_ENABLE"]) == ("3", "1")
    assert lines == []


def test_other_processes_keep_what_the_first_one_set(process):
    """With fewer GPUs to see, an engine core may come to another decision."""
    inherited, _ = process(WANTED)
    environ, lines = process({"NCCL_IB_SL": "4", "NCCL_IB_TC": "7"}, first=False, environ=inherited)
    assert environ == inherited
    assert lines == []


def test_workers_of_several_hosts_agree_although_their_first_processes_set_other_things(process):
    records = []
    for wanted in ({"NCCL_IB_DISABLE": "1"}, {}):
        inherited, _ = process(wanted)
        environ, _ = process(wanted, first=False, environ=inherited)
        records.append(Record(**_choices(Path(), environ, [])))
    check_agreement(records)
    assert [record.applied for record in records] == [{"NCCL_IB_DISABLE": "1"}, {}]
