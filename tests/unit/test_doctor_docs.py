"""docs/doctor.md: what it shows is what doctor says now of what it found on machines then; its tables."""

from pathlib import Path

import pytest
from measurements import host_cases, kept_report, nccl_times, peer_cases, single_calls

from ep_backend.doctor import text

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(words):
    """Those in fences."""
    return [block.strip("\n") for block in words.split("```")[1::2]]


@pytest.mark.parametrize(
    ("title", "file", "count"),
    [
        ("On two H200", "doctor-2h200.json", 1),
        ("On two H200 without peer access", "doctor-2h200-no-peer-access.json", 2),
        ("On one H200", "doctor-1h200.json", 1),
        ("On a machine without GPUs", "doctor-cpu.json", 1),
    ],
)
def test_samples_are_what_doctor_says(title, file, count):
    shown, said = blocks(section(title)), "\n".join(text.lines(kept_report(file)))
    assert len(shown) == count
    for block in shown:
        assert f"\n{block}\n" in f"\n{said}\n"


@pytest.mark.parametrize(
    ("way", "file", "cases"),
    [("peer", "doctor-2h200.json", peer_cases), ("host", "doctor-2h200-no-peer-access.json", host_cases)],
)
def test_the_tables_of_expected_and_measured_times(way, file, cases):
    expected = {
        (one.shape, one.tokens, one.dtype): one.seconds * 1e6
        for one in kept_report(file).expected
        if one.way == way
    }
    measured = {
        (of.hidden, tokens, dtype): us
        for name, of, ranks, tokens, dtype, sms, us in cases()
        if name.startswith(way) and ranks == 2 and sms is None
    }
    hidden = {"deepseek-v3": 7168, "qwen3-30b-a3b": 2048}
    tokens = list(dict.fromkeys(count for _, count, _ in expected))
    assert len(tokens) == 6
    for count in tokens:
        cells = []
        for shape, size in hidden.items():
            for table, key in ((expected, shape), (measured, size)):
                cells.append(", ".join(shown(table[key, count, dtype]) for dtype in ("bf16", "fp8")))
        assert f"| {count} | {' | '.join(cells)} |" in PAGE


def test_what_is_said_of_nccl():
    counts = (1, 128, 512, 4096)
    model = [
        shown(one.seconds * 1e6)
        for one in kept_report("doctor-2h200.json").expected
        if (one.shape, one.way, one.dtype) == ("deepseek-v3", "nccl", "bf16") and one.tokens in counts
    ]
    times = nccl_times("peer-2h200.json")
    calls = [shown(single_calls(times, count)) for count in counts]
    graphs = [shown(times[count, "round_trip"]) for count in counts]
    assert (
        f"on the two H200 that is {model[0]} us with 1 token, {model[1]} with 128, {model[2]} with 512 and "
        f"{model[3]} with 4096; all-gathers and reduce-scatter one by one were measured at "
        f"{', '.join(calls[:3])} and {calls[3]}, the same in a CUDA graph at {', '.join(graphs[:3])} and "
        f"{graphs[3]}."
    ) in " ".join(PAGE.split())


def shown(microseconds):
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"
