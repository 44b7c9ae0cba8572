"""What the plug-in does to the process that reads the command line. Run by test_seam.py, once per version of
SGLang's sources; the order counts: the first cases need SGLang unchanged."""

import argparse
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import ep_backend_sglang
import plug_in
import pytest
from ep_backend_sglang import NAME, seam, start
from sglang.srt.arg_groups import overrides
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe"
FLAG = "--moe-a2a-backend"


def choices(field="moe_a2a_backend"):
    hint = get_type_hints(ServerArgs, include_extras=True)[field]
    return next(list(a.choices) for a in get_args(hint) if isinstance(getattr(a, "choices", None), list))


def parse(*options):
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(["--model-path", str(MODEL), *options])


def resolved(**options):
    """Every option of a server, as SGLang completed them on this machine."""
    options = {"moe_runner_backend": "triton", "attention_backend": "torch_native", **options}
    args = ServerArgs(model_path=str(MODEL), device="cpu", tp_size=2, random_seed=1, **options)
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    return args


def comparable(args):
    view = overrides.resolved_view(args)
    return {name: repr(getattr(view, name)) for name in get_type_hints(ServerArgs)}


STOCK_CHOICES = choices()
STOCK = comparable(resolved(moe_a2a_backend="none"))


def test_a_place_that_is_missing_is_said_in_one_loud_line_and_nothing_is_changed(monkeypatch, caplog):
    monkeypatch.delattr(overrides, "_a2a_ep_size")
    with caplog.at_level(logging.ERROR):
        plug_in.load()
    (record,) = [record for record in caplog.records if "NOT AVAILABLE" in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert "_a2a_ep_size" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert choices() == STOCK_CHOICES
    assert not HookRegistry._hooks
    assert not seam._opened


def test_registration_is_light_and_adds_exactly_the_name():
    before = set(sys.modules)
    speculative = choices("speculative_moe_a2a_backend")
    plug_in.load()
    ep_backend_sglang.register()
    assert choices() == [*STOCK_CHOICES, NAME]
    assert set(choices("speculative_moe_a2a_backend")) - set(speculative) <= {NAME}
    loaded = set(sys.modules) - before
    assert not [name for name in loaded if "fused_moe" in name or "token_dispatcher" in name]
    assert "ep_backend.communicator" not in sys.modules, "registration must not load the library"
    assert not [target for target in HookRegistry._hooks if "layers" in target]
    assert len(HookRegistry._patched) == len(HookRegistry._hooks) == 3
    assert all(len(hooks) == 1 for hooks in HookRegistry._hooks.values()), "once, however often it is loaded"


def test_the_command_line_takes_the_name_and_still_rejects_others():
    assert parse(FLAG, NAME).moe_a2a_backend == NAME
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'ep_backened'"):
        parse(FLAG, "ep_backened")


def test_another_backend_is_resolved_as_without_the_plug_in():
    assert len(STOCK) > 300
    assert comparable(resolved(moe_a2a_backend="none")) == STOCK


@pytest.mark.parametrize("name", STOCK_CHOICES)
def test_hooks_say_nothing_about_other_backends(name):
    view = SimpleNamespace(moe_a2a_backend=name, tp_size=4, ep_size=4, enable_waterfill=False)
    for hook in (seam._keep_name, seam._span_all_ranks, seam._keep_shared_experts_apart):
        assert hook({}, view) is None


def gpu_view(**options):
    """What SGLang's hooks would be handed on a machine with GPUs."""
    args = parse(FLAG, NAME, "--tp-size", "4", "--dp-size", "4", "--enable-dp-attention", "--device", "cuda")
    view = SimpleNamespace(**{**vars(args), "enable_dp_attention": True, "tp_size": 4, "dp_size": 4})
    vars(view).update(options)
    return view


def test_every_option_that_is_looked_at_exists():
    read = start.read_launch(gpu_view())
    assert read.tensor_parallel == read.attention_data_parallel == 4
    assert read.device == "cuda"
    assert start.refusal(read) is None
    fields = get_type_hints(ServerArgs)
    for name in (
        "kt_weight_path",
        "elastic_ep_backend",
        "moe_dp_size",
        "attn_cp_size",
        "pp_size",
        "lora_paths",
    ):
        assert name in fields


def test_data_parallel_attention_is_seen_however_it_is_written():
    args = resolved(moe_a2a_backend="none", dp_size=2, enable_dp_attention=True)
    assert start.read_launch(overrides.resolved_view(args)).attention_data_parallel == 2
    args = resolved(moe_a2a_backend="none")
    assert start.read_launch(overrides.resolved_view(args)).attention_data_parallel == 1


def test_experts_span_all_ranks_and_the_environment_is_set_first(monkeypatch, caplog):
    applied = []
    monkeypatch.setattr(start.start, "apply_profile", lambda device, log: applied.append(device))
    view = gpu_view()
    with caplog.at_level(logging.WARNING):
        assert overrides._a2a_ep_size(view) == {"ep_size": 4}
        assert overrides._a2a_ep_size(view) == {"ep_size": 4}
    assert applied == ["cuda"], "once"
    assert "was tested with" not in caplog.text
    assert overrides._a2a_fusion_adjustments(view)["disable_shared_experts_fusion"] is True


def test_a_profile_s_values_win_over_sglang_s_own_defaults(monkeypatch):
    """SGLang sets NCCL_CUMEM_ENABLE and NCCL_NVLS_ENABLE only where they are unset."""
    from sglang.srt.entrypoints import engine

    from ep_backend.select import Decision, EnvValue, apply_env

    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    values = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    env = tuple(EnvValue(name=n, value=v, why="", source="") for n, v in values.items())
    apply_env(Decision(**{**_decision_fields(Decision), "env": env}))
    args = resolved(moe_a2a_backend="none")
    monkeypatch.setattr(engine.mp, "set_start_method", lambda *a, **k: None)
    monkeypatch.setattr(engine.signal, "signal", lambda *a: None)
    engine._set_envs_and_config(args)
    assert {name: os.environ[name] for name in values} == values


def _decision_fields(decision):
    import msgspec

    blank = {str: "", int: 0}
    return {
        field.name: blank.get(field.type, ()) for field in msgspec.structs.fields(decision) if field.required
    }


def test_a_version_outside_the_tested_range_gets_one_warning_and_is_tried(monkeypatch, caplog):
    import sglang

    monkeypatch.setattr(sglang, "__version__", "0.5.99")
    monkeypatch.setattr(start.start, "apply_profile", lambda device, log: None)
    start._announce_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert overrides._a2a_ep_size(gpu_view()) == {"ep_size": 4}
    assert caplog.text.count("was tested with SGLang 0.5.17 to 0.5.23, this is 0.5.99") == 1


def test_options_that_replace_the_name_are_refused():
    view = gpu_view(enable_waterfill=True)
    with pytest.raises(ValueError, match="without --enable-waterfill"):
        overrides._a2a_backend_overrides(view)


def test_a_refusal_ends_the_launcher():
    with pytest.raises(ValueError, match="use --device cuda, or use --moe-a2a-backend none"):
        resolved(moe_a2a_backend=NAME)
