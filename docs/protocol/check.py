#!/usr/bin/env python3
"""Runs the protocol models beside this file with spin and says whether each case came out as it must.

    python3 docs/protocol/check.py --quick      under a minute of one core, under 2 GB (also the default)
    python3 docs/protocol/check.py --full       the quick cases and the long ones: minutes, under 4 GB
    python3 docs/protocol/check.py --only chunk      cases whose name contains "chunk", of both sets
    python3 docs/protocol/check.py --trace NAME      one case, and its counter-example step by step

cases.txt is the table of cases. A case "holds" only if spin has seen every state: a search that ends at a
memory, depth or time bound is a failure here, whatever number of errors it prints. A case that must fail has
to fail for the stated reason.
Needs spin and gcc (Debian: apt-get install spin gcc). Exit status: 0 all as expected, 1 not, 2 cannot run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOLDS = "holds"
DEADLOCK = "deadlock"
BOUNDS = {  # what pan prints -> how a search ended early
    "max search depth too small": "depth bound reached",
    "reached -DMEMLIM": "memory bound reached",
    "out of memory": "out of memory",
    "VECTORSZ": "state vector too large",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of cases.txt."""

    name: str
    model: str
    defines: str
    expect: str  # "holds", or what must be violated
    long: bool
    hashed: bool  # hash-compacted: all states are visited, up to collisions of a 64-bit hash


def read_cases() -> list[Case]:
    cases = []
    for line in (HERE / "cases.txt").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        name, model, defines, expect, *rest = (field.strip() for field in line.split("|"))
        words = rest[0].split() if rest else []
        defines = defines.replace("FOLDED", "ROWS_AT_ONCE READ_AT_ONCE")
        defines = defines.replace("KINDER", "ROWS_AT_ONCE SAME_PLACE_IN_ORDER")
        cases.append(Case(name, f"{model}.pml", defines, expect, "long" in words, "hashed" in words))
    return cases


@dataclasses.dataclass
class Result:
    name: str
    model: str
    defines: str
    expect: str
    outcome: str  # "holds", what was violated, or "inconclusive: why"
    ok: bool
    exhaustive: bool
    states: int
    depth: int
    seconds: float  # CPU time of the search
    memory_mb: float


def define_options(defines: str) -> list[str]:
    return [f"-D{d}" if "=" in d else f"-D{d}=1" for d in defines.split()]


def read_outcome(text: str, status: int) -> str:
    """What a run of pan says, with every way not to finish taken for a failure."""
    for sign, why in BOUNDS.items():
        if sign in text:
            return f"inconclusive: {why}"
    errors = re.search(r"errors: (\d+)", text)
    if status != 0 or errors is None:
        return f"inconclusive: pan ended with status {status}"
    if errors[1] != "0":
        violated = re.search(r"assertion violated\s+!\(\s*(\w+)", text)
        if violated:
            return violated[1]
        return DEADLOCK if "pan:1: invalid end state" in text else "inconclusive: unknown error"
    if "Search not completed" in text or "invalid end states\t+" not in text:
        return "inconclusive: search not completed"
    return HOLDS


