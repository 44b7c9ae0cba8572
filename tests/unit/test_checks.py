"""The checks of peer access without a GPU: workers that finish, hang, die or talk."""

import itertools
import json
import os
import re
import time

import msgspec
import pytest
from check_workers import (
    FABRIC,
    FINE,
    GPUS,
    MEASURED,
    ORDER,
    PAIRS,
    PAIRS_FINE,
    UUIDS,
    counted_results,
    run,
)

from ep_backend import checks
from ep_backend.checks import supervise, worker
from ep_backend.checks.data import Direction, Fabric, Request
from ep_backend.nvml import Gpu, Link

# --- the supervisor ---


def test_a_worker_that_finishes():
    outcome = run(FINE, fabric=["GPU-a"])
    assert set(outcome.directions) == set(PAIRS)
    assert all(direction.works for direction in outcome.directions.values())
    assert (outcome.fabric, outcome.problems) == ({"GPU-a": True}, [])


def test_a_direction_that_hangs_has_failed_and_a_fresh_worker_goes_on():
    begin = time.monotonic()
    outcome = run("good(pairs[0])\nif len(pairs) == 6: begin(pairs[1]); time.sleep(60)\n" + FINE)
    assert time.monotonic() - begin < 30
    hung = outcome.directions.pop(PAIRS[1])
    assert hung.works is False
    assert re.fullmatch(r"no answer within [1-9](\.\d)? s", hung.problem)
    assert all(direction.works for direction in outcome.directions.values())


def test_time_that_runs_out_keeps_what_was_found():
    outcome = run("good(pairs[0]); begin(pairs[1]); time.sleep(60)", deadline_s=4.0, answer_s=30)
    assert outcome.directions[PAIRS[0]].works
    later = outcome.directions[PAIRS[2]]
    assert (later.works, later.problem) == (None, "not tried: the time for it was up")
    assert outcome.problems == ["peer access was not tried in 5 of 6 directions: the time for it was up"]


def test_a_worker_that_says_nothing():
    outcome = run("time.sleep(60)", start_s=0.5)
    assert {direction.works for direction in outcome.directions.values()} == {None}
    assert re.search(r"said nothing within (0\.[5-9]\d?|[1-9](\.\d)?) s", outcome.problems[0])


@pytest.mark.parametrize(
    ("death", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with signal 11"),
        ("print('CUDA is sick', file=sys.stderr); os._exit(3)", "ended with status 3 (CUDA is sick)"),
    ],
)
def test_a_worker_that_dies(death, words):
    outcome = run(f"good(pairs[0])\nif len(pairs) == 6: begin(pairs[1]); {death}\n" + FINE)
    dead = outcome.directions.pop(PAIRS[1])
    assert dead.works is False
    assert words in dead.problem
    assert all(direction.works for direction in outcome.directions.values())


def test_workers_that_die_every_time_are_not_started_for_ever():
    outcome = run("begin(pairs[0]); os._exit(1)")
    failed = [d for d in outcome.directions.values() if d.works is False]
    assert len(failed) == supervise.MOST_WORKERS
    assert "broke too often" in outcome.problems[0]


