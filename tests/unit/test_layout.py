"""Where things are in a window: the compiled layout against one computed here from its description."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ep_backend as ep
from ep_backend._native import ops

LINE = 128
FIELDS = (
    "world",
    "top_k",
    "max_tokens",
    "row_bytes",
    "scale_bytes",
    "wire_bytes",
    "chunks",
    "channels",
    "weights_back",
)


def lines(size):
    return -(-size // LINE) * LINE


def regions(shape):
    """(name, size) of a channel's regions in order, each on lines of its own."""
    s = dict(zip(FIELDS, shape, strict=True))
    slots = s["world"] * s["max_tokens"]
    per_token = 4 * s["top_k"]
    return {
        "dispatch_flags": s["world"] * s["chunks"] * LINE,
        "combine_flags": s["world"] * s["chunks"] * LINE,
        "headers": s["world"] * LINE,
        "ids": slots * per_token,
        "weights": slots * per_token,
        "scales": slots * s["scale_bytes"],
        "rows": slots * s["row_bytes"],
        "combine_rows": slots * s["wire_bytes"],
        "combine_weights": slots * per_token if s["weights_back"] else 0,
    }


def expected(shape):
    s = dict(zip(FIELDS, shape, strict=True))
    offsets, at = {}, 0
    for name, size in regions(shape).items():
        offsets[name] = at
        at += lines(size)
    first = (
        2 * s["world"] * LINE
    )  # one abort word and one word for meetings per rank, each on a line of its own
    return [
        first + s["channels"] * at,
        first,
        at,
        offsets["scales"],
        offsets["rows"],
        offsets["combine_rows"],
    ]


shapes = st.tuples(
    st.integers(1, 72),
    st.integers(1, 16),
    st.integers(1, 16384),
    st.integers(1, 4096).map(lambda n: n * 16),
    st.integers(0, 512).map(lambda n: n * 4),
    st.integers(1, 4096).map(lambda n: n * 16),
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(0, 1),
)


@given(shapes)
def test_sizes_and_offsets(shape):
    assert list(ops.window_layout(list(shape))) == expected(shape)


@given(shapes, st.data())
def test_what_each_source_has(shape, data):
    """The blocks of all sources lie in their region, one behind the other and without overlap."""
    s = dict(zip(FIELDS, shape, strict=True))
    channel = data.draw(st.integers(0, s["channels"] - 1))
    slots, chunks = (data.draw(st.integers(1, s[name])) for name in ("max_tokens", "chunks"))
    _, first, stride, *_ = ops.window_layout(list(shape))
    ids = 4 * s["top_k"] * slots
    back = s["wire_bytes"]
    wanted = {
        "dispatch_flags": (s["chunks"] * LINE, chunks * LINE),
        "headers": (LINE, LINE),
        "ids": (ids, ids),
        "weights": (ids, ids),
        "scales": (s["scale_bytes"] * slots,) * 2,
        "rows": (s["row_bytes"] * slots,) * 2,
        "combine_flags": (s["chunks"] * LINE, chunks * LINE),
        "combine_rows": (back * s["max_tokens"], back * slots),
    }
    found = iter(ops.window_blocks(list(shape), channel, slots, chunks))
    at, starts = first + channel * stride, {}
    for name, size in regions(shape).items():
        starts[name] = at
        at += lines(size)
    for name, (pitch, size) in wanted.items():
        assert (next(found), next(found), next(found)) == (starts[name], pitch, size), name
        assert (s["world"] - 1) * pitch + size <= regions(shape)[name]


@given(shapes)
def test_aligned_and_without_overlap(shape):
    total, first, stride, scales, rows, combine_rows = ops.window_layout(list(shape))
    assert all(n % LINE == 0 for n in (total, first, stride, scales, rows, combine_rows))
    size = regions(shape)
    assert first >= 2 * shape[0] * LINE
    assert rows >= scales + size["scales"]
    assert combine_rows >= rows + size["rows"]
    assert stride >= combine_rows + size["combine_rows"] + size["combine_weights"]
    assert total == first + shape[7] * stride


@pytest.mark.parametrize("number", [0, 8, 10])
def test_a_shape_has_nine_fields(number):
    with pytest.raises(RuntimeError, match="9 fields"):
        ops.window_layout([1] * number)


@given(
    st.integers(1, 8),
    st.integers(1, 64),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    st.integers(1, 4),
)
def test_window_of_a_configuration(world, tokens, payload, channels):
    """The layout's place for rows is where the received view begins, and the view fits in."""
    config = ep.EpConfig(
        num_experts=8,
        top_k=2,
        hidden_size=256,
        max_tokens_per_rank=tokens,
        payload=payload,
        num_channels=channels,
    )
    shape = config.window_shape(world)
    total, first, stride, _, rows, _ = ops.window_layout(shape)
    end = first + (channels - 1) * stride + rows + world * tokens * config.row_bytes
    assert end <= total
    assert expected(shape)[0] == total
