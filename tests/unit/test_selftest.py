"""``ep-backend selftest``: its plan, its verdicts on made-up ranks, and real runs on CPUs."""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from machines import cpu_rank

import ep_backend as ep
from ep_backend import _native, cli, env, select
from ep_backend.cli import choice
from ep_backend.launch.processes import Outcome
from ep_backend.selftest import command, graphs, network, phases, plan, report
from ep_backend.selftest.advice import advise
from ep_backend.selftest.exchanges import Result
from ep_backend.selftest.phases import Group, Options

ROOT = Path(__file__).parents[2]
CPU = Options(device="cpu", ranks=2, transport="auto", deadline_s=60.0, timeout_s=30.0)
GPUS = replace(CPU, device="cuda", ranks=4)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [*launcher, *(name for name in os.environ if name.startswith(env.PREFIX))]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def four_gpus(monkeypatch):
    """As far as the plan goes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(phases, "available", lambda device: frozenset({"peer", "collective"}))
    monkeypatch.setattr(phases, "expected", lambda options: "peer")


# ---- the plan ----


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_layout_and_payload_with_all_kinds_of_exchanges(world):
    lists = [plan.group_cases(world), plan.group_cases(world, bulk=True)]
    lists += [plan.local_cases("cpu"), plan.local_cases("cuda")] if world == 1 else []
    for cases in lists:
        names = {(case.payload, case.layout) for case in cases}
        assert names == {(p, lay) for p in plan.PAYLOADS for lay in plan.LAYOUTS}
        assert len(names) == len(cases)
        seeds = [step.seed for case in cases for step in case.steps]
        assert len(set(seeds)) == len(seeds), "old rows would pass for new"
        for case in cases:
            assert case.config(world, "auto", 5.0).layout == case.layout
            for step in case.steps:
                assert len(step.tokens) == world
                assert all(0 <= count <= step.slots for count in step.tokens)
            assert {step.halves for step in case.steps} == {True, False}
            assert {step.exact for step in case.steps} == {True, False}
            assert min(step.slots for step in case.steps) == 1
            assert any(0 in step.tokens for step in case.steps)
            again = [step.slots for step in case.steps]
            assert any(a == b for a, b in pairwise(again))
            if world > 1:
                assert any(len(set(step.tokens)) > 1 for step in case.steps)
                assert any(step.routing == "one_rank" for step in case.steps)


def test_bulk_exchanges_are_above_the_switch():
    source = (ROOT / "csrc/kernels/cuda/exchange.cu").read_text()
    assert float(re.search(r"kBulkFrom = (\w+);", source).group(1)) <= plan.BULK_TOKENS * plan.BULK_HIDDEN * 2

    def has_bulk(case):
        return case.config(1, "auto", 1.0).hidden_size == plan.BULK_HIDDEN and any(
            step.slots >= plan.BULK_TOKENS for step in case.steps
        )

    bulk = {(case.payload, case.layout) for case in plan.local_cases("cuda") if has_bulk(case)}
    assert bulk == {(payload, "rank_major") for payload in plan.PAYLOADS} | {
        ("bf16", layout) for layout in plan.LAYOUTS
    }
    for with_bulk in (False, True):
        cases = plan.group_cases(4, bulk=with_bulk)
        together = {case.payload for case in cases if has_bulk(case)}
        assert together == (set(plan.BULK_TWICE) if with_bulk else set())


def test_replays_change_the_number_of_tokens():
    steps = plan.graph_steps(4, graphs.SLOTS, graphs.REPLAYS)
    for rank in range(4):
        counts = [step.tokens[rank] for step in steps]
        assert all(a != b for a, b in pairwise(counts))
        assert max(counts) <= graphs.SLOTS


# ---- verdicts ----


def done(transport="peer", wrong=(), left_out="", exchanges=9):
    result = Result(transport=transport, exchanges=0 if left_out else exchanges, cells=1000, wrong=wrong)
    return [Outcome(rank, "done", value=replace(result, left_out=left_out)) for rank in range(2)]


class Starts:
    """Groups of ranks that end as is said, one after another; remembers what they were started for."""

    def __init__(self, *outcomes):
        self.outcomes, self.tasks, self.counts = list(outcomes), [], []

    def __call__(self, job, arguments, *, count, deadline_s):
        assert deadline_s == 60.0
        self.tasks.append(arguments[0])
        self.counts.append(count)
        return self.outcomes.pop(0)


def test_local_tries_every_gpu_alone(four_gpus):
    start = Starts(*[done()] * 4)
    found = phases.local(replace(GPUS, ranks=2), start)
    assert found.status == "passed"
    assert [(task.gpu, task.transport) for task in start.tasks] == [(gpu, "peer") for gpu in range(4)]
    assert start.counts == [1] * 4
    assert [group.name for group in found.groups] == [f"peer on GPU {gpu}" for gpu in range(4)]


def test_a_sick_gpu_ends_the_phase_and_is_named(four_gpus):
    start = Starts(done(), done(wrong=((0, "rows[3, 4]: 1 instead of 2"),)))
    found = phases.local(GPUS, start)
    assert (found.status, len(start.tasks)) == ("failed", 2)
    assert str(found.failure) == "peer on GPU 1, rank 0: rows[3, 4]: 1 instead of 2"
    assert "Xid" in found.next[0]


def test_node_takes_what_is_chosen_first_and_then_the_others(four_gpus):
    start = Starts(done("peer"), done("collective"))
    found = phases.node(GPUS, start)
    assert [(task.transport, task.optional) for task in start.tasks] == [
        ("auto", False),
        ("collective", True),
    ]
    assert start.counts == [4] * 2
    assert [any(step.slots > 2048 for case in task.cases for step in case.steps) for task in start.tasks] == [
        True,
        False,
    ]
    names = [(group.name, group.chosen) for group in found.groups]
    assert names == [("peer", True), ("collective", False)]
    assert all(task.timeout_s == 20.0 for task in start.tasks)  # a third of the deadline


def test_without_the_kernels_for_gpus_nothing_is_tried_on_them(four_gpus, monkeypatch):
    monkeypatch.setattr(phases, "available", lambda device: frozenset())
    for phase in (phases.local, phases.graph):
        found = phase(GPUS, Starts())
        assert found.status == "skipped"
        assert "EP_BACKEND_CUDA=1" in found.why


def test_a_transport_that_is_asked_for_is_the_only_one(four_gpus):
    asked = replace(GPUS, transport="peer")
    start = Starts(done("peer"))
    found = phases.node(asked, start)
    assert [task.transport for task in start.tasks] == ["peer"]
    assert [group.chosen for group in found.groups] == [False]


def test_what_is_set_up_wrongly_is_no_sick_gpu(four_gpus):
    refused = [Outcome(0, "raised", text="rank 0 cannot start: no", error="EpConfigError")]
    found = phases.local(GPUS, Starts(refused))
    assert (found.status, found.failure.error) == ("failed", "EpConfigError")
    assert "Xid" not in " ".join(found.next)


def test_what_cannot_start_here_is_left_out_but_not_what_is_chosen(four_gpus):
    start = Starts(done("collective"), done("peer", left_out="no access"))
    found = phases.node(GPUS, start)
    assert found.status == "passed"
    assert "without peer: no access" in report.lines(found)[0]
    refused = [Outcome(0, "raised", text="cannot map", error="EpConfigError")]
    assert phases.node(GPUS, Starts(refused)).status == "failed"


def test_graphs_that_cannot_be_captured_are_skipped_with_the_reason(four_gpus):
    found = phases.graph(GPUS, Starts(done("collective", left_out="no NCCL")))
    assert (found.status, found.why) == ("skipped", "no NCCL")
    assert phases.graph(CPU, Starts()).status == "skipped"


def test_a_failure_names_rank_place_and_the_others():
    at = "transport cpu, layout compact, payload fp32, exchange 3"
    outcomes = [
        Outcome(0, "raised", text="rank 0 waited 3.0 s in combine for rank 1", details="Traceback ..."),
        Outcome(1, "cut", text="was ended 3 s after rank 0 had failed", details="in sleep", at=at),
        Outcome(2, "done", value=Result(transport="cpu")),
    ]
    found = phases.node(CPU, Starts(outcomes))
    assert (found.status, found.failure.kind, found.failure.rank) == ("failed", "raised", 0)
    text = "\n".join(report.lines(found))
    assert "node     FAILED" in text
    assert "cpu, rank 0: rank 0 waited 3.0 s in combine for rank 1" in text
    assert f"also: rank 1: was ended 3 s after rank 0 had failed (at: {at})" in text
    assert "rank 2" not in text
    assert "in sleep" in found.failure.details
    assert "next 1: " in text


def test_ranks_of_the_same_fate_share_a_line():
    late = [Outcome(rank, "late", text="was ended after 5 s without an answer") for rank in range(6)]
    late[3] = replace(late[3], at="the first exchange")
    found = phases.node(CPU, Starts(late))
    also = [line for line in report.lines(found) if "also:" in line]
    assert also == [
        "  also: ranks 1-2, 4-5, each: was ended after 5 s without an answer",
        "  also: rank 3: was ended after 5 s without an answer (at: the first exchange)",
    ]


@pytest.mark.parametrize("phase", ["local", "node", "graph", "network"])
@pytest.mark.parametrize("kind", ["wrong", "raised", "died", "late"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("transport", ["cpu", "peer", "collective", "auto"])
def test_advice(phase, kind, device, transport):
    steps = advise(phase, kind, transport, device)
    assert "ep-backend doctor" in steps[-2]
    assert steps[-1].endswith(f"--phase {phase} --json")
    text = " ".join(steps)
    assert ("--deadline" in text) == (kind == "late")
    if phase == "graph":
        assert "--enforce-eager" in text
    elif transport == "collective":
        assert "EP_BACKEND_TRANSPORT=collective" not in text
    else:
        # One GPU alone runs the same kernels with any transport.
        assert ("EP_BACKEND_TRANSPORT=collective" in text) == (device == "cpu" or phase != "local")
        assert ("EP_BACKEND_PEER_ACCESS=0" in text) == (device == "cuda" and phase != "local")


def test_the_last_line():
    passed, failed = (phases.Report(phase=p, status=s) for p, s in (("local", "passed"), ("node", "failed")))
    skipped = phases.skipped("graph", "no GPU")
    assert report.last_line([passed, skipped]).startswith("passed: local;")
    assert report.last_line([passed, failed, skipped]) == "FAILED: phase node"
    assert report.last_line([skipped]) == "nothing was tested: graph cannot run here"
    network = phases.skipped("network", "no others")
    assert report.last_line([skipped, network]) == "nothing was tested: graph, network cannot run here"


@pytest.mark.parametrize(
    ("hosts", "nodes", "words"),
    [(2, 2, " on 2 hosts"), (1, 2, " on 2 nodes of one host"), (1, 1, ", all on one host")],
)
def test_hosts_are_counted(hosts, nodes, words):
    group = Group(name="collective", result=Result(transport="collective", exchanges=3, cells=5), chosen=True)
    found = phases.Report(
        phase="network", status="passed", ranks=4, hosts=hosts, nodes=nodes, groups=(group,), seconds=1.0
    )
    line = report.lines(found)[0]
    assert f"4 ranks{words}; collective (chosen here) 3 exchanges, 5 values" in line


# ---- the command ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["--phase", "everything"],
        ["--ranks", "0"],
        ["--ranks", "73"],
        ["--deadline", "1"],
        ["--deadline", "soon"],
        ["--transport", "cpi"],
        ["--device", "tpu"],
    ],
)
def test_wrong_usage(arguments, capsys):
    assert cli.main(["selftest", *arguments]) == 2
    assert "usage: ep-backend selftest" in capsys.readouterr().err


def test_the_command_line_knows_the_most_ranks_of_the_library():
    assert choice.MAX_RANKS == _native.MAX_WORLD


def test_more_ranks_than_gpus_is_wrong_usage(four_gpus, capsys):
    assert cli.main(["selftest", "--ranks", "5"]) == 2
    assert "--ranks 5, but PyTorch finds 4 GPUs here" in capsys.readouterr().err


def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["selftest", "--device", "cuda"]) == 1
    assert "finds no GPU here" in capsys.readouterr().err


WRONG_SETTINGS = [
    ({"EP_BACKEND_TRANSPORT": "cpi"}, "did you mean 'cpu'"),
    ({"EP_BACKEND_TRANSPORT": "peer"}, "EP_BACKEND_TRANSPORT"),
    ({"EP_BACKEND_PROFILE": "/nowhere/own.toml"}, "with EP_BACKEND_PROFILE=/nowhere/own.toml: "),
    ({"EP_BACKEND_PROFILE": "nvswich"}, "did you mean 'nvswitch'"),
    ({"EP_BACKEND_TIMOUT_S": "1"}, "EP_BACKEND_TIMOUT_S is set but means nothing to ep_backend"),
    ({"EP_BACKEND_TIMEOUT_S": "soon"}, "EP_BACKEND_TIMEOUT_S='soon' is not usable"),
    ({"EP_BACKEND_TIMOUT_S": "1", "EP_BACKEND_TIMEOUT_S": "soon"}, "; EP_BACKEND_TIMOUT_S is set but"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG_SETTINGS)
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--phase", "local"]])
def test_a_wrong_environment_is_one_sentence_before_all_phases(
    monkeypatch, capsys, settings, words, arguments
):
    def started(*of):
        raise AssertionError("a phase was started")

    for phase in ("local", "node", "graph"):
        monkeypatch.setattr(phases, phase, started)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["selftest", "--device", "cpu", *arguments]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert words in streams.err
    assert streams.err.count("\n") == 1


def test_who_asked_for_a_transport_that_cannot_be_had(capsys):
    assert cli.main(["selftest", "--device", "cpu", "--transport", "peer"]) == 1
    assert "--transport asks for transport 'peer', but it " in capsys.readouterr().err
    with pytest.raises(ep.EpConfigError) as caught:
        select.decide([cpu_rank()], "peer")
    assert "the communicator's configuration asks for" in str(caught.value)
    assert select.obstacle_to("peer", caught.value).startswith("it ")  # selftest itself asked


@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_one_rank_of_a_machine_says_so(monkeypatch, capsys, rank):
    group = {"RANK": str(rank + 8), "LOCAL_RANK": str(rank), "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**group, "EP_BACKEND_PROFILE": "nvswich"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    assert ("did you mean 'nvswitch'" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--ranks", "3"], "but 2 ranks have been started"), (["--phase", "node"], "without torchrun")],
)
def test_ranks_of_torchrun_run_the_network_phase_only(monkeypatch, capsys, arguments, words):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    assert cli.main(["selftest", "--device", "cpu", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_phase_that_is_asked_for_and_cannot_run_is_no_success(capsys):
    assert cli.main(["selftest", "--device", "cpu", "--phase", "network"]) == 1
    text = capsys.readouterr().out
    assert "network  skipped" in text
    assert "torchrun --nnodes 2 --nproc-per-node" in text
    assert "-m ep_backend.cli selftest --phase network --device cpu" in text
    assert text.endswith("nothing was tested: network cannot run here\n")
    assert cli.main(["selftest", "--device", "cpu", "--phase", "graph", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["phases"][0]["status"]) == ("skipped", "skipped")


def test_the_command_to_type_is_one_that_the_command_line_takes():
    words = network.how_to_start(CPU).split()
    arguments = words[words.index("ep_backend.cli") + 2 :]
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    assert parser.parse_args(["selftest", *arguments]).phase == "network"


def test_phases_after_a_failure_are_not_run(monkeypatch, capsys):
    monkeypatch.setattr(phases, "local", lambda options: phases.Report(phase="local", status="failed"))
    assert cli.main(["selftest", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [phase["status"] for phase in found["phases"]] == ["failed", "not run", "not run", "not run"]
    assert found["status"] == "failed"


# ---- real runs ----


def run(*command_line):
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_real_run():
    found = json.loads(
        run(sys.executable, "-m", "ep_backend.cli", "selftest", "--device", "cpu", "--ranks", "2", "--json")
    )
    assert found["status"] == "passed"
    assert [phase["status"] for phase in found["phases"]] == ["passed", "passed", "skipped", "skipped"]
    local, node = found["phases"][:2]
    alone = sum(len(case.steps) for case in plan.local_cases("cpu"))
    together = sum(len(case.steps) for case in plan.group_cases(2))
    assert [(g["name"], g["chosen"], g["exchanges"]) for g in local["groups"]] == [("cpu", False, alone)]
    groups = [(group["name"], group["chosen"], group["exchanges"]) for group in node["groups"]]
    assert groups == [("cpu", True, together), ("collective", False, together)]
    assert len({group["cells"] for group in node["groups"]}) == 1
    assert node["groups"][0]["cells"] > 1_000_000
    assert found["decision"]["transport"] == "cpu"
    assert {"ep_backend", "torch", "python"} <= set(found["versions"])


def test_a_real_run_under_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    text = run(*torchrun, "-m", "ep_backend.cli", "selftest", "--device", "cpu")
    assert text.count("network  ok") == 1  # rank 0 alone speaks
    assert "2 ranks, all on one host; cpu (chosen here) 162 exchanges" in text
    assert text.count("skipped") == 3
    assert "passed: network" in text
