"""Jobs for rank processes that the package itself starts: they must be importable there by name."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ep_backend.errors import EpConfigError


def add_up(note, base):
    total = torch.tensor(dist.get_rank() + base)
    dist.all_reduce(total)
    return os.getpid(), int(total), os.environ["LOCAL_RANK"]


def speak(note):
    os.write(1, b"words of a library\n")


def stop_one(note, how, victim):
    """Rank ``victim`` fails once all ranks are there; the others wait for it."""
    rank = dist.get_rank()
    dist.barrier()
    if rank == victim:
        time.sleep(0.3)  # until the others have left the barrier
    note(f"{how} soon")
    if rank == victim:
        if how == "raise":
            raise EpConfigError("made up\nby a test")
        if how == "leave":
            os._exit(3)
        if how == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "unpicklable":
            return lambda: None
    if how != "unpicklable":
        time.sleep(60)
    return rank


def hold(note, folder):
    """Tell that this rank is there, and never end."""
    Path(folder, str(os.getpid())).touch()
    while True:
        time.sleep(1)
