"""What is the same for every engine: how to serve, what the client sends, and a server that runs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_backend.bench.engines import trace
from ep_backend.errors import EpConfigError
from ep_backend.launch.server import Session, free_port, open_local, wait_until_healthy

METRICS = ("ttft", "tpot", "itl")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How to serve. Lengths are in tokens, times in seconds; port 0 means any free one."""

    model: Path
    backend: str
    device: str  # "cpu" | "cuda"
    data_parallel_size: int = 2
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
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

    @property
    def ranks(self) -> int:
        """One GPU each, on GPUs."""
        return self.data_parallel_size * self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the client sends: random prompts of `input_len` tokens, each answered with `output_len` tokens."""

    concurrency: int
    num_prompts: int
    input_len: int
    output_len: int
    request_rate: float = float("inf")  # requests per second
    seed: int = 0


TENSOR, PIPELINE = "tensor_parallel", "pipeline_parallel"
WITHOUT_EXPERT_PARALLELISM = (TENSOR, PIPELINE)
"""What may be compared with all-to-all backends: as many ranks, none of which has requests of its own."""


def parallelism(backend: str, data_parallel_size: int, tensor_parallel_size: int) -> dict[str, Any]:
    """How `Serving` divides the model. Without expert parallelism the data-parallel ranks are tensor-parallel
    ones, or the stages of a pipeline; EpConfigError if that would have one stage."""
    data, tensor, stages = data_parallel_size, tensor_parallel_size, 1
    if backend == TENSOR:
        data, tensor = 1, data * tensor
    elif backend == PIPELINE:
        if data == 1:
            raise EpConfigError(f"{PIPELINE} makes --data-parallel-size stages: 2 or more were wanted, not 1")
        data, stages = 1, data
    return {
        "data_parallel_size": data,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": stages,
        "expert_parallel": backend not in WITHOUT_EXPERT_PARALLELISM,
    }


def check_gpus(gpus: int, data_parallel_size: int, tensor_parallel_size: int, or_else: str = "") -> None:
    """EpConfigError, with the sizes that fit, if `gpus` are fewer than the ranks. ``or_else``: what to do if
    there are none."""
    wanted = data_parallel_size * tensor_parallel_size
    if gpus >= wanted:
        return
    if gpus == 0:
        remedy = f"look at nvidia-smi and CUDA_VISIBLE_DEVICES{or_else}"
    elif gpus < tensor_parallel_size:
        remedy = f"--tensor-parallel-size {gpus} --data-parallel-size 1 fits"
    else:
        beside = f" beside --tensor-parallel-size {tensor_parallel_size}" if tensor_parallel_size > 1 else ""
        remedy = f"--data-parallel-size {gpus // tensor_parallel_size} fits{beside}"
    raise EpConfigError(f"{wanted} GPUs are needed, one per rank, and there are {gpus}: {remedy}")


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of Python and of those distributions that are installed here."""
    found = {name: importlib.metadata.version(name) for name in names if installed(name)}
    return {"python": platform.python_version(), **found}


def gpus(device: str) -> list[str]:
    """Names of the GPUs that ranks may use. To be called when no server runs: it takes memory of one."""
    if device == "cpu":
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def installed(distribution: str) -> bool:
    return any(importlib.metadata.distributions(name=distribution))


def check_plugin(engine: str, group: str, allow_list: str) -> None:
    """EpConfigError, with what to do, if ``engine`` would not find ep_backend among its plug-ins ``group``,
    or its variable ``allow_list`` leaves it out."""
    if "ep_backend" not in [entry.name for entry in importlib.metadata.entry_points(group=group)]:
        raise EpConfigError(
            f"{engine} would not find ep_backend: install the ep-backend wheel in this Python environment"
        )
    allowed = os.environ.get(allow_list)
    if allowed is not None and "ep_backend" not in [name.strip() for name in allowed.split(",")]:
        raise EpConfigError(
            f"{allow_list}={allowed} keeps {engine} from loading ep_backend: add it there, or unset the "
            "variable"
        )


def environment(serving: Serving, defaults: dict[str, str]) -> dict[str, str]:
    """The caller's environment, with ``defaults`` where the caller has set nothing."""
    # The client asks a server on this machine; a proxy is for others.
    no_proxy = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    proxies = {"no_proxy": no_proxy, "NO_PROXY": no_proxy}
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    return {**offline, **defaults, **os.environ, **proxies, **dict(serving.environ)}


def latencies(saved: dict[str, Any]) -> dict[str, Any]:
    """Medians and 99th percentiles in ms, as both engines' clients name them."""
    return {
        f"{metric}_{part}_ms": saved[f"{part}_{metric}_ms"]
        for metric in METRICS
        for part in ("median", "p99")
    }


class Server(ABC):
    """A served model. Use as a context manager; leaving it ends every process of the engine."""

    engine: str
    """As it is written in sentences."""

    def __init__(self, serving: Serving, folder: Path, progress: Callable[[str], None]) -> None:
        self.serving = serving
        self.port = serving.port or self.choose_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._progress = progress
        self._clients = 0
        # Engines leave files between their processes behind.
        self._scratch = tempfile.TemporaryDirectory(prefix="ep-backend-")
        self.session = Session(
            self.serve_command(), self.serve_environment(Path(self._scratch.name)), folder / "server.log"
        )

    @staticmethod
    def choose_port() -> int:
        """Where to serve: free now."""
        return free_port()

    @abstractmethod
    def serve_command(self) -> list[str]: ...
    @abstractmethod
    def serve_environment(self, scratch: Path) -> dict[str, str]:
        """``scratch``: a folder that lives as long as the server."""

    @abstractmethod
    def client_command(self, load: Load, result: Path, profile: bool) -> list[str]:
        """The engine's own benchmark client, which writes ``result``; ``profile``: traces decode steps."""

    @abstractmethod
    def client_environment(self) -> dict[str, str]: ...
    @abstractmethod
    def read_result(self, text: str, load: Load) -> dict[str, Any]:
        """The part of what the client wrote that is reported: times in ms, rates in tokens per second."""

    def __enter__(self) -> Server:
        self._progress(f"starting {self.engine} with {self.serving.backend}; log: {self.session.log}")
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
            self._scratch.cleanup()

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
        written = self._written(folder, before)
        kept = folder / f"at-{load.concurrency}"
        kept.mkdir(parents=True)
        for file in written:
            file.rename(kept / file.name)
        return trace.read(kept)

    def _written(self, folder: Path, before: set[Path]) -> set[Path]:
        """Traces that are new, once their writers are done."""
        return set(folder.glob("**/*.json.gz")) - before

    def measure(self, load: Load, timeout_s: float = 1800, *, profile: bool = False) -> dict[str, Any]:
        """Run the engine's benchmark client once; see `read_result`. ServerError if a request fails."""
        self._clients += 1
        log = self._folder / f"client-{self._clients}.log"
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            with Session(
                self.client_command(load, result, profile), self.client_environment(), log
            ) as client:
                status = client.wait(timeout_s)
                if status != 0 or not result.exists():
                    raise client.error(f"the benchmark client ended with status {status}")
            measured = self.read_result(result.read_text(), load)
        if measured["failed"] or measured["completed"] != load.num_prompts:
            raise self.session.error(f"only {measured['completed']} of {load.num_prompts} requests succeeded")
        return measured
