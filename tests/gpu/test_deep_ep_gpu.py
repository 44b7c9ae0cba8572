"""The stand-in for DeepEP on GPUs: the jobs of tests/compat, and CUDA graphs."""

import deep_ep_cases as cases
import deep_ep_low_latency_cases as low_latency
import elastic_cases
import gpus
import pytest
from harness import fresh_ranks, ranks

pytestmark = pytest.mark.gpu
PATIENCE_S = 300


@pytest.fixture(params=[2, 4])
def world(request):
    gpus.needs(request.param)
    return request.param


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("wait", [None, "async", "previous"])
def test_normal_mode(world, routing, wait):
    tokens = [500 * rank + 3 for rank in range(world)] if wait else [130] * world
    ranks(world).run(cases.normal_mode, "cuda", tokens, routing, 1, wait, timeout=PATIENCE_S)


def test_no_tokens(world):
    ranks(world).run(cases.normal_mode, "cuda", [0] * world, "uniform", 1, None, timeout=PATIENCE_S)


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("form", low_latency.FORMATS)
@pytest.mark.parametrize("hooks", [False, True])
def test_low_latency_mode(world, routing, form, hooks):
    tokens = [64 - 21 * rank for rank in range(world)]
    ranks(world).run(
        low_latency.low_latency_mode, "cuda", tokens, routing, 2, form, hooks, timeout=PATIENCE_S
    )


@pytest.mark.parametrize(
    "job",
    [
        cases.normal_details,
        cases.masked_and_reused,
        cases.least_worst_case,
        low_latency.two_micro_batches,
        low_latency.hooks_of_all_kinds,
        cases.captured,
    ],
)
def test_details(world, job):
    ranks(world).run(job, "cuda", timeout=PATIENCE_S)


@pytest.mark.parametrize("answers", [True, False])
def test_a_masked_rank(world, answers):
    with fresh_ranks(world, {"EP_BACKEND_TIMEOUT_S": "10"}) as group:
        group.run(low_latency.masked_ranks, "cuda", answers, timeout=PATIENCE_S)


@pytest.mark.parametrize("most", [16, 512])
def test_layers_of_two_batches(world, most):
    ranks(world).run(low_latency.layers_of_two_batches, "cuda", most, timeout=PATIENCE_S)


def test_the_same_bits_every_time(world):
    ranks(world).run(cases.many_repetitions, "cuda", 500, timeout=PATIENCE_S)


def test_refusals(world):
    for names, said in ranks(world).run(cases.refusals, "cuda", timeout=PATIENCE_S):
        assert sorted(said) == names


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize(("fp8", "alignment"), [(False, 1), (False, 128), (True, 128)])
@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_elastic(world, routing, fp8, alignment, events):
    tokens = [max(0, elastic_cases.MOST - 21 * rank) for rank in range(world)]
    job = elastic_cases.dispatch_and_combine
    ranks(world).run(job, "cuda", tokens, routing, fp8, alignment, events, timeout=PATIENCE_S)


@pytest.mark.parametrize("job", [elastic_cases.small_things, elastic_cases.refusals])
def test_details_of_elastic(world, job):
    ranks(world).run(job, "cuda", timeout=PATIENCE_S)
