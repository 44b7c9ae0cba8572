"""SGLang: the command that serves a model, and SGLang's own benchmark client."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ep_backend.bench.engines import base
from ep_backend.bench.engines.base import Load, Serving, installed
from ep_backend.errors import EpConfigError
from ep_backend.launch.server import is_free

__all__ = ["DISTRIBUTIONS", "Load", "Server", "Serving"]
TRACED_STEPS = 24
TRACES_WITHIN_S = 120.0  # of the end of the client; SGLang's ranks write their traces while they serve on
DISTRIBUTIONS = ("ep-backend", "sglang", "sglang-kernel", "torch", "transformers")
"""What takes part in a measurement."""
DERIVED_PORTS = (0, 1, *range(233, 240))
"""Beside --port: one for NCCL, and those that SGLang takes for data-parallel attention whether or not they
are free."""
FIRST_PORT, PORT_BLOCKS, PORT_BLOCK = 2000, 600, 20
"""Below what systems give to programs that ask for any port. Two blocks never share a derived port."""


def check_environment() -> None:
    """EpConfigError, with what to do, if this Python has no SGLang or SGLang would not find ep_backend."""
    if not installed("sglang"):
        raise EpConfigError("this Python has no SGLang: pip install 'ep-backend[sglang]'")
    if sys.version_info < (3, 11):
        raise EpConfigError("bench-engine starts SGLang with Python 3.11 or newer")
    base.check_plugin("SGLang", "sglang.srt.plugins", "SGLANG_PLUGINS")


def choose_device(data_parallel_size: int, tensor_parallel_size: int = 1) -> str:
    """Returns "cuda". EpConfigError if there are too few GPUs."""
    import torch

    base.check_gpus(torch.cuda.device_count(), data_parallel_size, tensor_parallel_size)
    return "cuda"


def serve_command(serving: Serving, port: int) -> list[str]:
    """``data_parallel_size`` groups that attend to different tokens, on one rank per GPU; or stages of a
    pipeline."""
    ranks = serving.data_parallel_size * serving.tensor_parallel_size  # of a stage
    # -P: or Python would look for ep_backend in the current folder first, perhaps a checkout.
    command = [sys.executable, "-P", "-m", "sglang.launch_server", "--model-path", str(serving.model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--nccl-port", str(port + 1)]
    command += ["--tp-size", str(ranks)]
    if serving.data_parallel_size > 1:
        command += ["--dp-size", str(serving.data_parallel_size), "--enable-dp-attention"]
    if serving.pipeline_parallel_size > 1:
        command += ["--pp-size", str(serving.pipeline_parallel_size)]
    if serving.expert_parallel:
        command += ["--ep-size", str(ranks), "--moe-a2a-backend", serving.backend]
    command += ["--dtype", serving.dtype]
    if serving.dummy_weights:
        command += ["--load-format", "dummy"]
    if serving.max_model_len is not None:
        command += ["--context-length", str(serving.max_model_len)]
    if serving.max_num_seqs is not None:
        # SGLang divides it by the data-parallel groups.
        command += ["--max-running-requests", str(serving.max_num_seqs * serving.data_parallel_size)]
    return [*command, *serving.extra]


def serve_environment(serving: Serving) -> dict[str, str]:
    """The caller's environment, with what an offline run needs where the caller has set nothing."""
    return base.environment(serving, {})


class Server(base.Server):
    """A model that SGLang serves."""

    engine = "SGLang"

    @staticmethod
    def choose_port() -> int:
        """The first of a block of ports that are free now; programs that start servers at the same moment
        begin at different blocks."""
        begin = os.getpid()
        for block in range(begin, begin + PORT_BLOCKS):
            port = FIRST_PORT + PORT_BLOCK * (block % PORT_BLOCKS)
            if all(is_free(port + offset) for offset in DERIVED_PORTS):
                return port
        raise EpConfigError("no ports are free for a server: see `ss -lnt`, or give one with --port")

    def serve_command(self) -> list[str]:
        return serve_command(self.serving, self.port)

    def serve_environment(self, scratch: Path) -> dict[str, str]:
        return serve_environment(self.serving)

    def client_environment(self) -> dict[str, str]:
        return serve_environment(self.serving)

    def client_command(self, load: Load, result: Path, profile: bool) -> list[str]:
        # Ids instead of text: a prompt has exactly the length that was asked for. With the same seed a later
        # measurement sends the same prompts, which must not be found in the prefix cache.
        command = [
            sys.executable, "-P", "-m", "sglang.benchmark.serving", "--backend", "sglang",
            "--base-url", self.url, "--model", str(self.serving.model), "--dataset-name", "random-ids",
            "--tokenize-prompt", "--random-range-ratio", "1.0",
            "--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len),
            "--num-prompts", str(load.num_prompts), "--max-concurrency", str(load.concurrency),
            "--request-rate", str(load.request_rate),
            "--warmup-requests", str(min(load.concurrency, load.num_prompts)),
            "--seed", str(load.seed), "--temperature", "0", "--flush-cache", "--disable-tqdm",
            "--output-file", str(result),
        ]  # fmt: skip
        if profile:
            assert self.serving.trace_folder is not None
            command += ["--profile", "--profile-by-stage", "--profile-stages", "decode"]
            command += ["--profile-num-steps", str(TRACED_STEPS)]
            command += ["--profile-output-dir", str(self.serving.trace_folder.resolve())]
        return command

    def read_result(self, text: str, load: Load) -> dict[str, Any]:
        """The client appends a line per run and does not count failures."""
        saved = json.loads(text.splitlines()[-1])
        return {
            "completed": saved["completed"],
            "failed": load.num_prompts - saved["completed"],
            "duration_s": saved["duration"],
            "output_tokens_per_s": saved["output_throughput"],
            **base.latencies(saved),
        }

    def _written(self, folder: Path, before: set[Path]) -> set[Path]:
        """The traces of all ranks, or those that are there when the time is over; whole ones only."""
        deadline = time.monotonic() + TRACES_WITHIN_S
        sizes: dict[Path, int] = {}
        while time.monotonic() < deadline:
            found = super()._written(folder, before)
            now = {file: file.stat().st_size for file in found}
            if len(found) >= self.serving.ranks and now == sizes:
                break
            sizes = now
            time.sleep(2)
        return super()._written(folder, before)
