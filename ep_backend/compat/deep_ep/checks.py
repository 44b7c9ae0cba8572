"""Checks of arguments. All raise EpArgumentError with what came and what was wanted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ep_backend.errors import EpArgumentError


def check_whole(name: str, value: object, least: int = 0) -> None:
    """Raise EpArgumentError unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EpArgumentError(f"{name} is {value!r}; a whole number from {least} was wanted")


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
    """``bias`` of a combine: None, one or two [tokens, hidden] bfloat16. Returns those there are."""
    biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
    if len(biases) > 2:
        raise EpArgumentError(f"bias is {len(biases)} tensors; at most 2 were wanted")
    for tensor in biases:
        check("bias", tensor, (tokens, hidden), (torch.bfloat16,))
    return biases


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise EpArgumentError(f"{name} is {value!r}; True or False was wanted")


def check_halves(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise EpArgumentError("async_finish and return_recv_hook exclude each other: the hook is the wait")


def no_cost_stats(name: str) -> NoReturn:
    raise EpArgumentError(
        f"{name} is not supported: a rank that does not answer is named by EpTimeoutError, and a profiler's "
        "trace shows the waits"
    )


def no_masks() -> NoReturn:
    raise EpArgumentError(
        "ranks cannot be masked: one that does not answer raises EpTimeoutError on the others, which names "
        "it; make a process group and a Buffer without it then"
    )
