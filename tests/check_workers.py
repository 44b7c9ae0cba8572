"""Made-up workers of the checks of peer access, and the GPUs that they speak of."""

import itertools
import os
import sys

from ep_backend import checks
from ep_backend.checks import supervise
from ep_backend.checks.data import OrderRates
from ep_backend.nvml import Gpu, Link

GPUS = tuple(Gpu(uuid=f"GPU-{name}", bus_id=f"00000000:0{i}:00.0") for i, name in enumerate("abc"))
UUIDS = [gpu.uuid for gpu in GPUS]
LINKS = tuple(Link(a=a, b=b, nvlink=False, ancestor="PHB") for a, b in itertools.combinations(UUIDS, 2))
PAIRS = list(itertools.permutations(UUIDS, 2))
FABRIC = Gpu(uuid="GPU-a", fabric_state="completed", fabric_cluster="1234")

# What every fake worker begins with. ``out``: one line; ``good``: what a healthy direction gives.
PREAMBLE = """
import json, os, signal, sys, time
request = json.loads(sys.argv[-1])
def out(**line):
    print(json.dumps(line), flush=True)
def begin(pair):
    out(type="begin", source=pair[0], target=pair[1])
def good(pair):
    begin(pair)
    out(type="done", direction={"source": pair[0], "target": pair[1], "access": True, "works": True,
                                "store_bytes_per_s": 5e10, "latency_s": 1e-6})
pairs = [tuple(pair) for pair in request["pairs"]]
"""
PAIRS_FINE = """
for pair in pairs: good(pair)
for gpu in request["fabric"]: out(type="fabric", gpu=gpu, works=True)
"""
FINE = (
    PAIRS_FINE
    + """
if request["order"]:
    begin(("", ""))
    out(type="order", rates={**request["order"], "together_bytes_per_s": 4e9,
                             "staggered_bytes_per_s": 1e10})
"""
)
ORDER = OrderRates(gpus=tuple(UUIDS))
MEASURED = OrderRates(gpus=tuple(UUIDS), together_bytes_per_s=4e9, staggered_bytes_per_s=1e10)


def fake(body):
    return (sys.executable, "-c", PREAMBLE + body)


def run(body, pairs=PAIRS, fabric=(), order=None, deadline_s=30.0, answer_s=2.0, start_s=10.0, environ=None):
    return supervise.run(
        UUIDS, pairs, fabric, order=order, environ=dict(os.environ) if environ is None else environ,
        deadline_s=deadline_s, answer_s=answer_s, start_s=start_s, command=fake(body),
    )  # fmt: skip


def counted_results(monkeypatch, tmp_path):
    """`checks.results` with a fake worker that counts how often it is started."""
    starts = tmp_path / "starts"
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    state = {"body": FINE}

    real = supervise.run

    def counted(*arguments, **more):
        with open(starts, "a") as file:
            file.write("x")
        return real(*arguments, **more, answer_s=0.5, command=fake(state["body"]))

    monkeypatch.setattr(supervise, "run", counted)

    def results(gpus=GPUS, links=LINKS, driver="580", boot_id="boot", body=FINE, **more):
        state["body"] = body
        before = starts.stat().st_size if starts.exists() else 0
        found = checks.results(gpus, links, driver, boot_id, **{"environ": environ, "deadline_s": 20, **more})
        return found, (starts.stat().st_size if starts.exists() else 0) - before

    results.folder = tmp_path / "cache" / "ep_backend"
    results.environ = environ
    return results
