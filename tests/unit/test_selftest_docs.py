"""docs/selftest.md: samples are what the command says of a kept run and of a failure."""

import json

import msgspec
import pytest
from measurements import RESULTS

from ep_backend.probe import Record
from ep_backend.selftest import phases, report
from ep_backend.selftest.advice import advise
from ep_backend.selftest.exchanges import Result

PAGE = (RESULTS.parents[1] / "docs" / "selftest.md").read_text()


def report_of(plain):
    groups = [
        phases.Group(name=name, chosen=chosen, result=Result(**result))
        for name, chosen, result in ((one.pop("name"), one.pop("chosen"), one) for one in plain["groups"])
    ]
    return phases.Report(**{**plain, "groups": groups})


@pytest.mark.parametrize("file", ["selftest-cpu.json", "selftest-1h200.json"])
def test_the_sample_of_a_kept_run(file):
    document = json.loads((RESULTS / file).read_text())
    named = {name: document[name] for name in ("device", "ranks", "transport")}
    options = phases.Options(**named, deadline_s=120.0, timeout_s=30.0)
    reports = [report_of(plain) for plain in document["phases"]]
    said = report.heading(msgspec.convert(document["machine"], Record), options)
    said += [line for one in reports for line in report.lines(one)]
    assert "\n".join(["```", *said, report.last_line(reports), "```"]) in PAGE


def test_the_sample_of_a_failure():
    """tests/failure/test_selftest.py makes such a failure."""
    [head] = [line for line in PAGE.splitlines() if line.startswith("node     FAILED")]
    failure = phases.Failure(group="cpu", rank=1, kind="wrong", text=head.partition(" cpu, rank 1: ")[2])
    steps = advise("node", failure.kind, "cpu", "cpu")
    failed = phases.Report(phase="node", status="failed", seconds=1.9, failure=failure, next=steps)
    later = phases.Report(phase="graph", status="not run", why="an earlier phase failed")
    said = [line for one in (failed, later) for line in report.lines(one)]
    assert "\n".join(["```", *said, "```"]) in PAGE
