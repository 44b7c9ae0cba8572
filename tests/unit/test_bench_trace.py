"""Reading what a GPU does in a step from a profiler's trace."""

import gzip
import json

import pytest

from ep_backend.bench.engines import trace
from ep_backend.errors import EpError


def kernel(launch, name, start, duration):
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "ts": start,
        "dur": duration,
        "args": {"correlation": launch},
    }


def launch(number):
    args = {"correlation": number}
    return {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 5, "args": args}


OURS = "void ep::cuda::(anonymous namespace)::dispatch_kernel<int>(ep::cuda::View)"
EVENTS = [
    launch(7),
    kernel(7, "gemm", 0, 10),
    kernel(7, OURS, 10, 4),
    kernel(7, "ncclDevKernel_AllGather", 12, 4),  # 2 us of it beside the one before
    launch(9),
    kernel(9, "gemm", 100, 10),
    kernel(9, "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*)", 112, 4),
    kernel(8, "sampling", 120, 50),  # of no graph
    {"ph": "M", "name": "process_name"},
]


def test_a_step_s_kernels_and_times():
    assert trace.read_rank(EVENTS) == {
        "steps": 2,
        "kernels": 2.5,
        "communication_kernels": 1.5,
        "busy_us": (16 + 14) / 2,
        "communication_us": (6 + 4) / 2,
        "first_us": 4,
    }


@pytest.mark.parametrize("events", [[], EVENTS[:4], [launch(7), launch(9)]])
def test_less_than_two_steps_say_nothing(events):
    assert trace.read_rank(events) is None


def test_ranks_are_read_from_files(tmp_path):
    for rank in range(3):
        with gzip.open(tmp_path / f"rank{rank}.pt.trace.json.gz", "wt") as file:
            json.dump({"traceEvents": EVENTS if rank < 2 else []}, file)
    found = trace.read(tmp_path)
    assert found["ranks"] == 2
    assert found["communication_kernels"] == 1.5


def test_nothing_traced_is_an_error(tmp_path):
    with pytest.raises(EpError, match="no trace with at least two replayed graphs, in 0 files"):
        trace.read(tmp_path)
