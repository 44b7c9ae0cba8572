"""How many rows the ranks bring to the exchange of the current step."""

import contextlib
from collections.abc import Iterator, Sequence

from sglang.srt.layers.dp_attention import get_dp_global_num_tokens, is_dp_attention_enabled
from sglang.srt.runtime_context import get_parallel

from ep_backend.engines.start import share

_whole_batch: Sequence[int] | None = None
"""While two halves of a batch overlap: the counts of the whole batch."""


def rows_per_rank(rows: int, most: int) -> int:
    """Most rows that any rank brings: the same number on all ranks, known on the host, at least 1.

    SGLang agrees on the token counts of all data-parallel ranks before each step, idle ranks included; ranks
    that share attention split their count evenly. Without data parallelism every rank has as many ``rows``.
    Half a batch carries no counts and differs from rank to rank: no half has more than the whole batch. Where
    nothing was agreed on, the answer is ``most``, which is right on all ranks but slower.
    """
    if not is_dp_attention_enabled() or get_parallel().attn_dp_size == 1:
        return max(1, rows)
    counts = get_dp_global_num_tokens() if _whole_batch is None else _whole_batch
    if counts is None or len(counts) < 2:
        return most
    return max(1, share(max(counts), get_parallel().attn_tp_size))


@contextlib.contextmanager
def two_halves(counts: Sequence[int] | None) -> Iterator[None]:
    """``counts``: what was agreed on for the batch that is computed as two overlapping halves."""
    global _whole_batch
    before, _whole_batch = _whole_batch, counts
    try:
        yield
    finally:
        _whole_batch = before
