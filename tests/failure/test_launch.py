"""Rank processes that commands start: their results, their failures, and that none is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launched
import pytest

from ep_backend.launch import processes

TESTS = Path(__file__).parent.parent


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_results_in_order_of_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "7")  # of another launcher
    outcomes = processes.run(launched.add_up, (10,), count=3, deadline_s=60)
    assert [outcome.end for outcome in outcomes] == ["done"] * 3
    assert [outcome.value[1:] for outcome in outcomes] == [(33, "0"), (33, "1"), (33, "2")]
    assert processes.first_failure(outcomes) is None
    assert not any(alive(outcome.value[0]) for outcome in outcomes)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_ranks_print(capfd, allowed):
    processes.run(launched.speak, count=1, deadline_s=60, speak=allowed)
    streams = capfd.readouterr()
    assert ("words of a library" in streams.out, "words of a library" in streams.err) == (
        allowed,
        not allowed,
    )


@pytest.mark.parametrize(
    ("how", "end", "words"),
    [
        ("raise", "raised", "made up by a test"),
        ("leave", "died", "ended with status 3"),
        ("die", "died", "was ended by SIGSEGV"),
        ("unpicklable", "raised", "pickle"),
    ],
)
def test_the_rank_that_fails_is_named_and_the_others_are_ended(how, end, words, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    start = time.monotonic()
    outcomes = processes.run(launched.stop_one, (how, 1), count=2, deadline_s=60)
    assert time.monotonic() - start < 40
    failure = processes.first_failure(outcomes)
    assert (failure.rank, failure.end, failure.at) == (1, end, f"{how} soon")
    assert words in str(failure)
    assert str(failure).startswith("rank 1: ")
    if how == "unpicklable":
        assert outcomes[0].end == "done"
        return
    assert outcomes[0].end == "cut"
    assert "after rank 1 had failed" in outcomes[0].text
    assert "in stop_one" in outcomes[0].details  # where it was
    assert ("EpConfigError" in failure.details) == (how == "raise")


def test_ranks_that_hang_meet_the_deadline():
    outcomes = processes.run(launched.stop_one, ("hang", 0), count=2, deadline_s=20)
    assert [outcome.end for outcome in outcomes] == ["late"] * 2
    assert all("after 20 s without an answer" in outcome.text for outcome in outcomes)
    assert all("in stop_one" in outcome.details for outcome in outcomes)


class Silent:
    """A rank that has said something, and nothing that ends it; it does not say where it is."""

    at = "something"

    def __init__(self, rank, asked):
        self.rank, self._asked = rank, asked
        self.pipe, self._theirs = multiprocessing.Pipe()
        self._theirs.send("at")  # never read: always something to hear

    def hear(self):
        return None

    def ask_for_stacks(self):
        self._asked.append(self.rank)

    def has_stacks(self):
        return False

    def stacks(self):
        assert len(self._asked) == 12, "one waits for another's answer"
        return ""


def test_the_deadline_counts_from_the_start_and_all_are_asked_together_where_they_are():
    asked = []
    begin = time.monotonic()
    found = processes._outcomes([Silent(rank, asked) for rank in range(12)], begin - 7, deadline_s=6)
    assert time.monotonic() - begin < 2 * processes.STACK_S
    assert [(one.rank, one.end, one.at) for one in found] == [(r, "late", "something") for r in range(12)]


def outcome(rank, end, after_s):
    return processes.Outcome(rank, end, after_s=after_s)


def test_which_failure_is_named():
    # A rank that died may be noticed after those that lost it.
    found = [outcome(0, "raised", 1.0), outcome(1, "died", 1.2), outcome(2, "raised", 0.9)]
    assert processes.first_failure(found).rank == 1
    assert processes.first_failure([found[0], found[2]]).rank == 2
    assert processes.first_failure([outcome(0, "cut", 3.0), outcome(1, "raised", 1.0)]).rank == 1
    assert processes.first_failure([outcome(0, "done", 1.0), outcome(1, "late", 9.0)]).rank == 1


COMMAND = """
import sys
import launched
from ep_backend.launch import processes

if __name__ == "__main__":
    processes.run(launched.hold, (sys.argv[1],), count=2)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_command_is_ended(tmp_path, how):
    script, folder, temporary = tmp_path / "command.py", tmp_path / "pids", tmp_path / "temporary"
    script.write_text(COMMAND)
    folder.mkdir()
    temporary.mkdir()
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(pids := [int(name) for name in os.listdir(folder)]) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(pids) == 2
        if how == signal.SIGINT:
            os.killpg(command.pid, how)  # as a terminal sends it: to the ranks too
        else:
            command.send_signal(how)
        words = command.communicate(timeout=60)[1]
    finally:
        command.kill()
        command.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
    if how != signal.SIGKILL:
        assert not list(temporary.glob("ep-backend-*"))
        assert words.count("Traceback") == 1  # of the command; the ranks say nothing
