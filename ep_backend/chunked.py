"""Calls of any length through windows of a bounded size.

Windows grow with ``max_tokens_per_rank`` and the number of ranks: "Window memory" in docs/architecture.md has
sizes. Where they would be too large, a smaller ``max_tokens_per_rank`` bounds them, and a long call goes in
pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ep_backend.communicator import Communicator, Handle
from ep_backend.errors import EpArgumentError
from ep_backend.transports.base import Received


def run_experts(
    communicator: Communicator,
    experts: Callable[[Received], torch.Tensor],
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    tokens_per_rank: int,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dispatch, experts and combine of M tokens, in as many exchanges as the windows make needed.

    ``x``, ``topk_ids``, ``topk_weights``, ``scales``: as for ``Communicator.dispatch``, but M may be larger.
    ``tokens_per_rank``: T, at least M on every rank and equal on all, of any size; each rank makes
    ceil(T / max_tokens_per_rank) exchanges. ``experts`` turns what was received into the y of
    ``Communicator.combine``; it is called once per exchange, also where no row came. Returns [M,
    hidden_size], bit for bit what one exchange would give. With two channels or more, the rows of the next
    exchange travel while the experts are at work. Whatever channels 0 and 1 have open is closed. Raises what
    ``Communicator.dispatch`` and ``combine`` raise.
    """
    config, size = communicator.config, communicator.config.max_tokens_per_rank
    if not isinstance(tokens_per_rank, int) or tokens_per_rank < max(1, len(x)):
        raise EpArgumentError(
            f"tokens_per_rank is {tokens_per_rank!r}; a whole number of at least {max(1, len(x))} was "
            f"wanted, as there are {len(x)} tokens"
        )
    out = torch.empty(len(x), config.hidden_size, dtype=config.result_dtype, device=communicator.device)
    ahead = config.num_channels > 1

    def send(first: int) -> Handle | None:
        """The tokens from ``first`` on, if there are slots for them."""
        if first >= tokens_per_rank:
            return None
        piece = slice(first, first + size)
        return communicator.dispatch_send(
            x[piece],
            topk_ids[piece],
            topk_weights[piece],
            scales=None if scales is None else scales[piece],
            tokens_per_rank=min(size, tokens_per_rank - first),
            channel=first // size % 2 if ahead else 0,
        )

    handle = send(0)
    first = 0
    while handle is not None:
        following = send(first + size) if ahead else None
        received = communicator.dispatch_recv(handle)
        communicator.combine(experts(received), handle, out=out[first : first + size])
        first += size
        handle = following if ahead else send(first)
    return out
