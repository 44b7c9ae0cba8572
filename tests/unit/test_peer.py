"""What of the transport over GPU memory can be seen without a GPU."""

from hypothesis import given
from hypothesis import strategies as st

import ep_backend as ep
from ep_backend.transports.gpu import local_numbers


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 5))
def test_experts_are_numbered_in_order_of_their_ids(ranks, rank):
    mine = [e for e, r in enumerate(ranks) if r == rank]
    assert local_numbers(ranks, rank) == [mine.index(e) if e in mine else -1 for e in range(len(ranks))]


def test_numbers_of_a_configuration():
    config = ep.EpConfig(num_experts=5, top_k=2, hidden_size=16, max_tokens_per_rank=4)
    ranks = config.expert_ranks(2)
    assert [local_numbers(ranks, rank) for rank in range(2)] == [[0, 1, 2, -1, -1], [-1, -1, -1, 0, 1]]
