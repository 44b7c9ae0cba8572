"""Wrong arguments: an error says what came and what was wanted; nothing is sent; all stays usable."""

import re
from dataclasses import replace

import pytest
import torch
from exchange import Runner, check_steps, make_call, step
from harness import ranks

import ep_backend as ep

WORLD = 3
PLAIN = ep.EpConfig(
    num_experts=7,
    top_k=3,
    hidden_size=16,
    max_tokens_per_rank=8,
    payload=torch.bfloat16,
    num_channels=2,
    timeout_s=20.0,
)
FP8 = replace(PLAIN, payload=torch.float8_e4m3fn, hidden_size=256)
OPAQUE = replace(PLAIN, payload=torch.uint8, payload_bytes=48, scale_bytes=12)
NO_SCALES = replace(PLAIN, payload=torch.uint8, payload_bytes=48)


def with_ids(value, dtype=torch.int64):
    """The good ids with ``value`` as the last one."""

    def change(good):
        ids = good["topk_ids"].to(dtype).clone()
        ids[-1, -1] = value
        return {"topk_ids": ids}

    return change


def duplicate(good):
    ids = good["topk_ids"].clone()
    ids[2] = torch.tensor([5, -1, 5])
    return {"topk_ids": ids}


def many(good):
    return {
        "x": torch.zeros(7, 16, dtype=torch.bfloat16),
        "topk_ids": good["topk_ids"][:1].repeat(7, 1),
        "topk_weights": torch.ones(7, 3),
    }


def change(name, function):
    return lambda good: {name: function(good[name])}


def give(name, value):
    return lambda good: {name: value}


# name: (config, what differs from a good call of 4 tokens with T = 6, what the message says: came and wanted)
DISPATCH = {
    "x is narrow": (PLAIN, change("x", lambda x: x[:, :8]), [r"x .*4, 8", r"4, 16"]),
    "x is wide": (PLAIN, change("x", lambda x: torch.cat([x, x], 1)), [r"x .*4, 32", r"4, 16"]),
    "x has one dimension": (PLAIN, change("x", lambda x: x[0]), [r"x .*16", r"16, 16|4, 16|\[M, 16"]),
    "x has no dimension": (PLAIN, change("x", lambda x: x[0, 0]), [r"x ", r", 16"]),
    "x has three dimensions": (PLAIN, change("x", lambda x: x[None]), [r"x .*1, 4, 16", r", 16\]"]),
    "x is float32": (PLAIN, change("x", torch.Tensor.float), [r"x .*float32", "bfloat16"]),
    "x is on another device": (PLAIN, change("x", lambda x: x.to("meta")), [r"x .*meta", "cpu"]),
    "x is a list": (PLAIN, change("x", torch.Tensor.tolist), [r"x .*list", "tensor"]),
    "x is None": (PLAIN, give("x", None), [r"x .*None", "tensor"]),
    "x is sparse": (PLAIN, change("x", torch.Tensor.to_sparse), [r"x .*sparse", "strided|dense"]),
    "x is bytes of another width": (OPAQUE, change("x", lambda x: x[:, 1:]), [r"x .*4, 47", r"4, 48"]),
    "ids have another top-k": (PLAIN, change("topk_ids", lambda t: t[:, :2]), [r"topk_ids .*4, 2", "4, 3"]),
    "ids have other tokens": (PLAIN, change("topk_ids", lambda t: t[:3]), [r"topk_ids .*3, 3", "4, 3"]),
    "ids are flat": (PLAIN, change("topk_ids", torch.flatten), [r"topk_ids .*12", "4, 3"]),
    "ids are float": (PLAIN, change("topk_ids", torch.Tensor.float), [r"topk_ids .*float32", "int32.*int64"]),
    "ids are int16": (PLAIN, change("topk_ids", torch.Tensor.short), [r"topk_ids .*int16", "int32.*int64"]),
    "ids on another device": (PLAIN, change("topk_ids", lambda t: t.to("meta")), ["topk_ids .*meta", "cpu"]),
    "ids are None": (PLAIN, give("topk_ids", None), [r"topk_ids .*None", "tensor"]),
    "weights are float64": (
        PLAIN,
        change("topk_weights", torch.Tensor.double),
        ["topk_weights .*float64", "float32"],
    ),
    "weights are bf16": (
        PLAIN,
        change("topk_weights", torch.Tensor.bfloat16),
        ["topk_weights .*bfloat16", "float32"],
    ),
    "weights have another shape": (PLAIN, change("topk_weights", torch.t), ["topk_weights .*3, 4", "4, 3"]),
    "weights are None": (PLAIN, give("topk_weights", None), ["topk_weights .*None", "tensor"]),
    "scales are missing": (FP8, give("scales", None), ["scales", r"4, 2", "float32"]),
    "scales are narrow": (FP8, change("scales", lambda t: t[:, :1]), [r"scales .*4, 1", "4, 2"]),
    "scales are bytes": (
        FP8,
        change("scales", lambda t: t.view(torch.uint8)[:, :2]),
        ["scales .*uint8", "float32"],
    ),
    "scales nobody wants": (PLAIN, give("scales", torch.ones(4, 1)), ["scales", "none|None|no"]),
    "scales without scale_bytes": (NO_SCALES, give("scales", torch.ones(4, 1)), ["scales", "none|None|no"]),
    "opaque scales are missing": (OPAQUE, give("scales", None), ["scales", "4, 12", "uint8"]),
    "opaque scales are float": (OPAQUE, give("scales", torch.ones(4, 12)), ["scales .*float32", "uint8"]),
    "id beyond the last": (PLAIN, with_ids(7), [r"topk_ids\[3, 2\] is 7", "0 to 6"]),
    "int32 id beyond the last": (PLAIN, with_ids(7, torch.int32), [r"topk_ids\[3, 2\] is 7", "0 to 6"]),
    "id of -2": (PLAIN, with_ids(-2), [r"topk_ids\[3, 2\] is -2", "-1 for none"]),
    "id of 2^32 + 1": (PLAIN, with_ids(2**32 + 1), ["is 4294967297", "0 to 6"]),
    "id of 2^32 - 1": (PLAIN, with_ids(2**32 - 1), ["is 4294967295", "0 to 6"]),
    "id of 2^63 - 1": (PLAIN, with_ids(2**63 - 1), ["is 9223372036854775807", "0 to 6"]),
    "id of -2^63": (PLAIN, with_ids(-(2**63)), ["is -9223372036854775808", "0 to 6"]),
    "expert twice": (PLAIN, duplicate, ["token 2 has expert 5 twice", "at most once"]),
    "more tokens than T": (PLAIN, many, ["x has 7 tokens", "6"]),
    "T beyond the most": (PLAIN, give("tokens_per_rank", 9), ["tokens_per_rank is 9", "1 to 8"]),
    "T of 0": (PLAIN, give("tokens_per_rank", 0), ["tokens_per_rank is 0", "1 to 8"]),
    "T of -1": (PLAIN, give("tokens_per_rank", -1), ["tokens_per_rank is -1", "1 to 8"]),
    "T is a float": (PLAIN, give("tokens_per_rank", 6.0), ["tokens_per_rank is 6.0", "1 to 8"]),
    "T is a text": (PLAIN, give("tokens_per_rank", "6"), ["tokens_per_rank is '6'", "1 to 8"]),
    "channel beyond the last": (PLAIN, give("channel", 2), ["channel is 2", "0 to 1"]),
    "channel of -1": (PLAIN, give("channel", -1), ["channel is -1", "0 to 1"]),
    "channel is a float": (PLAIN, give("channel", 0.0), ["channel is 0.0", "0 to 1"]),
    "channel is None": (PLAIN, give("channel", None), ["channel is None", "0 to 1"]),
}


