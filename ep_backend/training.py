"""The exchanges of a training step: what ``ep_backend.functional`` calls, without autograd."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from dataclasses import replace
from types import TracebackType

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend.communicator import Communicator, Handle
from ep_backend.config import FLOATS, EpConfig
from ep_backend.errors import EpArgumentError, EpConfigError
from ep_backend.transports.base import Received
from ep_backend.transports.gpu import BLOCKS_PER_SM, sms

WEIGHT_ROW_MULTIPLE = 4  # elements of float32: rows are multiples of 16 bytes
WEIGHT_SMS = 8  # rows of some 32 bytes fill no more

_numbers = itertools.count()
_by_name: weakref.WeakValueDictionary[str, TrainingCommunicator] = weakref.WeakValueDictionary()


def communicator(name: str) -> TrainingCommunicator:
    """The communicator that operators know by ``name``. Raises EpArgumentError if it is gone."""
    found = _by_name.get(name)
    if found is None:
        raise EpArgumentError(f"{name} is no more; it must live until the backward pass has ended")
    return found


class TrainingCommunicator:
    """The communicators that ``functional.dispatch`` and ``combine`` use, forward and backward.

    Made by all ranks of ``group`` together; ``group``, ``config`` and ``device`` as for ``Communicator``,
    with a float payload that is not quantised and the layout "rank_major" or "compact". ``gradient_dtype``:
    number format in which gradients of rows travel and are summed. None: those of the rows,
    ``config.payload`` towards the experts and ``config.wire_dtype`` back, through the same windows; another
    format has windows of its own. Gradients of top-k weights travel in float32, through small windows of
    their own. Raises EpConfigError on every rank if any rank cannot start or has other arguments.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        config: EpConfig,
        *,
        device: torch.device | str | None = None,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        rendezvous.together(group, lambda: _check(config, gradient_dtype))
        self.config = config
        where = torch.device(device or "cpu")
        formats = {config.payload, config.result_dtype, config.sum_dtype}
        weights = replace(
            config,
            hidden_size=-(-config.top_k // WEIGHT_ROW_MULTIPLE) * WEIGHT_ROW_MULTIPLE,
            payload=torch.float32,
            out_dtype=None,
            wire_dtype=None,
            num_channels=1,
            num_sms=WEIGHT_SMS,
        )
        own_format = gradient_dtype if formats != {gradient_dtype} else None
        if config.num_sms is None and where.type == "cuda":
            # All channels of all three must find room on the GPU at once.
            room = BLOCKS_PER_SM * sms(where) - WEIGHT_SMS
            each = room // (config.num_channels * (1 if own_format is None else 2))
            if each < sms(where):  # else the profile's budget holds, or all of them
                config = replace(config, num_sms=max(1, each))
        with contextlib.ExitStack() as made:
            self._forward = made.enter_context(Communicator(group, config, device=device))
            self._backward = self._forward
            if own_format is not None:
                gradients = replace(config, payload=own_format, out_dtype=own_format, wire_dtype=own_format)
                own = Communicator(group, gradients, device=device)
                self._backward = made.enter_context(own)
            self._weights = made.enter_context(Communicator(group, weights, device=device))
            self._made = made.pop_all()
        self.rank, self.world_size = self._forward.rank, self._forward.world_size
        self.device = self._forward.device
        self.local_experts = self._forward.local_experts
        self.transport = self._forward.transport
        # An exchange is open from dispatch to combine, and again from combine's backward to dispatch's.
        self._exchanges = itertools.count()
        self._open: dict[int, tuple[int, Handle]] = {}
        self._open_gradients: dict[int, tuple[int, Handle]] = {}
        self.name = f"TrainingCommunicator {next(_numbers)}"
        _by_name[self.name] = self

    def check(self) -> None:
        """Raise the error that stopped one of the communicators, if one did."""
        for each in (self._forward, self._backward, self._weights):
            each.check()

    def destroy(self) -> None:
        """Give everything back. May be called twice."""
        self._made.close()

    def __enter__(self) -> TrainingCommunicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slots: int, channel: int
    ) -> tuple[Received, int]:
        """As ``Communicator.dispatch``, in memory of its own; rank-major rows without a local expert are 0.

        Also returns the number of the exchange.
        """
        received, handle = self._forward.dispatch(x, ids, weights, tokens_per_rank=slots, channel=channel)
        number = next(self._exchanges)
        self._open[channel] = number, handle
        return replace(received, rows=self._owned_rows(received)), number

    def combine(self, y: torch.Tensor, number: int, channel: int) -> torch.Tensor:
        """As ``Communicator.combine``, of exchange ``number``."""
        handle = _of(self._open, channel, number)
        if handle is None:
            raise EpArgumentError(
                f"the exchange on channel {channel} has ended: another dispatch or a backward pass used the "
                "channel; exchanges that overlap in time want different channels"
            )
        return self._forward.combine(y, handle)

    def combine_backward(
        self, gradient: torch.Tensor, ids: torch.Tensor, number: int, slots: int, channel: int
    ) -> torch.Tensor:
        """The gradient of ``combine``'s y: each token's gradient at the ranks of its experts, a dispatch.

        ``gradient``: [M, hidden] of any float. Returns [R, hidden]; rank-major rows without a local expert
        are 0. The exchange stays open for ``dispatch_backward``.
        """
        received, handle = self._open_for_gradients(gradient, ids, slots, channel)
        self._open_gradients[channel] = number, handle
        return self._owned_rows(received)

    def dispatch_backward(
        self, gradient: torch.Tensor, ids: torch.Tensor, number: int, slots: int, channel: int
    ) -> torch.Tensor:
        """The gradient of ``dispatch``'s x: the sum of the gradients of a token's rows, a combine.

        ``gradient``: [R, hidden] of the payload's dtype. Returns [M, hidden] of it. Where
        ``combine_backward`` left no exchange open (the rows went to no ``combine``, or the channel was used
        in between), rows of zeros are dispatched first.
        """
        handle = _of(self._open_gradients, channel, number)
        if handle is None:
            nothing = gradient.new_zeros(ids.shape[0], self.config.hidden_size)
            _, handle = self._open_for_gradients(nothing, ids, slots, channel)
        total = self._backward.combine(gradient.to(self._backward.config.result_dtype), handle)
        return total.to(self.config.payload)

    def weights_backward(
        self, gradient: torch.Tensor, ids: torch.Tensor, received_ids: torch.Tensor, slots: int
    ) -> torch.Tensor:
        """The gradient of ``dispatch``'s top-k weights, [M, top_k] float32, from [R, top_k] float32.

        One dispatch of empty rows and one combine of rows of ``top_k`` float32. ``received_ids``: [R, top_k];
        what stands where they are ``pad_id`` does not count.
        """
        top_k, width = self.config.top_k, self._weights.config.hidden_size
        _, handle = self._weights.dispatch(
            gradient.new_zeros(ids.shape[0], width), ids, _no_weights(ids), tokens_per_rank=slots
        )
        rows = gradient.new_zeros(gradient.shape[0], width)
        rows[:, :top_k] = torch.where(received_ids == self.config.pad_id, 0, gradient)
        return self._weights.combine(rows, handle)[:, :top_k].contiguous()

    def _open_for_gradients(
        self, rows: torch.Tensor, ids: torch.Tensor, slots: int, channel: int
    ) -> tuple[Received, Handle]:
        rows = rows.to(self._backward.config.payload)
        return self._backward.dispatch(rows, ids, _no_weights(ids), tokens_per_rank=slots, channel=channel)

    def _owned_rows(self, received: Received) -> torch.Tensor:
        if self.config.layout == "compact":
            return received.rows
        assert received.topk_ids is not None
        live = (received.topk_ids != self.config.pad_id).any(1, keepdim=True)
        return torch.where(live, received.rows, 0)


def _of(exchanges: dict[int, tuple[int, Handle]], channel: int, number: int) -> Handle | None:
    """The handle of exchange ``number`` if it is still open on ``channel``."""
    last, handle = exchanges.get(channel, (-1, None))
    return handle if handle is not None and last == number and handle.state == "received" else None


def _no_weights(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)


def _check(config: EpConfig, gradient_dtype: torch.dtype | None) -> None:
    """Raise EpConfigError if gradients cannot pass through such exchanges."""
    if not isinstance(config, EpConfig):
        raise EpConfigError(f"config is a {type(config).__name__}; an EpConfig was wanted")
    if config.sums_only:
        raise EpConfigError("sums_only is True; a configuration that brings rows was wanted")
    if config.payload not in FLOATS or config.quantization:
        found = f"{config.payload}, quantization {config.quantization}"
        raise EpConfigError(f"payload is {found}; float32, float16 or bfloat16 as it is was wanted")
    if config.layout == "expert_major":
        raise EpConfigError("layout is 'expert_major'; 'rank_major' or 'compact' was wanted")
    if gradient_dtype not in (None, *FLOATS):
        raise EpConfigError(
            f"gradient_dtype is {gradient_dtype}; float32, float16, bfloat16 or None was wanted"
        )
