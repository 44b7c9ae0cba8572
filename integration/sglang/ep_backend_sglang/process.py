"""This process' communicators: made once, while the model is built, and shared by all of its MoE layers."""

import logging

import torch
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.moe.utils import is_tbo_enabled
from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule

from ep_backend import env
from ep_backend.engines.pool import Communicators
from ep_backend.engines.start import capacity_refusal, raise_first

from .start import INSTEAD, lower_chunk, rows_per_rank

logger = logging.getLogger("sglang.ep_backend")

_communicators: Communicators | None = None


def communicators() -> Communicators:
    """Over the tensor-parallel group, which holds all experts, in order of rank."""
    global _communicators
    if _communicators is None:
        group = get_tp_group()
        _communicators = Communicators(
            group.cpu_group,
            group.device,
            captures=group.device.type == "cuda" and captures_graphs(),
            without_graphs=f"add --disable-cuda-graph, {INSTEAD}",
            log=logger,
        )
    return _communicators


def captures_graphs() -> bool:
    """Whether decode steps, or any others, are captured as CUDA graphs."""
    config = get_exec().graph.cuda_graph_config
    return any(phase.backend != "disabled" for phase in (config.decode, config.prefill))


def has_copies_of_experts() -> bool:
    """Whether physical experts are others than the router's (EPLB)."""
    moe = get_exec().moe
    placed = moe.init_expert_location not in (None, "trivial")
    return bool(moe.enable_eplb or moe.ep_num_redundant_experts or placed)


def num_channels() -> int:
    """Exchanges that may be open at once: one per half of a batch."""
    return 2 if is_tbo_enabled() else 1


def most_rows() -> int:
    """Most rows that a rank brings to an exchange, by the server's options. ValueError if too many."""
    schedule, parallel = get_schedule(), get_parallel()
    chunked = schedule.chunked_prefill_size
    if not chunked or chunked < 0:
        raise ValueError("ep_backend needs chunked prefill: add --chunked-prefill-size 8192.")
    rows = rows_per_rank(chunked, schedule.max_running_requests, parallel.attn_dp_size, parallel.attn_tp_size)
    raise_first([capacity_refusal(rows, lower_chunk(chunked))])
    return rows


def serving() -> None:
    """Collective: the model is loaded and its graphs are captured.

    SGLang compiles kernels while it serves, seconds each and minutes for DeepGEMM, and a rank may need one
    long after the others: the long deadline stays unless EP_BACKEND_TIMEOUT_S asks for another.
    """
    if _communicators is not None and env.is_set("EP_BACKEND_TIMEOUT_S"):
        _communicators.engine_is_ready()


def check() -> None:
    """Raises the EpError that stopped an exchange, if one did."""
    if _communicators is not None:
        _communicators.check()


def device() -> torch.device:
    """Where rows live."""
    return communicators().device
