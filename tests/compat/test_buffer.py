"""The stand-in for DeepEP, on the CPU; tests/gpu/test_deep_ep_gpu.py runs the same jobs on GPUs."""

import argparse
import os
import subprocess
import sys
from unittest import mock

import deep_ep_cases as cases
import deep_ep_low_latency_cases as low_latency
import nodes
import pytest
import torch
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend import tuned
from ep_backend.compat import deep_ep
from ep_backend.compat.deep_ep import normal
from ep_backend.compat.deep_ep.low_latency import quantize_rounded
from ep_backend.compat.deep_ep.pool import Pool, Usual
from ep_backend.reference import quantize_fp8
from ep_backend.select import Decision
from ep_backend.transports.gpu import Share
from ep_backend.tuning import command

WORLDS = (2, 4)


def on_two_machines(rank, group):
    """Both modes through transport hier, which keeps no src_info."""
    with nodes.pretend(rank, [[0, 1], [2, 3]]):
        _on_two_machines(rank, group)


def _on_two_machines(rank, group):
    cases.normal_mode(rank, group, "cpu", [4, 9, 0, 7], "holes", 1, None)
    buffer, world, device = cases.ready(rank, group, "cpu")
    inputs = cases.all_inputs(world, [6] * world, "uniform", 1, device)
    mine = inputs[rank]
    rows, _, handle, _, _ = buffer.low_latency_dispatch(
        mine.x, mine.ids, 8, cases.EXPERTS_PER_RANK * world, use_fp8=False
    )
    out, _, _ = buffer.low_latency_combine(rows, mine.ids, mine.weights, handle)
    assert low_latency.diff(mine.x.float() * mine.weights.sum(1, keepdim=True), out) < low_latency.BF16_DIFF
    with pytest.raises(ep.EpArgumentError, match="hier has none"):
        handle[0]
    with pytest.raises(ep.EpError, match="transport hier cannot mask ranks"):
        buffer.low_latency_update_mask_buffer((rank + 1) % world, True)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_dispatch(mine.x, mine.ids, 8, cases.EXPERTS_PER_RANK * world, use_fp8=False)
    buffer.destroy()


def held_by_a_graph(rank, group):
    """A communicator that a CUDA graph would replay, outgrown by a later call."""
    fields = {"num_experts": 4, "top_k": 1, "hidden_size": 8, "payload": torch.bfloat16}
    pool = Pool(group, Share())
    held = pool.get(torch.device("cpu"), 4, **fields)
    held.captured = True
    grown = pool.get(torch.device("cpu"), 100, **fields)
    assert grown is not held
    assert pool.get(torch.device("cpu"), 4, **fields) is grown
    x, ids = torch.ones(4, 8, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.int64)
    for member in (held, grown):
        received, handle = member.communicator.dispatch(x, ids, torch.ones(4, 1))
        assert torch.equal(member.communicator.combine(received.rows, handle), x)
    pool.destroy()
    for member in (held, grown):
        with pytest.raises(ep.EpError, match="destroyed"):
            member.communicator.dispatch(x, ids, torch.ones(4, 1))


def spread(world, *tokens):
    return [tokens[rank % len(tokens)] for rank in range(world)]


@pytest.mark.parametrize(
    ("world", "routing", "wait", "tokens"),
    [
        (2, "uniform", None, (17, 40)),
        (4, "uniform", "previous", (33, 9)),
        (2, "holes", "async", (5, 0)),
        (4, "holes", None, (11, 30)),
        (4, "skewed", None, (20, 1)),
        (2, "nobody", "previous", (8, 3)),
        (2, "uniform", "async", (0, 0)),
    ],
)
def test_normal_mode(world, routing, wait, tokens):
    ranks(world).run(cases.normal_mode, "cpu", spread(world, *tokens), routing, 1, wait)


@pytest.mark.parametrize("world", WORLDS)
def test_details_of_normal_mode(world):
    ranks(world).run(cases.normal_details, "cpu")


def test_the_callers_tensors_may_change():
    ranks(2).run(cases.masked_and_reused, "cpu")


def test_least_worst_case():
    for few, unequal in ranks(4).run(cases.least_worst_case, "cpu"):
        assert few == (
            "num_worst_tokens is 16, but rank 0 would receive 17 rows: at least that was wanted, on all ranks"
        )
        assert "[17, 18, 19, 20] on the ranks" in unequal


