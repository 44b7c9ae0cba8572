"""vLLM on two nodes, which are two network namespaces of this machine, with two ranks on each: greedy tokens
against transformers, and what crosses the link between the nodes."""

import contextlib

import pytest
from engine_runs import AGREED, continue_greedily, differences_fp32, exchanged, node_options, serving
from networks import ADDRESSES, LINK, link_bytes, need_namespaces, two_nodes

from ep_backend.bench.engines.vllm import Server, is_cpu_build, serve_command, serve_environment
from ep_backend.launch.server import Session

pytestmark = pytest.mark.skipif(not is_cpu_build(), reason="this vLLM is not the CPU build")

PER_NODE = 2
WORLD = 2 * PER_NODE
SMALL = ("--max-num-batched-tokens", "512", "--num-gpu-blocks-override", "64")  # starts sooner


def on_node(transport, rank):
    """How to serve on the node whose first rank this is."""
    environ = (("EP_BACKEND_TRANSPORT", transport), ("GLOO_SOCKET_IFNAME", LINK))
    extra = (*node_options(rank, PER_NODE, ADDRESSES[0]), *SMALL)
    return serving(dtype="float32", data_parallel_size=WORLD, extra=extra, environ=environ)


def generate(folder, prompts, transport):
    """As `engine_runs.generate` on two nodes, and the bytes that leave the first one meanwhile."""
    with two_nodes() as (first, second), contextlib.ExitStack() as stack:
        headless = on_node(transport, PER_NODE)
        with second.inside():
            session = Session(serve_command(headless, 0), serve_environment(headless), folder / "second.log")
            stack.enter_context(session)
        stack.enter_context(first.inside())
        server = stack.enter_context(Server(on_node(transport, 0), folder, print))
        before = link_bytes()
        records = continue_greedily(server, prompts)
        sent = link_bytes() - before
        log = server.session.text() + session.text()
    return records, log, sent


@pytest.mark.engine_long
@pytest.mark.timeout(1800)
def test_float32_tokens_equal_transformers_and_hier_sends_less(tmp_path, reference):
    need_namespaces()
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    sent = {}
    for transport in ("hier", "collective"):
        spread, log, sent[transport] = generate(tmp_path / transport, prompts, transport)
        assert exchanged(log, WORLD, transport)
        assert AGREED not in log  # nodes share no memory
        assert differences_fp32(spread, want) == []
    print(f"bytes that left the first node: {sent}")
    assert sent["collective"] > 1.2 * sent["hier"]
