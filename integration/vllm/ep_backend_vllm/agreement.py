"""What the data-parallel ranks agree on before each step (token counts, graph or no graph), agreed through
shared memory.

vLLM sums a small tensor over gloo, which takes longer than several MoE layers: see docs/vllm.md for numbers.
The sum stays what it was; only the way is another, and a rank that does not come is named.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_dp_group
from vllm.logger import init_logger

from ep_backend import env, rendezvous
from ep_backend.facts import gather
from ep_backend.host_sum import HostSum
from ep_backend.probe import probe

logger = init_logger("vllm.ep_backend")

MODULES = ("vllm.v1.worker.dp_utils", "vllm.v1.worker.gpu.dp_utils")
"""Where vLLM agrees, for its first and its second model runner: by `dist.all_reduce`, or in later versions by
the group's own `cpu_all_reduce_`."""
NUMBERS_PER_RANK = 8
"""That an agreement may have; vLLM has 4 or 6."""

_sums: dict[dist.ProcessGroup, HostSum] = {}


class _Distributed:
    """torch.distributed, but for sums over a group that has a `HostSum`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain_sum = not args and kwargs.keys() == {"group"}
        host_sum = _sums.get(kwargs["group"]) if plain_sum else None
        if host_sum is None or not host_sum.takes(tensor):
            return dist.all_reduce(tensor, *args, **kwargs)
        return host_sum.all_reduce(tensor)


def agree_through_shared_memory() -> None:
    """Collective over the data-parallel group. Nothing changes if its ranks do not share memory.

    Ranks may wait long for each other between two steps, so the deadline is that of the start-up.
    """
    coordinator = get_dp_group()
    group = coordinator.cpu_group
    world = dist.get_world_size(group)
    if world == 1 or group in _sums:
        return
    if not gather(rendezvous.gather(group, probe("cpu"))).shares_memory:
        return
    host_sum = HostSum(group, NUMBERS_PER_RANK * world, env.get("EP_BACKEND_STARTUP_TIMEOUT_S"))
    _sums[group] = host_sum
    for name in MODULES:
        module = importlib.import_module(name) if importlib.util.find_spec(name) is not None else None
        if getattr(module, "dist", None) is dist:
            module.dist = _Distributed()  # type: ignore[union-attr]
    original = getattr(coordinator, "cpu_all_reduce_", None)
    if original is not None:
        coordinator.cpu_all_reduce_ = functools.partial(_all_reduce, host_sum, original)
    logger.info_once("ep_backend: the data-parallel ranks agree on each step through shared memory")


def _all_reduce(host_sum: HostSum, original: Callable, tensor: torch.Tensor) -> torch.Tensor:
    if not host_sum.takes(tensor):
        return original(tensor)
    host_sum.all_reduce(tensor)
    return tensor


def forget() -> None:
    """The groups are about to go."""
    for host_sum in _sums.values():
        host_sum.destroy()
    _sums.clear()
