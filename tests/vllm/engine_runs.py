"""Greedy tokens of the tiny model through an engine, and what counts as wrong about them."""

import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import engine_nodes

from ep_backend.bench.engines import vllm
from ep_backend.bench.engines.vllm import Server, Serving
from ep_backend.launch.server import ServerError, free_port

MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe"
NEW_TOKENS = 64
EQUAL_IN_BF16 = 6
"""Of 8 prompts, those that must be equal to the last token in bfloat16."""
BF16_GAP = 0.25
"""Largest gap between the two best logits at which bfloat16 may choose differently. vLLM on one rank, without
ep_backend, and transformers were seen to differ at gaps up to this with this model."""

AGREED = "ep_backend: the data-parallel ranks agree on each step through shared memory"
"""What the log says if they do."""

ALONE = {"data_parallel_size": 1, "expert_parallel": False}
SCALED = {"environ": (("EP_BACKEND_TEST_SCALE_COMBINE", "0.5"),)}


def serving(**changes):
    options = {"model": MODEL, "backend": "ep_backend", "device": "cpu", "max_num_seqs": 8, **changes}
    return Serving(**options)


def server_of(asked, folder):
    return on_two_nodes(asked, folder) if engine_nodes.wanted(asked) else Server(asked, folder, print)


def on_two_nodes(asked, folder, *, apart=False):
    """A server with half of its ranks on each node. ``apart``: nodes to ep_backend, too."""
    half = asked.data_parallel_size // 2
    port = ("--data-parallel-rpc-port", str(free_port()))
    nodes = [
        replace(
            asked,
            extra=(*asked.extra, *node_options(half * node, half, engine_nodes.ADDRESS), *port),
            environ=(
                *(engine_nodes.environ_apart(node, half) if apart else engine_nodes.environ(node)),
                *asked.environ,
            ),
        )
        for node in range(2)
    ]
    return engine_nodes.server(vllm, *nodes, folder)


def node_options(rank, ranks, address):
    """For the node with ``ranks`` ranks from ``rank`` on; the first node is at ``address``."""
    where = ("--data-parallel-size-local", str(ranks), "--data-parallel-address", address)
    headless = ("--headless", "--data-parallel-start-rank", str(rank)) if rank else ()
    return (*where, *headless, "--api-server-count", "0" if rank else "1")


def generate(folder, prompts, **changes):
    """Per prompt: new tokens, and the gap between the two best logits at each. Also the server's log."""
    with server_of(serving(**changes), folder) as server:
        records = continue_greedily(server, prompts)
        return records, server.session.text()


def continue_greedily(server, prompts):
    """The records of `generate` from a server that runs."""
    choices = server.complete(prompts, NEW_TOKENS, ignore_eos=True, return_token_ids=True, logprobs=2)
    records = []
    for choice in choices:
        best_two = [sorted(step.values())[-2:] for step in choice["logprobs"]["top_logprobs"]]
        records.append({"tokens": choice["token_ids"], "gaps": [b - a for a, b in best_two]})
    assert all(len(record["tokens"]) == NEW_TOKENS for record in records)
    return records


def log_of_a_stalled_rank(folder, stalled, max_tokens):
    """The server's log after rank 1 was stopped within a step and the engine has ended.

    Between two steps vLLM itself waits, with a deadline of its own; so the rank is stopped again, a little
    later, until it was stopped in time. Prompts for every rank keep all of them in steps.
    """
    with server_of(stalled, folder) as server:
        server.complete(["The"], 4)
        worker = int(re.search(r"Worker_DP1_EP1 pid=(\d+)", server.session.text()).group(1))
        failures = []

        def ask():
            try:
                server.complete(["The", "A"] * stalled.data_parallel_size, max_tokens, ignore_eos=True)
            except ServerError as error:
                failures.append(error)

        for attempt in range(10):
            asking = threading.Thread(target=ask)
            asking.start()
            time.sleep(0.3 + 0.037 * attempt)
            os.kill(worker, signal.SIGSTOP)
            asking.join(25)  # the deadline, and the time that the engine takes to end
            if failures:
                break
            os.kill(worker, signal.SIGCONT)
            asking.join(60)
            assert not asking.is_alive(), "the request must go on when the rank does"
            if failures:  # it came late
                break
        assert failures, "the request must fail, not hang"
        deadline = time.monotonic() + 60
        while "EngineDeadError" not in (log := server.session.text()):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    return log


def went_through_ep_backend(log, world=2):
    return exchanged(log, world) and AGREED in log


def exchanged(log, world, transport=""):
    """Whether every rank has a communicator, of ``transport`` if it is named."""
    return all(f"ep_backend: rank {rank} of {world}, transport {transport}" in log for rank in range(world))


def first_difference(got, want):
    pairs = zip(got["tokens"], want["tokens"], strict=True)
    return next((step for step, (a, b) in enumerate(pairs) if a != b), None)


def differences_fp32(got, want):
    """What is wrong in float32: any difference."""
    steps = {number: first_difference(g, w) for number, (g, w) in enumerate(zip(got, want, strict=True))}
    return [
        f"prompt {number} differs from token {step}" for number, step in steps.items() if step is not None
    ]


def differences_bf16(got, want, least_equal=EQUAL_IN_BF16, largest_gap=BF16_GAP):
    """What is wrong in bfloat16: too many prompts that differ, or one that is not explained by a near tie."""
    steps = {number: first_difference(g, w) for number, (g, w) in enumerate(zip(got, want, strict=True))}
    differing = {number: step for number, step in steps.items() if step is not None}
    wrong = []
    if len(got) - len(differing) < least_equal:
        wrong.append(f"only {len(got) - len(differing)} of {len(got)} prompts are equal")
    for number, step in differing.items():
        gap = want[number]["gaps"][step]
        print(f"prompt {number} differs from token {step}, where the two best logits are {gap:.3f} apart")
        if gap > largest_gap:
            wrong.append(f"prompt {number} differs at token {step}, where the gap is {gap:.3f}")
    return wrong
