"""Expected times: the formulas against every kept measurement, and against what must hold."""

import time

import pytest
from measurements import MEASURED, WITHIN, documents, host_cases, peer_cases, shape_of

from ep_backend.config import EpConfig
from ep_backend.doctor import copying, plan
from ep_backend.doctor.plan import AllReduces, Shape

# What doctor measured on 2 H200 (docs/doctor.md): stores of SMs between two GPUs, a flag one way.
H200 = {"bytes_per_s": 370e9, "latency_s": 0.73e-6}
# Memory of its host, both ways at once, and a flag through it.
HOST = {"bytes_per_s": 33e9, "latency_s": 2.23e-6}


def config(**changes):
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 7168, "max_tokens_per_rank": 1}
    return EpConfig(**{**sizes, **changes})


def cpu_cases():
    for name, document in documents("cpu-*.json"):
        for one in document["results"]:
            if one["transport"] == "cpu" and one["phase"] == "round_trip":
                yield name, document, one


def test_there_are_measurements():
    """Or the tests below would hold nothing."""
    assert {case[2] for case in peer_cases()} == {2, 4}
    assert {case[3] for case in peer_cases()} >= {1, 8, 32, 64, 128, 256, 4096}
    assert {case[4] for case in peer_cases()} == {"bf16", "fp8"}
    assert {case[3:5] for case in host_cases()} >= {(1, "bf16"), (128, "fp8"), (4096, "bf16"), (4096, "fp8")}
    assert {document["settings"]["ranks"] for _, document, _ in cpu_cases()} == {2, 4}


def errors(machine):
    """Of the expectation for ``machine`` against each measurement of peer; and whether it used all SMs."""
    for name, shape, ranks, tokens, dtype, sms, measured_us in peer_cases():
        expected_us = plan.peer_s(shape, ranks, tokens, dtype, **machine, sms=sms) * 1e6
        yield expected_us / measured_us - 1, sms is None or sms >= 132, (name, ranks, tokens, dtype, sms)


def host_errors(machine):
    for name, shape, ranks, tokens, dtype, _, measured_us in host_cases():
        expected_us = plan.host_s(shape, ranks, tokens, dtype, **machine) * 1e6
        yield expected_us / measured_us - 1, True, (name, ranks, tokens, dtype)


def missed(found):
    """Where the expectation is further away than it may be."""
    return [case for error, _, case in found if abs(error) >= WITHIN]


def test_every_measurement_of_peer_and_host_is_within_30_percent():
    assert missed(errors(H200)) == []
    assert missed(host_errors(HOST)) == []


def test_how_far_the_formulas_are_from_measurements_as_the_pages_say():
    """docs/doctor.md, "Expected times"; docs/planning.md, "How good it is"."""
    assert max(abs(error) for error, all_sms, _ in errors(H200) if all_sms) < 0.17
    assert max(abs(error) for error, all_sms, _ in errors(H200) if not all_sms) < 0.2
    assert max(abs(error) for error, _, _ in host_errors(HOST)) < 0.13


def test_every_measurement_of_cpu_is_within_30_percent():
    for name, document, one in cpu_cases():
        machine, ranks = document["machine"], document["settings"]["ranks"]
        rate = {"copy_bytes_per_s": machine["copy_bytes_per_s"], "cpus": machine["cpus"]}
        expected_us = plan.cpu_s(shape_of(document), ranks, one["tokens"], one["dtype"], **rate) * 1e6
        assert abs(expected_us / one["median_us"] - 1) < WITHIN, (name, one["tokens"], expected_us)


@pytest.mark.parametrize(
    "change", [{"latency_s": 5e-6}, {"bytes_per_s": 150e9}], ids=["slow flags", "slow link"]
)
def test_the_comparison_with_measurements_can_fail(change):
    assert missed(errors({**H200, **change}))
    host = {"latency_s": 5e-6} if "latency_s" in change else {"bytes_per_s": 24e9}
    assert missed(host_errors({**HOST, **host}))


def test_rows_per_token_by_hand():
    away, everywhere = plan.rows_per_token(Shape(name="", hidden=16, experts=4, topk=2), 2)
    assert everywhere == pytest.approx(2 * (1 - 1 / 6))  # of C(4,2) = 6 choices, one has no expert here
    assert away == pytest.approx(5 / 6)
    # docs/performance.md: 0.903 of four ranks, 2.71 others
    away, everywhere = plan.rows_per_token(MEASURED, 4)
    assert (everywhere / 4, away) == (pytest.approx(0.903, abs=1e-3), pytest.approx(2.71, abs=1e-2))