def test_a_worker_that_somebody_kills_says_nothing_about_the_gpus():
    outcome = run("good(pairs[0]); begin(pairs[1]); os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome.directions[PAIRS[0]].works
    assert outcome.directions[PAIRS[1]].works is None
    assert "signal 9" in outcome.problems[0]


def test_a_worker_that_ends_before_it_begins():
    outcome = run("sys.exit('no module named torch')")
    assert {direction.works for direction in outcome.directions.values()} == {None}
    assert "ended with status 1 (no module named torch)" in outcome.problems[0]


def test_a_note_is_the_reason():
    outcome = run("out(type='note', text='this build has no CUDA kernels')", fabric=["GPU-a"])
    assert {d.problem for d in outcome.directions.values()} == {"not tried: this build has no CUDA kernels"}
    assert outcome.fabric == {"GPU-a": None}
    assert len(outcome.problems) == 2


def test_orders_are_compared_where_all_directions_work():
    outcome = run(FINE, order=ORDER)
    assert (outcome.order, outcome.problems) == (MEASURED, [])
    assert run(FINE, pairs=(), order=ORDER).order == MEASURED
    failed = """
if pairs:
    out(type="done", direction={"source": "GPU-a", "target": "GPU-b", "works": False})
    pairs, request["order"] = pairs[1:], None
"""
    assert run(failed + FINE, order=ORDER).order is None, "no fresh worker is asked for it, either"


@pytest.mark.parametrize(
    ("body", "failed", "words"),
    [
        ("begin(('', '')); time.sleep(60)", True, "no answer within"),
        ("begin(('', '')); os._exit(3)", True, "ended with status 3"),
        ("begin(('', '')); os.kill(os.getpid(), signal.SIGKILL)", False, "not measured: the process that"),
        ("out(type='note', text='no memory left')", False, "not measured: no memory left"),
    ],
)
def test_orders_that_could_not_be_compared(body, failed, words):
    outcome = run(PAIRS_FINE + body, order=ORDER, answer_s=0.5)
    assert all(direction.works for direction in outcome.directions.values())
    assert (outcome.order.gpus, outcome.order.gain, outcome.order.failed) == (tuple(UUIDS), None, failed)
    assert words in outcome.order.problem
    (problem,) = outcome.problems
    assert problem == f"orders of stores: {outcome.order.problem}"


def test_garbage_between_the_lines_is_no_answer():
    body = """
print("Warning: something"); print("{"); print('{"type": "done"}'); print("x" * 200_000)
sys.stdout.buffer.write(bytes(range(256)) + b"\\n"); sys.stdout.flush()
out(type="done", direction={"source": "GPU-a", "target": "GPU-elsewhere", "works": True})
out(type="done", direction={"source": "GPU-a", "target": "GPU-b", "works": "yes"})
"""
    outcome = run(body + FINE)
    assert set(outcome.directions) == set(PAIRS)
    assert all(direction.works for direction in outcome.directions.values())


def test_a_flood_of_garbage_does_not_extend_the_time():
    begin = time.monotonic()
    outcome = run("begin(pairs[0])\nwhile True: print('words ' * 100)", pairs=PAIRS[:1], answer_s=0.5)
    assert time.monotonic() - begin < 20
    assert outcome.directions[PAIRS[0]].works is False


def test_a_fabric_handle_that_hangs_does_not_work():
    outcome = run(
        "out(type='begin', source='GPU-a')\ntime.sleep(60)", pairs=[], fabric=["GPU-a"], answer_s=0.4
    )
    assert outcome.fabric == {"GPU-a": False}
    assert "no answer within" in outcome.problems[0]


def test_no_process_of_a_worker_is_left():
    body = "child = os.fork() or time.sleep(60)\nbegin(pairs[0]); out(type='note', text=str(child))"
    outcome = run(body, pairs=PAIRS[:1])
    child = int(outcome.directions[PAIRS[0]].problem.removeprefix("not tried: "))
    for _ in range(100):
        try:
            with open(f"/proc/{child}/stat") as status:
                alive = status.read().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            alive = False
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


def test_what_the_worker_sees():
    """The GPUs by UUID, and no setting that makes a launch wait for its kernel."""
    body = """
names = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "KEPT")
out(type="note", text=json.dumps([os.environ.get(name) for name in names]))
"""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "7", "CUDA_LAUNCH_BLOCKING": "1", "KEPT": "x"}
    outcome = run(body, pairs=PAIRS[:1], environ=environ)
    told = json.loads(outcome.directions[PAIRS[0]].problem.removeprefix("not tried: "))
    assert told == ["GPU-a,GPU-b,GPU-c", None, "x"]


def test_a_command_that_does_not_exist():
    outcome = supervise.run(UUIDS, PAIRS, (), environ={}, deadline_s=5, command=("/nonexistent/python",))
    assert "does not start" in outcome.problems[0]


def test_the_real_worker_on_a_machine_without_gpus():
    """Whatever is missing here (GPUs, or CUDA kernels in this build), it says so and nothing is decided."""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    outcome = supervise.run(
        ["GPU-none", "GPU-nothing"], [("GPU-none", "GPU-nothing")], (), environ=environ, deadline_s=120
    )
    (direction,) = outcome.directions.values()
    assert direction.works is None
    assert "no CUDA kernels" in direction.problem or "CUDA shows 0 of 2 GPUs" in direction.problem


# --- the worker, over made-up operators ---


class FakeOps:
    """Operators of two GPUs. ``broken``: the call that raises."""

    def __init__(self, *, access=True, rounds=worker.ROUNDS, wrong=0, latency=1.5e-6, broken="", fabric=""):
        self.access, self.rounds, self.wrong, self.latency = access, rounds, wrong, latency
        self.broken, self.fabric, self.open = broken, fabric, 0

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.broken:
                raise RuntimeError(f"ep_backend: {name} failed: out of memory\nException raised from ...")
            if name == "gpu_pair_create":
                self.open += 1
            if name == "gpu_pair_destroy":
                self.open -= 1
            return {
                "gpu_pair_attributes": [int(self.access), 1],
                "gpu_pair_create": 77,
                "gpu_pair_destroy": None,
                "gpu_pair_store": [self.rounds, self.wrong],
                "gpu_pair_latency": self.latency,
                "gpu_pair_bandwidth": 4e11 if arguments[1:] == (True,) else 3e11,
                "gpu_fabric_handle": self.fabric,
                "gpu_order_rates": (4e9, 1e10),
            }[name]

        return call