def good_call(config, rank):
    call = make_call(config, WORLD, rank, step([4] * WORLD, seed=3))
    return {**vars(call), "tokens_per_rank": 6, "channel": 0}


def errors_of(action):
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def dispatch_job(rank, group, name, transport, culprits):
    """The culprits call wrongly, in both halves of an exchange, then all do what is right."""
    config, differs, _ = DISPATCH[name]
    steps = [step([4] * WORLD, seed=3, slots=6), step([0, 8, 3], seed=4)]
    errors = []
    with ep.Communicator(group, replace(config, transport=transport)) as c:
        runner = Runner(c, steps)
        good = good_call(config, rank)
        wrong = {**good, **differs(good)}
        if rank in culprits:
            errors.append(errors_of(lambda: c.dispatch(**wrong)))
        runner.act(0, "dispatch")
        if rank in culprits:  # an open exchange must not suffer
            errors.append(errors_of(lambda: c.dispatch_send(**wrong)))
        runner.act(0, "combine")
        runner.act(1, "dispatch")
        runner.act(1, "combine")
        c.check()
        return errors, {transport: (runner.received, runner.combined)}, steps


def check_errors(answers, culprits, patterns):
    for rank, (errors, _, _) in enumerate(answers):
        assert len(errors) == (2 if rank in culprits else 0)
        for kind, message in errors:
            assert kind == "EpArgumentError", f"{kind}: {message}"
            for pattern in patterns:
                assert re.search(pattern, message), message
            assert len(message) < 300


@pytest.mark.parametrize("transport", ["cpu", "collective"])
@pytest.mark.parametrize("culprits", [(0, 1, 2), (1,)], ids=["all", "one"])
@pytest.mark.parametrize("name", DISPATCH)
def test_dispatch(name, culprits, transport):
    answers = ranks(WORLD).run(dispatch_job, name, transport, culprits)
    check_errors(answers, culprits, DISPATCH[name][2])
    check_steps(DISPATCH[name][0], answers[0][2], [results for _, results, _ in answers])


