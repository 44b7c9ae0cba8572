"""The all-to-all manager of the expert-parallel group: it owns the communicators and their deadlines."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
import vllm
from vllm.config import get_current_vllm_config
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.logger import init_logger

from ep_backend import Communicator, EpConfig, EpConfigError
from ep_backend.engines.pool import Communicators

from . import agreement

logger = init_logger("vllm.ep_backend")

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
        if device.type == "cpu":
            # vLLM's bfloat16 attention uses AMX tiles without asking the kernel for them (0.32.0). If
            # nothing before it has asked, as with a short first prompt, SIGILL ends the process.
            torch.cpu._init_amx()
        vllm_config = get_current_vllm_config()
        self.scheduler_limit: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.num_channels: int = max(1, vllm_config.parallel_config.num_ubatches)
        self.communicators = Communicators(
            cpu_group,
            device,
            captures=device.type == "cuda" and bool(vllm_config.compilation_config.cudagraph_mode),
            without_graphs="add --enforce-eager, or use --all2all-backend allgather_reducescatter",
            log=logger,
        )
        _living.add(self)

    @staticmethod
    def living() -> "list[EpManager]":
        return list(_living)

    def get_handle(self, kwargs: dict[str, Any]) -> Communicator:
        """The communicator for these fields of EpConfig. Collective when new; layers load in order."""
        return self.communicators.get(EpConfig(**kwargs, num_channels=self.num_channels))

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
        """Collective: from here on the short deadline holds."""
        self.communicators.engine_is_ready()

    def check(self) -> None:
        """Raises the EpError that stopped an exchange, if one did."""
        self.communicators.check()

    def destroy(self) -> None:
        self.communicators.destroy()
        agreement.forget()
        super().destroy()
