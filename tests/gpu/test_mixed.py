"""Transport ``mixed`` on GPUs that all reach each other, divided into parts as if they did not.

On two GPUs there is one pair: it is joined, or it is not. Only four show both ways in one communicator.
"""

import gpu_jobs
import gpus
import pytest
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend import communicator

pytestmark = pytest.mark.gpu
PARTS = (((0, 1),), ((0,), (1,)), ((0, 1), (2, 3)), ((0, 1, 2), (3,)))


def divided_job(rank, group, job, parts, *args):
    """A job of gpu_jobs.py, with these parts in place of those of the machine."""
    kept = communicator.parts
    communicator.parts = lambda records: parts
    try:
        return getattr(gpu_jobs, job)(rank, group, *args)
    finally:
        communicator.parts = kept


def world_of(parts):
    world = sum(map(len, parts))
    gpus.needs(world)
    return world


@pytest.mark.parametrize("layout", gpu_jobs.LAYOUTS)
@pytest.mark.parametrize("name", ["bf16", "fp16 fp32-wire", "fp8", "opaque"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_same_bits_as_the_cpu_transport(parts, name, layout):
    world = world_of(parts)
    more = {**gpu_jobs.CONFIGS[name], "layout": layout}
    answers = ranks(world).run(divided_job, "same_bits_job", parts, "mixed", more, timeout=120)
    assert answers == [[]] * world


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_graph_replays_with_other_counts(parts):
    world = world_of(parts)
    assert ranks(world).run(divided_job, "graph_job", parts, "mixed", timeout=120) == [[]] * world


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_closing(parts):
    world = world_of(parts)
    results = ranks(world).run(divided_job, "closing_job", parts, "mixed", timeout=60)
    assert [same for same, _ in results] == [[True] * 4] * world
    assert "ended the exchange without a combine" in results[0][1]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_recovery_after_a_stall(parts):
    """Rank 1 stalls; abort words go through both kinds of windows."""
    with fresh_ranks(world_of(parts)) as group:
        results = group.run(divided_job, "loop_job", parts, "mixed", 4.0, timeout=60)
    for rank, ((peer, _, _), right_again) in enumerate(results):
        assert peer == 1 or rank == 1
        assert right_again


def refused_job(rank, group, parts):
    """Memory that the driver does not share on one rank: all say so and go on with another transport."""
    from ep_backend.transports import gpu_memory

    class Refusing:
        def __getattr__(self, name):
            return getattr(kept, name)

        def gpu_memory_map(self, *args):
            raise RuntimeError("made up by a test")

    kept = gpu_memory.ops
    if rank == 1:
        gpu_memory.ops = Refusing()
    try:
        divided_job(rank, group, "same_bits_job", parts, "mixed", {})
    except ep.EpConfigError as error:
        return str(error)
    finally:
        gpu_memory.ops = kept
    return ""


def test_memory_that_cannot_be_mapped():
    gpus.needs(2)
    for said in ranks(2).run(refused_job, ((0, 1),), timeout=60):
        assert "rank 1 cannot start: a peer's GPU memory cannot be mapped (made up by a test)" in said
    answers = ranks(2).run(divided_job, "same_bits_job", ((0, 1),), "mixed", {}, timeout=120)
    assert answers == [[]] * 2
