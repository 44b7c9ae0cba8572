"""What an error word becomes on the host."""

import pytest

import ep_backend as ep
from ep_backend import _native
from ep_backend.transports.base import error_for


def word(status, cause=_native.OK, *, peer=2, reporter=1, missing=0b100):
    return [status, peer, reporter, 1, 0, 8, 7, 1_500_000, cause, missing, 0]


def test_a_deadline_names_who_waited_for_whom():
    error = error_for(word(_native.TIMEOUT, reporter=0), rank=0, world=4)
    assert isinstance(error, ep.EpTimeoutError)
    assert (error.rank, error.peer, error.phase, error.missing) == (0, 2, "combine", (2,))


def test_a_rank_that_another_one_stopped_knows_of_its_deadline():
    error = error_for(word(_native.ABORTED, _native.TIMEOUT), rank=0, world=4)
    assert isinstance(error, ep.EpTimeoutError)
    assert (error.peer, error.reported_by) == (2, 1)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (_native.SLOTS_DIFFER, "not all ranks gave the same tokens_per_rank"),
        (_native.AHEAD, "the ranks did not make the same calls"),
    ],
)
@pytest.mark.parametrize(("rank", "blamed"), [(0, "blames rank 2"), (2, "blames this rank")])
def test_a_rank_that_another_one_stopped_knows_the_cause(cause, said, rank, blamed):
    error = error_for(word(_native.ABORTED, cause), rank, world=4)
    assert isinstance(error, ep.EpProtocolError)
    assert str(error).startswith("rank 1 stopped: ")
    assert said in str(error)
    assert blamed in str(error)