@pytest.mark.parametrize("form", low_latency.FORMATS)
@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize(("world", "routing"), [(2, "uniform"), (4, "holes")])
def test_low_latency_mode(world, routing, form, hooks):
    tokens = spread(world, 12, 0) if hooks else spread(world, 3, 9)
    ranks(world).run(low_latency.low_latency_mode, "cpu", tokens, routing, 2, form, hooks)


@pytest.mark.parametrize("routing", ["skewed", "nobody"])
def test_uneven_low_latency(routing):
    ranks(4).run(low_latency.low_latency_mode, "cpu", spread(4, 7), routing, 3, "fp8", True)


@pytest.mark.parametrize("world", WORLDS)
def test_two_micro_batches(world):
    ranks(world).run(low_latency.two_micro_batches, "cpu")


@pytest.mark.parametrize("world", WORLDS)
def test_layers_of_two_batches(world):
    ranks(world).run(low_latency.layers_of_two_batches, "cpu", 16)


def test_hooks_of_all_kinds():
    for early, third, twice, lost in ranks(2).run(low_latency.hooks_of_all_kinds, "cpu"):
        assert "rows have not come" in early
        assert third.startswith("2 calls of this kind are open")
        assert "exchange is" in twice
        assert "exchange is 'closed'" in lost


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_rounded_scales_of_what_is_not_finite(value):
    x = torch.randn(2, 256).bfloat16()
    x[0, 3] = value
    for got, want in zip(quantize_rounded(x), quantize_fp8(x), strict=True):
        assert torch.equal(got.float().isfinite(), want.float().isfinite())
    _, scales = quantize_rounded(x)
    assert torch.equal(scales[1], quantize_rounded(x[1:])[1][0])


def test_over_torch_distributed():
    with fresh_ranks(2, {"EP_BACKEND_TRANSPORT": "collective"}) as group:
        group.run(cases.normal_mode, "cpu", [7, 12], "holes", 1, None)
        group.run(low_latency.low_latency_mode, "cpu", [7, 12], "holes", 1, "fp8", True)


@pytest.mark.parametrize("answers", [True, False])
def test_masked_ranks(answers):
    with fresh_ranks(3, {"EP_BACKEND_TIMEOUT_S": "4"}) as group:
        group.run(low_latency.masked_ranks, "cpu", answers)


def test_between_machines():
    with fresh_ranks(4, {"EP_BACKEND_TRANSPORT": "hier"}) as group:
        group.run(on_two_machines)


def test_the_same_bits_every_time():
    ranks(2).run(cases.many_repetitions, "cpu", 30)


def test_what_a_graph_holds_stays():
    ranks(2).run(held_by_a_graph)


def test_what_is_refused_says_what_was_wanted():
    for names, said in ranks(2).run(cases.refusals, "cpu"):
        assert sorted(said) == names
        assert "one of [" in said["mask"]
        assert "call dispatch" in said["internode"]
        assert "before the hook" in said["larger before a hook"]
        for name in ("destroyed, with a handle", "destroyed, normal", "destroyed, low latency"):
            assert said[name] == "the Buffer has been destroyed"
        assert "x has 5 tokens" in said["too many"]
        assert "at most 16 were wanted" in said["many experts"]
        assert "[*, *] torch.bfloat16 was wanted" in said["dtype"]
        assert "2 ranks" in said["uneven experts"]


def test_config_and_sizes():
    config = deep_ep.Config(24, 8, 256)
    assert (config.num_sms, config.num_max_rdma_chunked_recv_tokens) == (24, 256)
    assert config.get_nvl_buffer_size_hint(14336, 8) % 128 == 0
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    assert deep_ep.Buffer.get_dispatch_config(3).num_sms == deep_ep.Buffer.num_sms
    sizes = [deep_ep.Buffer.get_low_latency_rdma_size_hint(t, 7168, 8, 256) for t in (64, 128)]
    assert sizes[0] % 128 == 0
    assert sizes[0] < sizes[1]
    assert deep_ep.topk_idx_t == torch.int64


def test_whole_numbers_of_other_kinds():
    config = deep_ep.Config(cases.Whole(24))
    assert (config, type(config.num_sms)) == (deep_ep.Config(24), int)
    with pytest.raises(ep.EpArgumentError, match="whole number"):
        deep_ep.Config(24.0)


