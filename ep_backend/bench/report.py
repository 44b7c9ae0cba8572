"""What the exchange benchmark says: statistics, the document (docs/benchmarking.md), the table."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

PHASES = ("dispatch", "combine", "round_trip")
TEXT, NUMBER, WHOLE, TRUTH = (str,), (int, float), (int,), (bool,)
DOCUMENT = {"machine": (dict,), "versions": (dict,), "command": TEXT, "results": (list,)}
RESULT = {
    "transport": TEXT,
    "tokens": WHOLE,
    "phase": TEXT,
    "dtype": TEXT,
    "median_us": NUMBER,
    "p99_us": NUMBER,
    "correct": TRUTH,
}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that at least ``share`` (0 to 1) of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def slowest(seconds_of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """For each iteration the time of the slowest rank; one row per rank."""
    return [max(iteration) for iteration in zip(*seconds_of_ranks, strict=True)]


def problems(document: Any) -> list[str]:
    """What is wrong with a document of ``--json``, one sentence each; nothing if it keeps to the schema."""
    if not isinstance(document, dict):
        return ["the document is not an object"]
    found = _fields("the document", document, DOCUMENT)
    results = document.get("results")
    if not isinstance(results, list):
        return found
    found += [] if results else ["results is empty"]
    for number, result in enumerate(results):
        where = f"results[{number}]"
        if not isinstance(result, dict):
            found.append(f"{where} is not an object")
            continue
        wrong = _fields(where, result, RESULT)
        found += wrong
        if wrong:
            continue
        if result["phase"] not in PHASES:
            found.append(f"{where}.phase is {result['phase']!r}; one of {', '.join(PHASES)} was wanted")
        if result["tokens"] < 0:
            found.append(f"{where}.tokens is {result['tokens']}; 0 or more was wanted")
        if not 0 < result["median_us"] <= result["p99_us"]:
            found.append(f"{where}: 0 < median_us <= p99_us was wanted")
    return found


def _fields(where: str, given: Mapping[str, Any], wanted: Mapping[str, tuple[type, ...]]) -> list[str]:
    found = []
    for name, types in wanted.items():
        value = given.get(name)
        # A bool is an int in Python and none in JSON.
        if name not in given:
            found.append(f"{where} has no {name}")
        elif not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            found.append(f"{where}.{name} is {value!r}; {types[-1].__name__} was wanted")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{where}.{name} is {value}; a finite number was wanted")
    return found


def load_average() -> tuple[float, ...]:
    """Processes that wanted to run, over 1, 5 and 15 minutes: more than our ranks means others ran too."""
    return os.getloadavg()


def python_version() -> str:
    return platform.python_version()


def machine(device: str) -> dict[str, Any]:
    """What decides the speed of an exchange on this machine; nothing that names it."""
    model = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    last_level = _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    return {
        "device": device,
        "system": platform.platform(),
        "cpu": model.group(1).strip() if model else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "last_level_cache": last_level or None,
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def label(result: Mapping[str, Any]) -> str:
    """The name of what was measured."""
    sms = result.get("num_sms")
    return result["transport"] + ("" if sms is None else f" {sms} SMs")


def labels(results: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str]:
    """Names that tell ``results`` with the same tokens and phase apart."""
    several = len({result["dtype"] for result in results}) > 1
    return lambda result: label(result) + (f" {result['dtype']}" if several else "")


def microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def table(document: Mapping[str, Any], baseline: str) -> Table:
    """One line per number of tokens, transport, dtype and number of SMs."""
    name = labels(document["results"])
    found = {(r["tokens"], name(r), r["phase"]): r for r in document["results"]}
    on_gpus = document["settings"]["device"] == "cuda"
    limit = "all ranks copying as many bytes"
    if on_gpus:
        limit = "each GPU writing as many bytes to its peers (host: copying them to and from the host)"
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="us: the slowest rank's time, median over exchanges. GB/s: least bytes of an exchange in "
        f"that time; of limit: against {limit}. vs: time of {baseline} (round trip, or dispatch + combine if "
        "that is shorter) / time.",
    )
    headers = (
        "dispatch\nus",
        "combine\nus",
        "round trip\nus",
        "p99\nus",
        "vs",
        "GB/s",
        "of\nlimit",
        "correct",
    )
    shown.add_column("tokens", justify="right", no_wrap=True)
    shown.add_column("transport", no_wrap=True)
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)
    before = None
    rows = dict.fromkeys(key[:2] for key in found)
    for tokens, transport in sorted(rows, key=lambda row: list(document["settings"]["tokens"]).index(row[0])):
        dispatch, combine, trip = (found[tokens, transport, phase] for phase in PHASES)
        if before is not None and before != tokens:
            shown.add_section()
        shown.add_row(
            str(tokens) if before != tokens else "",
            transport,
            *(microseconds(r["median_us"]) for r in (dispatch, combine, trip)),
            microseconds(trip["p99_us"]),
            _shown(trip.get("vs_baseline"), "{:.2f}x"),
            _shown(trip.get("gb_per_s"), "{:.2f}"),
            _shown(trip.get("of_limit"), "{:.1%}"),
            "yes" if all(r["correct"] for r in (dispatch, combine, trip)) else "[bold red]NO[/]",
        )
        before = tokens
    return shown


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    machine, ranks = document["machine"], document["settings"]["ranks"]
    lines = ["load average at the end: " + ", ".join(map(str, machine["load_average"]))]
    if "copy_bytes_per_s" in machine:
        rate = machine["copy_bytes_per_s"] / 1e9
        lines.insert(0, f"{ranks} processes together copy {rate:.1f} GB/s (large buffers)")
    if machine.get("peer_write_bytes_per_s") is not None:
        rate = machine["peer_write_bytes_per_s"] / 1e9
        lines.insert(0, f"each of {ranks} GPUs writes {rate:.1f} GB/s to its peers while all do")
    if machine.get("host_copy_bytes_per_s") is not None:
        rate = machine["host_copy_bytes_per_s"] / 1e9
        lines.insert(0, f"each of {ranks} GPUs copies {rate:.1f} GB/s to and from the host while all do")
    chosen = {(r["tokens"], r["collectives"]) for r in document["results"] if "collectives" in r}
    if machine["device"] == "cuda":
        lines += [f"baseline: NCCL, {name}" for name in sorted({name for _, name in chosen})]
        chosen = set()
    for number, name in sorted(chosen):
        lines.append(f"baseline at {number} tokens: {name}, the fastest of what torch.distributed offers")
    wrong = sorted({(r["transport"], r["tokens"]) for r in document["results"] if not r["correct"]})
    lines += [f"WRONG RESULTS: {transport} at {tokens} tokens" for transport, tokens in wrong]
    return lines


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
