"""A rank that dies or stalls while nodes exchange: all others raise in time; those of its node name it."""

import pytest
import torch
import torch.distributed as dist
from faults import MARGIN_S, POINTS, caught, exchange, refused, stop
from harness import fresh_ranks
from nodes import make

import ep_backend as ep

DEADLINE_S = 2.5
NODES = ((0, 2), (1, 3))
VICTIM = 3
BESIDE, PARTNER, FAR = 1, 2, 0  # in its node; of the same place in the other node; neither


def job(rank, group, point, how):
    config = ep.EpConfig(
        num_experts=6, top_k=2, hidden_size=64, max_tokens_per_rank=8, payload=torch.float32, timeout_s=30
    )
    comm = make(rank, group, NODES, config)
    for n in range(3):
        exchange(comm, n)
    comm.set_timeout(DEADLINE_S)
    dist.barrier(group)

    def loop():
        exchange(comm, 3, at=lambda p: stop(how) if (rank, p) == (VICTIM, point) else None)
        exchange(comm, 4)  # between the halves of combine the victim has sent all that its node waits for

    found = caught(comm, loop)
    found["recover"] = refused(comm.recover)[1]
    comm.destroy()
    return found


@pytest.mark.parametrize(
    ("point", "how"), [*((point, "dies") for point in POINTS), (POINTS[0], "stalls"), (POINTS[1], "stalls")]
)
def test_a_rank_stops(point, how):
    with fresh_ranks(4) as group:
        group.start(job, point, how)
        stopped = {VICTIM} if how == "stalls" else ()
        outcomes = group.outcomes(2 * DEADLINE_S + 30, stopped=stopped)
    assert not outcomes[VICTIM].ok
    for rank in (BESIDE, PARTNER, FAR):
        assert outcomes[rank].ok, outcomes[rank]
        found = outcomes[rank].value
        assert found["rank"] == rank
        assert found["elapsed"] < 2 * DEADLINE_S + MARGIN_S
        assert "cannot recover" in found["recover"]
    beside, partner, far = (outcomes[rank].value for rank in (BESIDE, PARTNER, FAR))
    if point == POINTS[1]:
        # Its node misses it in the node; the other node misses one of its node's ranks and cannot know which.
        assert beside["peer"] == VICTIM, beside["text"]
        assert partner["peer"] in (-1, VICTIM), partner["text"]
        assert "3 or the other ranks of their nodes" in partner["text"]
    elif point == POINTS[0]:
        assert partner["peer"] == VICTIM, partner["text"]
        assert beside["peer"] == VICTIM, beside["text"]
        # Its node has told it, and who has found out.
        assert far["reported_by"] == PARTNER, far["text"]
