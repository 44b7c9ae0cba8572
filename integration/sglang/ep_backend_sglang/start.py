"""What is decided once, while SGLang completes its options: refuse, warn, set the environment.

The decisions are pure functions of `Launch`, so that every sentence can be tested without an engine.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

from ep_backend import env
from ep_backend.engines import start
from ep_backend.engines.start import share

from . import TESTED_VERSIONS

logger = logging.getLogger("sglang.ep_backend")

RUNNERS = ("auto", "triton", "deep_gemm")
"""Expert kernels that take local ids, with -1 for experts that live elsewhere."""
MOST_REQUESTS = 4096
"""SGLang's own bound of the requests that one data-parallel rank decodes at once."""
INSTEAD = "or use --moe-a2a-backend none"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The options of a server that matter to us."""

    tensor_parallel: int
    attention_data_parallel: int
    device: str
    runner: str = "auto"
    quantization: str | None = None
    chunked_prefill: int | None = None  # tokens of a data-parallel rank; None: not known yet
    max_requests: int | None = None  # of all data-parallel ranks
    single_batch_overlap: bool = False
    lora: bool = False
    speculative: str | None = None
    pipeline_parallel: int = 1
    context_parallel: int = 1
    moe_data_parallel: int = 1
    elastic: bool = False
    compiled: bool = False
    offloaded: bool = False


def read_launch(view: Any) -> Launch:
    """Of the view on its options that SGLang hands to what completes them."""
    attention = getattr(view, "attn_dp_size", None) or 1
    if attention == 1 and view.enable_dp_attention:
        attention = view.dp_size
    return Launch(
        tensor_parallel=view.tp_size,
        attention_data_parallel=attention,
        device=view.device or "cuda",
        runner=view.moe_runner_backend,
        quantization=view.quantization,
        chunked_prefill=view.chunked_prefill_size,
        max_requests=view.max_running_requests,
        single_batch_overlap=view.enable_single_batch_overlap,
        lora=bool(view.enable_lora or view.lora_paths),
        speculative=view.speculative_algorithm,
        pipeline_parallel=view.pp_size,
        context_parallel=view.attn_cp_size,
        moe_data_parallel=view.moe_dp_size,
        elastic=view.elastic_ep_backend is not None,
        compiled=view.enable_torch_compile,
        offloaded=view.kt_weight_path is not None,
    )


def rows_per_rank(
    chunked_prefill: int,
    max_requests: int | None,
    attention_data_parallel: int,
    attention_tensor_parallel: int,
) -> int:
    """Most rows that one rank brings to one exchange: a chunk of prompts or all requests that are decoded,
    scattered over the ranks that share attention.

    ``chunked_prefill``: tokens of one data-parallel rank. ``max_requests``: of all of them.
    """
    decoded = MOST_REQUESTS
    if max_requests is not None:
        decoded = min(decoded, share(max_requests, attention_data_parallel))
    return share(max(chunked_prefill, decoded), attention_tensor_parallel)


def refusal(launch: Launch) -> str | None:
    """Why this server cannot run with ep_backend and what to use instead, or None."""
    for refused, sentence in _refusals(launch):
        if refused:
            return sentence
    if launch.chunked_prefill is None:
        return None
    rows = rows_per_rank(
        launch.chunked_prefill,
        launch.max_requests,
        launch.attention_data_parallel,
        max(1, launch.tensor_parallel // launch.attention_data_parallel),
    )
    return start.capacity_refusal(rows, lower_chunk(launch.chunked_prefill))


def lower_chunk(chunked_prefill: int) -> str:
    """What to do about too many rows."""
    return f"lower --chunked-prefill-size (now {chunked_prefill} for each data-parallel rank)"


def _refusals(launch: Launch) -> list[tuple[bool, str]]:
    chunked = launch.chunked_prefill
    return [
        (
            launch.device != "cuda",
            f"ep_backend serves SGLang on NVIDIA GPUs and this is --device {launch.device}, whose experts "
            f"cannot leave out those of other ranks: use --device cuda, {INSTEAD}.",
        ),
        (
            launch.runner not in RUNNERS,
            f"ep_backend gives experts the ids of their own rank, which --moe-runner-backend {launch.runner} "
            f"does not take: use --moe-runner-backend triton or deep_gemm, {INSTEAD}.",
        ),
        (
            "fp4" in (launch.quantization or ""),
            f"ep_backend does not send rows for --quantization {launch.quantization} experts: use a bf16 or "
            f"block-fp8 checkpoint, {INSTEAD}.",
        ),
        (
            launch.single_batch_overlap,
            "ep_backend does not support single-batch overlap: start without --enable-single-batch-overlap "
            "(--enable-two-batch-overlap is supported).",
        ),
        (
            launch.lora,
            "ep_backend does not support LoRA on MoE models: start without --enable-lora and --lora-paths, "
            f"{INSTEAD}.",
        ),
        (
            launch.speculative is not None,
            "ep_backend does not support speculative decoding: start without --speculative-algorithm, "
            f"{INSTEAD}.",
        ),
        (
            launch.pipeline_parallel > 1,
            f"ep_backend does not support pipeline parallelism: start with --pp-size 1, {INSTEAD}.",
        ),
        (
            launch.context_parallel > 1,
            "ep_backend does not support context parallelism in attention: start with --attn-cp-size 1, "
            f"{INSTEAD}.",
        ),
        (
            launch.moe_data_parallel > 1,
            "ep_backend spreads the experts over all ranks of --tp-size: start with --moe-dp-size 1, "
            f"{INSTEAD}.",
        ),
        (
            launch.elastic,
            "ep_backend does not support elastic expert parallelism: start without --elastic-ep-backend.",
        ),
        (
            launch.compiled,
            f"ep_backend does not support --enable-torch-compile: start without it, {INSTEAD}.",
        ),
        (
            launch.offloaded,
            f"ep_backend does not support experts on the CPU: start without --kt-weight-path, {INSTEAD}.",
        ),
        (
            chunked is not None and chunked <= 0,
            "ep_backend needs to know how many tokens a prompt's step has at most: add "
            "--chunked-prefill-size 8192.",
        ),
    ]


def unused_note(launch: Launch) -> str | None:
    """One line, with what to add, for a launch in which every expert is on one rank; else None."""
    if launch.tensor_parallel > 1:
        return None
    return (
        "--moe-a2a-backend ep_backend has nobody to exchange rows with: add --tp-size N (2 or more), and "
        "--dp-size N --enable-dp-attention so that ranks attend to different tokens."
    )


def announce(view: Any) -> None:
    """Refuse what cannot work with a ValueError, then say and set once what belongs to the launcher.

    SGLang sets NCCL_CUMEM_ENABLE and NCCL_NVLS_ENABLE to 0 later, where they are unset; the profile comes
    first.
    """
    launch = read_launch(view)
    start.raise_first([refusal(launch)])
    _announce_once(launch)


@functools.cache
def _announce_once(launch: Launch) -> None:
    import sglang

    version = start.version_note("SGLang", sglang.__version__, TESTED_VERSIONS)
    for note in (version, unused_note(launch), *env.misspelt()):
        if note is not None:
            logger.warning(note)
    start.apply_profile(launch.device, logger)


def refuse_layer(quant_method: Any, fused_shared_experts: int) -> str | None:
    """Why a MoE layer cannot run with ep_backend and what to use instead, or None."""
    kind = type(quant_method).__name__
    runner = getattr(getattr(quant_method, "runner", None), "runner_backend", None)
    if fused_shared_experts:
        return (
            "ep_backend does not support shared experts that are fused into the routed ones: add "
            "--disable-shared-experts-fusion."
        )
    plain = kind == "UnquantizedFusedMoEMethod"
    if not plain and list(block_shape(quant_method) or ()) != [128, 128]:
        return (
            "ep_backend serves bf16, fp16 and fp32 experts and fp8 ones with 128x128 scales under SGLang, "
            f"and this model has others ({kind}): use such a checkpoint, {INSTEAD}."
        )
    if runner is None or runner.value not in RUNNERS[1:]:
        chosen = "one of its own" if runner is None else runner.value
        return (
            "ep_backend gives experts the ids of their own rank, and SGLang chose an expert kernel that "
            f"does not take them ({chosen}): add --moe-runner-backend triton or deep_gemm, {INSTEAD}."
        )
    return None


def block_shape(quant_method: Any) -> list[int] | None:
    """Rows and columns of fp8 weights that share a scale; None without such blocks."""
    if type(quant_method).__name__ != "Fp8MoEMethod" or not getattr(quant_method, "block_quant", False):
        return None
    return quant_method.quant_config.weight_block_size