def test_num_sms_is_what_configs_get(monkeypatch):
    monkeypatch.setattr(deep_ep.Buffer, "num_sms", 20)
    monkeypatch.setattr(deep_ep.Buffer, "_wished_sms", 0)
    buffer = object.__new__(deep_ep.Buffer)
    usual = deep_ep.Buffer.get_dispatch_config(8)
    assert usual.num_sms == 20
    assert [buffer._sms_of(c) for c in (None, usual, deep_ep.Config(), deep_ep.Config(24))] == [0, 0, 20, 24]
    deep_ep.Buffer.set_num_sms(32)
    assert deep_ep.Buffer.get_combine_config(8) == deep_ep.Config(32)
    assert [buffer._sms_of(c) for c in (None, usual, deep_ep.Config(24))] == [32, 32, 24]
    deep_ep.Buffer.set_num_sms(20)
    assert buffer._sms_of(None) == 20, "the default, but as a wish"


def test_blocks_of_normal_mode(monkeypatch):
    monkeypatch.setattr(normal, "sms", lambda device: 132)
    gpu = torch.device("cuda", 0)
    assert [normal.blocks_for(n, gpu) for n in (0, 20, 24, 100)] == [Usual(40, 59), 40, 48, 59]
    assert type(normal.blocks_for(20, gpu)) is int
    assert normal.blocks_for(0, torch.device("cpu")) is None


def numbers_of_a_pool(rank, group):
    """What communicators use where the caller has no number, one, and where nothing says one."""
    fields = {"num_experts": 4, "top_k": 1, "hidden_size": 8, "payload": torch.bfloat16}

    def used(num_sms, **decided):
        """``decided``: of the machine, where the communicator's configuration has none."""

        def decide(*_, num_sms, **more):
            sms = {"sms": num_sms} if num_sms else decided
            return Decision(profile=None, transport="cpu", env=(), reason="made up", **sms)

        members = Pool(group, Share())
        with mock.patch("ep_backend.communicator.decide", decide):
            member = members.get(torch.device("cpu"), 4, num_sms=num_sms, **fields)
            assert members.get(torch.device("cpu"), 4, num_sms=num_sms, **fields) is member
        members.destroy()
        return member.communicator.decision.sms, member.communicator.decision.chunk_scale

    usual = Usual(40, 59)
    numbers = [used(usual), used(usual, sms=24, chunk_scale=2.0), used(usual, sms=96, chunk_scale=2.0)]
    numbers += [used(usual, chunk_scale=2.0), used(16, sms=24, chunk_scale=2.0)]
    with pytest.raises(ep.EpConfigError, match=r"different numbers of SMs, .* \[40, 41\] blocks by rank"):
        used(Usual(40 + rank, 59))
    return numbers


def test_a_tuned_number_is_used_where_the_caller_has_none():
    wanted = [(40, 1.0), (24, 2.0), (59, 1.0), (40, 1.0), (16, 1.0)]
    assert ranks(2).run(numbers_of_a_pool) == [wanted] * 2


def tuned_shapes(rank, group):
    """Of the communicators of normal mode and of low-latency dispatches, rows in bf16 and in fp8."""
    buffer, world, device = cases.ready(rank, group, "cpu")
    experts = cases.EXPERTS_PER_RANK * world
    mine = cases.make_inputs(rank, world, 16, "uniform", 1, device)
    layout = cases.layout_of(buffer, mine, world)
    for x in (mine.x, mine.fp8()):
        buffer.dispatch(x, topk_idx=mine.ids, topk_weights=mine.weights, **layout)
    for fp8 in (False, True):
        buffer.low_latency_dispatch(mine.x, mine.ids, 16, experts, use_fp8=fp8)
    members = [member for pool in buffer._pools for member in pool._members.values()]
    buffer.destroy()
    return [tuned.Shape.of(member.communicator.config, world) for member in members]


def test_communicators_have_the_shapes_that_are_tuned():
    arguments = ["tune", "--ranks", "2", "--tokens", "16", "--hidden", str(cases.HIDDEN)]
    arguments += ["--experts", str(2 * cases.EXPERTS_PER_RANK), "--topk", str(cases.TOP_K)]
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    with mock.patch.object(command, "usable_gpus", return_value=2):
        measured = [
            command.settings_of(parser.parse_args([*arguments, "--layout", layout, "--dtype", dtype]))
            for layout in ("rank_major", "expert_major")
            for dtype in ("bf16", "fp8")
        ]
    wanted = [tuned.Shape.of(settings.config("peer"), 2) for settings in measured]
    assert ranks(2).run(tuned_shapes) == [wanted] * 2


