"""`ep-backend tune` on the GPUs there are: the choice keeps its promise, and communicators use it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from statistics import median

import pytest
import torch
from harness import fresh_ranks

import ep_backend as ep
from ep_backend import env

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
TOKENS = (8, 1030)
COMMAND = [sys.executable, "-m", "ep_backend.cli", "tune", "--tokens", ",".join(map(str, TOKENS))]
SHAPE = {"num_experts": 16, "top_k": 4, "hidden_size": 1024, "max_tokens_per_rank": TOKENS[-1]}


def decided_job(rank, group, config):
    """What communicators decide: of this shape, for more tokens, and with a number of their own. All work."""
    torch.cuda.set_device(rank)
    decisions = []
    for wanted in (config, replace(config, max_tokens_per_rank=TOKENS[-1] + 1), replace(config, num_sms=5)):
        with ep.Communicator(group, wanted, device="cuda") as communicator:
            decisions.append(
                (
                    communicator.transport,
                    (communicator.decision.sms, communicator.decision.chunk_scale),
                    communicator.decision.reason,
                )
            )
            x = torch.ones(3, config.hidden_size, dtype=torch.bfloat16, device="cuda")
            ids = torch.zeros(3, config.top_k, dtype=torch.int32, device="cuda").fill_(-1)
            ids[:, 0] = torch.arange(3)
            received, handle = communicator.dispatch(x, ids, torch.ones(3, config.top_k, device="cuda"))
            assert torch.equal(communicator.combine(received.rows.clone(), handle), x)
            communicator.check()
    return decisions


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_choice_is_not_slow_and_is_used(tmp_path, count):
    if count > GPUS:
        pytest.skip(f"needs {count} GPUs, {GPUS} found")
    file = tmp_path / "tuned.json"
    ours = {v.name for v in env.VARIABLES if v.name.startswith(env.PREFIX)}
    environ = {name: text for name, text in os.environ.items() if name not in ours}
    environ["XDG_CACHE_HOME"] = str(tmp_path)
    done = subprocess.run(
        [
            *COMMAND,
            *("--ranks", str(count), "--hidden", str(SHAPE["hidden_size"]), "--json", str(file)),
            *("--experts", str(SHAPE["num_experts"]), "--topk", str(SHAPE["top_k"]), "--iters", "80"),
        ],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())
    best = found["chosen"]["num_sms"]
    assert {0.25, 0.5, 1.0, 2.0, 4.0} == {s["chunk_scale"] for s in found["samples"]}

    def exchange_us(num_sms, scale, tokens):
        way = num_sms, scale, tokens
        return median(
            s["exchange_us"] for s in found["samples"] if (s["num_sms"], s["chunk_scale"], s["tokens"]) == way
        )

    for tokens in TOKENS:
        chosen = exchange_us(best, found["chosen"]["chunk_scale"], tokens)
        assert chosen <= 1.03 * exchange_us(None, 1.0, tokens), done.stdout

    with fresh_ranks(count, {"XDG_CACHE_HOME": str(tmp_path)}) as group:
        for ofs in group.run(decided_job, ep.EpConfig(**SHAPE), timeout=120):
            same, more_tokens, asked = ofs
            assert same[:2] == (found["transport"], (best, found["chosen"]["chunk_scale"]))
            assert "tuned on this machine" in same[2]
            assert more_tokens[1] == (None, 1.0)
            assert asked[1] == (5, 1.0)
            assert "tuned" not in more_tokens[2] + asked[2]
