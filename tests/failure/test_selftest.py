"""``ep-backend selftest`` where something is wrong: a bit, a rank that hangs or dies, the command ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Transport cpu with a fault on rank 1, made here: the command has no switch for it. Ranks import this too.
FAULTY = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from ep_backend import cli
from ep_backend.transports.cpu import CpuTransport

real, calls = CpuTransport.combine_recv, 0

def combine_recv(self, channel, out):
    global calls
    real(self, channel, out)
    calls += 1
    how = sys.argv[1]
    if dist.get_rank() == 1 and calls == 4:
        if how == "wrong":
            out.view(torch.int16)[4, 7] ^= 1
        elif how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raises":
            raise RuntimeError("made up by a test")
        else:
            Path(sys.argv[2], str(os.getpid())).touch()
            time.sleep(600)

CpuTransport.combine_recv = combine_recv

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[3:]))
"""
# The fourth exchange of the first case.
PLACE = (
    "transport cpu, layout rank_major, payload bf16, exchange 3 "
    "(T = 37, tokens 22, 19, one_rank routing, in halves)"
)


def command(tmp_path, how, *arguments):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    chosen = ["selftest", "--device", "cpu", "--ranks", "2", *arguments]
    return [sys.executable, str(script), how, str(tmp_path), *chosen]


def environment(**more):
    launcher = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "EP_BACKEND_TRANSPORT"}
    return {**{k: v for k, v in os.environ.items() if k not in launcher}, **more}


def run(tmp_path, how, *arguments):
    """Exit status and standard output."""
    done = subprocess.run(
        command(tmp_path, how, *arguments),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    return done.returncode, done.stdout


def test_one_wrong_bit_on_one_rank(tmp_path):
    status, text = run(tmp_path, "wrong")
    assert status == 1, text
    local, node = (next(line for line in text.splitlines() if line.startswith(p)) for p in ("local", "node"))
    assert "ok" in local
    assert "FAILED" in node
    assert f"cpu, rank 1: {PLACE}: combined[4, 7]: " in node
    assert "; 1 of 4864 cells differ" in node
    assert "EP_BACKEND_TRANSPORT=collective" in text
    assert "graph    not run" in text
    assert text.endswith("FAILED: phase node\n")


@pytest.mark.parametrize(("how", "words"), [("dies", "SIGKILL"), ("raises", "made up by a test")])
def test_a_rank_that_dies_or_raises(tmp_path, how, words):
    status, text = run(tmp_path, how, "--phase", "node", "--json")
    assert status == 1
    found = json.loads(text)
    assert found["status"] == "failed"
    (node,) = found["phases"]
    failure = node["failure"]
    assert (failure["rank"], failure["kind"]) == (1, "died" if how == "dies" else "raised")
    assert words in failure["text"]
    assert f"(at: {PLACE})" in failure["text"]
    assert node["next"]


def test_a_rank_that_hangs(tmp_path):
    start = time.monotonic()
    status, text = run(tmp_path, "hangs", "--phase", "node", "--deadline", "30", "--json")
    assert status == 1
    assert time.monotonic() - start < 70
    (node,) = json.loads(text)["phases"]
    failure = node["failure"]
    # The other one waits a third of the deadline, and says for whom.
    assert (failure["rank"], failure["kind"]) == (0, "raised")
    assert "for rank 1" in failure["text"]
    (other,) = failure["others"]
    assert other.startswith("rank 1: ")
    assert PLACE in other
    assert "in combine_recv" in failure["details"]  # where rank 1 sleeps


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_ended(tmp_path, how):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        command(tmp_path, "hangs", "--phase", "node"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(TMPDIR=str(temporary)),
    )
    try:
        deadline = time.monotonic() + 60
        while not (held := [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(how)
        text = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    assert "Traceback" not in text
    assert not Path(f"/proc/{held[0]}").exists()
    assert not list(temporary.iterdir())


def test_network_a_rank_that_raises_is_named_by_rank_0(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            command(tmp_path, "raises", "--phase", "network", "--deadline", "60"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**group, RANK=str(rank)),
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=100)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 1], texts
    assert "network  FAILED" in texts[0]
    assert "rank 1: RuntimeError: made up by a test" in texts[0]
    assert PLACE in texts[0]
    assert "FAILED" not in texts[1]
