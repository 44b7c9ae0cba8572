"""Nodes that are made up: ranks of one machine that say that they are on several."""

import os
from dataclasses import replace
from unittest import mock

from exchange import run_steps

import ep_backend as ep


def pretend(rank, nodes):
    """While it lasts, ``rank`` says that it is on its node of ``nodes``."""
    here = next(n for n, ranks in enumerate(nodes) if rank in ranks)
    return mock.patch.dict(os.environ, EP_BACKEND_NODE=str(here))


def make(rank, group, nodes, config, transport="hier", device=None):
    with pretend(rank, nodes):
        return ep.Communicator(group, replace(config, transport=transport), device=device)


def run_steps_on(rank, group, nodes, config, steps, schedule, transports=("hier",), device="cpu"):
    """The job ``run_steps`` on made-up nodes."""
    with pretend(rank, nodes):
        return run_steps(rank, group, config, steps, schedule, transports, device)


def crossings(config, calls, nodes):
    """Rows that leave their node: one per token and other node that has an expert of it."""
    node_of = {rank: n for n, ranks in enumerate(nodes) for rank in ranks}
    owners = config.expert_ranks(len(calls))
    return sum(
        len({node_of[owners[e]] for e in ids if e >= 0} - {node_of[rank]})
        for rank, call in enumerate(calls)
        for ids in call.topk_ids.tolist()
    )
