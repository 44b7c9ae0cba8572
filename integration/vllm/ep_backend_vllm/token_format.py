"""In which format tokens travel, so that they arrive as the chosen experts want them.

Each format says which fields of EpConfig it needs, what becomes of a layer's input before it is sent
(`encode`), and of what arrived before the experts get it (`decode`).
"""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

from ep_backend import EpConfigError
from ep_backend.engines.formats import BLOCK, QUANTIZATION, dispatch_may_quantize, example_rows


class Plain:
    """As they are: the experts are not quantised, or quantise by themselves."""

    ran_in_an_engine = True
    """Whether docs/vllm.md lists a run with this format."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.fields: dict[str, Any] = {"payload": dtype}

    def encode(self, a1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[M, H] -> what is sent, and its scales."""
        return a1, None

    def decode(
        self, rows: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What arrived -> rows [R, ...] and scales for the experts."""
        return rows, scales


class BlockFp8(Plain):
    """float8_e4m3fn with a float32 scale per 1x128 block; dispatch itself quantises."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.fields["quantization"] = QUANTIZATION


class Opaque(Plain):
    """What vLLM's own quantisation makes of a row, byte for byte, with its scales beside it.

    ``rows``, ``scales``: what it makes of two rows; scales None: the experts have a scale of their own.
    """

    def __init__(
        self, quant_config: Any, dtype: torch.dtype, rows: torch.Tensor, scales: torch.Tensor | None
    ) -> None:
        self._quant_config = quant_config
        self.ran_in_an_engine = list(quant_config.block_shape or ()) == [BLOCK, BLOCK]
        self._rows, self._scales = rows[0], None if scales is None else scales[0]
        self.fields = {
            "payload": torch.uint8,
            "payload_bytes": _bytes(self._rows),
            "scale_bytes": 0 if self._scales is None else _bytes(self._scales),
            "out_dtype": dtype,
        }

    def encode(self, a1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if a1.shape[0] == 0:
            scale_bytes = self.fields["scale_bytes"]
            empty = a1.new_empty(0, self.fields["payload_bytes"], dtype=torch.uint8)
            return empty, empty.new_empty(0, scale_bytes) if scale_bytes else None
        rows, scales = quantize(a1, self._quant_config)
        if self._scales is None or scales is None:
            return _as_bytes(rows), None
        return _as_bytes(rows), _as_bytes(scales)

    def decode(
        self, rows: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = rows.view(self._rows.dtype)
        if scales is None or self._scales is None:
            return rows, self._quant_config.a1_scale
        scales = scales.view(self._scales.dtype)
        if self._quant_config.quant_dtype == "nvfp4" and self._quant_config.is_scale_swizzled:
            from vllm.utils.flashinfer import nvfp4_block_scale_interleave

            scales = nvfp4_block_scale_interleave(scales.view(torch.uint8))
        return rows, scales


def choose_format(
    quant_config: Any, deferred: bool, dtype: torch.dtype, hidden: int, device: torch.device
) -> Plain:
    """For experts with this FusedMoEQuantConfig (None: not quantised). ``deferred``: they want plain rows.

    Raises EpConfigError if one scale is computed for all tokens together: what arrives has rows without a
    token in between.
    """
    if quant_config is None or quant_config.quant_dtype is None or deferred:
        return Plain(dtype)
    example = example_rows(dtype, hidden, device)
    rows, scales = quantize(example, quant_config)
    if scales is None or scales.numel() == 1:
        if quant_config.a1_scale is None:
            raise EpConfigError(
                "ep_backend does not support fp8 with one dynamic scale per tensor: use a checkpoint with "
                "static, per-token or 128x128 block scales, or --all2all-backend allgather_reducescatter."
            )
        return Opaque(quant_config, dtype, rows, None)
    if dispatch_may_quantize(quant_config.block_shape, example, rows, scales):
        return BlockFp8(dtype)
    return Opaque(quant_config, dtype, rows, scales)


def quantize(a1: torch.Tensor, quant_config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """vLLM's own quantisation of [M, H], row by row, scales not yet swizzled: that mixes rows."""
    return moe_kernel_quantize_input(
        a1,
        quant_config.a1_gscale if quant_config.quant_dtype == "nvfp4" else quant_config.a1_scale,
        quant_dtype=quant_config.quant_dtype,
        per_act_token_quant=quant_config.per_act_token_quant,
        block_shape=quant_config.block_shape,
        is_scale_swizzled=False,
    )


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8).view(t.shape[0], -1)


def _bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()
