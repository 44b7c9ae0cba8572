"""What `ep-backend env` and `ep-backend doctor` both show: the choice made here, as text and as JSON."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from importlib import resources
from typing import Any

import msgspec

from ep_backend import env
from ep_backend.probe import Record
from ep_backend.select import AVAILABLE, Conflict, Decision, EnvValue, opposed
from ep_backend.transports import OF_GPUS

MAX_RANKS = 72  # of a group: ep_backend._native.MAX_WORLD, which cannot be had without torch


def available() -> frozenset[str]:
    """Transports of this build, found out without torch. Without a library: what a whole one has."""
    # Loading the library would take torch and seconds; the schema of an operator stands in it as text.
    with resources.as_file(resources.files("ep_backend") / "libep_backend.so") as path:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return AVAILABLE if content.find(b"cuda_dispatch(") >= 0 else AVAILABLE - OF_GPUS
        except (OSError, ValueError):  # an empty file cannot be mapped
            return AVAILABLE


def cpu_ranks() -> int:
    """How many ranks a command takes on a machine without GPUs if it is not told."""
    return 4 if len(os.sched_getaffinity(0)) >= 4 else 2


def status(item: EnvValue, environ: Mapping[str, str]) -> str:
    """What setting ``item`` where it is unset would do."""
    found = environ.get(item.name)
    if found is None:
        return "conflict" if opposed(item, environ) else "will be set"
    if found == item.value:
        return "already so"
    return "set before by ep_backend" if item.name in env.applied(environ) else "conflict"


def as_json(
    decision: Decision, conflicts: tuple[Conflict, ...], environ: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "profile": decision.profile,
        "transport": decision.transport,
        "reason": decision.reason,
        "environment": [
            {**msgspec.to_builtins(item), "status": status(item, environ)} for item in decision.env
        ],
        "conflicts": msgspec.to_builtins(conflicts),
        "engine_arguments": msgspec.to_builtins(decision.engine),
        "sms": decision.sms,
        "peer_order": decision.peer_order,
        "peer_group": decision.peer_group,
    }


def versions(record: Record, others: Mapping[str, str] | None = None) -> str:
    """Names and versions in one line, the driver last."""
    found = {**record.versions, **(others or {})}
    shown = ", ".join(f"{name} {text}" for name, text in sorted(found.items())) or "none found"
    if not record.driver:
        return shown
    return f"{shown}, driver {record.driver}" + (
        f" (CUDA {record.cuda_driver})" if record.cuda_driver else ""
    )


def chosen(decision: Decision) -> list[str]:
    budget = (
        [] if decision.sms is None else [f"SM budget    {decision.sms}; num_sms of a communicator goes first"]
    )
    order = "order        staggered: a rank stores all to one rank, then all to the next"
    if decision.peer_group > 1:
        order += f"; {decision.peer_group} ranks behind a switch always to such as are behind one"
    return [
        f"profile      {decision.profile or 'none'}",
        f"transport    {decision.transport}",
        *([order] if decision.peer_order == "staggered" else []),
        *budget,
        f"reason       {decision.reason}",
    ]


def settings(decision: Decision, conflicts: tuple[Conflict, ...], environ: Mapping[str, str]) -> list[str]:
    """Lines about the variables that are set for other libraries and the arguments for engines."""
    lines = ["Set for other libraries (a value of yours always wins):"]
    for item in decision.env:
        lines += [f"  {item.name}={item.value}  [{status(item, environ)}]"]
        lines += [f"      {item.why}", f"      source: {item.source}"]
    lines += [] if decision.env else ["  nothing"]
    lines += [f"  conflict: {conflict}" for conflict in conflicts]
    if decision.engine:
        lines += ["", "Arguments worth giving to an engine:"]
        lines += [f"  {a.engine}: {f'{a.name} {a.value}'.strip()}\n      {a.why}" for a in decision.engine]
    return lines
