"""Dispatch and combine with gradients, for training: dispatch's backward is a combine, combine's a dispatch.

    from ep_backend import functional

    communicator = functional.TrainingCommunicator(None, config)
    received, exchange = functional.dispatch(communicator, x, topk_ids, topk_weights)
    y = my_experts(received.rows, received.topk_ids, received.topk_weights)
    out = functional.combine(communicator, y, exchange)

Both are custom operators with shape functions, and torch.compile traces them without a graph break. They are
marked as having ordered effects, so that no compiler pass leaves one out, merges two or changes their order.
docs/training.md has the rules that all ranks must keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._library.effects import EffectType

from ep_backend.compiling import keep_order
from ep_backend.errors import EpArgumentError
from ep_backend.training import TrainingCommunicator, communicator
from ep_backend.transports.base import Received

__all__ = ["Exchange", "TrainingCommunicator", "combine", "dispatch"]


@dataclass
class Exchange:
    """One exchange, from ``dispatch`` to ``combine``."""

    number: Tensor
    """int64 scalar on the CPU: which of the communicator's exchanges it is. What orders combine behind
    dispatch."""
    topk_ids: Tensor
    """[M, top_k], as they were dispatched."""
    tokens_per_rank: int
    """T: slots per source."""
    channel: int


def dispatch(
    communicator: TrainingCommunicator,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    tokens_per_rank: int | None = None,
    channel: int = 0,
) -> tuple[Received, Exchange]:
    """Send each token to every rank that holds one of its experts; receive what the others sent here.

    Arguments and errors as for ``Communicator.dispatch``: ``x`` [M, hidden_size] of ``config.payload``,
    ``topk_ids`` [M, top_k] int32 or int64, ``topk_weights`` [M, top_k] float32. The tensors of the result are
    memory of their own; rank-major rows without a local expert are 0; ``rows_per_expert`` is None if
    rank-major. Gradients of ``rows`` and ``topk_weights`` reach ``x`` and ``topk_weights`` of the tokens'
    ranks: in those of ``topk_weights``, whatever stands where the received id is ``pad_id`` does not count.
    Raises EpArgumentError where torch.compile does not keep the order of exchanges.
    """
    if not isinstance(communicator, TrainingCommunicator):
        raise EpArgumentError(
            f"communicator is a {type(communicator).__name__}; a TrainingCommunicator was wanted"
        )
    _check_order_is_kept()
    config = communicator.config
    slots = config.max_tokens_per_rank if tokens_per_rank is None else tokens_per_rank
    compact = config.layout == "compact"
    rows, ids, weights, tokens, per_expert, number = _dispatch(
        x,
        topk_ids,
        topk_weights,
        communicator.name,
        slots,
        channel,
        None if compact else communicator.world_size * slots,
        communicator.world_size,
        len(communicator.local_experts) if compact else 0,
    )
    received = Received(rows, None, ids, weights, tokens, per_expert if compact else None)
    return received, Exchange(number, topk_ids, slots, channel)


def combine(communicator: TrainingCommunicator, y: Tensor, exchange: Exchange) -> Tensor:
    """Send the experts' results back; return their sum for each of this rank's tokens, [M, hidden_size].

    ``y``: [R, hidden_size] of the result's dtype or float32, one row per received row, weighted and summed
    over this rank's experts; sums and rounding as for ``Communicator.combine``. The gradient of rank-major
    rows without a local expert is 0. Raises what ``Communicator.combine`` raises, and EpArgumentError if the
    exchange has ended, and where torch.compile does not keep the order of exchanges.
    """
    _check_order_is_kept()
    return _combine(
        y,
        exchange.topk_ids,
        exchange.number,
        communicator.name,
        exchange.tokens_per_rank,
        exchange.channel,
        communicator.config.result_dtype,
    )


def _check_order_is_kept() -> None:
    if torch.compiler.is_compiling() and not _compiles():
        raise EpArgumentError(
            f"exchanges cannot be compiled with PyTorch {torch.__version__}, where ep_backend does not know "
            "how to keep their order; in 2.11, 2.13 and 2.14 it does. Keep them out: torch.compiler.disable"
        )


@torch.compiler.assume_constant_result
def _compiles() -> bool:
    """Whether Inductor keeps the order of exchanges: it does from here on, where it can be made to."""
    return keep_order(tuple(operator._opoverload for operator in _OPERATORS))


# The operators. What their shape functions need is among their arguments, so that a compiled graph is guarded
# by it. ``name``: of the communicator. Which exchange is open is known on the host, so no CUDA graph may
# replay them.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("ep_backend::training_dispatch", mutates_args=(), tags=_TAGS)
def _dispatch(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    name: str,
    slots: int,
    channel: int,
    num_rows: int | None,
    world: int,
    num_local: int,
) -> list[Tensor]:
    """``num_rows``: that will be received, None if unknown. ``num_local``: experts whose rows are counted.

    A list, not a tuple: torch 2.13's Inductor loses sight of a number of rows that only the run knows where
    an operator with effects returns a tuple.
    """
    got, number = communicator(name).dispatch(x, topk_ids, topk_weights, slots, channel)
    assert got.topk_ids is not None
    assert got.topk_weights is not None
    per_expert = got.rows_per_expert
    if per_expert is None or num_local == 0:
        per_expert = got.tokens_per_source.new_empty(0)
    return [got.rows, got.topk_ids, got.topk_weights, got.tokens_per_source, per_expert, torch.tensor(number)]


@_dispatch.register_fake
def _(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    name: str,
    slots: int,
    channel: int,
    num_rows: int | None,
    world: int,
    num_local: int,
) -> list[Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    return [
        x.new_empty(rows, x.shape[1]),
        x.new_empty(rows, topk_ids.shape[1], dtype=torch.int32),
        x.new_empty(rows, topk_ids.shape[1], dtype=torch.float32),
        x.new_empty(world, dtype=torch.int32),
        x.new_empty(num_local, dtype=torch.int32),
        torch.empty((), dtype=torch.int64),
    ]


@torch.library.custom_op("ep_backend::training_combine", mutates_args=(), tags=_TAGS)
def _combine(
    y: Tensor, topk_ids: Tensor, number: Tensor, name: str, slots: int, channel: int, dtype: torch.dtype
) -> Tensor:
    return communicator(name).combine(y, int(number), channel)


@_combine.register_fake
def _(
    y: Tensor, topk_ids: Tensor, number: Tensor, name: str, slots: int, channel: int, dtype: torch.dtype
) -> Tensor:
    return y.new_empty(topk_ids.shape[0], y.shape[1], dtype=dtype)


@torch.library.custom_op("ep_backend::training_combine_backward", mutates_args=(), tags=_TAGS)
def _combine_backward(
    gradient: Tensor,
    topk_ids: Tensor,
    number: Tensor,
    name: str,
    slots: int,
    channel: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    rows = communicator(name).combine_backward(gradient, topk_ids, int(number), slots, channel)
    return rows.to(dtype)


@_combine_backward.register_fake
def _(
    gradient: Tensor,
    topk_ids: Tensor,
    number: Tensor,
    name: str,
    slots: int,
    channel: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    return gradient.new_empty(num_rows, gradient.shape[1], dtype=dtype)


@torch.library.custom_op("ep_backend::training_dispatch_backward", mutates_args=(), tags=_TAGS)
def _dispatch_backward(
    gradient: Tensor, topk_ids: Tensor, number: Tensor, name: str, slots: int, channel: int
) -> Tensor:
    return communicator(name).dispatch_backward(gradient, topk_ids, int(number), slots, channel)


@_dispatch_backward.register_fake
def _(gradient: Tensor, topk_ids: Tensor, number: Tensor, name: str, slots: int, channel: int) -> Tensor:
    return gradient.new_empty(topk_ids.shape[0], gradient.shape[1])


@torch.library.custom_op("ep_backend::training_weights_backward", mutates_args=(), tags=_TAGS)
def _weights_backward(
    gradient: Tensor, topk_ids: Tensor, received_ids: Tensor, name: str, slots: int
) -> Tensor:
    return communicator(name).weights_backward(gradient, topk_ids, received_ids, slots)


@_weights_backward.register_fake
def _(gradient: Tensor, topk_ids: Tensor, received_ids: Tensor, name: str, slots: int) -> Tensor:
    return gradient.new_empty(topk_ids.shape)


def _keep_for_dispatch(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, topk_ids, _, ctx.name, ctx.slots, ctx.channel, *_ = inputs
    ctx.save_for_backward(topk_ids, output[1], output[5])


def _gradients_of_dispatch(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    rows, _, weights, *_ = gradients
    topk_ids, received_ids, number = ctx.saved_tensors
    of_x = of_weights = None
    if ctx.needs_input_grad[0]:
        of_x = _dispatch_backward(rows, topk_ids, number, ctx.name, ctx.slots, ctx.channel)
    if ctx.needs_input_grad[2]:
        of_weights = _weights_backward(weights, topk_ids, received_ids, ctx.name, ctx.slots)
    return of_x, None, of_weights, None, None, None, None, None, None


def _keep_for_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, topk_ids, number, ctx.name, ctx.slots, ctx.channel, _ = inputs
    ctx.num_rows, ctx.dtype = y.shape[0], y.dtype
    ctx.save_for_backward(topk_ids, number)


def _gradients_of_combine(ctx: Any, out: Tensor) -> tuple[Any, ...]:
    topk_ids, number = ctx.saved_tensors
    of_y = _combine_backward(out, topk_ids, number, ctx.name, ctx.slots, ctx.channel, ctx.num_rows, ctx.dtype)
    return of_y, None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *gradients: Any) -> NoReturn:
    raise EpArgumentError(
        "second derivatives of an exchange are not supported: take gradients of it without create_graph"
    )


_dispatch.register_autograd(_gradients_of_dispatch, setup_context=_keep_for_dispatch)
_combine.register_autograd(_gradients_of_combine, setup_context=_keep_for_combine)
for _operator in (_combine_backward, _dispatch_backward, _weights_backward):
    _operator.register_autograd(_no_second_derivative)
_OPERATORS = (_dispatch, _combine, _combine_backward, _dispatch_backward, _weights_backward)
for _operator in _OPERATORS:
    _operator.register_effect(EffectType.ORDERED)
