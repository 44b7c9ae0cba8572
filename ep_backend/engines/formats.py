"""In which format tokens travel to fp8 experts: whether dispatch may quantise instead of the engine."""

from __future__ import annotations

from typing import Any

import torch

from ep_backend import reference
from ep_backend.config import SCALE_BLOCK as BLOCK  # elements that share a scale

QUANTIZATION = "fp8_block128"


def example_rows(dtype: torch.dtype, hidden: int, device: torch.device) -> torch.Tensor:
    """[2, hidden] on which an engine's quantisation is tried: its blocks have different scales."""
    return torch.linspace(-1, 1, hidden, dtype=dtype, device=device).repeat(2, 1)


def dispatch_may_quantize(
    block_shape: Any, example: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None
) -> bool:
    """Whether what an engine made of ``example``, ``rows`` and ``scales``, is what dispatch would make of it.

    It is if weights have scales per 128x128 and rows have a float32 scale per 1x128, not packed nor rounded
    up to powers of two (as DeepGEMM wants them on Blackwell).
    """
    if list(block_shape or ()) != [BLOCK, BLOCK] or scales is None or example.shape[-1] % BLOCK:
        return False
    _, ours = reference.quantize_fp8(example)
    return (
        rows.dtype == torch.float8_e4m3fn
        and scales.dtype == torch.float32
        and scales.shape == ours.shape
        and torch.allclose(scales, ours, rtol=1e-5, atol=0)
    )
