"""docs/performance.md: the table of two nodes is that of the kept runs."""

import json
from pathlib import Path

import pytest
from measurements import RESULTS

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()


@pytest.mark.parametrize(("hidden", "file"), [(7168, "nodes-2h200"), (2048, "nodes-2h200-hidden2048")])
def test_two_nodes(hidden, file):
    times = {}
    for one in json.loads((RESULTS / f"{file}.json").read_text())["results"]:
        assert one["correct"]
        times[one["transport"], one["tokens"], one["phase"]] = one["median_us"]
    for tokens in (1, 8, 128, 1024):

        def round_trip(name, tokens=tokens):
            return times[name, tokens, "round_trip"]

        def with_single_calls(name, tokens=tokens):
            single = times[name, tokens, "dispatch"] + times[name, tokens, "combine"]
            return f"{round_trip(name):,.0f} ({single:,.0f})"

        cells = [with_single_calls("collective"), f"{round_trip('hier'):,.0f}", with_single_calls("nccl")]
        cells += [f"{round_trip('nccl_all_to_all'):,.0f}"]
        assert f"| {hidden} | {tokens} | {' | '.join(cells)} |" in PAGE
