"""Greedy tokens of the tiny model through vLLM with ep_backend, against vLLM without it and against
transformers.

Between vLLM and transformers a step's arithmetic differs in its order only. In float32 that changes no
token here. In bfloat16 it may swap two tokens whose logits are nearly equal, and from there on the texts
differ.
"""

import os
import re
import signal
import threading
import time

import pytest
from engine_runs import (
    ALONE,
    SCALED,
    differences_bf16,
    differences_fp32,
    generate,
    serving,
    went_through_ep_backend,
)

from ep_backend.bench.engines.process import ServerError
from ep_backend.bench.engines.vllm import Server, is_cpu_build

pytestmark = pytest.mark.skipif(not is_cpu_build(), reason="this vLLM is not the CPU build")


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_float32_tokens_equal_one_rank_and_transformers(tmp_path, reference):
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    assert len(prompts) == 8
    spread, log = generate(tmp_path / "spread", prompts, dtype="float32")
    assert went_through_ep_backend(log)
    assert "every rank is ready, deadline of a wait is now 30 s" in log
    assert differences_fp32(spread, want) == []
    alone, log = generate(tmp_path / "alone", prompts, dtype="float32", **ALONE)
    assert not went_through_ep_backend(log)
    assert differences_fp32(alone, want) == []


@pytest.mark.engine_long
@pytest.mark.timeout(1200)
def test_bfloat16_tokens_differ_only_at_near_ties(tmp_path, reference):
    want = reference("bfloat16")
    prompts = [record["prompt"] for record in want]
    spread, log = generate(tmp_path / "spread", prompts, dtype="bfloat16")
    assert went_through_ep_backend(log)
    alone, _ = generate(tmp_path / "alone", prompts, dtype="bfloat16", **ALONE)
    assert differences_bf16(spread, want) == []
    assert differences_bf16(spread, alone) == []


@pytest.mark.engine_long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("dtype", "differences"), [("float32", differences_fp32), ("bfloat16", differences_bf16)]
)
def test_a_wrong_combine_is_noticed(tmp_path, reference, dtype, differences):
    want = reference(dtype)
    prompts = [record["prompt"] for record in want]
    scaled, log = generate(tmp_path, prompts, dtype=dtype, **SCALED)
    assert "THE MODEL'S OUTPUT IS WRONG" in log
    assert differences(scaled, want) != []


@pytest.mark.engine_long
@pytest.mark.timeout(600)
def test_a_stalled_rank_ends_the_engine_with_a_message(tmp_path):
    """A rank that stops within a step. Between two steps vLLM itself waits, with a deadline of its own;
    so the rank is stopped again, a little later, until it was stopped in time."""
    stalled = serving(environ=(("EP_BACKEND_TIMEOUT_S", "5"),))
    with Server(stalled, tmp_path, print) as server:
        server.complete(["The"], 4)
        worker = int(re.search(r"Worker_DP1_EP1 pid=(\d+)", server.session.log.read_text()).group(1))
        failures = []

        def ask():
            try:
                server.complete(["The", "A"], 150)
            except ServerError as error:
                failures.append(error)

        for attempt in range(20):
            asking = threading.Thread(target=ask)
            asking.start()
            time.sleep(0.3 + 0.037 * attempt)
            os.kill(worker, signal.SIGSTOP)
            asking.join(15)
            if failures:
                break
            os.kill(worker, signal.SIGCONT)
            asking.join(60)
            assert not asking.is_alive(), "the request must go on when the rank does"
        assert failures, "the request must fail, not hang"
        wait_for_end = time.monotonic() + 60
        while "EngineDeadError" not in server.session.log.read_text(errors="replace"):
            assert time.monotonic() < wait_for_end
            time.sleep(0.5)
        log = server.session.log.read_text(errors="replace")
    assert re.search(r"EpTimeoutError: rank 0 waited \d+\.\d s in (dispatch|combine) for rank 1", log)


@pytest.mark.engine_long
@pytest.mark.timeout(600)
def test_compiled_model_on_cpu(tmp_path, reference):
    """Without --enforce-eager torch.compile runs; the layers with the exchange stay opaque to it."""
    want = reference("float32")
    prompts = [record["prompt"] for record in want]
    compiled, log = generate(tmp_path, prompts, dtype="float32", extra=("--no-enforce-eager",))
    assert went_through_ep_backend(log)
    assert differences_fp32(compiled, want) == []
