"""One rank of tests/failure/test_network.py: ``network_rank.py JOB RANK WORLD FOLDER TRANSPORT...``."""

import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from exchange import Runner, make_call, step
from networks import LINK, link_bytes

import ep_backend as ep
from ep_backend.selftest import exchanges, plan

CONFIG = ep.EpConfig(
    num_experts=16, top_k=4, hidden_size=1024, max_tokens_per_rank=32, payload=torch.float32, timeout_s=20.0
)
SELFTEST = plan.group_cases(4)[:1]
"""Rows of bf16: the sums of nodes are rounded once more than those of ranks."""
STEPS = [step([32, 17, 0, 29], seed=seed) for seed in range(6)]


def count(comm):
    """All steps; bytes that left this node meanwhile, and the results."""
    runner = Runner(comm, STEPS)
    dist.barrier()
    before = link_bytes()
    dist.barrier()
    for number in range(len(STEPS)):
        runner.act(number, "dispatch")
        runner.act(number, "combine")
    dist.barrier()
    return {"sent": link_bytes() - before, "results": (runner.received, runner.combined)}


def cut(comm):
    """Exchanges until one fails: how, and after how long."""
    comm.set_timeout(3.0)
    call = make_call(CONFIG, comm.world_size, comm.rank, STEPS[0])
    dist.barrier()
    (Path(FOLDER) / f"running-{comm.rank}").touch()
    try:
        for _ in range(10**6):
            start = time.monotonic()
            _, handle = comm.dispatch(call.x, call.topk_ids, call.topk_weights)
            comm.combine(torch.zeros(comm.world_size * 32, CONFIG.hidden_size), handle)
    except ep.EpTimeoutError as error:
        return {"error": str(error), "waited": time.monotonic() - start}
    raise AssertionError("the network was cut and nobody noticed")


def start(folder):
    """What is said of a network that is cut before a communicator is made, and after how long."""
    (folder / f"running-{RANK}").touch()
    while not (folder / "cut").exists():
        time.sleep(0.05)
    os.environ["EP_BACKEND_STARTUP_TIMEOUT_S"] = "2"
    begin = time.monotonic()
    try:
        ep.Communicator(None, CONFIG)
    except ep.EpConfigError as error:
        return {"error": str(error), "waited": time.monotonic() - begin}
    raise AssertionError("the network was cut and nobody noticed")


if __name__ == "__main__":
    JOB, RANK, WORLD, FOLDER, *TRANSPORTS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
    os.environ["GLOO_SOCKET_IFNAME"] = LINK
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{FOLDER}/store", WORLD),
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    answers = {"start": start(Path(FOLDER))} if JOB == "start" else {}
    for transport in TRANSPORTS:
        comm = ep.Communicator(None, replace(CONFIG, transport=transport))
        answers[transport] = {"count": count, "cut": cut}[JOB](comm)
        answers[transport]["reason"] = comm.decision.reason
        comm.destroy()
        if JOB == "count":
            task = exchanges.Task(device="cpu", transport=transport, timeout_s=20.0, cases=SELFTEST)
            answers[transport]["selftest"] = exchanges.run(lambda text: None, task)
    torch.save(answers, f"{FOLDER}/answer-{RANK}")
    if JOB == "start":
        # PyTorch's thread of the meeting that has just failed lets go of tensors, for which it wants the
        # interpreter; if that is ending, the process is aborted (seen once).
        time.sleep(1)
