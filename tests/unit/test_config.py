"""EpConfig: what it accepts, what it refuses and in which words, what follows from it."""

import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ep_backend as ep

GOOD = {"num_experts": 8, "top_k": 2, "hidden_size": 256, "max_tokens_per_rank": 16}
OPAQUE = {**GOOD, "payload": torch.uint8, "payload_bytes": 64}

WRONG = [
    ({"num_experts": 0}, "num_experts is 0", "from 1 to 1024"),
    ({"num_experts": 1025}, "num_experts is 1025", "from 1 to 1024"),
    ({"num_experts": 8.0}, "num_experts is 8.0", "whole number"),
    ({"num_experts": True}, "num_experts is True", "whole number"),
    ({"num_experts": "8"}, "num_experts is '8'", "whole number"),
    ({"top_k": 0}, "top_k is 0", "from 1 to 8"),
    ({"top_k": 9}, "top_k is 9", "from 1 to 8"),
    ({"num_experts": 64, "top_k": 17}, "top_k is 17", "from 1 to 16"),
    ({"hidden_size": 0}, "hidden_size is 0", "from 1 to"),
    ({"hidden_size": 2**20}, "hidden_size is 1048576", "from 1 to"),
    ({"hidden_size": 4}, "8 bytes", "multiple of 16"),
    (
        {"hidden_size": 12, "payload": torch.float32, "wire_dtype": torch.float16},
        "24 bytes",
        "multiple of 16",
    ),
    ({"max_tokens_per_rank": 0}, "max_tokens_per_rank is 0", "from 1 to 16384"),
    ({"max_tokens_per_rank": 16385}, "max_tokens_per_rank is 16385", "from 1 to 16384"),
    ({"payload": torch.float64}, "payload is torch.float64", "torch.bfloat16"),
    ({"payload": torch.int8}, "payload is torch.int8", "torch.uint8"),
    ({"payload": "bfloat16"}, "payload is 'bfloat16'", "torch.bfloat16"),
    ({"payload": None}, "payload is None", "torch.bfloat16"),
    ({"quantization": "fp4"}, "quantization is 'fp4'", "fp8_block128"),
    ({"quantization": "fp8_block128", "payload": torch.float8_e4m3fn}, "fp8_block128", "float payload"),
    (
        {"quantization": "fp8_block128", "payload": torch.uint8, "payload_bytes": 64},
        "fp8_block128",
        "float payload",
    ),
    ({"quantization": "fp8_block128", "hidden_size": 192}, "192", "multiple of 128"),
    ({"quantization": "fp8_block128", "scales_by_column": True}, "scales_by_column", "expert_major"),
    ({"layout": "expert_major", "scales_by_column": True}, "scales_by_column", "fp8 rows"),
    ({"payload": torch.float8_e4m3fn, "hidden_size": 192}, "192", "multiple of 128"),
    ({"payload": torch.uint8}, "opaque", "payload_bytes"),
    ({"payload_bytes": 64}, "payload_bytes", "uint8 payload"),
    ({"scale_bytes": 4}, "scale_bytes", "uint8 payload"),
    ({**OPAQUE, "payload_bytes": 0}, "payload_bytes is 0", "from 1 to"),
    ({**OPAQUE, "payload_bytes": 40}, "40 bytes", "multiple of 16"),
    ({**OPAQUE, "payload_bytes": 64.0}, "payload_bytes is 64.0", "whole number"),
    ({**OPAQUE, "payload_bytes": 2**40}, "payload_bytes is 1099511627776", "from 1 to"),
    ({**OPAQUE, "scale_bytes": 6}, "scale_bytes is 6", "multiple of 4"),
    ({**OPAQUE, "scale_bytes": -4}, "scale_bytes is -4", "from 1 to"),
    ({**OPAQUE, "scale_bytes": 4.0}, "scale_bytes is 4.0", "whole number"),
    ({"out_dtype": torch.float8_e4m3fn}, "out_dtype is torch.float8_e4m3fn", "torch.bfloat16"),
    ({"wire_dtype": torch.uint8}, "wire_dtype is torch.uint8", "torch.bfloat16"),
    ({"layout": "row_major"}, "layout is 'row_major'", "rank_major, compact, expert_major"),
    ({"expert_ids": "all"}, "expert_ids is 'all'", "local, global"),
    ({"pad_id": 2**31}, "pad_id is 2147483648", "32-bit"),
    ({"pad_id": -(2**31) - 1}, "pad_id is -2147483649", "32-bit"),
    ({"pad_id": None}, "pad_id is None", "whole number"),
    ({"expert_map": (0,) * 7}, "7 entries", "8 experts"),
    ({"expert_map": (0.0,) * 8}, "expert_map", "rank"),
    ({"expert_map": 3}, "expert_map is 3", "tuple"),
    ({"expert_map": "00000000"}, "expert_map is '00000000'", "tuple"),
    ({"num_channels": 0}, "num_channels is 0", "from 1 to 16"),
    ({"num_channels": 17}, "num_channels is 17", "from 1 to 16"),
    ({"chunk_scale": 0.2}, "chunk_scale is 0.2", "from 0.25 to 4"),
    ({"chunk_scale": float("nan")}, "chunk_scale is nan", "from 0.25 to 4"),
    ({"chunk_scale": True}, "chunk_scale is True", "from 0.25 to 4"),
    ({"timeout_s": 0}, "timeout_s is 0", "seconds above 0"),
    ({"timeout_s": -1.5}, "timeout_s is -1.5", "seconds above 0"),
    ({"timeout_s": float("nan")}, "timeout_s is nan", "seconds above 0"),
    ({"timeout_s": float("inf")}, "timeout_s is inf", "seconds above 0"),
    ({"timeout_s": "30"}, "timeout_s is '30'", "seconds above 0"),
    ({"transport": None}, "transport is None", "name"),
]


