"""``ep-backend env``: what would be set on this machine and why, and what ep_backend reads."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from typing import Any

import msgspec

from ep_backend import env
from ep_backend.probe import Record, probe
from ep_backend.select import Conflict, Decision, decide, find_conflicts


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "env",
        help="show what is chosen here and why, and the variables that matter",
        description="Show the profile, transport and environment that ep_backend would use here, and why. "
        "Nothing is changed. Several machines together may choose otherwise: this looks at one.",
    )
    parser.add_argument(
        "--profile",
        metavar="auto|NAME|FILE",
        help="in place of EP_BACKEND_PROFILE; auto recognises the machine",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--shell", action="store_true", help='print export lines, for: eval "$(ep-backend env --shell)"'
    )
    form.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    record = probe()
    decision = decide([record], requested_profile=args.profile)
    conflicts = find_conflicts(decision, os.environ)
    wrong = [*env.misspelt(), *env.wrong_values()]
    if args.shell:
        print(_shell(decision, conflicts))
    elif args.json:
        print(json.dumps(_json(record, decision, conflicts, wrong), indent=2))
    else:
        print(_text(record, decision, conflicts))
    for sentence in wrong:
        print(f"ep-backend: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def _status(name: str, wanted: str) -> str:
    found = os.environ.get(name)
    return "will be set" if found is None else "already so" if found == wanted else "conflict"


def _shell(decision: Decision, conflicts: tuple[Conflict, ...]) -> str:
    lines = [f"# {decision.reason}"]
    lines += [f"export {i.name}={shlex.quote(i.value)}" for i in decision.env if i.name not in os.environ]
    lines += [f"# conflict: {conflict}" for conflict in conflicts]
    return "\n".join(" ".join(line.split()) for line in lines)


def _json(
    record: Record, decision: Decision, conflicts: tuple[Conflict, ...], wrong: list[str]
) -> dict[str, Any]:
    return {
        "profile": decision.profile,
        "transport": decision.transport,
        "reason": decision.reason,
        "environment": [
            {**msgspec.to_builtins(item), "status": _status(item.name, item.value)} for item in decision.env
        ],
        "conflicts": msgspec.to_builtins(conflicts),
        "engine_arguments": msgspec.to_builtins(decision.engine),
        "sms": decision.sms,
        "variables": [
            {
                "name": v.name,
                "kind": v.kind,
                "value": os.environ.get(v.name),
                "default": v.default,
                "wanted": v.wanted,
                "help": v.help,
            }
            for v in env.VARIABLES
        ],
        "wrong": wrong,
        "machine": msgspec.to_builtins(record),
    }


def _text(record: Record, decision: Decision, conflicts: tuple[Conflict, ...]) -> str:
    gpus = ", ".join(f"{gpu.name or 'GPU'} {gpu.uuid}" for gpu in record.gpus) or "none"
    versions = ", ".join(f"{name} {text}" for name, text in sorted(record.versions.items()))
    lines = [
        f"machine      {record.host}, {record.cpus} CPUs, GPUs: {gpus}",
        f"versions     {versions or 'none found'}" + (f", driver {record.driver}" if record.driver else ""),
        f"profile      {decision.profile or 'none'}",
        f"transport    {decision.transport}",
        f"reason       {decision.reason}",
    ]
    lines += [f"note         {problem}" for problem in record.problems]
    lines += ["", "Set for other libraries (a value of yours always wins):"]
    for item in decision.env:
        lines += [f"  {item.name}={item.value}  [{_status(item.name, item.value)}]", f"      {item.why}"]
        lines += [f"      source: {item.source}"]
    lines += [] if decision.env else ["  nothing"]
    lines += [f"  conflict: {conflict}" for conflict in conflicts]
    if decision.engine:
        lines += ["", "Arguments worth giving to an engine:"]
        lines += [f"  {a.engine}: {f'{a.name} {a.value}'.strip()}\n      {a.why}" for a in decision.engine]
    lines += ["", "Read by ep_backend:"]
    for variable in (v for v in env.VARIABLES if v.kind == "read"):
        found = os.environ.get(variable.name, "")
        default = f"{variable.default} (default)" if variable.default != "" else "(not set)"
        shown = found if found.strip() else default
        lines += [f"  {variable.name} = {shown}", f"      {variable.help} Wanted: {variable.wanted}."]
    return "\n".join(lines)
