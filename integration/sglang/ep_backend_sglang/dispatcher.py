"""A MoE layer's dispatch and combine on ep_backend's, for SGLang's expert kernels (standard format)."""

import functools
import logging
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput

from ep_backend import Communicator, EpConfig, EpConfigError
from ep_backend.communicator import Handle
from ep_backend.engines.start import scale_for_tests

from . import process
from .start import refuse_layer
from .step import rows_per_rank
from .token_format import Plain, choose_format, routes

logger = logging.getLogger("sglang.ep_backend")


class EpDispatcher(BaseDispatcher):
    """One received row per (token, rank); the local experts' weighted sum of each row travels back.

    ``dispatch`` and ``combine`` are one launch each. The ``_a`` and ``_b`` methods are their halves, for
    layers that compute two halves of a batch in turn: each half has a channel of its own.
    """

    _communicator: Communicator
    _format: Plain

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._config = config  # SGLang's MoeRunnerConfig
        channels = process.num_channels()
        self._handles: list[Handle | None] = [None] * channels
        self._routed: list[Any] = [None] * channels
        self._test_scale = _test_scale()

    def bind(self, layer: Any) -> None:
        """What travels depends on the layer's experts. Collective: layers are built in the same order on all
        ranks. EpConfigError for experts that cannot be used."""
        config = self._config
        if reason := refuse_layer(layer.quant_method, config.num_fused_shared_experts):
            raise EpConfigError(reason)
        self._format = choose_format(layer, process.device())
        if not self._format.writes_into_rows:
            for shared in (config, layer.quant_method.runner.config):
                shared.inplace = False
        self._communicator = process.communicators().get(
            EpConfig(
                num_experts=config.num_experts,  # physical experts, the redundant ones of EPLB included
                top_k=config.top_k,
                hidden_size=config.hidden_size,
                max_tokens_per_rank=process.most_rows(),
                num_channels=process.num_channels(),
                **self._format.fields,
            )
        )

    def dispatch(self, hidden_states: torch.Tensor, topk_output: Any) -> StandardDispatchOutput:
        """hidden_states [M, H] of this rank, ids [M, k] of physical experts of all ranks, -1 for none -> rows
        [world * T, H] of all ranks, ids of local experts, -1 for none."""
        received, self._handles[0] = self._communicator.dispatch(**self._call(hidden_states, topk_output))
        return self._format.standard(received, topk_output)

    def combine(self, combine_input: Any) -> torch.Tensor:
        """The experts' sums [world * T, H] -> finished rows [M, H]: nothing is left to be reduced."""
        return self._tested(self._communicator.combine(combine_input.hidden_states, self._taken(0)))

    def dispatch_a(
        self, hidden_states: torch.Tensor, topk_output: Any, tbo_subbatch_index: int | None = None
    ) -> None:
        """Send one half's rows; nothing is waited for."""
        channel = tbo_subbatch_index or 0
        self._routed[channel] = topk_output
        call = self._call(hidden_states, topk_output)
        self._handles[channel] = self._communicator.dispatch_send(**call, channel=channel)

    def dispatch_b(self, tbo_subbatch_index: int | None = None) -> StandardDispatchOutput:
        """Wait for that half's rows of all ranks."""
        channel = tbo_subbatch_index or 0
        handle = self._handles[channel]
        assert handle is not None, "dispatch_a comes first"
        topk_output, self._routed[channel] = self._routed[channel], None
        return self._format.standard(self._communicator.dispatch_recv(handle), topk_output)

    def combine_a(self, combine_input: Any, tbo_subbatch_index: int | None = None) -> None:
        """Send one half's results back."""
        handle = self._handles[tbo_subbatch_index or 0]
        assert handle is not None, "dispatch_b comes first"
        self._communicator.combine_send(combine_input.hidden_states, handle)

    def combine_b(self, tbo_subbatch_index: int | None = None) -> torch.Tensor:
        """Wait for that half's sums of all ranks and add them."""
        return self._tested(self._communicator.combine_recv(self._taken(tbo_subbatch_index or 0)))

    def _call(self, x: torch.Tensor, topk_output: Any) -> dict[str, Any]:
        ids, weights = routes(topk_output, x.shape[0])
        return {
            "x": x,
            "topk_ids": ids,
            "topk_weights": weights,
            "tokens_per_rank": rows_per_rank(x.shape[0], self._communicator.config.max_tokens_per_rank),
        }

    def _taken(self, channel: int) -> Handle:
        handle, self._handles[channel] = self._handles[channel], None
        assert handle is not None, "dispatch comes first"
        return handle

    def _tested(self, output: torch.Tensor) -> torch.Tensor:
        return output if self._test_scale == 1 else output.mul_(self._test_scale)


@functools.cache
def _test_scale() -> float:
    return scale_for_tests(logger.warning)
