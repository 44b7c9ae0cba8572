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
from ep_backend.cli import choice
from ep_backend.probe import Record, probe
from ep_backend.select import Conflict, Decision, apply_env, decide, find_conflicts, missing


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
    decision = decide([record], requested_profile=args.profile, available=choice.available())
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


def _shell(decision: Decision, conflicts: tuple[Conflict, ...]) -> str:
    lines = [f"# {decision.reason}"]
    environ = dict(os.environ)
    apply_env(decision, environ)
    changed = [item.name for item in missing(decision, os.environ)]
    # What ep_backend sets must not look like the user's: on another host it may be something else.
    names = [*changed, env.APPLIED] if changed else []
    lines += [f"export {name}={shlex.quote(environ[name])}" for name in names]
    lines += [f"# conflict: {conflict}" for conflict in conflicts]
    return "\n".join(" ".join(line.split()) for line in lines)


def _json(
    record: Record, decision: Decision, conflicts: tuple[Conflict, ...], wrong: list[str]
) -> dict[str, Any]:
    return {
        **choice.as_json(decision, conflicts, os.environ),
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
    node = record.node and f", node {record.node}"
    lines = [
        f"machine      {record.host}{node}, {record.cpus} CPUs, GPUs: {gpus}",
        f"versions     {choice.versions(record)}",
        *choice.chosen(decision),
    ]
    lines += [f"tuned        {entry}" for entry in record.tuned_sms]
    lines += [f"note         {problem}" for problem in (*record.problems, record.tuned_problem) if problem]
    lines += ["", *choice.settings(decision, conflicts, os.environ)]
    lines += ["", "Read by ep_backend:"]
    for variable in (v for v in env.VARIABLES if v.kind == "read"):
        found = os.environ.get(variable.name, "")
        default = "(not set)" if variable.default in (None, "") else f"{variable.default} (default)"
        shown = found if found.strip() else default
        lines += [f"  {variable.name} = {shown}", f"      {variable.help} Wanted: {variable.wanted}."]
    return "\n".join(lines)
