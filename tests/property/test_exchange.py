"""Whole exchanges of several ranks, over all transports, against the reference: bit by bit."""

from dataclasses import replace

import gpus
import pytest
import torch
from exchange import check_steps, one_by_one, run_steps
from harness import ranks
from hypothesis import given
from hypothesis import strategies as st
from random_exchanges import cases, interleaved


@pytest.mark.parametrize("world", range(1, 9))
@given(data=st.data())
def test_exchanges_in_a_row(world, data):
    config, listed = data.draw(cases(world))
    check_steps(config, listed, ranks(world).run(run_steps, config, listed, one_by_one(listed)))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@given(data=st.data())
def test_exchanges_in_flight(world, data):
    config, listed, schedule = data.draw(interleaved(world))
    check_steps(config, listed, ranks(world).run(run_steps, config, listed, schedule))


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2, 4])
@given(data=st.data())
def test_exchanges_in_flight_on_gpus(world, data):
    gpus.needs(world)
    config, listed, schedule = data.draw(interleaved(world))
    config = replace(config, num_sms=24)  # three channels must fit a GPU together
    if config.sum_dtype not in (config.result_dtype, torch.float32):
        config = replace(config, wire_dtype=None)  # others are refused on GPUs
    results = ranks(world).run(run_steps, config, listed, schedule, ("peer",), "cuda")
    check_steps(config, listed, results, device="cuda")
