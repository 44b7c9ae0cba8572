"""`ep-backend bench-engine` without an engine: processes are ended, commands and numbers are right."""

import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from ep_backend.bench import engine
from ep_backend.bench.engines import process, vllm
from ep_backend.bench.engines.process import ServerError, Session
from ep_backend.errors import EpConfigError

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
    monkeypatch.setattr(process, "TERM_GRACE_S", 1.0)
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
        process.wait_until_healthy(session, "http://127.0.0.1:9/health", 30, print)


def test_a_server_that_is_never_ready_is_reported_in_time(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    port = process.free_port()
    begin = time.monotonic()
    with (
        Session(command, os.environ, tmp_path / "log") as session,
        pytest.raises(ServerError, match="not ready after 1 s"),
    ):
        process.wait_until_healthy(session, f"http://127.0.0.1:{port}/health", 1, print)
    assert time.monotonic() - begin < 30


def test_ready_is_a_200(tmp_path):
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
        process.wait_until_healthy(session, f"http://127.0.0.1:{server.server_port}/health", 30, print)
    server.shutdown()
    assert answers == []


def test_sigterm_to_the_bench_stops_its_servers(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from ep_backend.bench.terminable import terminable\n"
        "from ep_backend.bench.engines.process import Session\n"
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


def test_the_command_serves_two_ranks_with_expert_parallelism():
    command = vllm.serve_command(vllm.Serving(model=Path("m"), backend="ep_backend", device="cpu"), 8000)
    text = " ".join(command)
    assert "--data-parallel-size 2" in text
    assert "--enable-expert-parallel --all2all-backend ep_backend" in text
    alone = vllm.Serving(
        model=Path("m"), backend="x", device="cpu", data_parallel_size=1, expert_parallel=False
    )
    assert "--all2all-backend" not in vllm.serve_command(alone, 8000)


def test_what_the_caller_has_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    serving = vllm.Serving(model=Path("m"), backend="ep_backend", device="cpu", environ=(("A", "b"),))
    environ = vllm.serve_environment(serving)
    assert environ["OMP_NUM_THREADS"] == "7"
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert environ["A"] == "b"


def test_an_allow_list_without_us_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EpConfigError, match="VLLM_PLUGINS=other"):
        vllm.check_environment()


def test_the_table_compares_medians_over_rounds_with_the_first_other_backend():
    def row(backend, number, tpot):
        measured = dict.fromkeys(engine.METRICS, 1.0) | {"tpot_median_ms": tpot}
        return {"backend": backend, "round": number, "concurrency": 4, **measured}

    results = [row("ep_backend", n, tpot) for n, tpot in enumerate((10.0, 30.0, 20.0))]
    results += [row("stock", n, tpot) for n, tpot in enumerate((40.0, 40.0, 90.0))]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(engine._table(results, ["ep_backend", "stock"], "title"))
    lines = console.export_text().splitlines()
    (ours,) = (line for line in lines if "ep_backend" in line)
    (stock,) = (line for line in lines if "│ stock" in line)
    assert ours.rstrip(" │").endswith("0.50")
    assert "20.0" in ours
    assert stock.rstrip(" │").endswith("1.00")


def test_a_folder_without_a_model_is_refused(tmp_path):
    from ep_backend.cli import main

    assert main(["bench-engine", "--model", str(tmp_path)]) == 1
