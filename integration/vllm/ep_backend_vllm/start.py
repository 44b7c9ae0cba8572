"""What is decided once, when an engine's configuration is complete: refuse, warn, set the environment.

The decisions are pure functions of `Launch`, so that every sentence can be tested without an engine.
"""

import functools
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from ep_backend import env
from ep_backend.engines import start
from ep_backend.engines.start import MAX_TOKENS_PER_RANK

from . import TESTED_VERSIONS

logger = init_logger("vllm.ep_backend")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The options of an engine that matter to us."""

    expert_parallel: bool
    data_parallel: int
    tensor_parallel: int
    context_parallel: int
    is_moe: bool | None  # None: not known yet
    device: str  # "cpu", "cuda", ...
    max_tokens_per_rank: int | None  # None: not known yet
    ubatches: int = 1
    elastic: bool = False
    fault_tolerance: bool = False
    lora: bool = False

    @property
    def calls_all_to_all(self) -> bool:
        """vLLM calls the all-to-all only if the experts are spread and ranks hold different tokens."""
        different_tokens = self.data_parallel > 1 or self.context_parallel > 1
        return self.expert_parallel and different_tokens and self.is_moe is not False


def max_tokens_per_rank(vllm_config: Any) -> int:
    """Most tokens that one rank brings to one exchange: the scheduler's limit, or a TP rank's share of it."""
    parallel = vllm_config.parallel_config
    shares = parallel.tensor_parallel_size if parallel.use_sequence_parallel_moe else 1
    return start.share(vllm_config.scheduler_config.max_num_batched_tokens, shares)


def read_launch(vllm_config: Any) -> Launch:
    """`Launch` of a VllmConfig, complete or still under construction."""
    from vllm.platforms import current_platform

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    limit = vllm_config.scheduler_config.max_num_batched_tokens
    return Launch(
        expert_parallel=parallel.enable_expert_parallel,
        data_parallel=parallel.data_parallel_size,
        tensor_parallel=parallel.tensor_parallel_size,
        context_parallel=parallel.prefill_context_parallel_size,
        is_moe=None if model is None else bool(model.is_moe),
        device=current_platform.device_type,
        max_tokens_per_rank=None if limit is None else max_tokens_per_rank(vllm_config),
        ubatches=max(1, parallel.num_ubatches),
        elastic=parallel.enable_elastic_ep,
        fault_tolerance=getattr(parallel, "enable_fault_tolerance", False),
        lora=vllm_config.lora_config is not None,
    )


def refusal(launch: Launch) -> str | None:
    """Why this engine cannot run with ep_backend and what to use instead, or None."""
    if not launch.calls_all_to_all:
        return None
    if launch.device not in ("cpu", "cuda"):
        return (
            f"ep_backend serves on CPUs and NVIDIA GPUs and this engine runs on {launch.device}: "
            "use --all2all-backend allgather_reducescatter."
        )
    if launch.ubatches > 2 or (launch.ubatches > 1 and launch.device == "cpu"):
        return (
            "ep_backend overlaps two batches, on GPUs: use --enable-dbo without --ubatch-size there, and "
            "neither on a CPU."
        )
    if launch.elastic:
        return "ep_backend does not support elastic expert parallelism: start without --enable-elastic-ep."
    if launch.fault_tolerance:
        return "ep_backend does not support vLLM's fault tolerance: start without --enable-fault-tolerance."
    if launch.context_parallel > 1:
        return (
            "ep_backend does not support prefill context parallelism: start with "
            "--prefill-context-parallel-size 1, or use --all2all-backend allgather_reducescatter."
        )
    if launch.lora:
        return (
            "ep_backend does not support LoRA on MoE models: use --all2all-backend allgather_reducescatter."
        )
    return start.capacity_refusal(
        launch.max_tokens_per_rank, f"add --max-num-batched-tokens {MAX_TOKENS_PER_RANK}"
    )


def unused_note(launch: Launch) -> str | None:
    """One line, with what to add, for a launch that selects ep_backend but never calls it; else None."""
    if launch.calls_all_to_all:
        return None
    if launch.is_moe is False:
        return "--all2all-backend ep_backend has no effect: this model has no experts to spread over ranks."
    add = []
    if not launch.expert_parallel:
        add.append("--enable-expert-parallel")
    if launch.data_parallel == 1:
        add.append("--data-parallel-size N (2 or more; without it every rank already has every token)")
    return f"--all2all-backend ep_backend has no effect with these options: add {' and '.join(add)}."


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises ValueError with the sentence of `refusal`, or with the wrong value of a variable."""
    start.raise_first([refusal(read_launch(vllm_config))])


def announce(vllm_config: Any) -> None:
    """Refuse what became known only now, then say once per process what the user should know."""
    refuse_unsupported(vllm_config)
    launch = read_launch(vllm_config)
    if launch.is_moe is not None:
        _announce_once(launch)


@functools.cache
def _announce_once(launch: Launch) -> None:
    import vllm

    version = start.version_note("vLLM", vllm.__version__, TESTED_VERSIONS)
    for note in (version, unused_note(launch), *env.misspelt()):
        if start.is_first_process() and note is not None:
            logger.warning(note)
    if launch.calls_all_to_all:
        start.apply_profile(launch.device, logger)
