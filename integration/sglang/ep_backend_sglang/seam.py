"""The places of SGLang that `register` touches. Each passes through unchanged for every other name.

SGLang's own hooks are used: they follow functions to wherever they were imported by value. But SGLang logs a
hook whose target is missing and goes on, so all targets are looked up before the first one is hooked.
"""

import pkgutil
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from . import NAME

RESOLUTION = "sglang.srt.arg_groups.overrides."
LAYER = "sglang.srt.layers.moe.fused_moe_triton.layer"
FUSED_KERNELS = "sglang.srt.layers.moe.moe_runner.base.FusedOpPool.get_fused_func"

_opened: set[str] = set()


def open_seam() -> None:
    """Raises AttributeError or ImportError, and changes nothing, if this SGLang lacks a place to hold on
    to."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks: list[tuple[str, Callable, Any]] = [
        (f"{RESOLUTION}_a2a_backend_overrides", _keep_name, HookType.AFTER),
        (f"{RESOLUTION}_a2a_ep_size", _span_all_ranks, HookType.AFTER),
        (f"{RESOLUTION}_a2a_fusion_adjustments", _keep_shared_experts_apart, HookType.AFTER),
    ]
    # The launcher has not imported the MoE code yet and needs none of it; a scheduler has.
    serves = LAYER in sys.modules
    if serves:
        hooks += [
            (f"{LAYER}.create_moe_dispatcher", _create_dispatcher, HookType.AROUND),
            (f"{LAYER}.FusedMoE.__init__", _bind_dispatcher, HookType.AFTER),
            (FUSED_KERNELS, _use_standard_kernels, HookType.BEFORE),
        ]
    choices = _choices()
    for target, _, _ in hooks:
        owner, _, attribute = target.rpartition(".")
        getattr(pkgutil.resolve_name(owner), attribute)
    if serves:
        add_member()
    for target, hook, kind in hooks:
        if target not in _opened:
            HookRegistry.register(target, hook, kind)
            _opened.add(target)
    if NAME not in choices:
        choices.append(NAME)


def _choices() -> list[str]:
    """What `--moe-a2a-backend` accepts: a list in the annotation of the option's field."""
    from sglang.srt.server_args import ServerArgs

    hint = get_type_hints(ServerArgs, include_extras=True)["moe_a2a_backend"]
    for argument in get_args(hint):
        choices = getattr(argument, "choices", None)
        if isinstance(choices, list):
            return choices
    raise AttributeError("the field moe_a2a_backend of ServerArgs has no list of choices")


def add_member() -> None:
    """Give the Enum of all-to-all backends a member of our name.

    Models ask the member, not its name, how they must behave. FlashInfer's all-to-all promises what ours
    does: one rank's rows in, its finished rows out, the same shape on all ranks. So our member, and it alone,
    says yes to being FlashInfer's; what checks arguments compares names and does not see it.
    """
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    if NAME in MoeA2ABackend._value2member_map_:
        return
    member = object.__new__(MoeA2ABackend)
    member._name_, member._value_ = NAME.upper(), NAME
    member.is_flashinfer = lambda: True
    member.__objclass__ = MoeA2ABackend
    MoeA2ABackend._member_names_.append(member._name_)
    MoeA2ABackend._member_map_[member._name_] = member
    MoeA2ABackend._value2member_map_[NAME] = member


def selected() -> bool:
    """Whether this process' MoE layers use ep_backend."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return bool(get_moe_a2a_backend().value == NAME)


def _keep_name(result: dict[str, Any], view: Any) -> None:
    """Some options make SGLang take another backend than the one that was asked for."""
    if view.moe_a2a_backend == NAME and "moe_a2a_backend" in result:
        raise ValueError(
            f"SGLang takes {result['moe_a2a_backend']} instead of ep_backend with these options: start "
            "without --enable-waterfill and without SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE."
        )


def _span_all_ranks(result: dict[str, Any], view: Any) -> dict[str, Any] | None:
    """Options are known and no other process exists yet: the place to refuse them, too."""
    if view.moe_a2a_backend != NAME:
        return None
    from . import start

    start.announce(view)
    return {"ep_size": view.tp_size}


def _keep_shared_experts_apart(result: dict[str, Any], view: Any) -> dict[str, Any] | None:
    """Fused into the routed ones, their weights are scaled for an all-reduce that does not happen."""
    return {"disable_shared_experts_fusion": True} if view.moe_a2a_backend == NAME else None


def _create_dispatcher(original: Callable, config: Any, *args: Any, **kwargs: Any) -> Any:
    if not selected():
        return original(config, *args, **kwargs)
    from .dispatcher import EpDispatcher
    from .install import install

    install()
    return EpDispatcher(config)


def _bind_dispatcher(result: None, layer: Any, *args: Any, **kwargs: Any) -> None:
    """What travels depends on the layer's experts, which `create_moe_dispatcher` is not told in every
    version."""
    if selected():
        layer.dispatcher.bind(layer)


def _use_standard_kernels(pool: Any, dispatch_name: str, runner_name: str) -> tuple[tuple, dict]:
    """What our dispatcher gives has the standard format: the fused experts made for no all-to-all fit."""
    return (pool, "none" if dispatch_name == NAME else dispatch_name, runner_name), {}