# name: (layout, arguments of combine from the received rows R, what the message says)
COMBINE = {
    "y is narrow": ("rank_major", lambda r: {"y": torch.zeros(18, 8).bfloat16()}, ["y .*18, 8", "18, 16"]),
    "y has few rows": (
        "rank_major",
        lambda r: {"y": torch.zeros(17, 16).bfloat16()},
        ["y .*17, 16", "18, 16"],
    ),
    "y is float16": (
        "rank_major",
        lambda r: {"y": torch.zeros(18, 16).half()},
        ["y .*float16", "bfloat16.*float32"],
    ),
    "y is elsewhere": (
        "rank_major",
        lambda r: {"y": torch.zeros(18, 16, device="meta")},
        ["y .*meta", "cpu"],
    ),
    "y is None": ("rank_major", lambda r: {"y": None}, ["y .*None", "tensor"]),
    "y has a row too many": (
        "compact",
        lambda r: {"y": torch.zeros(len(r.rows) + 1, 16)},
        [r"y .*\d+, 16", r"\d+, 16"],
    ),
    "y is not by expert": (
        "expert_major",
        lambda r: {"y": torch.zeros(18, 16)},
        ["y .*18, 16", r"\d, 18, 16"],
    ),
    "out is narrow": (
        "rank_major",
        lambda r: {"out": torch.zeros(4, 8).bfloat16()},
        ["out .*4, 8", "4, 16"],
    ),
    "out has few rows": (
        "compact",
        lambda r: {"out": torch.zeros(3, 16).bfloat16()},
        ["out .*3, 16", "4, 16"],
    ),
    "out is float32": ("rank_major", lambda r: {"out": torch.zeros(4, 16)}, ["out .*float32", "bfloat16"]),
    "out is strided": (
        "rank_major",
        lambda r: {"out": torch.zeros(16, 4).bfloat16().t()},
        ["out .*1, 4", "contiguous"],
    ),
    "out is a list": ("rank_major", lambda r: {"out": []}, ["out .*list", "tensor"]),
    "handle is None": ("rank_major", lambda r: {"handle": None}, ["handle.*None", "Handle"]),
    "handle is of another": (
        "rank_major",
        lambda r: {"handle": ep.Handle(5, 6, 4, True, state="received")},
        ["handle"],
    ),
}


def combine_job(rank, group, name, transport, culprits):
    layout, differs, _ = COMBINE[name]
    steps = [step([4] * WORLD, seed=3, slots=6), step([2, 0, 8], seed=4)]
    errors = []
    with ep.Communicator(group, replace(PLAIN, layout=layout, transport=transport)) as c:
        runner = Runner(c, steps)
        runner.act(0, "dispatch")
        good = {"y": runner._result(0), "handle": runner.open[0]}
        wrong = {**good, **differs(runner.received[0])}
        if rank in culprits:
            errors.append(errors_of(lambda: c.combine(**wrong)))
            if "out" in wrong:  # in halves, the second one has it
                errors.append(errors[0])
            else:
                errors.append(errors_of(lambda: c.combine_send(**wrong)))
        runner.act(0, "combine")
        runner.act(1, "send")
        runner.act(1, "recv")
        runner.act(1, "combine_send")
        if "out" in wrong and rank in culprits:
            bad = {"out": wrong["out"], "handle": runner.open[1]}
            kind, _ = errors_of(lambda: c.combine_recv(**bad))
            assert kind == "EpArgumentError"
        runner.act(1, "combine_recv")
        return errors, {transport: (runner.received, runner.combined)}, steps


@pytest.mark.parametrize("transport", ["cpu", "collective"])
@pytest.mark.parametrize("culprits", [(0, 1, 2), (1,)], ids=["all", "one"])
@pytest.mark.parametrize("name", COMBINE)
def test_combine(name, culprits, transport):
    answers = ranks(WORLD).run(combine_job, name, transport, culprits)
    check_errors(answers, culprits, COMBINE[name][2])
    config = replace(PLAIN, layout=COMBINE[name][0])
    check_steps(config, answers[0][2], [results for _, results, _ in answers])


def timeout_job(rank, group):
    values = (0, -1, float("nan"), float("inf"), "3", None, True)
    with ep.Communicator(group, PLAIN) as c:
        return [errors_of(lambda value=value: c.set_timeout(value)) for value in values]


def test_set_timeout():
    for kind, message in ranks(1).run(timeout_job)[0]:
        assert kind == "EpArgumentError", message
        assert "seconds" in message


def result_of_other_rank_job(rank, group, transport):
    """T differs between ranks: not an argument that one rank can judge, so it is an error of the protocol."""
    config = replace(PLAIN, transport=transport)
    with ep.Communicator(group, config) as c:
        good = {**good_call(config, rank), "tokens_per_rank": 6 if rank else 5}
        first = errors_of(lambda: c.dispatch(**good))
        return first, errors_of(c.check)


@pytest.mark.parametrize("transport", ["cpu", "collective"])
def test_different_tokens_per_rank(transport):
    for first, later in ranks(2).run(result_of_other_rank_job, transport):
        assert first[0] == "EpProtocolError", first
        assert "tokens_per_rank" in first[1]
        assert later[0] == "EpProtocolError"
