"""The example with two micro-batches: it runs with equal results, and reads traces rightly."""

import contextlib
import json
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
from harness import ranks

from ep_backend.launch import processes

FOLDER = Path(__file__).parents[2] / "examples" / "overlap"


def example():
    sys.path.insert(0, str(FOLDER))
    try:
        import two_micro_batches
    finally:
        sys.path.remove(str(FOLDER))
    return two_micro_batches


def job(rank, group, options):
    return example().measure(lambda text: None, example().Options(**options))


def test_runs_and_traces(monkeypatch, capsys, tmp_path):
    def run(function, arguments, *, count, deadline_s):
        values = ranks(count).run(job, asdict(arguments[0]), timeout=120)
        return [processes.Outcome(rank, "done", value) for rank, value in enumerate(values)]

    monkeypatch.setattr(processes, "run", run)
    shape = "--tokens 5 --hidden 64 --width 16 --layers 2 --passes 1 --experts 4 --topk 2"
    written = tmp_path / "found.json"
    arguments = ["two_micro_batches.py", *shape.split(), "--trace", str(tmp_path), "--json", str(written)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert example().main() == 0
    assert "equal bit by bit" in capsys.readouterr().out
    assert all(mode["communication_ms"] > 0 for mode in json.loads(written.read_text())["modes"])
    for rank in range(2):
        events = json.loads((tmp_path / f"rank-{rank}.json").read_text())["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        for mode, actions in (("overlapped", example().EXCHANGING[2:]), ("without overlap", ("dispatch",))):
            assert mode in names
            for action in actions:
                layers_and_passes = 2 * example().TRACED
                assert {names.count(f"{action} {batch}") for batch in "AB"} == {layers_and_passes}


def test_result_that_differs_is_told():
    mode = {"median_ms": 1.0, "middle_half_ms": [1.0, 1.0]}
    options = {"ranks": 2, "device": "cpu", "tokens": 1, "hidden": 64, "layers": 1, "passes": 9}
    found = {"options": options, "transport": "cpu", "equal": False}
    text = example().report(found | {"modes": [mode | {"mode": name} for name in example().MODES]})
    assert "DIFFERENT" in text
    assert "no gain or loss is shown" in text


@pytest.mark.parametrize("layers", [1, 3])
def test_order(layers):
    """Each micro-batch has the same done to it; with overlap, the other one's rows are on their way."""
    plain, overlapped = (list(example().order(layers, mode, 1)) for mode in example().MODES)
    under_way = set()
    hidden = 0
    for action, batch in overlapped:
        with contextlib.suppress(ValueError):
            name, half = action.split("_")
            (under_way.add if half == "send" else under_way.remove)((name, batch))
        if action in example().COMPUTING:
            assert not {number for _, number in under_way} & {batch}
            hidden += bool(under_way)
    assert hidden == 4 * layers - 1, "all but the very first"
    assert not under_way
    for batch in range(2):
        done = [
            action.removesuffix("_recv") for action, of in overlapped if of == batch and "send" not in action
        ]
        assert done == [action for action, of in plain if of == batch]


def test_order_on_two_streams():
    """Whole exchanges, each with computation of the other micro-batch called behind it."""
    plain, overlapped = (list(example().order(3, mode, 2)) for mode in example().MODES)
    for batch in range(2):
        done, wanted = ([action for action, of in each if of == batch] for each in (overlapped, plain))
        assert done == wanted
    for (action, batch), (behind, other) in pairwise(overlapped):
        assert (action in example().COMPUTING) != (behind in example().COMPUTING)
        assert action in example().COMPUTING or batch != other


def test_exposed_time_of_a_gpus_trace():
    """On two streams, 4 of 10 us of an exchange run beside a matrix product; others do not count."""

    def event(cat, name, ts, dur):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "overlapped", 100, 100),
        event("user_annotation", "dispatch_send A", 100, 50),
        event("kernel", "void ep::cuda::dispatch_kernel<1>(...)", 120, 10),
        event("kernel", "gemm", 126, 30),
        event("kernel", "void ep::cuda::combine_kernel<1>(...)", 300, 10),
    ]
    assert example().exposed(events, "overlapped", kernels=True) == (10, 6)
    assert example().exposed(events, "overlapped", kernels=False) == (50, 50)
