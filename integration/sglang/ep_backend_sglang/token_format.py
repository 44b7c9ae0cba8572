"""In which format tokens travel, and how the experts get them: always SGLang's standard format."""

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput

from ep_backend.engines.formats import BLOCK, QUANTIZATION, dispatch_may_quantize, example_rows
from ep_backend.transports.base import Received

from .start import block_shape

QUANTIZED = "_ep_backend_quantized"
"""Attribute of a row buffer: its rows and scales, as they came."""


class Plain:
    """As they are. The experts read the window itself: its rows are those of all ranks, in order of rank."""

    writes_into_rows = False
    """Whether experts may write their results over the rows they got. Not over a window: a rank that has its
    own results back may send the next rows, which would land on results that others still wait for
    (docs/protocol.md, rule 3)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.fields: dict[str, Any] = {"payload": dtype}

    def standard(self, received: Received, topk_output: Any) -> StandardDispatchOutput:
        """What arrived, as the experts take it: rows [R, hidden], ids local, -1 for none."""
        return StandardDispatchOutput(
            hidden_states=received.rows, hidden_states_scale=None, topk_output=routed(received, topk_output)
        )


class BlockFp8(Plain):
    """float8_e4m3fn with a float32 scale per 1x128 block; dispatch itself quantises, half the bytes.

    The experts' row buffer is memory beside the window: Triton takes the quantised rows in a field of the
    standard format, DeepGEMM's preparation asks SGLang's quantisation for them (`quantized`).
    """

    writes_into_rows = True

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._dtype = dtype
        self.fields["quantization"] = QUANTIZATION

    def standard(self, received: Received, topk_output: Any) -> StandardDispatchOutput:
        rows = torch.empty(received.rows.shape, dtype=self._dtype, device=received.rows.device)
        assert received.scales is not None
        pair = (received.rows, received.scales)
        setattr(rows, QUANTIZED, pair)
        return StandardDispatchOutput(
            hidden_states=rows,
            hidden_states_scale=None,
            topk_output=routed(received, topk_output),
            hidden_states_pre_quant=pair,
        )


def routes(topk_output: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's ids [rows, k] and float32 weights for ``rows`` rows.

    A data-parallel rank without requests is given rows of padding where all ranks must have as many. Half a
    batch of such rows reaches us without an answer of the router, which SGLang does not ask then
    (`op_gate`, `op_select_experts`): these rows have no experts, and their sums are zero.
    """
    ids, weights = topk_output.topk_ids, topk_output.topk_weights.to(torch.float32)
    if rows and not ids.shape[0]:
        return ids.new_full((rows, ids.shape[1]), -1), weights.new_zeros(rows, ids.shape[1])
    return ids, weights


def routed(received: Received, topk_output: Any) -> Any:
    """The router's answer for the received rows."""
    return topk_output._replace(topk_ids=received.topk_ids, topk_weights=received.topk_weights)


def quantized(original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's quantisation: the rows of a `BlockFp8` buffer came quantised."""
    pair = getattr(x, QUANTIZED, None)
    return original(x, *args, **kwargs) if pair is None else pair


def choose_format(layer: Any, device: torch.device) -> Plain:
    """For a FusedMoE layer: fp8 if its experts have 128x128 scales and quantise rows as dispatch does."""
    dtype, hidden = layer.moe_runner_config.params_dtype, layer.moe_runner_config.hidden_size
    shape = block_shape(layer.quant_method)
    if shape is None or hidden % BLOCK:
        return Plain(dtype)
    example = example_rows(dtype, hidden, device)
    rows, scales = _quantize(example, layer.quant_method.runner.runner_backend.is_deep_gemm())
    return BlockFp8(dtype) if dispatch_may_quantize(shape, example, rows, scales) else Plain(dtype)


def _quantize(x: torch.Tensor, deep_gemm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, hidden] as SGLang quantises it for Triton's or DeepGEMM's experts."""
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8
    from sglang.srt.layers import deep_gemm_wrapper

    packed = deep_gemm and deep_gemm_wrapper.DEEPGEMM_SCALE_UE8M0
    return sglang_per_token_group_quant_fp8(
        x, BLOCK, column_major_scales=packed, scale_tma_aligned=packed, scale_ue8m0=packed
    )
