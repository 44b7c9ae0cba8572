"""What a worker of an engine that selected ep_backend replaces in vLLM, before the model is built."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.all2all_utils as all2all_utils
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from ep_backend.engines.patches import replace_everywhere

from . import NAME
from .manager import EpManager
from .prepare_finalize import make_prepare_finalize
from .seam import mark, marked

logger = init_logger("vllm.ep_backend")


def install(vllm_config: Any) -> None:
    """Idempotent; called by our communicator, so only in workers that selected ep_backend."""
    _replace_prepare_finalize()
    _hide_layers_from_compiler()
    worker = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    _watch_for_ready(worker)
    _check_after_steps(worker)


def _replace_prepare_finalize() -> None:
    original = all2all_utils.maybe_make_prepare_finalize
    if marked(original):
        return

    @functools.wraps(original)
    def maybe_make_prepare_finalize(moe: Any, *args: Any, **kwargs: Any) -> Any:
        parallel = moe.moe_parallel_config
        if parallel.all2all_backend != NAME or not parallel.use_all2all_kernels:
            return original(moe, *args, **kwargs)
        manager = kwargs.get("all2all_manager") or all2all_utils.get_ep_all2all_manager()
        return make_prepare_finalize(moe, manager, monolithic=kwargs.get("use_monolithic", False))

    # The kernel oracles import it by value.
    replace_everywhere(original, mark(maybe_make_prepare_finalize))


def _hide_layers_from_compiler() -> None:
    """On CPU vLLM lets torch.compile trace into the MoE layer, and so into the exchange, which it cannot
    trace.

    On other devices the layer is an opaque operator; use the same operator here.
    """
    original = MoERunner._select_forward
    if not current_platform.is_cpu() or marked(original):
        return

    @functools.wraps(original)
    def _select_forward(self: Any) -> Callable:
        if self.moe_config.moe_parallel_config.all2all_backend != NAME:
            return original(self)
        if self._shared_experts is None:
            return torch.ops.vllm.moe_forward
        return torch.ops.vllm.moe_forward_shared

    MoERunner._select_forward = mark(_select_forward)


def _watch_for_ready(worker: Any) -> None:
    """compile_or_warm_up_model is the last step of a worker's start-up: then the short deadline holds."""
    original = worker.compile_or_warm_up_model
    if marked(original):
        return

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        for manager in EpManager.living():
            manager.engine_is_ready()
        return result

    worker.compile_or_warm_up_model = mark(compile_or_warm_up_model)


def _check_after_steps(worker: Any) -> None:
    """Raise what stopped an exchange on a GPU before the tokens of that step leave the worker: in a replayed
    CUDA graph none of our code runs on the host."""
    for name in ("execute_model", "sample_tokens"):
        original = getattr(worker, name, None)
        if original is None or marked(original) or current_platform.is_cpu():
            continue
        setattr(worker, name, mark(_checked(original)))


def _checked(step: Callable) -> Callable:
    @functools.wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if hasattr(result, "get_output"):  # tokens that are still being computed
            get_output = result.get_output

            def checked_output() -> Any:
                output = get_output()
                _check()
                return output

            result.get_output = checked_output
        elif result is not None:
            _check()
        return result

    return call


def _check() -> None:
    for manager in EpManager.living():
        manager.check()
