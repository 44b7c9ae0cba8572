"""The communicators of an engine's process: one for all MoE layers that agree, their deadlines and errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist

from ep_backend import Communicator, EpConfig, EpConfigError, env


class Communicators:
    """Hands out one communicator per EpConfig over ``group``, made when it is first asked for.

    ``captures``: the engine captures CUDA graphs; ``without_graphs`` says how to start it without, or with
    what instead. Until `engine_is_ready`, a wait may last EP_BACKEND_STARTUP_TIMEOUT_S: compilation and
    profiling let ranks wait for minutes for each other.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        captures: bool,
        without_graphs: str,
        log: logging.Logger,
    ) -> None:
        self.group, self.device, self.captures = group, device, captures
        self._without_graphs, self._log = without_graphs, log
        self._timeout_s: float = env.get("EP_BACKEND_STARTUP_TIMEOUT_S")
        self._made: dict[EpConfig, Communicator] = {}

    def get(self, config: EpConfig) -> Communicator:
        """Collective when new; layers ask in the same order on all ranks. Raises EpConfigError."""
        if config not in self._made:
            with no_defaults_of_a_model():
                self._made[config] = self._create(replace(config, timeout_s=self._timeout_s))
        return self._made[config]

    def _create(self, config: EpConfig) -> Communicator:
        communicator = Communicator(self.group, config, device=self.device)
        if self.captures and not communicator.capturable:
            communicator.destroy()
            raise EpConfigError(
                f"CUDA graphs cannot capture transport {communicator.transport}: {self._without_graphs}. "
                f"{communicator.decision.reason}"
            )
        sms = communicator.decision.sms
        self._log.info(
            "ep_backend: rank %d of %d, transport %s%s, windows %.1f MiB "
            "(%d experts, top-%d, hidden %d, %s, at most %d tokens per rank), deadline of a wait %g s",
            communicator.rank,
            communicator.world_size,
            communicator.transport,
            "" if sms is None else f", at most {sms} SMs",
            communicator.window_bytes / 2**20,
            config.num_experts,
            config.top_k,
            config.hidden_size,
            config.quantization or config.payload,
            config.max_tokens_per_rank,
            self._timeout_s,
        )
        return communicator

    def engine_is_ready(self) -> None:
        """Collective: once every rank is done with its start-up, nobody has a reason to wait long."""
        dist.barrier(group=self.group)
        self._timeout_s = env.get("EP_BACKEND_TIMEOUT_S")
        for communicator in self._made.values():
            communicator.set_timeout(self._timeout_s)
        self._log.info("ep_backend: every rank is ready, deadline of a wait is now %g s", self._timeout_s)

    def check(self) -> None:
        """Raises the EpError that stopped an exchange, if one did."""
        for communicator in self._made.values():
            communicator.check()

    def destroy(self) -> None:
        for communicator in self._made.values():
            communicator.destroy()
        self._made.clear()


@contextlib.contextmanager
def no_defaults_of_a_model() -> Iterator[None]:
    """Engines build models under a default device and dtype of the model's, which are not ours."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
