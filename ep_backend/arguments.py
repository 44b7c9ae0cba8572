"""What callers give a communicator, checked before anything is sent.

Each error names the argument, what it is and what was wanted.
"""

from __future__ import annotations

import torch

from ep_backend.config import EpConfig
from ep_backend.errors import EpArgumentError
from ep_backend.transports.base import DispatchCall


class Arguments:
    """The checks of one communicator. Each raises EpArgumentError; what it returns is contiguous.

    ``num_local``: experts of this rank.
    """

    def __init__(self, config: EpConfig, world_size: int, num_local: int, device: torch.device) -> None:
        self.config, self.world_size, self.num_local, self.device = config, world_size, num_local, device
        self.slots_stay: list[int] | None = None
        """The only T that each channel may have, 0 for any: see ``Communicator.mask_ranks``."""
        self._no_rows: torch.Tensor | None = None
        """What exchanges of sums dispatch, on transports that have no better way."""
        if config.sums_only:
            shape = (config.max_tokens_per_rank, config.row_width)
            self._no_rows = torch.zeros(shape, dtype=config.x_dtype, device=device)

    def dispatch(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        tokens_per_rank: int | None,
        num_tokens: torch.Tensor | None,
        channel: int,
    ) -> DispatchCall:
        slots = self._slots(tokens_per_rank, channel)
        config = self.config
        if config.sums_only:
            raise EpArgumentError(
                "a dispatch was asked for, but this communicator's configuration says sums_only: "
                "exchange_sums was wanted"
            )
        if isinstance(x, torch.Tensor) and x.dim() != 2:
            raise EpArgumentError(f"x is {list(x.shape)}; [M, {config.row_width}] was wanted")
        tokens = x.shape[0] if isinstance(x, torch.Tensor) else 0
        self._tensor("x", x, (tokens, config.row_width), (config.payload,))
        self._choices("x", tokens, slots, ids, weights)
        if config.payload == torch.float8_e4m3fn:
            scale_dtype, width = torch.float32, config.hidden_size // 128
        else:
            scale_dtype, width = torch.uint8, config.scale_bytes
        if width:
            if scales is None:
                raise EpArgumentError(f"scales are missing; [{tokens}, {width}] {scale_dtype} was wanted")
            self._tensor("scales", scales, (tokens, width), (scale_dtype,))
            scales = scales.contiguous()
        elif scales is not None:
            raise EpArgumentError(
                "scales were given, but this communicator's payload has none of the caller's"
            )
        if num_tokens is not None:
            if self.device.type == "cpu":
                raise EpArgumentError(
                    "num_tokens is for CUDA graphs; on a CPU pass as many rows as there are tokens"
                )
            self._tensor("num_tokens", num_tokens, (1,), (torch.int32,))
        return DispatchCall(
            channel, x.contiguous(), scales, ids.contiguous(), weights.contiguous(), slots, num_tokens
        )

    def results(self, y: torch.Tensor, slots: int, num_rows: int) -> torch.Tensor:
        """``y`` of a combine; ``slots``: T; ``num_rows``: that its dispatch received."""
        capacity = self.world_size * slots
        lead = {
            "rank_major": (capacity,),
            "compact": (num_rows,),
            "expert_major": (self.num_local, capacity),
        }[self.config.layout]
        self._results(y, lead)
        return y.contiguous()

    def sums(
        self,
        y: torch.Tensor,
        places: torch.Tensor | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tokens_per_rank: int | None,
        channel: int,
    ) -> tuple[DispatchCall, torch.Tensor]:
        """An exchange of sums as a dispatch, and its ``y``."""
        slots = self._slots(tokens_per_rank, channel)
        if self._no_rows is None:
            raise EpArgumentError(
                "an exchange of sums was asked for; a communicator with sums_only was wanted"
            )
        top_k = self.config.top_k
        if isinstance(ids, torch.Tensor) and ids.dim() != 2:
            raise EpArgumentError(f"topk_ids is {list(ids.shape)}; [M, {top_k}] was wanted")
        tokens = len(ids) if isinstance(ids, torch.Tensor) else 0
        self._choices("topk_ids", tokens, slots, ids, weights)
        capacity = self.world_size * slots
        self._results(y, (self.num_local, capacity))
        if places is not None:
            self._tensor("places", places, (capacity, top_k), (torch.int32,))
            if not places.is_contiguous():
                raise EpArgumentError("places is not contiguous, as received_places gives it")
        call = DispatchCall(
            channel, self._no_rows[:tokens], None, ids.contiguous(), weights.contiguous(), slots
        )
        return call, y.contiguous()

    def rows(self, rows: torch.Tensor, slots: int) -> None:
        """Where a dispatch puts its rows."""
        if self.config.layout != "expert_major":
            raise EpArgumentError("rows are for the layout expert_major: others decide themselves")
        shape = (self.num_local, self.world_size * slots, self.config.row_width)
        self._tensor("rows", rows, shape, (self.config.received_dtype,))
        _contiguous("rows", rows)

    def out(self, out: torch.Tensor | None, tokens: int) -> torch.Tensor:
        """Where a combine puts its result: a new tensor if none is given."""
        shape, dtype = (tokens, self.config.hidden_size), self.config.result_dtype
        if out is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        self._tensor("out", out, shape, (dtype,))
        _contiguous("out", out)
        return out

    def _slots(self, tokens_per_rank: int | None, channel: int) -> int:
        """T; the channel is checked, too."""
        config = self.config
        if not isinstance(channel, int) or not 0 <= channel < config.num_channels:
            raise EpArgumentError(f"channel is {channel!r}; 0 to {config.num_channels - 1} was wanted")
        most = config.max_tokens_per_rank
        slots = most if tokens_per_rank is None else tokens_per_rank
        if not isinstance(slots, int) or not 1 <= slots <= most:
            raise EpArgumentError(f"tokens_per_rank is {slots!r}; a whole number from 1 to {most} was wanted")
        before = self.slots_stay[channel] if self.slots_stay else 0
        if before and slots != before:
            raise EpArgumentError(
                f"tokens_per_rank is {slots}; while ranks are masked {before} was wanted, as in the exchange "
                "before"
            )
        return slots

    def _choices(self, name: str, tokens: int, slots: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """``name``: of the tensor that has one row for each of the ``tokens``."""
        if tokens > slots:
            raise EpArgumentError(
                f"{name} has {tokens} tokens; at most tokens_per_rank = {slots} were wanted"
            )
        top_k = self.config.top_k
        self._tensor("topk_ids", ids, (tokens, top_k), (torch.int32, torch.int64))
        self._tensor("topk_weights", weights, (tokens, top_k), (torch.float32,))

    def _results(self, y: torch.Tensor, lead: tuple[int, ...]) -> None:
        config = self.config
        self._tensor("y", y, (*lead, config.hidden_size), (config.result_dtype, torch.float32))

    def _tensor(
        self, name: str, t: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> None:
        types = " or ".join(dict.fromkeys(map(str, dtypes)))
        wanted = f"{list(shape)} {types} on {self.device} was wanted"
        if not isinstance(t, torch.Tensor):
            raise EpArgumentError(f"{name} is {named(t)}; a tensor {wanted}")
        if t.layout != torch.strided:
            raise EpArgumentError(f"{name} is {t.layout}; a dense tensor {wanted}")
        if tuple(t.shape) != shape or t.dtype not in dtypes or t.device.type != self.device.type:
            raise EpArgumentError(f"{name} is {list(t.shape)} {t.dtype} on {t.device}; {wanted}")


def _contiguous(name: str, t: torch.Tensor) -> None:
    if not t.is_contiguous():
        raise EpArgumentError(f"{name} of strides {tuple(t.stride())}; a contiguous tensor was wanted")


def named(value: object) -> str:
    """A value of the wrong type, in an error's words."""
    return "None" if value is None else f"a {type(value).__name__}"