@pytest.mark.parametrize(("change", "came", "wanted"), WRONG, ids=[str(c)[:60] for c, _, _ in WRONG])
def test_refused(change, came, wanted):
    with pytest.raises(ep.EpConfigError) as caught:
        ep.EpConfig(**{**GOOD, **change})
    assert came in str(caught.value)
    assert wanted in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", GOOD)
def test_what_has_no_default_is_needed(name):
    with pytest.raises(TypeError, match=name):
        ep.EpConfig(**{k: v for k, v in GOOD.items() if k != name})


def test_frozen_and_comparable():
    a, b = ep.EpConfig(**GOOD), ep.EpConfig(**GOOD)
    assert a == b
    assert a == pickle.loads(pickle.dumps(a))
    assert a.differences(b) == []
    assert len({a, b}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.top_k = 3


def test_a_list_of_ranks_becomes_a_tuple():
    listed, tuple_ = (ep.EpConfig(**GOOD, expert_map=kind([0, 1] * 4)) for kind in (list, tuple))
    assert listed == tuple_
    assert len({listed, tuple_}) == 1
    assert listed.differences(tuple_) == []


@pytest.mark.parametrize(
    ("more", "result", "wire", "received", "row", "scales", "back"),
    [
        ({}, torch.bfloat16, torch.bfloat16, torch.bfloat16, 512, 0, 512),
        ({"payload": torch.float32}, torch.float32, torch.float32, torch.float32, 1024, 0, 1024),
        (
            {"payload": torch.float16, "wire_dtype": torch.float32},
            torch.float16,
            torch.float32,
            torch.float16,
            512,
            0,
            1024,
        ),
        ({"quantization": "fp8_block128"}, torch.bfloat16, torch.bfloat16, torch.float8_e4m3fn, 256, 8, 512),
        (
            {"quantization": "fp8_block128", "payload": torch.float32},
            torch.float32,
            torch.float32,
            torch.float8_e4m3fn,
            256,
            8,
            1024,
        ),
        ({"payload": torch.float8_e4m3fn}, torch.bfloat16, torch.bfloat16, torch.float8_e4m3fn, 256, 8, 512),
        (
            {"payload": torch.uint8, "payload_bytes": 144, "scale_bytes": 12, "out_dtype": torch.float16},
            torch.float16,
            torch.float16,
            torch.uint8,
            144,
            12,
            512,
        ),
    ],
)  # fmt: skip
def test_what_follows(more, result, wire, received, row, scales, back):
    config = ep.EpConfig(**{**GOOD, **more})
    assert (config.result_dtype, config.sum_dtype, config.received_dtype) == (result, wire, received)
    assert (config.row_bytes, config.row_scale_bytes, config.wire_row_bytes) == (row, scales, back)


@given(num_experts=st.integers(1, 1024), world=st.integers(1, 72))
def test_contiguous_placement(num_experts, world):
    config = ep.EpConfig(**{**GOOD, "num_experts": num_experts, "top_k": 1})
    owners = config.expert_ranks(world)
    assert list(owners) == sorted(owners)
    counts = [owners.count(r) for r in range(world)]
    assert sum(counts) == num_experts
    assert counts == sorted(counts, reverse=True)  # the first ones hold one more
    assert counts[0] - counts[-1] <= 1


def test_world_limit():
    with pytest.raises(ep.EpConfigError, match=r"73 ranks.*72"):
        ep.EpConfig(**GOOD).expert_ranks(73)


@given(owners=st.lists(st.integers(0, 9), min_size=8, max_size=8), world=st.integers(1, 8))
def test_given_placement(owners, world):
    config = ep.EpConfig(**GOOD, expert_map=tuple(owners))
    wrong = [r for r in owners if r >= world]
    if wrong:
        with pytest.raises(ep.EpConfigError, match=rf"rank {wrong[0]}\b.*0 to {world - 1}"):
            config.expert_ranks(world)
    else:
        assert config.expert_ranks(world) == tuple(owners)


@given(st.data())
def test_any_configuration_is_accepted_or_refused(data):
    """Whatever comes, it is an EpConfig whose sizes fit together, or an EpConfigError."""
    numbers = st.one_of(st.integers(-2, 40), st.integers(), st.sampled_from([128, 256, 16384, 16385]))
    dtypes = st.sampled_from([*ep.config.DTYPES, None, torch.int32, torch.float64])
    fields = {
        "num_experts": numbers,
        "top_k": numbers,
        "hidden_size": numbers,
        "max_tokens_per_rank": numbers,
        "payload": dtypes,
        "quantization": st.sampled_from([None, "fp8_block128", "fp8"]),
        "payload_bytes": st.one_of(st.none(), numbers),
        "scale_bytes": st.one_of(st.just(0), numbers),
        "out_dtype": dtypes,
        "wire_dtype": dtypes,
        "layout": st.sampled_from(["rank_major", "compact", "expert_major", ""]),
        "pad_id": numbers,
        "num_channels": numbers,
        "chunk_scale": st.one_of(st.none(), st.floats()),
        "timeout_s": st.one_of(st.none(), st.floats()),
    }
    chosen = data.draw(st.sets(st.sampled_from(sorted(fields)), max_size=4))
    values = {name: data.draw(fields[name], label=name) for name in sorted(chosen)}
    try:
        config = ep.EpConfig(**{**GOOD, **values})
    except ep.EpConfigError:
        return
    assert config.row_bytes % 16 == 0
    assert config.wire_row_bytes % 16 == 0
    assert config.row_scale_bytes % 4 == 0
    assert 1 <= config.top_k <= config.num_experts
    assert all(isinstance(field, int) and field >= 0 for field in config.window_shape(2))
