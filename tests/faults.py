"""Ranks that stop or die on purpose, for tests/failure: a checked exchange, and what a rank found out."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import ep_backend as ep
from ep_backend import rendezvous

POINTS = ("before dispatch", "before combine", "between the halves of combine")
MARGIN_S = 15.0  # on top of a deadline, for a machine that is busy with other work


def make(group, *, transport="cpu", layout="rank_major", channels=1, device=None, **more):
    defaults = {"num_experts": 6, "top_k": 2, "hidden_size": 64, "max_tokens_per_rank": 8, "timeout_s": 30}
    config = ep.EpConfig(
        payload=torch.float32,
        layout=layout,
        transport=transport,
        num_channels=channels,
        **{**defaults, **more},
    )
    return ep.Communicator(group, config, device=device)


def exchange(comm, number, *, channel=0, tokens=None, at=lambda point: None, without=()):
    """One exchange; raises AssertionError if its result is wrong. ``at(point)`` is called at each of POINTS.

    Every expert returns its row, and all weights are 1: each token comes back ``top_k`` times, but for its
    experts on the ranks ``without``. Rows carry their number and rank, so a row of another exchange or rank
    is noticed.
    """
    config = comm.config
    if tokens is None:
        tokens = (number + comm.rank) % (config.max_tokens_per_rank + 1)
    x = torch.full((tokens, config.hidden_size), float(number * 16 + comm.rank + 1), device=comm.device)
    first = torch.arange(tokens, device=comm.device) + number
    ids = torch.stack([(first + j) % config.num_experts for j in range(config.top_k)], dim=1)
    at("before dispatch")
    weights = torch.ones(ids.shape, device=comm.device)
    received, handle = comm.dispatch(x, ids, weights, channel=channel)
    if config.layout == "expert_major":
        y = received.rows
    else:
        times = (received.topk_ids >= 0).sum(1, keepdim=True)
        y = torch.where(times > 0, received.rows * times, 0.0)
    at("before combine")
    comm.combine_send(y, handle)
    at("between the halves of combine")
    out = comm.combine_recv(handle)
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)
        comm.check()  # else the next call would raise what went wrong in this one
    owners = torch.tensor(config.expert_ranks(comm.world_size), device=comm.device)[ids]
    alive = torch.isin(owners, torch.tensor(without, dtype=torch.int64, device=comm.device), invert=True)
    torch.testing.assert_close(out, x * alive.sum(1, keepdim=True), rtol=0, atol=0)


def go_on_without(comm, gone):
    """The ranks that are left mask ``gone``, meet, and exchange on."""
    comm.set_timeout(30)
    comm.mask_ranks([gone])
    comm.recover()
    for n in range(5, 25):
        exchange(comm, n, channel=n % comm.config.num_channels, without=[gone])
    with pytest.raises(AssertionError, match="not equal"):
        exchange(comm, 22)  # as if nobody were missing


def stop(how):
    """End or stop this process, from inside: at exactly this place."""
    os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)


def caught(comm, act):
    """What ``act`` raised, as numbers, and that the error stays: every later call raises it at once."""
    start = time.monotonic()
    try:
        act()
    except ep.EpTimeoutError as error:
        found = {
            "rank": error.rank,
            "peer": error.peer,
            "phase": error.phase,
            "reported_by": error.reported_by,
            "missing": error.missing,
            "text": str(error),
            "elapsed": time.monotonic() - start,
        }
    else:
        raise AssertionError("a rank that stopped went unnoticed")
    start = time.monotonic()
    for again in (comm.check, lambda: exchange(comm, 90), lambda: exchange(comm, 91)):
        with pytest.raises(ep.EpTimeoutError) as stays:
            again()
        assert str(stays.value) == found["text"], "another error than the first"
    found["sticky_s"] = time.monotonic() - start
    return found


def refused(act):
    """Seconds until ``act`` raised EpError that is no timeout of an exchange; and the message."""
    start = time.monotonic()
    with pytest.raises(ep.EpError) as refusal:
        act()
    assert not isinstance(refusal.value, ep.EpTimeoutError)
    return time.monotonic() - start, str(refusal.value)


def windows_of(pids):
    """Anonymous files of ours that these processes have mapped or open, by inode."""
    inodes = set()
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
            inodes |= set(re.findall(r" (\d+) +/memfd:ep_backend-window", maps))
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                if "/memfd:ep_backend-window" in os.readlink(fd):
                    inodes.add(str(os.stat(fd).st_ino))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return inodes


def all_pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def refused_start(act):
    """What ``act`` said when it raised EpConfigError, how long it took, and what it left: windows, files."""
    rendezvous.gather(None, None)  # the group opens its sockets when it is first used
    files, start = len(os.listdir("/proc/self/fd")), time.monotonic()
    try:
        act()
    except ep.EpConfigError as error:
        text = str(error)
    else:
        raise AssertionError("it started, and should not have")
    seconds, more_files = time.monotonic() - start, len(os.listdir("/proc/self/fd")) - files
    return text, seconds, (len(windows_of([os.getpid()])), more_files)


def check_refusals(found, *words):
    """``found``: of each rank, from `refused_start`."""
    for text, seconds, left in found:
        for word in words:
            assert word in text, text
        assert seconds < MARGIN_S
        assert left == (0, 0)