def run_tool(command: list[str], folder: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


def children_seconds() -> float:
    """CPU time of all processes run so far; a busy machine does not change it much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    return float(found[1]) if found else 0.0


def run_case(case: Case, folder: str, memory_mb: int, timeout: float) -> Result:
    """Generates, compiles and runs the checker of one case in `folder`."""
    result = Result(
        case.name, case.model, case.defines, case.expect, "", False, not case.hashed, 0, 0, 0.0, 0.0
    )
    store = "-DHC4" if case.hashed else "-DCOLLAPSE"
    # Compiling takes most of a short run's time.
    optimise = "-O2" if case.long else "-O1" if case.expect == HOLDS else "-O0"
    compile_command = [
        "gcc",
        "-w",
        optimise,
        "-DSAFETY",
        store,
        "-DVECTORSZ=4096",
        f"-DMEMLIM={memory_mb}",
        "-o",
        "pan",
        "pan.c",
    ]
    try:
        for command in (
            ["spin", "-a", *define_options(case.defines), str(HERE / case.model)],
            compile_command,
        ):
            done = run_tool(command, folder, timeout)
            if done.returncode != 0 or "Error:" in done.stdout + done.stderr:
                result.outcome = f"inconclusive: {command[0]}: {(done.stdout + done.stderr).strip()[:200]}"
                return result
        before = children_seconds()
        done = run_tool(["./pan", "-m100000"], folder, timeout)  # -m: depth bound in steps
        result.seconds = round(children_seconds() - before, 2)
    except subprocess.TimeoutExpired:
        result.outcome = f"inconclusive: not finished after {timeout:.0f} s"
        return result
    text = done.stdout + done.stderr
    result.outcome = read_outcome(text, done.returncode)
    result.ok = result.outcome == case.expect
    result.states = int(number(r"(\d+) states, stored", text))
    result.depth = int(number(r"depth reached (\d+)", text))
    result.memory_mb = number(r"([\d.]+)\s+total actual memory usage", text)
    return result


def print_trace(case: Case, folder: str) -> None:
    done = run_tool(
        [
            "spin",
            "-k",
            f"{case.model}.trail",
            "-t",
            "-p",
            "-g",
            *define_options(case.defines),
            str(HERE / case.model),
        ],
        folder,
        60,
    )
    print(done.stdout)


def first_line(command: list[str]) -> str:
    text = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return text.splitlines()[0] if text else "unknown"


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def describe() -> dict[str, object]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "spin": first_line(["spin", "-V"]),
            "gcc": first_line(["gcc", "--version"]),
            "python": platform.python_version(),
        },
        "command": shlex.join(["python3", "docs/protocol/check.py", *sys.argv[1:]]),
    }


def table_row(r: Result) -> str:
    states = f"{r.states:,}{'' if r.exhaustive else '*'}"
    found = r.outcome + ("" if r.ok else "   <-- NOT AS EXPECTED")
    return f"{r.name:<36} {r.expect:<20} {states:>12} {r.seconds:>7.2f} {r.memory_mb:>6.0f}  {found}"


def select_cases(args: argparse.Namespace) -> list[Case]:
    cases = read_cases()
    if args.trace:
        return [c for c in cases if c.name == args.trace]
    if args.only:
        return [c for c in cases if args.only in c.name]
    return [c for c in cases if args.full or not c.long]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Checks the models of the exchange protocol with spin.")
    parser.add_argument("--quick", action="store_true", help="the short cases (default)")
    parser.add_argument("--full", action="store_true", help="all cases")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--trace", metavar="NAME", help="run one case and print its counter-example")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results to FILE")
    parser.add_argument(
        "--memory", metavar="MB", type=int, help="memory bound of a search (2000; --full 4000)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=600, help="time bound of a search (600)"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    # So that a search does not go on when whoever called us gives up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            print(f"{tool} is not installed (Debian: apt-get install {tool})", file=sys.stderr)
            return 2
    cases = select_cases(args)
    if not cases:
        print("no case has such a name", file=sys.stderr)
        return 2

    memory = args.memory or (4000 if args.full or any(c.long for c in cases) else 2000)
    print(f"{'case':<36} {'expected':<20} {'states':>12} {'CPU s':>7} {'MB':>6}  found")
    results = []
    started = time.monotonic()
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="ep_backend_protocol_") as folder:
            r = run_case(case, folder, memory, args.timeout)
            print(table_row(r), flush=True)
            if args.trace:
                print_trace(case, folder)
        results.append(r)
    wrong = [r.name for r in results if not r.ok]
    wall = time.monotonic() - started
    print(
        f"{len(results) - len(wrong)} of {len(results)} as expected, {wall:.0f} s in all; *: hash-compacted"
    )
    if args.json:
        report = {**describe(), "results": [dataclasses.asdict(r) for r in results]}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
