"""Numbers of experts in the layout expert-major."""

from hypothesis import given
from hypothesis import strategies as st

import ep_backend as ep
from ep_backend.places import local_numbers


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 5))
def test_experts_are_numbered_in_order_of_their_ids(ranks, rank):
    mine = [e for e, r in enumerate(ranks) if r == rank]
    numbers = [mine.index(e) if e in mine else -1 for e in range(len(ranks))]
    assert local_numbers(ranks, rank).tolist() == numbers


def test_numbers_of_a_configuration():
    config = ep.EpConfig(num_experts=5, top_k=2, hidden_size=16, max_tokens_per_rank=4)
    ranks = config.expert_ranks(2)
    numbers = [local_numbers(ranks, rank).tolist() for rank in range(2)]
    assert numbers == [[0, 1, 2, -1, -1], [-1, -1, -1, 0, 1]]
