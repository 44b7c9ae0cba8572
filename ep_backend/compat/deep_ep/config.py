"""``Config``: how a call of normal mode shall be tuned."""

from __future__ import annotations

from dataclasses import dataclass

from ep_backend.compat.deep_ep.checks import check_whole

ALIGNMENT = 128
USUAL_SMS = 20  # DeepEP's own default


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of ``alignment``."""
    return -(-size // alignment) * alignment


@dataclass(frozen=True)
class Config:
    """Of these numbers only ``num_sms`` has a meaning here: SMs that an exchange may use. Chunks follow from
    the size of a call."""

    num_sms: int = USUAL_SMS
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, check_whole(name, value, 1))

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """A number of bytes for ``Buffer``'s ``num_nvl_bytes``, which allocates nothing: rows of
        ``hidden_bytes`` for the tokens that are received in one chunk."""
        check_whole("hidden_bytes", hidden_bytes, 1)
        check_whole("num_ranks", num_ranks, 1)
        return aligned(hidden_bytes * num_ranks * self.num_max_nvl_chunked_recv_tokens)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: nothing here needs memory that is registered with a network adapter."""
        check_whole("hidden_bytes", hidden_bytes, 1)
        check_whole("num_ranks", num_ranks, 1)
        return 0


class UsualConfig(Config):
    """What ``Buffer`` gives while nobody has said a number of SMs: ``num_sms`` is no wish, and what was tuned
    or set for the machine goes before it."""