@pytest.mark.parametrize(
    ("ops", "works", "problem", "broken"),
    [
        (FakeOps(), True, "", False),
        (FakeOps(access=False), False, "the driver offers no peer access", False),
        (FakeOps(wrong=12), False, "12 words were read otherwise than they had been stored", False),
        (FakeOps(rounds=2), False, "the flag of round 3 of 8 did not come within 2 s", False),
        (FakeOps(broken="gpu_pair_attributes"), None, "not tried: gpu_pair_attributes failed: out of", False),
        (FakeOps(broken="gpu_pair_create"), None, "not tried: gpu_pair_create failed: out of memory", False),
        (FakeOps(broken="gpu_pair_store"), False, "gpu_pair_store failed", True),
        (FakeOps(broken="gpu_pair_bandwidth"), False, "gpu_pair_bandwidth failed", True),
    ],
)
def test_one_direction(ops, works, problem, broken):
    direction, is_broken = worker.try_direction(ops, 0, 1, "GPU-a", "GPU-b")
    assert (direction.works, is_broken) == (works, broken)
    assert problem in direction.problem
    assert "\n" not in direction.problem
    assert ops.open == 0
    measured = (direction.store_bytes_per_s, direction.copy_bytes_per_s, direction.latency_s)
    assert measured == ((3e11, 4e11, 1.5e-6) if works else (None, None, None))


def test_a_latency_that_could_not_be_measured_is_none():
    direction, _ = worker.try_direction(FakeOps(latency=-1.0), 0, 1, "GPU-a", "GPU-b")
    assert (direction.works, direction.latency_s) == (True, None)


def test_fabric_handles():
    assert worker.try_fabric(FakeOps(), 0, "GPU-a") == Fabric("GPU-a", True)
    assert worker.try_fabric(FakeOps(fabric="cuMemCreate gives X"), 0, "GPU-a").works is False
    assert worker.try_fabric(FakeOps(broken="gpu_fabric_handle"), 0, "GPU-a").works is None


def test_orders():
    assert worker.try_orders(FakeOps(), [0, 1, 2], ORDER).rates == MEASURED
    rates = worker.try_orders(FakeOps(broken="gpu_order_rates"), [0, 1, 2], ORDER).rates
    assert rates.problem == "not measured: gpu_order_rates failed: out of memory"
    assert (rates.gain, rates.failed) == (None, False)


# --- which GPUs, and what the numbers say ---


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return counted_results(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("switches", "group"),
    [("aabb", 2), ("aaabbb", 3), ("abab", 1), ("aaaa", 1), ("abcd", 1), ("aab", 1), ("aabbbb", 1), ("", 1)],
)
def test_groups_behind_switches(switches, group):
    links = [
        Link(a=str(i), b=str(j), ancestor="PXB" if switches[i] == switches[j] else "NODE")
        for i, j in itertools.combinations(range(len(switches)), 2)
    ]
    assert checks.switch_group([str(i) for i in range(len(switches))], links) == group


def test_slices_and_undescribed_gpus_are_not_tried(machine):
    gpus = (*GPUS[:2], Gpu(uuid="GPU-m", mig=True), Gpu(uuid="undescribed-3"), Gpu(uuid="MIG-4"))
    assert checks.testable(gpus) == ["GPU-a", "GPU-b"]
    found, _ = machine(gpus=gpus)
    assert len(found.directions) == 2


def test_one_gpu_has_no_directions(machine):
    assert machine(gpus=GPUS[:1], links=()) == (checks.Results(), 0)
    assert not machine.folder.exists()


@pytest.mark.parametrize(
    ("state", "cluster", "has"),
    [("completed", "1234", True), ("completed", "", False), ("in progress", "1234", False), ("", "", False)],
)
def test_a_fabric_has_a_name_and_is_complete(state, cluster, has):
    assert checks.has_fabric(Gpu(uuid="GPU-a", fabric_state=state, fabric_cluster=cluster)) == has


def test_fabric_handles_are_tried_where_there_is_a_fabric(machine):
    found, starts = machine(gpus=(FABRIC,), links=())
    assert (found.fabric_works, starts) == (True, 1)
    assert machine(gpus=(FABRIC,), links=(), among=(), fabric=["GPU-a"]) == (found, 0)
    body = (
        "out(type='fabric', gpu='GPU-a', works=False, problem='cuMemCreate gives CUDA_ERROR_NOT_PERMITTED')"
    )
    found, _ = machine(gpus=(FABRIC,), links=(), body=body, fresh=True)
    assert found.fabric_works is False
    assert any("NOT_PERMITTED" in problem for problem in found.problems)
    assert machine()[0].fabric_works is None


@pytest.mark.parametrize(("speed", "said"), [(3.6e9, True), (54e9, False), (None, False)])
def test_peer_access_that_is_staged_through_the_host(speed, said):
    fast = Gpu(uuid="GPU-a", pcie_generation=5, pcie_width=16)
    direction = Direction(source="GPU-a", target="GPU-b", works=True, store_bytes_per_s=speed)
    note = checks.staged(direction, fast, msgspec.structs.replace(fast, uuid="GPU-b"))
    assert bool(note) == said
    assert not said or "3.6 GB/s, where PCIe carries 63 GB/s" in note
    assert checks.staged(direction, fast, Gpu(uuid="GPU-b")) == ""


def test_requests_and_results_are_plain_data():
    request = Request(gpus=("a",), pairs=(("a", "b"),), fabric=(), order=ORDER, limit_s=1.0)
    assert msgspec.json.decode(msgspec.json.encode(request), type=Request) == request
