"""What was tuned: remembered for the machine as it was, used unless somebody says otherwise, by all ranks."""

import warnings
from unittest import mock

import msgspec
import pytest
from harness import ranks
from hypothesis import given
from hypothesis import strategies as st
from machines import EVERYTHING, gpu_machine

import ep_backend as ep
from ep_backend import cli, communicator, probe, profiles, tuned
from ep_backend.checks import cache
from ep_backend.cli import env as cli_env
from ep_backend.nvml import Gpu
from ep_backend.select import decide, select

GPUS = (Gpu(uuid="GPU-a", name="H200"), Gpu(uuid="GPU-b", name="H200"))
CONFIG = ep.EpConfig(num_experts=256, top_k=8, hidden_size=7168, max_tokens_per_rank=4096)
SMALL = ep.EpConfig(num_experts=4, top_k=1, hidden_size=64, max_tokens_per_rank=1)
SHAPE = tuned.Shape.of(CONFIG, 2)
PROFILE = """
name = "box"
description = "Made up."
transport = { inside = ["peer"], across = ["collective"], source = "a test" }
sm_budget = { sms = 16, source = "a test" }
"""


def entry(num_sms=24, shape=SHAPE, transport="peer", **more):
    return tuned.Entry(shape=shape, transport=transport, num_sms=num_sms, date="2026-11-28", **more)


@pytest.fixture
def folder(tmp_path):
    """A file with one entry, and how to read it again."""
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    file = tuned.store(entry(), GPUS, "580.65.06", environ)

    def load(gpus=GPUS, driver="580.65.06"):
        return tuned.load(gpus, driver, environ)

    return file, load, environ


# --- the file ---


def test_an_entry_comes_back_and_is_replaced_by_one_for_the_same(folder):
    _, load, environ = folder
    assert load() == ((entry(),), "")
    other = entry(8, msgspec.structs.replace(SHAPE, hidden=2048))
    tuned.store(other, GPUS, "580.65.06", environ)
    tuned.store(entry(None), GPUS, "580.65.06", environ)
    assert load() == ((entry(None), other), "")
    assert load(gpus=GPUS[::-1]) == load(), "processes see GPUs in different orders"


def test_another_driver_other_gpus_another_version_or_build(folder, monkeypatch, tmp_path):
    _, load, _ = folder
    assert load(driver="590.1") == ((), "")
    assert load(gpus=GPUS[:1]) == ((), "")
    assert load(gpus=(GPUS[0], msgspec.structs.replace(GPUS[1], nvlinks=4))) == ((), "")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "__version__", "0.0.1")
        assert load() == ((), "")
    with monkeypatch.context() as patch:
        other = tmp_path / "libep_backend.so"
        other.write_bytes(b"another build")
        patch.setattr(cache, "LIBRARY", other)
        assert load() == ((), "")
    assert load() == ((entry(),), "")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"identity": "x"}', b"\xff\xfe"])
def test_a_damaged_file_is_ignored_and_replaced(folder, content):
    file, load, environ = folder
    file.write_bytes(content)
    entries, problem = load()
    assert entries == ()
    assert str(file) in problem
    assert "run ep-backend tune again" in problem
    tuned.store(entry(), GPUS, "580.65.06", environ)
    assert load() == ((entry(),), "")


@pytest.mark.parametrize(("found", "wrong"), [(b'"num_sms": 24', b'"num_sms": 0'), (b"1.0", b"5.0")])
def test_a_choice_that_cannot_be(folder, found, wrong):
    file, load, _ = folder
    file.write_bytes(file.read_bytes().replace(found, wrong))
    assert load()[0] == ()
    assert ("num_sms" if b"num_sms" in wrong else "chunk_scale") in load()[1]


def test_nothing_was_tuned(tmp_path):
    assert tuned.load(GPUS, "", {"XDG_CACHE_HOME": str(tmp_path)}) == ((), "")
    assert tuned.load((), "", {}) == ((), "")


# --- which entry suits ---


@pytest.mark.parametrize(
    ("changes", "suits"),
    [
        ({}, True),
        ({"max_tokens_per_rank": 64}, True),
        ({"max_tokens_per_rank": 4097}, False),
        ({"hidden_size": 2048}, False),
        ({"num_experts": 128}, False),
        ({"top_k": 6}, False),
        ({"quantization": "fp8_block128"}, False),
        ({"layout": "compact"}, False),
        ({"num_channels": 2}, True),
    ],
)
def test_shapes(changes, suits):
    shape = tuned.Shape.of(ep.EpConfig(**{**vars(CONFIG), **changes}), 2)
    assert entry().suits(shape, "peer") == suits
    assert not entry().suits(shape, "host")
    assert not entry().suits(msgspec.structs.replace(shape, ranks=4), "peer")


# --- what goes first ---


def machine(*numbers, **changes):
    """Two ranks with these tuned numbers, 0 for none."""
    records = gpu_machine(2, **changes)
    known = [(entry(n),) if n != 0 else () for n in (numbers or (24, 24))]
    return [msgspec.structs.replace(r, tuned_sms=k) for r, k in zip(records, known, strict=True)]


def decided(records, **more):
    return decide(records, available=EVERYTHING, **{"shape": SHAPE, **more})


def test_what_was_tuned_is_used_and_the_reason_says_so():
    decision = decided(machine())
    assert decision.sms == 24
    assert "SMs of an exchange: 24, tuned on this machine for this shape on 2026-11-28." in decision.reason
    assert decision.warnings == ()
    assert decision.chunk_scale == 1
    assert "no limit, tuned" in decided(machine(None, None)).reason
    assert decided(machine(None, None)).sms is None


