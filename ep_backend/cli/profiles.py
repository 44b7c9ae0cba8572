"""``ep-backend profiles``: list, show and check hardware profiles."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ep_backend import env, profiles
from ep_backend.errors import EpConfigError
from ep_backend.probe import probe
from ep_backend.select import decide


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "profiles",
        help="list, show and check hardware profiles",
        description="Hardware profiles are TOML files; docs/configuration.md describes them.",
    )
    actions = parser.add_subparsers(dest="action", metavar="list|show|validate")
    listing = actions.add_parser("list", help="names and descriptions, in the order in which they are tried")
    listing.set_defaults(func=run_list)
    show = actions.add_parser("show", help="print one profile's file")
    show.add_argument("name", help="name or alias of a shipped profile")
    show.set_defaults(func=run_show)
    validate = actions.add_parser("validate", help="check files, or with none given the shipped ones")
    validate.add_argument("files", nargs="*", metavar="FILE")
    validate.set_defaults(func=run_validate)
    parser.set_defaults(func=run_list)


def run_list(args: argparse.Namespace) -> int:
    # What the user has forced must not hide what the machine is.
    environ = {name: text for name, text in os.environ.items() if not name.startswith(env.PREFIX)}
    here = decide([probe(environ=environ)], requested_profile="auto").profile
    for profile in profiles.shipped():
        aliases = f" (also: {', '.join(profile.aliases)})" if profile.aliases else ""
        mark = "  <- this machine" if profile.name == here else ""
        print(f"{profile.name}{aliases}{mark}\n    {profile.description}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    wanted = profiles.find(args.name, profiles.shipped()).name
    for file, content in profiles.shipped_files():
        if profiles.loads(content, file).name == wanted:
            print(content.decode(), end="")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Check every file, not only up to the first that is wrong. Returns 1 if one is."""
    status = 0
    files: list[tuple[str, bytes | None]] = [(name, None) for name in args.files]
    files = files or list(profiles.shipped_files())
    for name, content in files:
        try:
            profile = profiles.load_file(name) if content is None else profiles.loads(content, name)
            print(f"{name}: valid (profile {profile.name})")
        except EpConfigError as error:
            print(error, file=sys.stderr)
            status = 1
    if not args.files:
        profiles.shipped()  # names must also be unique among all
    return status