def test_rows_per_token_with_every_expert_and_with_uneven_shares():
    assert plan.rows_per_token(Shape(name="", hidden=16, experts=8, topk=8), 4) == (3, 4)
    uneven = Shape(name="", hidden=16, experts=7, topk=1)
    sizes = [config(num_experts=7).expert_ranks(3).count(rank) for rank in range(3)]
    assert plan.rows_per_token(uneven, 3)[1] == pytest.approx(sum(size / 7 for size in sizes)) == 1


def test_more_ranks_than_experts():
    assert plan.rows_per_token(Shape(name="", hidden=16, experts=2, topk=1), 4) == (0.75, 1)


def test_row_bytes_are_those_of_the_library():
    import torch

    fp8 = config(payload=torch.float8_e4m3fn)
    assert plan.row_bytes(7168, "fp8") == (fp8.row_bytes + fp8.row_scale_bytes, fp8.wire_row_bytes)
    bf16 = config()
    assert plan.row_bytes(7168, "bf16") == (bf16.row_bytes, bf16.wire_row_bytes)


def test_slower_links_and_longer_flights_take_longer():
    base = plan.peer_s(MEASURED, 4, 128, "bf16", **H200)
    assert plan.peer_s(MEASURED, 4, 128, "bf16", bytes_per_s=50e9, latency_s=1.24e-6) > 4 * base
    slow = plan.peer_s(MEASURED, 4, 128, "bf16", bytes_per_s=H200["bytes_per_s"], latency_s=10.73e-6)
    assert slow - base == pytest.approx(plan.FLIGHTS * 10e-6)


def test_what_does_not_leave_the_gpu_costs_host_nothing():
    alone = Shape(name="", hidden=2048, experts=4, topk=2)
    assert plan.host_s(alone, 1, 4096, "bf16", **HOST) == plan.host_s(alone, 1, 1, "bf16", **HOST)
    base = plan.host_s(MEASURED, 2, 4096, "bf16", **HOST)
    twice = plan.host_s(MEASURED, 2, 4096, "bf16", bytes_per_s=66e9, latency_s=HOST["latency_s"])
    assert base == pytest.approx(2 * twice, rel=0.01)
    assert plan.host_s(MEASURED, 2, 4096, "fp8", **HOST) < 0.8 * base


def test_all_reduces_between_and_beyond_what_was_measured():
    times = AllReduces([(1000, 10e-6), (3000, 20e-6), (100, 9e-6)])
    assert times.launch_s == 9e-6
    assert times(1) == 9e-6
    assert times(1000) == pytest.approx(10e-6)
    assert times(2000) == pytest.approx(15e-6)
    assert times(6000) == pytest.approx(40e-6)


def test_nccl_is_an_all_reduce_and_three_launches():
    flat = AllReduces([(1, 10e-6), (1 << 30, 10e-6)])
    assert plan.nccl_s(MEASURED, 4, 8, "bf16", flat) == pytest.approx(40e-6)
    steep = AllReduces([(1, 1e-12), (1 << 30, (1 << 30) * 1e-12)])
    assert plan.nccl_s(MEASURED, 4, 8, "bf16", steep) == pytest.approx(4 * 8 * 14336e-12, rel=1e-3)
    assert plan.nccl_s(MEASURED, 4, 8, "fp8", steep) < plan.nccl_s(MEASURED, 4, 8, "bf16", steep)


def test_the_best_of_several_copy_rates_counts(monkeypatch):
    """Another program that is at work meanwhile must not make memory look slow."""
    slow = iter([0.05] * 3)
    monkeypatch.setattr(copying.ctypes, "memmove", lambda *of: time.sleep(next(slow, 0.001)))
    assert copying.copy_rate(1, size=1 << 20, seconds=0.02) > (1 << 20) / 0.01


def test_copy_rate_is_that_of_some_memory():
    assert 1e8 < copying.copy_rate(1, size=1 << 22, seconds=0.02) < 1e13
    assert copying.copy_rate(3, size=1 << 20, seconds=0.02) > 1e8
