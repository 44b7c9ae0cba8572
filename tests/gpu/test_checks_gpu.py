"""The checks of peer access on real GPUs: they pass where it works, and can fail."""

import itertools
import os
import time
from unittest import mock

import pytest
import torch
from harness import ranks

import ep_backend as ep
from ep_backend import checks
from ep_backend._native import HAS_CUDA, ops
from ep_backend.checks import OrderRates, worker
from ep_backend.nvml import Gpu, Link
from ep_backend.probe import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="this build has no CUDA kernels"),
]
COUNT = torch.cuda.device_count()


def needs(count):
    if count > COUNT:
        pytest.skip(f"needs {count} GPUs, {COUNT} found")


def gpus():
    found = [str(torch.cuda.get_device_properties(index).uuid) for index in range(COUNT)]
    return tuple(Gpu(uuid=name if name.startswith("GPU-") else f"GPU-{name}") for name in found)


@pytest.fixture
def environ(tmp_path):
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}


def print_table(directions):
    for d in directions:
        numbers = (d.store_bytes_per_s, d.copy_bytes_per_s, d.latency_s)
        store, copy, latency = (float("nan") if number is None else number for number in numbers)
        print(
            f"{d.source[:12]} -> {d.target[:12]}: works {d.works}, stores {store / 1e9:.1f} GB/s, "
            f"copy engine {copy / 1e9:.1f} GB/s, flag {latency * 1e6:.2f} us, atomics {d.atomics} {d.problem}"
        )


def test_every_direction_works_and_is_remembered(environ):
    needs(2)
    begin = time.monotonic()
    found = checks.results(gpus(), (), "driver", "boot", fresh=True, environ=environ)
    print(f"\n{len(found.directions)} directions in {time.monotonic() - begin:.1f} s, {found.problems}")
    print_table(found.directions)
    pairs = set(itertools.permutations([gpu.uuid for gpu in gpus()], 2))
    assert {(d.source, d.target) for d in found.directions} == pairs
    assert found.problems == ()
    for d in found.directions:
        assert (d.access, d.works, d.problem) == (True, True, "")
        assert d.store_bytes_per_s > 10e9
        assert d.copy_bytes_per_s > 10e9
        assert 0.1e-6 < d.latency_s < 50e-6
        assert d.atomics is not None
    begin = time.monotonic()
    assert checks.results(gpus(), (), "driver", "boot", environ=environ) == found
    assert time.monotonic() - begin < 0.5


def test_one_gpu_has_no_directions(environ):
    needs(1)
    assert checks.results(gpus()[:1], (), "driver", "boot", fresh=True, environ=environ).directions == ()


def test_what_was_not_stored_is_not_found():
    """A negative control: the reader looks for another pattern than the one that is stored."""
    needs(2)
    direction, broken = worker.try_direction(ops, 0, 1, "a", "b", expected=12345)
    assert (direction.works, broken) == (False, False)
    words = worker.ROUNDS * worker.BYTES // 4
    assert direction.problem.startswith(f"{words} words were read otherwise")
    assert direction.store_bytes_per_s is None


def test_a_flag_that_never_comes_ends_the_wait():
    needs(2)
    begin = time.monotonic()
    direction, broken = worker.try_direction(ops, 0, 1, "a", "b", announce=False, timeout_s=0.5)
    assert 0.5 < time.monotonic() - begin < 10
    assert (direction.works, broken) == (False, False)
    assert direction.problem == f"the flag of round 1 of {worker.ROUNDS} did not come within 0.5 s"
    assert worker.try_direction(ops, 0, 1, "a", "b")[0].works, "nothing is left behind"


def test_a_pair_gives_its_memory_back():
    needs(2)
    worker.try_direction(ops, 0, 1, "a", "b")  # contexts and kernels stay
    before = [torch.cuda.mem_get_info(index)[0] for index in (0, 1)]
    for _ in range(4):
        assert worker.try_direction(ops, 0, 1, "a", "b")[0].works
    after = [torch.cuda.mem_get_info(index)[0] for index in (0, 1)]
    assert all(b - a < worker.BYTES for b, a in zip(before, after, strict=True))


