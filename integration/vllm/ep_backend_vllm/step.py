"""How many tokens the ranks bring to the exchange of the current step."""

from vllm.forward_context import get_forward_context, is_forward_context_available


def tokens_per_rank(maximum: int) -> int:
    """Most tokens that any rank brings: the same number on all ranks, known on the host, at least 1.

    vLLM agrees on the token counts of all data-parallel ranks before each step, idle ranks included.
    Without that (a layer called outside a step) the answer is `maximum`, which is right on all ranks but
    slower.
    """
    metadata = get_forward_context().dp_metadata if is_forward_context_available() else None
    if metadata is None:
        return maximum
    # Inside a layer this is the list per expert-parallel rank, with TP's shares taken into account.
    sizes = metadata.local_sizes
    most = max(sizes) if sizes is not None else int(metadata.num_tokens_across_dp_cpu.max())
    return max(1, most)
