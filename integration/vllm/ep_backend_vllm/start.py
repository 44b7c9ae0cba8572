"""What is decided once, when an engine's configuration is complete: refuse, warn, set the environment.

The decisions are pure functions of `Launch`, so that every sentence can be tested without an engine.
"""

import functools
import multiprocessing
import os
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from . import TESTED_VERSIONS

logger = init_logger("vllm.ep_backend")


MAX_TOKENS_PER_RANK = 16384
"""Upper bound of EpConfig.max_tokens_per_rank."""


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
    return -(-vllm_config.scheduler_config.max_num_batched_tokens // shares)


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
    tokens = launch.max_tokens_per_rank
    if tokens is not None and tokens > MAX_TOKENS_PER_RANK:
        return (
            f"ep_backend exchanges at most {MAX_TOKENS_PER_RANK} tokens per rank and step, this engine may "
            f"schedule {tokens}: add --max-num-batched-tokens {MAX_TOKENS_PER_RANK}."
        )
    return None


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


def version_note(version: str) -> str | None:
    """A warning if `version` of vLLM is outside the tested range; None inside it or if it cannot be read."""
    try:
        minor = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return None
    first, last = (tuple(int(part) for part in tested.split(".")) for tested in TESTED_VERSIONS)
    if first <= minor <= last:
        return None
    return (
        f"ep_backend was tested with vLLM {' to '.join(TESTED_VERSIONS)}, this is {version}. "
        "It is tried all the same."
    )


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises ValueError with the sentence of `refusal`, or with the wrong value of a variable."""
    from ep_backend import env

    reasons = (*env.wrong_values(), refusal(read_launch(vllm_config)))
    for reason in reasons:
        if reason is not None:
            raise ValueError(reason)


def announce(vllm_config: Any) -> None:
    """Refuse what became known only now, then say once per process what the user should know."""
    refuse_unsupported(vllm_config)
    launch = read_launch(vllm_config)
    if launch.is_moe is not None:
        _announce_once(launch)


@functools.cache
def _announce_once(launch: Launch) -> None:
    import vllm

    from ep_backend import env

    for note in (version_note(vllm.__version__), unused_note(launch), *env.misspelt()):
        if _is_first_process() and note is not None:
            logger.warning(note)
    if launch.calls_all_to_all:
        _set_environment(launch.device)


def _is_first_process() -> bool:
    """Of the engine, on this host: the others would only say the same again."""
    return multiprocessing.parent_process() is None


@functools.cache
def _set_environment(device: str) -> None:
    """Apply the machine profile's settings; NCCL has not started anywhere yet.

    The other processes of an engine keep what the first one has set. With fewer GPUs to see they might decide
    otherwise, each for itself. One that did not inherit it decides as the first one would, and says nothing.
    """
    from ep_backend import env
    from ep_backend.probe import probe
    from ep_backend.select import apply_env, decide

    if not _is_first_process() and env.APPLIED in os.environ:
        return
    decision = decide([probe("cpu" if device == "cpu" else None)])
    missing = [f"{item.name}={item.value}" for item in decision.env if item.name not in os.environ]
    conflicts = apply_env(decision)
    if _is_first_process():
        for conflict in conflicts:
            logger.warning("ep_backend: %s", conflict)
        if missing:
            logger.info("ep_backend: profile %s sets %s", decision.profile, " ".join(missing))