ASKED = """
import logging
import ep_backend
from ep_backend import compat
compat.provide_if_asked(logging.getLogger())
"""
PROVIDED = """
import importlib.util, sys
assert importlib.util.find_spec("deep_ep") is not None
compat.provide_deep_ep()
import deep_ep
from deep_ep import Buffer, Config, EventOverlap, topk_idx_t
from deep_ep.buffer import Buffer as same
from deep_ep.utils import EventHandle, EventOverlap as same_event
import deep_ep.config
assert deep_ep is sys.modules["ep_backend.compat.deep_ep"] and same is Buffer
assert deep_ep.config.Config is Config and same_event is EventOverlap
assert deep_ep.__version__.endswith(ep_backend.__version__)
"""


def run_python(text, **environ):
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_stands_in_for_the_module():
    done = run_python(ASKED + PROVIDED, EP_BACKEND_PROVIDE_DEEP_EP="1")
    assert done.returncode == 0, done.stderr


def test_processes_started_from_it_find_the_module_by_themselves():
    """Engines ask for it in their workers before they call plug-ins there."""
    text = (
        "import importlib, multiprocessing\n"
        "start = multiprocessing.get_context('spawn').Process\n"
        "process = start(target=importlib.import_module, args=('deep_ep.buffer',))\n"
        "process.start()\nprocess.join()\nassert process.exitcode == 0"
    )
    done = run_python(ASKED + text, EP_BACKEND_PROVIDE_DEEP_EP="1")
    assert done.returncode == 0, done.stderr
    assert "No module named 'deep_ep'" in run_python(ASKED + text).stderr


def test_a_folder_of_the_name_is_not_the_module(tmp_path):
    (tmp_path / "deep_ep").mkdir()
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    done = run_python(before + ASKED + PROVIDED, EP_BACKEND_PROVIDE_DEEP_EP="1")
    assert done.returncode == 0, done.stderr


def test_it_does_not_unless_asked():
    text = ASKED + "import deep_ep"
    assert "No module named 'deep_ep'" in run_python(text).stderr
    assert "No module named 'deep_ep'" in run_python(text, EP_BACKEND_PROVIDE_DEEP_EP="0").stderr


def test_it_never_takes_the_place_of_deep_ep_itself(tmp_path):
    (tmp_path / "deep_ep.py").write_text("real = True\n")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    done = run_python(before + ASKED + "import deep_ep; assert deep_ep.real", EP_BACKEND_PROVIDE_DEEP_EP="1")
    assert done.returncode == 0, done.stderr
    assert "DeepEP itself is installed" in done.stderr
    for loaded in ("", "import deep_ep\n"):
        done = run_python(before + loaded + "from ep_backend import compat\ncompat.provide_deep_ep()")
        assert "EpConfigError" in done.stderr
        assert str(tmp_path) in done.stderr


def test_a_module_without_a_file_is_named_so():
    done = run_python(
        "import sys, types\nsys.modules['deep_ep'] = types.ModuleType('deep_ep')\n"
        "from ep_backend import compat\ncompat.provide_deep_ep()"
    )
    assert "a module of that name, which has no file" in done.stderr


PROGRAM = """
import multiprocessing, sys
import deep_ep
import beside

def child(queue):
    queue.put((deep_ep.__name__, deep_ep.config.Config is deep_ep.Config, deep_ep.Buffer.__module__))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(sys.argv[1:], queue.get(timeout=60))
    process.join()
"""


def run_program(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "ep_backend.compat", *arguments],
        cwd=folder.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_program_runs_as_it_is(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("")
    done = run_program(tmp_path, str(tmp_path / "program.py"), "--count", "3")
    assert done.returncode == 0, done.stderr
    assert "stands in for the module deep_ep" in done.stderr
    said = "['--count', '3'] ('ep_backend.compat.deep_ep', True, 'ep_backend.compat.deep_ep.buffer')"
    assert done.stdout.strip() == said
    (tmp_path / "deep_ep.py").write_text("real = True")
    done = run_program(tmp_path, str(tmp_path / "program.py"))
    assert done.returncode == 1
    assert done.stderr.startswith("ep_backend: ")
    assert f"installed ({tmp_path / 'deep_ep.py'})" in done.stderr
    assert "usage" in run_program(tmp_path).stderr


@pytest.mark.parametrize("plug_in", ["ep_backend_vllm", "ep_backend_sglang"])
def test_the_plug_ins_provide_it(plug_in):
    text = f"import {plug_in}\n{plug_in}.register()\nimport sys\nassert 'deep_ep' in sys.modules"
    done = run_python(text, EP_BACKEND_PROVIDE_DEEP_EP="1")
    if f"No module named '{plug_in}'" in done.stderr:
        pytest.skip("the plug-in is not installed")
    assert done.returncode == 0, done.stderr
