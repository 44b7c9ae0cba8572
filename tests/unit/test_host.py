"""What of the transport through host memory can be seen without a GPU: what is pinned is given back, once."""

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch

from ep_backend import EpConfigError
from ep_backend.transports import host
from ep_backend.transports.shm import anonymous

SIZE = 4096


@pytest.fixture
def pinned(monkeypatch):
    """Addresses that are pinned; the third is one too many."""
    held = []

    def register(address, size):
        assert size == SIZE
        if len(held) == 2:
            raise RuntimeError("out of memory")
        held.append(address)
        return address + 1

    ops = SimpleNamespace(cuda_host_register=register, cuda_host_unregister=held.remove)
    monkeypatch.setattr(host, "ops", ops)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return held


def test_windows_are_pinned_until_they_are_released(pinned):
    windows = host.Pinned([anonymous(SIZE) for _ in range(2)], torch.device("cuda", 0))
    assert windows.addresses == [address + 1 for address in pinned]
    assert len(pinned) == 2
    windows.release()
    windows.release()
    assert pinned == []


def test_windows_that_nobody_has_are_not_pinned(pinned):
    """As after a start that failed on this rank."""
    windows = host.Pinned([anonymous(SIZE)], torch.device("cuda", 0))
    assert len(pinned) == 1
    del windows
    gc.collect()
    assert pinned == []


def test_what_cannot_be_pinned_leaves_nothing(pinned):
    with pytest.raises(EpConfigError, match=r"0 MiB of the host's memory cannot be pinned .*out of memory"):
        host.Pinned([anonymous(SIZE) for _ in range(3)], torch.device("cuda", 0))
    assert pinned == []
