"""benchmarks/deepep.py on CPUs."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "deepep.py"
SHAPE = "--device cpu --ranks 2 --hidden 256 --experts 4 --topk 2 --tokens 9 --low-latency-tokens 3 --iters 4"
# In the processes of the ranks, too: they run what stands at the top of the file.
SPOILT = """
from ep_backend.compat.deep_ep import Buffer

class Spoilt(Buffer):
    def dispatch(self, x, handle=None, **more):
        result = super().dispatch(x, handle, **more)
        rows = result[0] if torch.is_tensor(result[0]) else result[0][0]
        if handle is not None:
            rows.view(torch.uint8)[:1, :1] += 1
        return result

    def low_latency_combine(self, *args, out, **more):
        result = super().low_latency_combine(*args, out=out, **more)
        out[:1] *= 1.1
        return result

sys.modules["ep_backend.compat.deep_ep"].Buffer = Spoilt
OURS"""


def run(script, file):
    done = subprocess.run(
        [sys.executable, script, *SHAPE.split(), "--json", file], capture_output=True, text=True, timeout=120
    )
    return done, json.loads(file.read_text())


def test_it_measures_every_case(tmp_path):
    done, document = run(SCRIPT, tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    assert {"machine", "versions", "command", "date", "settings"} <= set(document)
    trips = [each for each in document["results"] if each["phase"] == "round_trip"]
    assert {(each["mode"], each["dtype"], each["tokens"]) for each in trips} == {
        (mode, dtype, tokens)
        for mode, tokens in (("normal", 9), ("low latency", 3))
        for dtype in ("bf16", "fp8")
    }
    assert all(each["correct"] and each["median_us"] > 0 for each in document["results"])


def test_a_wrong_result_is_noticed(tmp_path):
    spoilt = tmp_path / "spoilt.py"
    spoilt.write_text(SCRIPT.read_text().replace("\nOURS", SPOILT, 1))
    done, document = run(spoilt, tmp_path / "results.json")
    assert done.returncode == 1
    assert not any(each["correct"] for each in document["results"])
