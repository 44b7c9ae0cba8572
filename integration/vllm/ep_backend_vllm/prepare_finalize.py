"""vLLM's prepare / finalize of a MoE layer on ep_backend's dispatch / combine (Standard format)."""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_enabled, dbo_maybe_run_recv_hook

from ep_backend import Communicator, EpConfigError
from ep_backend.engines.start import scale_for_tests, share
from ep_backend.transports.base import Received

from . import expert_rows
from .manager import EpManager
from .step import tokens_per_rank
from .token_format import Plain, choose_format

logger = init_logger("vllm.ep_backend")


def make_prepare_finalize(moe: Any, manager: EpManager, *, monolithic: bool) -> "EpPrepareAndFinalize":
    """For one layer with vLLM's FusedMoEConfig `moe`. EpConfigError for experts that cannot be used."""
    if monolithic:
        raise EpConfigError(
            "ep_backend needs expert kernels that take top-k ids, vLLM chose some that route by themselves: "
            "choose others with --moe-backend, or use --all2all-backend allgather_reducescatter."
        )
    return EpPrepareAndFinalize(moe, manager)


class EpPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """One received row per (token, rank); the local experts' weighted sum of each row travels back.

    Dispatch and combine are one launch each. With two micro-batches their halves are, and the other batch is
    computed in between.
    """

    _communicator: Communicator
    _format: Plain

    def __init__(self, moe: Any, manager: EpManager) -> None:
        super().__init__()
        self._moe, self._manager = moe, manager
        self._handles: list[Any] = [None] * manager.num_channels
        self._test_scale = scale_for_tests(logger.warning_once)

    def post_init_setup(self, fused_experts: Any) -> None:
        """What travels depends on the experts. Collective: layers are set up in the same order on all
        ranks."""
        moe, device = self._moe, self._manager.device
        self._format = choose_format(
            fused_experts.quant_config,
            fused_experts.expects_unquantized_inputs,
            moe.in_dtype,
            moe.hidden_dim,
            device,
        )
        if not self._format.ran_in_an_engine:
            logger.warning_once(
                "ep_backend: rows in this format (%s) have been tested without an engine only: compare "
                "answers with those of --all2all-backend allgather_reducescatter before you rely on them.",
                type(fused_experts).__name__,
            )
        slots = share(self._manager.scheduler_limit, moe.moe_parallel_config.sp_size)
        # CUTLASS experts make their scratch memory for this many rows; vLLM counts those of one rank only.
        moe.max_num_tokens = max(moe.max_num_tokens, self._manager.world_size * slots)
        self._communicator = self._manager.get_handle(
            {
                "num_experts": moe.num_experts,  # physical experts, the redundant ones of EPLB included
                "top_k": moe.experts_per_token,
                "hidden_size": moe.hidden_dim,
                "max_tokens_per_rank": slots,
                **self._format.fields,
                **expert_rows.config_fields(device, self._manager.rank, moe.num_experts),
            }
        )

    @property
    def activation_format(self) -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def num_dispatchers(self) -> int:
        return self._manager.world_size

    def output_is_reduced(self) -> bool:
        return True

    def supports_async(self) -> bool:
        return self._manager.num_channels > 1

    def supports_dbo(self) -> bool:
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
        """a1 [M, H], topk_* [M, k] -> rows [R, H], their scales or None, no counts, ids [R, k'], weights
        [R, k'] fp32."""
        call = self._dispatch_arguments(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        received, self._handles[0] = self._communicator.dispatch(**call)
        return self._received(received)

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> Any:
        """Returns what returns the rows as `prepare` does. With two micro-batches the rows are only on their
        way, and before it comes what waits for them."""
        call = self._dispatch_arguments(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        if not dbo_enabled():
            arrived, self._handles[0] = self._communicator.dispatch(**call)
            return lambda: self._received(arrived)
        logger.info_once("ep_backend: this step is computed as two batches that overlap")
        channel = dbo_current_ubatch_id()
        handle = self._handles[channel] = self._communicator.dispatch_send(**call, channel=channel)
        received: list[Received] = []

        def wait() -> None:
            received.append(self._communicator.dispatch_recv(handle))

        return wait, lambda: self._received(received[0])

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
        rows = _reduced(
            fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input, weight_and_reduce_impl
        )
        self._communicator.combine(rows.view(-1, output.shape[-1]), self._handles[0], out=output)
        self._scale_for_tests(output)

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: mk.TopKWeightAndReduce,
    ) -> Any:
        """As `finalize`, and returns a call without work. With two micro-batches it sends only, and before
        that call comes one that waits for the others' sums and adds them."""
        if not dbo_enabled():
            self.finalize(
                output,
                fused_expert_output,
                topk_weights,
                topk_ids,
                apply_router_weight_on_input,
                weight_and_reduce_impl,
            )
            return _nothing
        # The other batch is about to need what its `prepare_async` left for us to wait for.
        dbo_maybe_run_recv_hook()
        handle = self._handles[dbo_current_ubatch_id()]
        rows = _reduced(
            fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input, weight_and_reduce_impl
        )
        self._communicator.combine_send(rows.view(-1, output.shape[-1]), handle)

        def wait() -> None:
            self._communicator.combine_recv(handle, out=output)
            self._scale_for_tests(output)

        return wait, _nothing

    def _dispatch_arguments(
        self, a1: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, weight_on_input: bool
    ) -> dict[str, Any]:
        if weight_on_input:
            if ids.shape[1] != 1:
                raise EpConfigError("router weights can be applied to the input only with top-1 routing")
            a1 = a1 * weights.to(a1.dtype)
        x, scales = self._format.encode(a1)
        return {
            "x": x,
            "topk_ids": ids,
            "topk_weights": weights.to(torch.float32),
            "scales": scales,
            "tokens_per_rank": tokens_per_rank(self._communicator.config.max_tokens_per_rank),
        }

    def _received(self, received: Received) -> mk.PrepareResultType:
        ids, weights = received.topk_ids, received.topk_weights
        assert ids is not None  # only expert-major rows come without
        assert weights is not None
        if self._manager.device.type == "cpu":
            ids, weights = expert_rows.for_cpu_kernel(ids, weights)
        rows, scales = self._format.decode(received.rows, received.scales)
        return rows, scales, None, ids, weights

    def _scale_for_tests(self, output: torch.Tensor) -> None:
        if self._test_scale != 1:
            output.mul_(self._test_scale)


def _nothing() -> None:
    pass


def _reduced(
    rows: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weight_on_input: bool,
    weight_and_reduce: mk.TopKWeightAndReduce,
) -> torch.Tensor:
    """The experts' results as one weighted sum per received row."""
    if rows.numel() == 0:
        return rows
    if isinstance(weight_and_reduce, TopKWeightAndReduceDelegate):
        weight_and_reduce = TopKWeightAndReduceContiguous()
    return weight_and_reduce.apply(
        output=None,
        fused_expert_output=rows,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        apply_router_weight_on_input=weight_on_input,
    )
