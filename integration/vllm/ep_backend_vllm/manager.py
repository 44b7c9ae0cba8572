"""The all-to-all manager of the expert-parallel group: it owns the communicators and their deadlines."""

import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import vllm
from vllm.config import get_current_vllm_config
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.logger import init_logger

from ep_backend import Communicator, EpConfig, EpConfigError, env

from . import agreement

logger = init_logger("vllm.ep_backend")

CAPTURABLE = ("peer",)
"""Transports that a CUDA graph can capture."""

_living: "weakref.WeakSet[EpManager]" = weakref.WeakSet()


class EpManager(AgRsAll2AllManager):
    """Hands out one communicator per (experts, top-k, hidden size, dtype), shared by all MoE layers that
    agree.

    vLLM's own all-gather methods stay as they are: data parallelism without expert parallelism uses them.
    """

    def __init__(
        self, cpu_group: dist.ProcessGroup, tcp_store_group: Any = None, *, device: torch.device
    ) -> None:
        super().__init__(cpu_group, tcp_store_group)
        self.device = device
        vllm_config = get_current_vllm_config()
        self.scheduler_limit: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.num_channels: int = max(1, vllm_config.parallel_config.num_ubatches)
        self._captures = device.type == "cuda" and bool(vllm_config.compilation_config.cudagraph_mode)
        # Compilation and profiling let ranks wait for minutes for each other; see engine_is_ready.
        self._timeout_s: float = env.get("EP_BACKEND_STARTUP_TIMEOUT_S")
        self._communicators: dict[EpConfig, Communicator] = {}
        _living.add(self)

    @staticmethod
    def living() -> "list[EpManager]":
        return list(_living)

    def get_handle(self, kwargs: dict[str, Any]) -> Communicator:
        """The communicator for these fields of EpConfig. Collective when new; layers load in order."""
        config = EpConfig(**kwargs, num_channels=self.num_channels)
        if config not in self._communicators:
            self._communicators[config] = self._create(replace(config, timeout_s=self._timeout_s))
        return self._communicators[config]

    def _create(self, config: EpConfig) -> Communicator:
        communicator = Communicator(self.cpu_group, config, device=self.device)
        if self._captures and communicator.transport not in CAPTURABLE:
            raise EpConfigError(
                f"CUDA graphs cannot capture transport {communicator.transport}: add --enforce-eager, or use "
                f"--all2all-backend allgather_reducescatter. {communicator.decision.reason}"
            )
        logger.info(
            "ep_backend: rank %d of %d, transport %s, windows %.1f MiB "
            "(%d experts, top-%d, hidden %d, %s, at most %d tokens per rank), deadline of a wait %g s",
            communicator.rank,
            communicator.world_size,
            communicator.transport,
            communicator.window_bytes / 2**20,
            config.num_experts,
            config.top_k,
            config.hidden_size,
            config.quantization or config.payload,
            config.max_tokens_per_rank,
            self._timeout_s,
        )
        return communicator

    def dispatch_router_logits(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own gathering, for expert layers that route by themselves; it does not exist on CPUs."""
        if self.device.type == "cpu":
            raise EpConfigError(
                f"the CPU experts of vLLM {vllm.__version__} route by themselves, and ep_backend needs "
                "top-k ids: use a version whose CPU experts take them (0.32 does)."
            )
        return super().dispatch_router_logits(*args, **kwargs)

    def max_sms_used(self) -> int | None:
        """SMs to keep free for an exchange that runs beside other work: none, its halves are short."""
        return 0

    def engine_is_ready(self) -> None:
        """Collective: once every rank is done with its start-up, nobody has a reason to wait long."""
        dist.barrier(group=self.cpu_group)
        self._timeout_s = env.get("EP_BACKEND_TIMEOUT_S")
        for communicator in self._communicators.values():
            communicator.set_timeout(self._timeout_s)
        logger.info("ep_backend: every rank is ready, deadline of a wait is now %g s", self._timeout_s)

    def check(self) -> None:
        """Raises the EpError that stopped an exchange, if one did."""
        for communicator in self._communicators.values():
            communicator.check()

    def destroy(self) -> None:
        for communicator in self._communicators.values():
            communicator.destroy()
        self._communicators.clear()
        agreement.forget()
        super().destroy()
