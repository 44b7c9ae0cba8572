"""The GPUs that tests use, one per rank.

With EP_TEST_SHARED_GPUS=1 ranks share the GPUs there are. Their kernels then take turns, a few milliseconds
each, and wait for each other across turns: this shows whether results are right, and no time. NCCL refuses
ranks of one host that share a GPU, so every rank is a host of its own to it, joined by sockets. So it is in
`nodes`, however many GPUs there are.
"""

from __future__ import annotations

import os

import harness
import pytest
import torch

FOUND = torch.cuda.device_count()
SHARED = os.environ.get("EP_TEST_SHARED_GPUS") == "1"
if SHARED:  # for the rank processes, which inherit it
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


# Between what it takes for hosts, NCCL uses neither peer access nor shared memory, and an adapter's loopback
# would be no network either.
NODES = {"NCCL_HOSTID": "rank-{rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}


def nodes(count: int) -> harness.Ranks:
    """The session's group of ``count`` ranks each of which is a host of its own to NCCL, joined by sockets,
    so that made-up nodes (nodes.py) are nodes to NCCL too, however they are made up. In processes of their
    own: NCCL looks at these variables once."""
    return harness.ranks(count, NODES)


def shared(ranks: int) -> bool:
    """Whether so many ranks share the GPUs."""
    return SHARED and 0 < FOUND < ranks


def needs(count: int, *, own: bool = False) -> None:
    """Skip the test if there are not ``count`` GPUs. ``own``: ranks cannot share them."""
    if count > FOUND and (own or not shared(count)):
        pytest.skip(f"needs {count} GPUs, {FOUND} found")


def take(rank: int) -> torch.device:
    """The GPU of ``rank``, which becomes this process's current one."""
    if SHARED:
        os.environ["NCCL_HOSTID"] = f"rank-{rank}"
    device = torch.device("cuda", rank % FOUND)
    torch.cuda.set_device(device)
    return device
