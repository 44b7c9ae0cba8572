"""What a scheduler whose MoE layers use ep_backend replaces in SGLang, while the model is built."""

import functools
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang.srt.layers.dp_attention import get_dp_global_num_tokens

from ep_backend import EpConfigError
from ep_backend.engines.patches import replace_everywhere

from . import process, step
from .start import INSTEAD
from .token_format import quantized

logger = logging.getLogger("sglang.ep_backend")

QWEN3_MOE = "sglang.srt.models.qwen3_moe"


@functools.cache
def install() -> None:
    """Raises AttributeError or ImportError if this SGLang lacks a place to hold on to."""
    _hand_over_quantized_rows()
    _count_overlapping_halves()
    _leave_all_multiprocessors_to_experts()
    _route_to_physical_experts()
    _refuse_unknown_copies()
    _watch_scheduler()


def _hand_over_quantized_rows() -> None:
    """DeepGEMM's preparation quantises the rows it gets; ours came quantised."""
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8 as original

    replace_everywhere(original, _around(original, quantized))


def _count_overlapping_halves() -> None:
    """Halves of a batch carry no counts of other ranks; until they begin, those of the batch are there."""
    from sglang.srt.batch_overlap.operations import execute_overlapped_operations as original

    def execute(original: Callable, *args: Any, **kwargs: Any) -> Any:
        _say_once("ep_backend: a batch is computed as two overlapping halves")
        with step.two_halves(get_dp_global_num_tokens()):
            return original(*args, **kwargs)

    replace_everywhere(original, _around(original, execute))


def _leave_all_multiprocessors_to_experts() -> None:
    """Two-batch overlap takes multiprocessors from DeepGEMM, as many as DeepEP says that it uses on a stream
    of its own, and fails where DeepEP is not installed. Our halves run in the model's stream."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPConfig

    def get_instance(_original: Callable) -> Any:
        return SimpleNamespace(num_sms=0)

    DeepEPConfig.get_instance = _around(DeepEPConfig.get_instance, get_instance)


def _route_to_physical_experts() -> None:
    """Qwen3's way for an all-to-all knows which copies of an expert there are (EPLB) and which rows are
    padding; its other way, which unknown names get, does not."""
    model = sys.modules.get(QWEN3_MOE)
    if model is None:
        return

    def forward(
        original: Callable, block: Any, hidden_states: Any, forward_batch: Any = None, **kwargs: Any
    ) -> Any:
        if forward_batch is None:
            return original(block, hidden_states, forward_batch, **kwargs)
        return block.forward_deepep(hidden_states, forward_batch)

    layer = model.Qwen3MoeSparseMoeBlock
    layer.forward = _around(layer.forward, forward)


def _refuse_unknown_copies() -> None:
    """In earlier versions the model says where an expert's copies are; some models do not, for an unknown
    name. Their tokens would go to the wrong experts."""
    from sglang.srt.layers.moe.topk import select_experts

    if not process.has_copies_of_experts():
        return

    def select(original: Callable, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("expert_location_dispatch_info") is None:
            raise EpConfigError(
                "this SGLang does not tell this model's layers where the copies of an expert are: start "
                "without --enable-eplb, --ep-num-redundant-experts and --init-expert-location, "
                f"{INSTEAD}."
            )
        return original(*args, **kwargs)

    replace_everywhere(select_experts, _around(select_experts, select))


def _watch_scheduler() -> None:
    """In a replayed CUDA graph none of our code runs on the host: what stopped an exchange is raised before
    the tokens of that step leave."""
    from sglang.srt.managers.scheduler import Scheduler

    def run_event_loop(original: Callable, scheduler: Any) -> Any:
        process.serving()
        return original(scheduler)

    def process_batch_result(
        original: Callable, scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any
    ) -> Any:
        copied = getattr(result, "copy_done", None)
        if copied is not None:
            copied.synchronize()  # SGLang waits for it, too, before it looks at the tokens
        process.check()
        outcome = original(scheduler, batch, result, *args, **kwargs)
        if copied is None:  # only now has the GPU been waited for
            process.check()
        return outcome

    Scheduler.run_event_loop = _around(Scheduler.run_event_loop, run_event_loop)
    Scheduler.process_batch_result = _around(Scheduler.process_batch_result, process_batch_result)


@functools.cache
def _say_once(sentence: str) -> None:
    logger.info(sentence)


def _around(original: Callable, hook: Callable) -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return call
