"""`ep-backend bench-engine --engine sglang` without an engine: its commands, and the results it reads."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from ep_backend.bench.engines import base, sglang, summary
from ep_backend.bench.engines.base import Load, Serving
from ep_backend.cli import main
from ep_backend.errors import EpConfigError

LOAD = Load(concurrency=4, num_prompts=16, input_len=64, output_len=32, seed=3)
RESULT = {
    "completed": 16,
    "duration": 2.5,
    "output_throughput": 204.8,
    **{f"{part}_{metric}_ms": 1.0 for part in ("median", "p99") for metric in ("ttft", "tpot", "itl")},
    "median_tpot_ms": 4.25,
    "p99_itl_ms": 9.5,
}


def serve_text(**options):
    serving = Serving(model=Path("m"), **{"backend": "ep_backend", "device": "cuda", **options})
    return " ".join(sglang.serve_command(serving, 8000)) + " "


def test_data_parallel_ranks_attend_to_different_tokens():
    text = serve_text()
    assert text.startswith(f"{sys.executable} -P -m sglang.launch_server --model-path m --host 127.0.0.1")
    assert "--tp-size 2 --dp-size 2 --enable-dp-attention --ep-size 2 --moe-a2a-backend ep_backend" in text
    assert "--load-format" not in text


def test_tensor_parallelism_alone_has_no_data_parallel_attention():
    text = serve_text(data_parallel_size=1, tensor_parallel_size=4, backend="none")
    assert "--tp-size 4 --ep-size 4 --moe-a2a-backend none" in text
    assert "--dp-size" not in text
    assert "--tp-size 8 --dp-size 4" in serve_text(data_parallel_size=4, tensor_parallel_size=2)


def test_the_same_ranks_without_expert_parallelism():
    tensor = serve_text(**base.parallelism("tensor_parallel", 2, 2), backend="tensor_parallel")
    assert "--tp-size 4 --dtype" in tensor
    stages = serve_text(**base.parallelism("pipeline_parallel", 2, 2), backend="pipeline_parallel")
    assert "--tp-size 2 --pp-size 2 --dtype" in stages


def test_limits_weights_and_other_arguments_are_passed_on():
    text = serve_text(dummy_weights=True, max_model_len=512, max_num_seqs=64, extra=("--mem-fraction", "0.8"))
    assert "--load-format dummy --context-length 512 --max-running-requests 128 --mem-fraction 0.8 " in text


def test_servers_that_start_at_the_same_moment_share_no_port(tmp_path, monkeypatch):
    serving, taken = Serving(model=Path("m"), backend="none", device="cuda"), []
    monkeypatch.setattr(sglang, "is_free", lambda port: port not in taken)
    for process in (5, 6, 5, 5 + sglang.PORT_BLOCKS):
        monkeypatch.setattr(sglang.os, "getpid", lambda process=process: process)
        port = sglang.Server(serving, tmp_path, print).port
        assert f"--port {port} --nccl-port {port + 1} " in " ".join(sglang.serve_command(serving, port))
        taken += [port + offset for offset in sglang.DERIVED_PORTS]
    assert len(set(taken)) == len(taken) == 4 * len(sglang.DERIVED_PORTS)
    assert max(taken) < 16000
    monkeypatch.setattr(sglang, "is_free", lambda port: False)
    with pytest.raises(EpConfigError, match="--port"):
        sglang.Server(serving, tmp_path, print)


@pytest.fixture
def server(tmp_path):
    serving = Serving(
        model=Path("m"), backend="none", device="cuda", trace_folder=tmp_path / "traces", port=7
    )
    return sglang.Server(serving, tmp_path, print)


def test_the_client_sends_prompts_of_exact_length_to_an_empty_cache(server, tmp_path):
    text = " ".join(server.client_command(LOAD, tmp_path / "r", profile=False))
    assert "-m sglang.benchmark.serving --backend sglang --base-url http://127.0.0.1:7 --model m" in text
    assert "--dataset-name random-ids --tokenize-prompt --random-range-ratio 1.0" in text
    assert "--random-input-len 64 --random-output-len 32 --num-prompts 16 --max-concurrency 4" in text
    assert "--warmup-requests 4 --seed 3 --temperature 0 --flush-cache" in text
    assert text.endswith(f"--output-file {tmp_path / 'r'}")
    assert "--profile" not in text


def test_decode_steps_are_traced(server, tmp_path):
    text = " ".join(server.client_command(LOAD, tmp_path / "r", profile=True))
    assert "--profile --profile-by-stage --profile-stages decode --profile-num-steps 24" in text
    assert text.endswith(f"--profile-output-dir {tmp_path / 'traces'}")


def test_traces_are_taken_when_every_rank_s_is_whole(server, tmp_path, monkeypatch):
    folder, sleeps = tmp_path / "traces", []
    folder.mkdir()
    old = folder / "old.json.gz"
    old.touch()

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) <= 3:
            with (folder / f"TP-{len(sleeps) % 2}.json.gz").open("ab") as file:
                file.write(b"x")

    monkeypatch.setattr(sglang.time, "sleep", sleep)
    written = server._written(folder, {old})
    assert {file.name for file in written} == {"TP-0.json.gz", "TP-1.json.gz"}
    assert len(sleeps) == 4, "once more after the last change"


def test_the_last_line_of_the_client_s_file_is_read(server):
    text = "\n".join(json.dumps({**RESULT, "completed": n}) for n in (1, 16)) + "\n"
    assert server.read_result(text, LOAD) == {
        "completed": 16,
        "failed": 0,
        "duration_s": 2.5,
        "output_tokens_per_s": 204.8,
        "ttft_median_ms": 1.0,
        "ttft_p99_ms": 1.0,
        "tpot_median_ms": 4.25,
        "tpot_p99_ms": 1.0,
        "itl_median_ms": 1.0,
        "itl_p99_ms": 9.5,
    }
    assert server.read_result(json.dumps({**RESULT, "completed": 13}), LOAD)["failed"] == 3


def test_stock_is_what_others_are_compared_with():
    assert summary.baseline_of(["ep_backend", "deepep", "none"]) == "none"
    assert summary.baseline_of(["ep_backend", "deepep"]) == "deepep"
    assert summary.baseline_of(["ep_backend"]) is None
    assert summary.baseline_of(["none", "allgather_reducescatter"]) == "allgather_reducescatter"


def installed(monkeypatch, *groups):
    points = [importlib.metadata.EntryPoint("ep_backend", "x:y", group) for group in groups]
    monkeypatch.setattr(sglang, "installed", lambda name: True)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [p for p in points if p.group == group]
    )


def test_an_environment_without_the_plug_in_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12))
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    installed(monkeypatch, "vllm.general_plugins")
    with pytest.raises(EpConfigError, match="SGLang would not find ep_backend"):
        sglang.check_environment()
    installed(monkeypatch, "sglang.srt.plugins")
    sglang.check_environment()
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    with pytest.raises(EpConfigError, match="SGLANG_PLUGINS=other keeps SGLang"):
        sglang.check_environment()
    monkeypatch.setattr(sglang, "installed", lambda name: False)
    with pytest.raises(EpConfigError, match=r"pip install 'ep-backend\[sglang\]'"):
        sglang.check_environment()


def test_too_few_gpus_are_refused_with_what_fits(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert sglang.choose_device(2) == "cuda"
    with pytest.raises(EpConfigError, match="4 GPUs are needed"):
        sglang.choose_device(4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(EpConfigError, match=r"CUDA_VISIBLE_DEVICES$"):
        sglang.choose_device(2)


def test_a_cpu_is_refused_before_anything_starts(capsys):
    command = ["bench-engine", "--engine", "sglang", "--shape", "qwen3-30b-a3b", "--device", "cpu"]
    assert main(command) == 1
    assert "SGLang is measured on GPUs" in capsys.readouterr().err


def test_backends_are_served_in_turn_and_recorded(tmp_path, monkeypatch, capsys):
    served = []

    class Served(sglang.Server):
        def __enter__(self):
            served.append(self.serving)
            return self

        def __exit__(self, *exception):
            pass

        def measure(self, load, timeout_s=0, *, profile=False):
            text = json.dumps({**RESULT, "completed": load.num_prompts, "median_tpot_ms": 2.0 * len(served)})
            return self.read_result(text, load)

    monkeypatch.setattr(sglang, "check_environment", lambda: None)
    monkeypatch.setattr(sglang, "Server", Served)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    json_file = tmp_path / "result.json"
    command = ["bench-engine", "--engine", "sglang", "--shape", "qwen3-30b-a3b,layers=2", "--device", "cuda"]
    command += ["--backends", "ep_backend,none", "--rounds", "2", "--concurrency", "4"]
    assert main([*command, "--json", str(json_file), "--log-dir", str(tmp_path / "logs")]) == 0
    assert [serving.backend for serving in served] == ["ep_backend", "none"] * 2
    document = json.loads(json_file.read_text())
    assert document["engine"] == "sglang"
    assert {result["engine"] for result in document["results"]} == {"sglang"}
    (ratio,) = document["ratios"]
    assert (ratio["backend"], ratio["baseline"]) == ("ep_backend", "none")
    assert ratio["tpot_median_ratio"] == pytest.approx((2 + 6) / (4 + 8))
    shown = capsys.readouterr().out
    assert "0.67" in shown
    assert "2 cuda ranks" in shown
