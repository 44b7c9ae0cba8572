"""Whole exchanges over made-up nodes against the reference, bit by bit: sums inside each node come first."""

import pytest
from exchange import check_steps, one_by_one
from harness import ranks
from hypothesis import given
from hypothesis import strategies as st
from nodes import run_steps_on
from random_exchanges import cases, interleaved

TWO_BY_TWO = ((0, 1), (2, 3))
NODES = {
    "2 x 2": TWO_BY_TWO,
    "2 x 2, ranks take turns": ((0, 2), (1, 3)),
    "2 x 2, one inside the other": ((0, 3), (1, 2)),
    "2 x 1": ((0,), (1,)),
    "3 x 1": ((0,), (1,), (2,)),
    "one node": ((0, 1, 2),),
}


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
@given(data=st.data())
def test_exchanges_in_a_row(nodes, data):
    world = sum(map(len, nodes))
    config, listed = data.draw(cases(world))
    schedule = one_by_one(listed)
    check_steps(config, listed, ranks(world).run(run_steps_on, nodes, config, listed, schedule), nodes)


@pytest.mark.parametrize("nodes", [TWO_BY_TWO, ((0,), (1,))], ids=["2 x 2", "2 x 1"])
@given(data=st.data())
def test_exchanges_in_flight(nodes, data):
    world = sum(map(len, nodes))
    config, listed, schedule = data.draw(interleaved(world))
    check_steps(config, listed, ranks(world).run(run_steps_on, nodes, config, listed, schedule), nodes)
