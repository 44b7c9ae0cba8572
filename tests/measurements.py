"""What was measured on H200 and CPUs and is kept (benchmarks/results), for tests of expectations."""

import json
from pathlib import Path

import msgspec

from ep_backend.doctor import report, shapes
from ep_backend.doctor.plan import Shape
from ep_backend.doctor.warmup import WarmUp
from ep_backend.planning.model import of_registry
from ep_backend.probe import Record

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
WITHIN = 0.3
DEFAULT_SHAPES = [of_registry(shape) for shape in shapes.DEFAULT]
MEASURED = Shape(name="measured", hidden=7168, experts=256, topk=8)


def shape_of(document):
    of = document.get("settings", {})
    defaults = {"hidden": MEASURED.hidden, "experts": MEASURED.experts, "topk": MEASURED.topk}
    return Shape(name="measured", **{name: of.get(name, value) for name, value in defaults.items()})


def documents(pattern):
    for file in sorted(RESULTS.glob(pattern)):
        yield file.name, json.loads(file.read_text())


def ranks_of(document):
    return document.get("settings", {}).get("ranks") or document["machine"]["gpus"]


def round_trips(pattern, transport):
    """File, shape, ranks, tokens, dtype, SMs (None: all) and microseconds."""
    for name, document in documents(pattern):
        for one in document["results"]:
            if one["transport"] == transport and one["phase"] == "round_trip":
                yield (
                    name,
                    shape_of(document),
                    ranks_of(document),
                    one["tokens"],
                    one["dtype"],
                    one.get("num_sms"),
                    one["median_us"],
                )


def host_cases():
    yield from round_trips("host-2h200*.json", "host")


def peer_cases():
    yield from round_trips("peer-*.json", "peer")
    for name, document in documents("kernels-h200x4-*.json"):
        shape = Shape(
            name="measured",
            hidden=document["hidden"],
            experts=document["experts"],
            topk=document["top_k"],
        )
        for one in document["processes_4"] + document["one_process_4_gpus"]:
            yield name, shape, 4, one["T"], "fp8" if one["quant"] else "bf16", one["blocks"], one["us"]


def nccl_times(name):
    """Microseconds of plain collectives, bf16, by number of tokens and phase."""
    return {
        (one["tokens"], one["phase"]): one["median_us"]
        for one in json.loads((RESULTS / name).read_text())["results"]
        if one["transport"].startswith(("nccl", "baseline")) and one["dtype"] == "bf16"
    }


def single_calls(times, tokens):
    """The same, of all-gathers and reduce-scatter one by one."""
    return times[tokens, "dispatch"] + times[tokens, "combine"]


def kept_report(name):
    """What doctor says now of a machine that it looked at then."""
    document = json.loads((RESULTS / name).read_text())
    record = msgspec.convert(document["machine"], Record)
    decision, undecided = report.choose(record)
    return report.examine(
        record,
        decision,
        undecided,
        msgspec.convert(document["warm_up"], WarmUp),
        DEFAULT_SHAPES,
        shapes.TOKENS,
        document["ranks"],
        environ=record.environment,
        versions=document["software"],
        copy_bytes_per_s=document.get("copy_bytes_per_s"),
    )
