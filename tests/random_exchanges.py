"""Random exchanges for property tests: configurations, steps, and schedules of them (tests/exchange.py)."""

import torch
from exchange import HALVES, WHOLE
from hypothesis import event
from hypothesis import strategies as st

import ep_backend as ep
from ep_backend.selftest.inputs import ROUTINGS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def configs(draw, world):
    kind = draw(st.sampled_from(["plain", "quantised", "fp8", "opaque"]))
    layout = draw(st.sampled_from(["rank_major", "compact", "expert_major"]))
    num_experts = draw(st.integers(1, 20))
    more = {}
    hidden = draw(st.integers(1, 9)) * 8
    if kind == "plain":
        more["payload"] = draw(st.sampled_from(FLOATS))
    elif kind == "opaque":
        more["payload"] = torch.uint8
        more["payload_bytes"] = draw(st.integers(1, 9)) * 16
        more["scale_bytes"] = draw(st.integers(0, 5)) * 4
    else:
        hidden = draw(st.integers(1, 3)) * 128
        more["payload"] = draw(st.sampled_from(FLOATS)) if kind == "quantised" else torch.float8_e4m3fn
        more["quantization"] = "fp8_block128" if kind == "quantised" else None
    placement = draw(st.sampled_from(["contiguous", "any", "one rank"]))
    if placement == "any":
        owners = st.lists(st.integers(0, world - 1), min_size=num_experts, max_size=num_experts)
        more["expert_map"] = tuple(draw(owners))
    elif placement == "one rank":
        more["expert_map"] = (draw(st.integers(0, world - 1)),) * num_experts
    event(f"{kind}, {layout}, {placement}")
    return ep.EpConfig(
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 8))),
        hidden_size=hidden,
        max_tokens_per_rank=draw(st.integers(1, 12)),
        layout=layout,
        out_dtype=draw(st.sampled_from([None, *FLOATS])),
        wire_dtype=draw(st.sampled_from([None, *FLOATS])),
        expert_ids=draw(st.sampled_from(["local", "global"])),
        pad_id=draw(st.sampled_from([-1, -7, num_experts, 2**31 - 1, -(2**31)])),
        num_channels=draw(st.integers(1, 3)),
        timeout_s=20.0,
        **more,
    )


@st.composite
def steps(draw, world, config, *, may_close=True):
    slots = draw(st.one_of(st.none(), st.integers(1, config.max_tokens_per_rank)))
    counts = st.integers(0, slots or config.max_tokens_per_rank)
    everybody = st.sets(st.integers(0, world - 1), min_size=1)
    return {
        "seed": draw(st.integers(0, 2**20)),
        "slots": slots,
        "tokens": tuple(draw(st.lists(counts, min_size=world, max_size=world))),
        "routing": draw(st.sampled_from(ROUTINGS)),
        "ids": draw(st.sampled_from([torch.int32, torch.int64])),
        "result": draw(st.sampled_from([None, torch.float32])),
        "strided": draw(st.booleans()),
        "channel": draw(st.integers(0, config.num_channels - 1)),
        "closers": tuple(draw(st.one_of(st.just(set()), st.just(set()), everybody))) if may_close else (),
    }


@st.composite
def cases(draw, world):
    """Exchanges one after another; some are released, or combined on some ranks only."""
    config = draw(configs(world))
    return config, draw(st.lists(steps(world, config), min_size=1, max_size=4))


@st.composite
def interleaved(draw, world):
    """Exchanges on all channels whose halves overlap in any order; some are dropped on the way."""
    config = draw(configs(world))
    listed = draw(st.lists(steps(world, config, may_close=False), min_size=2, max_size=6))
    plans = {}  # per channel: what is still to be done, in order
    for number, s in enumerate(listed):
        actions = draw(st.sampled_from([WHOLE, HALVES]))
        kept = draw(st.sampled_from([len(actions), len(actions), len(actions), 1, 2]))
        plans.setdefault(s["channel"], []).extend((number, action) for action in actions[:kept])
    schedule = []
    while any(plans.values()):
        channel = draw(st.sampled_from(sorted(c for c, plan in plans.items() if plan)))
        schedule.append(plans[channel].pop(0))
    return config, listed, schedule
