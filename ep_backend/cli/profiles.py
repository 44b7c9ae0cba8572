"""``ep-backend profiles``: list, show and check hardware profiles."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
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
    show.add_argument(
        "name",
        metavar="NAME|FILE",
        help="name or alias of a profile, shipped or in the file that EP_BACKEND_PROFILE names; or a file",
    )
    show.set_defaults(func=run_show)
    validate = actions.add_parser("validate", help="check files, or with none given the shipped ones")
    validate.add_argument("files", nargs="*", metavar="FILE")
    validate.set_defaults(func=run_validate)
    parser.set_defaults(func=run_list)


def run_list(args: argparse.Namespace) -> int:
    # What the user has forced must not hide what the machine is.
    environ = {name: text for name, text in os.environ.items() if not name.startswith(env.PREFIX)}
    path = _own_path()
    known, own, forced = profiles.load(path or "auto")
    here = decide([probe(environ=environ)], requested_profile="auto" if forced or not path else path).profile
    for profile in known:
        aliases = f" (also: {', '.join(profile.aliases)})" if profile.aliases else ""
        source = f" from {path}" if path and profile.name == own else ""
        mark = "  <- this machine" if profile.name == here else ""
        print(f"{profile.name}{aliases}{source}{mark}\n    {profile.description}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    path = args.name if profiles.is_path(args.name) else _own_path()
    if path:
        own, content = profiles.load_file(path), Path(path).read_bytes().decode()
        if path == args.name or args.name in own.names:
            print(content, end="")
            return 0
    wanted = profiles.find(args.name, profiles.shipped()).name
    for file, shipped in profiles.shipped_files():
        if profiles.loads(shipped, file).name == wanted:
            print(shipped.decode(), end="")
    return 0


def _own_path() -> str:
    """The file that EP_BACKEND_PROFILE names; empty if it names none."""
    wish: str = env.get("EP_BACKEND_PROFILE")
    return wish if profiles.is_path(wish) else ""


def run_validate(args: argparse.Namespace) -> int:
    """Check every file, not only up to the first that is wrong. Returns 1 if one is."""
    status = 0
    files: list[tuple[str, bytes | None]] = [(name, None) for name in args.files]
    files = files or list(profiles.shipped_files())
    for name, content in files:
        try:
            profile = profiles.load_file(name) if content is None else profiles.loads(content, name)
            if content is None:
                profiles.beside_shipped(profile, name)  # as it will be used
            print(f"{name}: valid (profile {profile.name})")
        except EpConfigError as error:
            print(error, file=sys.stderr)
            status = 1
    if not args.files:
        profiles.shipped()  # names must also be unique among all
    return status
