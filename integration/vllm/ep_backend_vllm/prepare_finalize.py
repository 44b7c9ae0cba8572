"""vLLM's prepare / finalize of a MoE layer on ep_backend's dispatch / combine (Standard format)."""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)

from ep_backend import Communicator, EpConfigError, env

from .expert_rows import ids_and_weights
from .manager import EpManager
from .step import tokens_per_rank

logger = init_logger("vllm.ep_backend")


def make_prepare_finalize(moe: Any, manager: EpManager, *, monolithic: bool) -> "EpPrepareAndFinalize":
    """For one layer with vLLM's FusedMoEConfig `moe`. EpConfigError for experts that cannot be used."""
    if monolithic:
        raise EpConfigError(
            "ep_backend needs expert kernels that take top-k ids, vLLM chose some that route by themselves: "
            "choose others with --moe-backend, or use --all2all-backend allgather_reducescatter."
        )
    communicator = manager.get_handle(
        {
            "num_experts": moe.num_experts,  # physical experts, the redundant ones of EPLB included
            "top_k": moe.experts_per_token,
            "hidden_size": moe.hidden_dim,
            "max_tokens_per_rank": -(-manager.scheduler_limit // moe.moe_parallel_config.sp_size),
            "payload": moe.in_dtype,
            "layout": "compact",
            "expert_ids": "local",
        }
    )
    return EpPrepareAndFinalize(communicator)


class EpPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """One received row per (token, rank); the local experts' weighted sum of each row travels back."""

    def __init__(self, communicator: Communicator) -> None:
        super().__init__()
        self._communicator = communicator
        self._handle: Any = None
        self._test_scale: float = env.get("EP_BACKEND_TEST_SCALE_COMBINE")
        if self._test_scale != 1:
            logger.warning_once(
                "ep_backend: EP_BACKEND_TEST_SCALE_COMBINE=%g multiplies the result of every MoE layer: "
                "THE MODEL'S OUTPUT IS WRONG. Unset it unless this is a test of a test.",
                self._test_scale,
            )

    def post_init_setup(self, fused_experts: Any) -> None:
        quant = fused_experts.quant_config
        if (
            quant is not None
            and quant.quant_dtype is not None
            and not fused_experts.expects_unquantized_inputs
        ):
            raise EpConfigError(
                f"ep_backend sends unquantised activations only, {type(fused_experts).__name__} wants them "
                f"quantised to {quant.quant_dtype}: use --all2all-backend allgather_reducescatter."
            )

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def num_dispatchers(self) -> int:
        return self._communicator.world_size

    def output_is_reduced(self) -> bool:
        return True

    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> mk.PrepareResultType:
        """a1 [M, H], topk_* [M, k] -> rows [R, H], no scales or counts, ids [R, k'], weights [R, k'] fp32."""
        if apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise EpConfigError("router weights can be applied to the input only with top-1 routing")
            a1 = a1 * topk_weights.to(a1.dtype)
        received, self._handle = self._communicator.dispatch(
            a1.contiguous(),
            topk_ids.contiguous(),
            topk_weights.to(torch.float32).contiguous(),
            tokens_per_rank=tokens_per_rank(self._communicator.config.max_tokens_per_rank),
        )
        assert received.topk_ids is not None  # only expert-major rows come without
        assert received.topk_weights is not None
        ids, weights = ids_and_weights(received.topk_ids, received.topk_weights)
        return received.rows, None, None, ids, weights

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: mk.TopKWeightAndReduce,
    ) -> None:
        """output [M, H] receives the sum over ranks; topk_* are those that `prepare` returned."""
        rows = fused_expert_output
        if rows.numel() > 0:
            if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
                weight_and_reduce_impl = TopKWeightAndReduceContiguous()
            rows = weight_and_reduce_impl.apply(
                output=None,
                fused_expert_output=rows,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                apply_router_weight_on_input=apply_router_weight_on_input,
            )
        handle, self._handle = self._handle, None
        self._communicator.combine(rows.view(-1, output.shape[-1]), handle, out=output)
        if self._test_scale != 1:
            output.mul_(self._test_scale)