def with_chunks(records, *scales):
    """The same with tuned chunks."""
    found = zip(records, scales, strict=True)
    return [msgspec.structs.replace(r, tuned_sms=(entry(chunk_scale=s),)) for r, s in found]


def test_tuned_chunks_go_with_the_tuned_number_of_sms():
    records = with_chunks(machine(), 2.0, 2.0)
    decision = decided(records)
    assert (decision.sms, decision.chunk_scale) == (24, 2.0)
    assert "SMs of an exchange: 24, chunks x 2, tuned on this machine" in decision.reason
    assert decided(records, num_sms=24).chunk_scale == 1
    limited = with_chunks(machine(environment={"EP_BACKEND_NUM_SMS": "24"}), 2.0, 2.0)
    assert decided(limited).chunk_scale == 1
    decision = decided(with_chunks(machine(), 2.0, 1.0))
    assert (decision.sms, decision.chunk_scale) == (None, 1)
    assert "(24, chunks x 2 on rank 0, 24 on rank 1)" in decision.warnings[0]


def test_order(tmp_path):
    file = tmp_path / "box.toml"
    file.write_text(PROFILE)
    own, limit = {"EP_BACKEND_PROFILE": str(file)}, {"EP_BACKEND_NUM_SMS": "12"}
    assert decided(machine(environment=own | limit), num_sms=4).sms == 4
    assert "tuned" not in decided(machine(), num_sms=4).reason
    decision = decided(machine(environment=own | limit))
    assert decision.sms == 12
    assert "12, by EP_BACKEND_NUM_SMS" in decision.reason
    decision = decided(machine(environment={"EP_BACKEND_NUM_SMS": "0"}))
    assert decision.sms is None
    assert "no limit, by EP_BACKEND_NUM_SMS" in decision.reason
    assert decided(machine(environment=own)).sms == 16
    assert decided(machine(), shape=None).sms is None


def test_the_budget_of_a_profile_that_nobody_named_is_a_default():
    text = PROFILE + '[recognition]\norder = 1\nsource = "a test"\nrequire = { gpus = "all" }\n'
    known = [profiles.loads(text.encode(), "box.toml")]
    tuned_or_not = [select(machine(n, n), known, available=EVERYTHING, shape=SHAPE).sms for n in (24, 0)]
    assert tuned_or_not == [24, 16]
    assert select(machine(), known, profile="box", available=EVERYTHING, shape=SHAPE).sms == 16


def test_ranks_that_differ_use_none_of_it_and_say_so():
    decision = decided(machine(24, 32))
    assert decision.sms is None
    (warning,) = decision.warnings
    assert "(24 on rank 0, 32 on rank 1), so none of it is used" in warning
    assert warning in decision.reason
    assert "24 on rank 0, nothing on rank 1" in decided(machine(24, 0)).warnings[0]
    assert "no limit on rank 0, 8 on rank 1" in decided(machine(None, 8)).warnings[0]
    assert decided(machine(24, 32), num_sms=8).warnings == ()


def test_ranks_must_agree_on_the_variable():
    records = machine()
    records[1] = msgspec.structs.replace(records[1], environment={"EP_BACKEND_NUM_SMS": "8"})
    with pytest.raises(ep.EpConfigError, match="EP_BACKEND_NUM_SMS: nothing on rank 0, 8 on rank 1"):
        decided(records)


@given(st.lists(st.sampled_from([0, None, 8, 24]), min_size=2, max_size=2))
def test_every_rank_decides_alike(numbers):
    decision = decided(machine(*numbers))
    assert decision.sms in (None, 8, 24)
    assert (decision.sms in numbers) or numbers[0] != numbers[1] or numbers == [0, 0]


# --- the probe, the command env and the communicator ---


def test_env_shows_what_was_tuned(monkeypatch, capsys):
    (first, _) = machine(24, 24, tuned_problem="tuned.json cannot be used")
    monkeypatch.setattr(cli_env, "probe", lambda: first)
    monkeypatch.setattr(cli_env.choice, "available", lambda: EVERYTHING)
    cli.main(["env"])
    out = capsys.readouterr().out
    assert (
        "tuned        SMs: 24 (2026-11-28) for peer, 2 ranks, hidden 7168, 256 experts, top-8, rows of" in out
    )
    assert "note         tuned.json cannot be used" in out


def test_the_probe_reads_the_file(monkeypatch, folder):
    file, _, environ = folder
    answer = {"gpus": GPUS, "driver": "580.65.06", "visible": ("GPU-a", "GPU-b")}
    monkeypatch.setattr(probe, "_gpus", lambda *_: dict(answer))
    found = probe.probe(environ=environ, checks="never")
    assert (found.tuned_sms, found.tuned_problem) == ((entry(),), "")
    file.write_bytes(b"{")
    found = probe.probe(environ=environ, checks="never")
    assert found.tuned_sms == ()
    assert str(file) in found.tuned_problem
    answer["device"] = "cpu"
    assert probe.probe(environ=environ, checks="never").tuned_problem == "", "ranks on CPUs have no SMs"


def warnings_job(rank, group, decision):
    """What the communicator of a made-up decision tells its user."""
    with (
        mock.patch.object(communicator, "decide", return_value=decision),
        warnings.catch_warnings(record=True) as caught,
        ep.Communicator(group, SMALL),
    ):
        return [str(warning.message) for warning in caught]


def test_one_warning_for_a_damaged_file():
    problem = "tuned.json cannot be used"
    records = [msgspec.structs.replace(r, tuned_problem=problem) for r in gpu_machine(2)]
    decision = decided(records)
    assert (decision.sms, decision.warnings) == (None, (problem,))
    decision = msgspec.structs.replace(decision, transport="cpu")
    assert ranks(2).run(warnings_job, decision) == [[problem], []]
