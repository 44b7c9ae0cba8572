"""The four places of vLLM that `register` touches. Each passes through unchanged for every other backend
name, but where DeepEP's modes on ep_backend overlap batches.

vLLM has no registry for all-to-all backends, so the names are extended in place. Nothing here imports the
fused-MoE layers or device code.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args

from . import NAME

_MARK = "__ep_backend__"
_OVERLAPS = "deepep_low_latency"


def open_seam() -> None:
    accept_name()
    check_engine_config()
    accept_sequence_parallel_moe()
    wrap_device_communicator()


def marked(obj: Any) -> bool:
    return getattr(obj, _MARK, False)


def mark(obj: Any) -> Any:
    setattr(obj, _MARK, True)
    return obj


def selected(vllm_config: Any) -> bool:
    return vllm_config is not None and vllm_config.parallel_config.all2all_backend == NAME


def overlaps(vllm_config: Any) -> bool:
    """Whether an engine's batches are halves that overlap, by our exchange or by DeepEP's interface to it."""
    if vllm_config is None:
        return False
    parallel, stand_in = vllm_config.parallel_config, sys.modules.get("ep_backend.compat.deep_ep")
    stands_in = stand_in is not None and sys.modules.get("deep_ep") is stand_in
    ours = selected(vllm_config) or (stands_in and parallel.all2all_backend.startswith("deepep"))
    return ours and bool(parallel.use_ubatching)


def accept_name() -> None:
    """Add the name to what ParallelConfig and `--all2all-backend` accept; wrong names stay rejected."""
    import vllm.config.parallel as parallel
    from pydantic.dataclasses import rebuild_dataclass  # type: ignore[import-not-found,unused-ignore]

    field = parallel.ParallelConfig.__dataclass_fields__["all2all_backend"]
    names = get_args(field.type)
    if NAME in names:
        return
    names += (NAME,)
    accepted: Any = Literal[names]
    parallel.All2AllBackend = accepted
    parallel.ParallelConfig.__annotations__["all2all_backend"] = accepted
    field.type = accepted
    rebuild_dataclass(parallel.ParallelConfig, force=True)
    # The command line takes its choices from the field's type and caches them.
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is not None and hasattr(arg_utils, "_compute_kwargs"):
        arg_utils._compute_kwargs.cache_clear()


def check_engine_config() -> None:
    """When an engine's configuration is complete: refuse what cannot work, say what will not be used.

    This runs in the process that reads the command line, before any worker exists, so a refusal is the last
    line of a short log and environment settings reach every worker.
    """
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__
    if marked(original):
        return

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not selected(self):
            return original(self, *args, **kwargs)
        from . import start

        # Before: vLLM asserts on the names it knows for some options, with a message that would not help.
        start.refuse_unsupported(self)
        with _known_to_overlap(self.parallel_config):
            original(self, *args, **kwargs)
        start.announce(self)

    VllmConfig.__post_init__ = mark(post_init)


@contextlib.contextmanager
def _known_to_overlap(parallel: Any) -> Iterator[None]:
    """Two-batch overlap is allowed for a fixed list of names, asserted in the middle of a long method: go by
    one of them for as long as it runs. The name steers nothing else there."""
    if not parallel.use_ubatching:
        yield
        return
    parallel.all2all_backend = _OVERLAPS
    try:
        yield
    finally:
        parallel.all2all_backend = NAME


def accept_sequence_parallel_moe() -> None:
    """With TP, let each TP rank bring its own share of the tokens. Otherwise all bring the same ones."""
    from vllm.config.parallel import ParallelConfig

    original = ParallelConfig.use_sequence_parallel_moe.fget
    if marked(original):
        return

    @functools.wraps(original)
    def use_sequence_parallel_moe(self: Any) -> bool:
        if self.all2all_backend != NAME:
            return original(self)
        return self.enable_expert_parallel and self.tensor_parallel_size > 1 and self.data_parallel_size > 1

    ParallelConfig.use_sequence_parallel_moe = property(mark(use_sequence_parallel_moe))


def wrap_device_communicator() -> None:
    """Put our all-to-all manager into whatever device communicator the platform uses. Every worker comes by
    here early, so this is also where halves that overlap are seen to."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.get_device_communicator_cls.__func__
    if marked(original):
        return

    @functools.wraps(original)
    def get_device_communicator_cls(cls: Any) -> str:
        from vllm.config import get_current_vllm_config_or_none

        base, vllm_config = original(cls), get_current_vllm_config_or_none()
        if overlaps(vllm_config):
            from . import overlap

            overlap.build_metadata_for_each_half()
        if not selected(vllm_config):
            return base
        from . import communicator

        return communicator.derive(base)

    platform.get_device_communicator_cls = classmethod(mark(get_device_communicator_cls))
