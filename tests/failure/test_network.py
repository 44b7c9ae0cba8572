"""Two nodes with a network between them: what crosses it, and what happens when it is cut."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from exchange import check_steps, make_call
from network_rank import CONFIG, SELFTEST, STEPS
from networks import LINK, need_namespaces, two_nodes

RANK_NODES = (0, 1, 1, 0)  # of each rank, its node
NODES = ((0, 3), (1, 2))
RANK_FILE = Path(__file__).parent.parent / "network_rank.py"
ADDED = 1.1  # by TCP, IP and Ethernet, and by the barriers around what is counted


@pytest.fixture
def nodes():
    need_namespaces()
    with two_nodes() as nodes:
        yield nodes


@contextlib.contextmanager
def started(nodes, job, folder, transports):
    """The ranks' processes, which do not outlive this."""
    world = len(RANK_NODES)
    # No empty part: that would be the working folder, and the checkout has no library.
    path = os.pathsep.join(filter(None, [str(RANK_FILE.parent), os.environ.get("PYTHONPATH")]))
    arguments = [(job, str(rank), str(world), str(folder), *transports) for rank in range(world)]
    processes = [
        subprocess.Popen(
            nodes[node].command(sys.executable, str(RANK_FILE), *words),
            env={**os.environ, "PYTHONPATH": path},
        )
        for node, words in zip(RANK_NODES, arguments, strict=True)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def answers(processes, folder, timeout):
    deadline = time.monotonic() + timeout
    for process in processes:
        assert process.wait(max(0.1, deadline - time.monotonic())) == 0
    return [torch.load(folder / f"answer-{rank}", weights_only=False) for rank in range(len(processes))]


def crossings(rank_to):
    """Rows that leave each node over all steps; ``rank_to``: to the ranks of the other node, each or once."""
    left, owners = [0, 0], CONFIG.expert_ranks(len(RANK_NODES))
    for one in STEPS:
        for rank, node in enumerate(RANK_NODES):
            for ids in make_call(CONFIG, len(RANK_NODES), rank, one).topk_ids.tolist():
                away = {rank_to(owners[e]) for e in ids if e >= 0 and RANK_NODES[owners[e]] != node}
                left[node] += len(away)
    return left


def test_what_crosses_the_network(nodes, tmp_path):
    with started(nodes, "count", tmp_path, ("hier", "collective")) as processes:
        found = answers(processes, tmp_path, 90)
    assert all("asked for" in answer["hier"]["reason"] for answer in found)
    check_steps(CONFIG, STEPS, [{"hier": answer["hier"]["results"]} for answer in found], NODES)
    check_steps(CONFIG, STEPS, [{"collective": answer["collective"]["results"]} for answer in found])
    record = CONFIG.row_bytes + 8 * CONFIG.top_k + 8
    for transport, rank_to in (("hier", lambda rank: RANK_NODES[rank]), ("collective", lambda rank: rank)):
        left = crossings(rank_to)
        for rank, node in ((0, 0), (1, 1)):
            # Dispatched rows go out; combined ones answer what came in.
            wanted = left[node] * record + left[1 - node] * CONFIG.wire_row_bytes
            sent = found[rank][transport]["sent"]
            assert wanted < sent < ADDED * wanted, f"{transport}, node {node}"
        selftest = found[0][transport]["selftest"]
        assert (selftest.exchanges, selftest.wrong) == (len(SELFTEST[0].steps), ())
    # With four experts of a token, most go to both ranks of a node.
    assert found[0]["collective"]["sent"] > 1.5 * found[0]["hier"]["sent"]


def cut(nodes, processes, folder):
    """Cut the network once all ranks are running."""
    deadline = time.monotonic() + 120  # a busy machine imports slowly
    while len(list(folder.glob("running-*"))) < len(processes):
        assert time.monotonic() < deadline, "the ranks did not start"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    time.sleep(0.5)
    nodes[0].ip("link", "set", LINK, "down")


def test_a_network_that_is_cut_before_a_communicator_is_made(nodes, tmp_path):
    with started(nodes, "start", tmp_path, []) as processes:
        cut(nodes, processes, tmp_path)
        (tmp_path / "cut").touch()
        found = answers(processes, tmp_path, 40)
    for rank, answer in enumerate(found):
        # Who gives up first closes the connections of the other rank of its node.
        said = rf"rank {rank} (waited \d\.\d s for|lost) a rank while all of them met"
        assert re.search(said, answer["start"]["error"])
        assert answer["start"]["waited"] < 20


@pytest.mark.parametrize("transport", ["hier", "collective"])
def test_a_cut_network(nodes, tmp_path, transport):
    """All ranks of both nodes say so in time; then nothing keeps their processes from ending."""
    with started(nodes, "cut", tmp_path, [transport]) as processes:
        cut(nodes, processes, tmp_path)
        found = answers(processes, tmp_path, 40)
    for answer in found:
        assert answer[transport]["waited"] < 20
    errors = [answer[transport]["error"] for answer in found]
    assert any("waited" in text for text in errors), errors
    # Who sees its deadline first closes connections, or tells its node.
    words = ("waited", "lost the connection", "stopped first")
    assert all(any(word in text for word in words) for text in errors), errors
