"""The compiled operators as PyTorch sees them: schemas, shape functions, torch.compile."""

import pytest
import torch
from exchange import check_steps, make_call, make_result, own, step
from harness import ranks
from torch._subclasses.fake_tensor import FakeTensorMode

import ep_backend as ep
from ep_backend._native import HAS_CUDA, OK, ops

NAMES = [
    "window_layout",
    "window_blocks",
    "dispatch_send",
    "dispatch_wait",
    "dispatch_counts",
    "dispatch_read",
    "combine_send",
    "combine_recv",
    "check_ids",
    "pack_count",
    "pack_dispatch",
    "unpack_dispatch",
    "pack_combine",
    "pack_close",
    "unpack_combine",
    "host_sum",
]
if HAS_CUDA:
    NAMES += ["cuda_dispatch", "cuda_combine", "cuda_index_rows", "cuda_gather_rows", "cuda_sort_rows"]
    NAMES += ["cuda_return_rows", "cuda_exchange_sums"]


def schema(name):
    return getattr(ops, name).default._schema


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_with_tensors_has_a_shape_function(name):
    """Under fake tensors nothing may be executed: the handle 0 is no exchange."""
    arguments = schema(name).arguments
    if not any("Tensor" in str(a.type) for a in arguments):
        pytest.skip("takes no tensor")
    with FakeTensorMode():
        values = [
            torch.empty(2, 2) if "Tensor" in str(a.type) else [0] if "List" in str(a.type) else 0
            for a in arguments
        ]
        given = getattr(ops, name)(*values)
    done = True if name == "cuda_exchange_sums" else OK
    assert given == (done if schema(name).returns else None)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("dispatch_send", []),
        ("dispatch_counts", ["tokens_per_source", "rows_per_expert"]),
        ("dispatch_read", ["rows", "scales", "ids", "weights"]),
        ("combine_send", []),
        ("combine_recv", ["out"]),
        ("pack_count", ["rows_per_rank"]),
        ("pack_dispatch", ["records"]),
        ("unpack_dispatch", []),
        ("pack_combine", ["records"]),
        ("pack_close", ["records"]),
        ("unpack_combine", ["out"]),
        ("cuda_dispatch", ["out_ids", "out_weights", "tokens_per_source"]),
        ("cuda_combine", ["sums", "out"]),
        ("cuda_index_rows", ["tile_counts", "places", "totals"]),
        ("cuda_gather_rows", ["out_rows", "out_scales", "out_ids", "out_weights"]),
        ("cuda_sort_rows", ["tile_counts", "places", "totals", "out_rows", "out_scales"]),
        ("cuda_return_rows", ["rows"]),
        ("cuda_exchange_sums", ["out"]),
    ],
)
def test_schemas_say_what_is_written(name, written):
    if name.startswith("cuda_") and not HAS_CUDA:
        pytest.skip("no CUDA kernels in this build")
    found = [a.name for a in schema(name).arguments if a.alias_info and a.alias_info.is_write]
    assert found == written


CONFIG = ep.EpConfig(
    num_experts=4, top_k=2, hidden_size=16, max_tokens_per_rank=4, payload=torch.float32, timeout_s=30.0
)
STEPS = [step([4], seed=1), step([3], seed=2)]


def compiled_job(rank, group):
    """The model around an exchange may be compiled; the exchange itself is a break in its graph."""
    with ep.Communicator(group, CONFIG) as c:

        def layer(x, ids, weights, number):
            received, handle = c.dispatch(x * 1.0, ids, weights)
            kept = own(received)
            return kept, c.combine(make_result(CONFIG, rank, STEPS[number], kept) * 1.0, handle) + 0.0

        compiled = torch.compile(layer, backend="eager")
        received, combined = {}, {}
        for number in range(2):
            call = make_call(CONFIG, c.world_size, rank, STEPS[number])
            x = call.x.nan_to_num()  # times 1 must change nothing
            received[number], combined[number] = compiled(x, call.topk_ids, call.topk_weights, number)
        return {"cpu": ({}, combined)}


def test_exchange_in_a_compiled_function():
    check_steps(CONFIG, STEPS, ranks(1).run(compiled_job, timeout=120))
