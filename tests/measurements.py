"""What was measured on H200 and CPUs and is kept (benchmarks/results), for tests of expectations."""

import json
from pathlib import Path

from ep_backend.doctor.plan import Shape

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
WITHIN = 0.3
MEASURED = Shape(name="measured", hidden=7168, experts=256, topk=8)


def shape_of(document):
    of = document.get("settings", {})
    defaults = {"hidden": MEASURED.hidden, "experts": MEASURED.experts, "topk": MEASURED.topk}
    return Shape(name="measured", **{name: of.get(name, value) for name, value in defaults.items()})


def documents(pattern):
    for file in sorted(RESULTS.glob(pattern)):
        yield file.name, json.loads(file.read_text())


def peer_cases():
    for name, document in documents("peer-*.json"):
        ranks = document.get("settings", {}).get("ranks") or document["machine"]["gpus"]
        for one in document["results"]:
            if one["transport"] == "peer" and one["phase"] == "round_trip":
                yield (
                    name,
                    shape_of(document),
                    ranks,
                    one["tokens"],
                    one["dtype"],
                    one.get("num_sms"),
                    one["median_us"],
                )
    for name, document in documents("kernels-h200x4-*.json"):
        shape = Shape(
            name="measured",
            hidden=document["hidden"],
            experts=document["experts"],
            topk=document["top_k"],
        )
        for one in document["processes_4"] + document["one_process_4_gpus"]:
            yield name, shape, 4, one["T"], "fp8" if one["quant"] else "bf16", one["blocks"], one["us"]
