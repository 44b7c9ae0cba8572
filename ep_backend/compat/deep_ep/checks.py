"""Checks of arguments. All raise EpArgumentError with what came and what was wanted."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch

from ep_backend.config import MAX_TOP_K
from ep_backend.errors import EpArgumentError

INDEX = (torch.int64, torch.int32)  # dtypes of expert ids


def check_whole(name: str, value: Any, least: int = 0) -> int:
    """``value`` as an int: one of at least ``least``, or what stands for one, as numpy's do; no bool."""
    number = least - 1 if isinstance(value, bool) else _whole(value, least - 1)
    if number < least:
        raise EpArgumentError(f"{name} is {value!r}; a whole number from {least} was wanted")
    return number


def _whole(value: Any, otherwise: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        return otherwise


def check(name: str, t: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """``shape``: None for any size."""
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    wanted = f"[{sizes}] {' or '.join(map(str, dtypes))}"
    if not isinstance(t, torch.Tensor):
        raise EpArgumentError(f"{name} is a {type(t).__name__}; a tensor {wanted} was wanted")
    fits = len(shape) == t.dim() and all(
        want in (None, has) for want, has in zip(shape, t.shape, strict=True)
    )
    if not fits or t.dtype not in dtypes:
        raise EpArgumentError(f"{name} is {list(t.shape)} {t.dtype}; {wanted} was wanted")


def check_ids(topk_idx: Any, tokens: int | None = None) -> torch.Tensor:
    """``topk_idx``: [tokens, top_k] int64 or int32, at most 16 experts for a token."""
    check("topk_idx", topk_idx, (tokens, None), INDEX)
    ids: torch.Tensor = topk_idx
    if ids.shape[1] > MAX_TOP_K:
        raise EpArgumentError(
            f"topk_idx has {ids.shape[1]} experts for a token; at most {MAX_TOP_K} were wanted: divide them "
            "between two calls and add the results up"
        )
    return ids


def check_rows(x: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``x`` of a dispatch of normal mode: [M, hidden] bfloat16, or that as float8_e4m3fn with scales, [M, n]
    or [M] of float32 or int32. Returns rows and scales."""
    rows, scales = x if isinstance(x, tuple) else (x, None)
    check("x", rows, (None, None), (torch.bfloat16 if scales is None else torch.float8_e4m3fn,))
    if scales is not None:
        shape = (len(rows),) if scales.dim() == 1 else (len(rows), None)
        check("the scales of x", scales, shape, (torch.float32, torch.int32))
    return rows, scales


def check_bias(bias: Any, tokens: int, hidden: int) -> tuple[torch.Tensor, ...]:
    """``bias`` of a combine: None, one or two [tokens, hidden] bfloat16, of which one may be None. Returns
    those there are."""
    given = bias if isinstance(bias, (tuple, list)) else (bias,)
    if len(given) > 2:
        raise EpArgumentError(f"bias is {len(given)} tensors; at most 2 were wanted")
    biases = tuple(tensor for tensor in given if tensor is not None)
    for tensor in biases:
        check("bias", tensor, (tokens, hidden), (torch.bfloat16,))
    return biases


def check_flags(**flags: Any) -> None:
    """Flags are True or False, or 1 or 0, as DeepEP's own tests give them."""
    for name, value in flags.items():
        if _whole(value, -1) not in (0, 1):
            raise EpArgumentError(f"{name} is {value!r}; True or False was wanted")


def check_halves(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise EpArgumentError("async_finish and return_recv_hook exclude each other: the hook is the wait")


def no_cost_stats(name: str) -> NoReturn:
    raise EpArgumentError(
        f"{name} is not supported: a rank that does not answer is named by EpTimeoutError, and a profiler's "
        "trace shows the waits"
    )
