"""Exchanges for tests: inputs made from a seed, a job that runs them, and what must come out.

A *step* is one exchange on one channel, a dict:

    seed, tokens (per rank), slots (T or None), routing, ids (dtype), result (dtype of y), strided (bool),
    channel, closers (ranks that release instead of combining)

A *schedule* is a list of (step number, action); actions are "dispatch", "send", "recv", "combine",
"combine_send", "combine_recv". A step whose schedule ends early is dropped: the next dispatch on its channel
closes it.
"""

from __future__ import annotations

from dataclasses import replace

import gpus
import torch

import ep_backend as ep
from ep_backend import reference
from ep_backend.selftest import inputs

WHOLE = ("dispatch", "combine")
HALVES = ("send", "recv", "combine_send", "combine_recv")


def step(tokens, *, seed=0, slots=None, **more):
    """A step with what most tests want."""
    usual = {
        "routing": "uniform",
        "ids": torch.int64,
        "result": None,
        "strided": False,
        "channel": 0,
        "closers": (),
    }
    return {"seed": seed, "tokens": tuple(tokens), "slots": slots, **usual, **more}


def make_call(config, world, rank, step):
    """What ``rank`` dispatches."""
    call = inputs.make_call(
        config, world, rank, seed=step["seed"], count=step["tokens"][rank], routing=step["routing"]
    )
    return replace(call, topk_ids=call.topk_ids.to(step["ids"]))


def make_result(config, rank, step, received):
    """The y of ``rank``; NaN in every row that must not be read."""
    dtype = step["result"] or config.result_dtype
    return inputs.make_results(config, rank, received, seed=step["seed"], dtype=dtype)


def _strided(t):
    """The same values with gaps between rows and between elements."""
    wide = torch.zeros(*t.shape[:-1], t.shape[-1] * 2, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def own(received):
    """A copy on the CPU that outlives the exchange."""
    copy = {k: None if v is None else v.cpu().clone() for k, v in vars(received).items()}
    return ep.Received(**copy)


class Runner:
    """One rank's communicator and its exchanges under way."""

    def __init__(self, communicator, steps):
        self.c, self.steps, self.open = communicator, steps, {}
        self.received, self.combined = {}, {}

    def act(self, number, action):
        step, c, config = self.steps[number], self.c, self.c.config
        if action in ("dispatch", "send"):
            call = make_call(config, c.world_size, c.rank, step)
            parts = (call.x, call.topk_ids, call.topk_weights, call.scales)
            x, ids, weights, scales = (None if t is None else t.to(c.device) for t in parts)
            if step["strided"]:
                x, ids, weights = _strided(x), _strided(ids), _strided(weights)
                scales = None if scales is None else _strided(scales)
            arguments = {"scales": scales, "tokens_per_rank": step["slots"], "channel": step["channel"]}
            if action == "send":
                self.open[number] = c.dispatch_send(x, ids, weights, **arguments)
            else:
                received, self.open[number] = c.dispatch(x, ids, weights, **arguments)
                self._keep(number, received)
        elif action == "recv":
            self._keep(number, c.dispatch_recv(self.open[number]))
        elif c.rank in step["closers"]:
            if action != "combine_recv":
                c.release(self.open.pop(number))
        elif action == "combine_send":
            c.combine_send(self._result(number), self.open[number])
        else:
            handle = self.open.pop(number)
            try:
                if action == "combine":
                    self.combined[number] = c.combine(self._result(number), handle).cpu()
                else:
                    self.combined[number] = c.combine_recv(handle).cpu()
            except ep.EpProtocolError as error:
                self.combined[number] = str(error)

    def _keep(self, number, received):
        self.received[number] = own(received)

    def _result(self, number):
        y = make_result(self.c.config, self.c.rank, self.steps[number], self.received[number])
        y = y.to(self.c.device)
        return _strided(y) if self.steps[number]["strided"] else y


def run_steps(rank, group, config, steps, schedule, transports=("cpu", "collective"), device="cpu"):
    """The job: per transport what was received and combined, by step. ``device``: "cuda" for a GPU each."""
    if device == "cuda":
        device = gpus.take(rank)
    results = {}
    for transport in transports:
        with ep.Communicator(group, replace(config, transport=transport), device=device) as communicator:
            runner = Runner(communicator, steps)
            for number, action in schedule:
                runner.act(number, action)
            communicator.check()
            results[transport] = (runner.received, runner.combined)
    return results


def one_by_one(steps):
    """The schedule that finishes each step before the next."""
    return [(number, action) for number in range(len(steps)) for action in WHOLE]


def check_steps(config, steps, results, nodes=None, device="cpu"):
    """Compare the results of ``run_steps`` on all ranks with the reference, bit by bit. ``nodes``: of
    transport hier; ``device``: as there."""
    world = len(results)
    for number, step in enumerate(steps):
        calls = [make_call(config, world, rank, step) for rank in range(world)]
        wanted = reference.dispatch(config, calls, step["slots"])
        ys = [make_result(config, rank, step, wanted[rank]) for rank in range(world)]
        totals = reference.combine(config, calls, ys, step["slots"], nodes)
        for rank in range(world):
            for transport, (received, combined) in results[rank].items():
                where = f"{transport}, rank {rank}, step {number}"
                if number in received:
                    want = wanted[rank]
                    if device == "cuda" and config.layout == "rank_major":
                        want = replace(want, rows_per_expert=None)  # nobody counts them on a GPU
                    difference = reference.first_difference(config, received[number], want)
                    assert difference is None, f"{where}: {difference}"
                if number not in combined:
                    continue
                if step["closers"]:
                    assert isinstance(combined[number], str), f"{where}: combined though a rank closed"
                    assert "without a combine" in combined[number]
                else:
                    same = reference.same_bits(combined[number], totals[rank])
                    assert same, f"{where}: {combined[number]} instead of {totals[rank]}"