def test_too_little_memory_is_not_tried():
    needs(2)
    with pytest.raises(RuntimeError, match="cudaMalloc failed: out of memory"):
        ops.gpu_pair_create(0, 1, 1 << 44)
    with mock.patch.object(worker, "BYTES", 1 << 44):
        direction, broken = worker.try_direction(ops, 0, 1, "a", "b")
    assert (direction.works, broken) == (None, False)
    assert direction.problem == "not tried: cudaMalloc failed: out of memory"
    assert worker.try_direction(ops, 0, 1, "a", "b")[0].works, "the error is not taken for one of the next"


def print_orders(rates):
    print(f"\n{len(rates.gpus)} GPUs: {rates.problem or 'GB/s of each'}", end="")
    if rates.gain is not None:
        together, staggered = rates.together_bytes_per_s / 1e9, rates.staggered_bytes_per_s / 1e9
        print(f", together {together:.1f}, staggered {staggered:.1f}")


def test_orders_of_stores_on_one_gpu():
    """All ranks are one GPU: that it measures and ends, not how fast it is."""
    needs(1)
    of = OrderRates(gpus=("a", "b", "c", "d"), group=2)
    worker.try_orders(ops, [0] * 4, of)  # contexts and kernels stay
    before, begin = torch.cuda.mem_get_info(0)[0], time.monotonic()
    for _ in range(4):
        rates = worker.try_orders(ops, [0] * 4, of).rates
        print_orders(rates)
        assert (rates.gpus, rates.group, rates.problem) == (of.gpus, 2, "")
        assert min(rates.together_bytes_per_s, rates.staggered_bytes_per_s) > 1e9
        assert 0.1 < rates.gain < 10
    assert time.monotonic() - begin < 4
    assert before - torch.cuda.mem_get_info(0)[0] < worker.ORDER_BYTES
    for devices, group in (([0], 1), ([0] * 4, 3), ([0] * 4, 0), ([0] * 17, 1)):
        with pytest.raises(RuntimeError, match="2 to 16 GPUs in equal groups and a size were wanted"):
            ops.gpu_order_rates(devices, group, worker.ORDER_BYTES)
    with mock.patch.object(worker, "ORDER_BYTES", 1 << 44):
        problem = worker.try_orders(ops, [0] * 4, of).rates.problem
    assert problem == "not measured: cudaMalloc failed: out of memory"


def test_orders_of_stores_are_compared_and_remembered(environ):
    needs(3)
    links = [Link(a=a.uuid, b=b.uuid, nvlink=False) for a, b in itertools.combinations(gpus(), 2)]
    found = checks.results(gpus(), links, "driver", "boot", environ=environ)
    (rates,) = found.orders
    print_orders(rates)
    assert rates.gpus == tuple(gpu.uuid for gpu in gpus())
    assert min(rates.together_bytes_per_s, rates.staggered_bytes_per_s) > 1e9
    assert checks.results(gpus(), links, "driver", "boot", environ=environ) == found


def test_a_fabric_handle_is_tried_and_the_answer_has_a_reason():
    needs(1)
    answer = worker.try_fabric(ops, 0, "a")
    print(f"\nfabric handle: {answer}")
    assert answer.works is not None
    assert answer.works == (answer.problem == "")


def test_the_probe_of_this_machine(environ):
    needs(2)
    record = probe(checks="fresh", environ=environ)
    print_table(record.directions)
    print(record.problems)
    assert len(record.directions) == len(record.gpus) * (len(record.gpus) - 1)
    assert {link.peer_works for link in record.links} <= {True}
    assert probe(environ=environ).directions == record.directions


def veto_job(rank, group):
    config = ep.EpConfig(num_experts=8, top_k=2, hidden_size=256, max_tokens_per_rank=8, timeout_s=10.0)
    with (
        mock.patch.dict(os.environ, {"EP_BACKEND_PEER_ACCESS": "0"}),
        ep.Communicator(group, config, device=f"cuda:{rank}") as comm,
    ):
        return comm.transport, comm.decision.reason


def test_the_users_veto():
    needs(2)
    for transport, reason in ranks(2).run(veto_job):
        assert transport == "host"
        assert "EP_BACKEND_PEER_ACCESS=0" in reason
