"""Gradients through exchanges between GPUs: against one process without exchanges."""

import gpus
import pytest
import torch
from gradients import check_layers, layers_job
from harness import ranks

pytestmark = pytest.mark.gpu


def gpu_job(rank, group, case, compiled, gradient_dtype):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return layers_job(rank, group, case, device="cuda", compiled=compiled, gradient_dtype=gradient_dtype)


def case(layout, transport, world, payload=torch.float32):
    return {
        "tokens": (300, 0, 17, 128)[:world],
        "hidden_size": 256,
        "max_tokens_per_rank": 300,
        "layout": layout,
        "transport": transport,
        "payload": payload,
        "timeout_s": 200.0,  # a rank may wait for one that still compiles
    }


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("layout", ["rank_major", "compact"])
@pytest.mark.parametrize("transport", ["peer", "host", "collective"])
def test_layers_equal_one_process(transport, layout, world):
    gpus.needs(world)
    tried = case(layout, transport, world)
    check_layers(tried, ranks(world).run(gpu_job, tried, None, None, timeout=300), tolerance=1e-3)


@pytest.mark.parametrize("gradient_dtype", [None, torch.float32])
@pytest.mark.parametrize("layout", ["rank_major", "compact"])
def test_layers_in_bfloat16(layout, gradient_dtype):
    gpus.needs(2)
    tried = case(layout, "peer", 2, torch.bfloat16)
    check_layers(tried, ranks(2).run(gpu_job, tried, None, gradient_dtype, timeout=300), tolerance=0.05)


@pytest.mark.parametrize("layout", ["rank_major", "compact"])
def test_compiled(layout):
    gpus.needs(2)
    tried = case(layout, "peer", 2)
    check_layers(tried, ranks(2).run(gpu_job, tried, "inductor", None, timeout=600), tolerance=1e-3)
