"""Hardware profiles: the loader of ``configs/*.toml`` and of users' own files.

A profile says how a kind of machine is recognised, which transports to use on it, and which settings of other
libraries to ask for, each with a source. Every mistake in a file raises EpConfigError naming the file, the
key, and the nearest valid name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.resources
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from ep_backend import env
from ep_backend.errors import EpConfigError
from ep_backend.profile_rules import check_meaning, check_shape, in_words
from ep_backend.profile_schema import ENGINES, Condition, Profile, Setting, version
from ep_backend.transports import TRANSPORTS

__all__ = [
    "ENGINES",
    "TRANSPORTS",
    "Condition",
    "Profile",
    "Setting",
    "beside_shipped",
    "digest",
    "find",
    "from_dict",
    "in_order",
    "is_path",
    "load",
    "load_file",
    "loads",
    "shipped",
    "shipped_files",
    "version",
]

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

_LARGEST_FILE = 1 << 20


def from_dict(data: Any, where: str) -> Profile:
    """Check ``data`` (a parsed TOML document) and make a Profile of it.

    ``where`` is the file's name for messages. Raises EpConfigError for anything that is not a valid profile.
    """
    try:
        check_shape(data, Profile, "")
        profile = msgspec.convert(data, Profile, strict=True)
        check_meaning(profile)
    except msgspec.ValidationError as error:
        raise EpConfigError(f"{where}: {in_words(error)}") from None
    except EpConfigError as error:
        raise EpConfigError(f"{where}: {error}") from None
    except RecursionError:
        raise EpConfigError(f"{where}: nested too deeply to be a profile") from None
    return profile


def loads(content: bytes, where: str) -> Profile:
    """`from_dict` of a TOML text. A syntax error names line and column."""
    try:
        data = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # decoding and syntax errors are ValueErrors
        raise EpConfigError(f"{where}: not valid TOML: {error}") from None
    return from_dict(data, where)


def load_file(path: str | Path) -> Profile:
    """The profile in a user's own file. Raises EpConfigError if it cannot be read or is not valid."""
    return loads(_read(Path(path)), str(path))


def shipped_files() -> tuple[tuple[str, bytes], ...]:
    """Name and content of the profile files that belong to this installation."""
    folder = importlib.resources.files("ep_backend").joinpath("configs")
    found = sorted(
        (entry.name, entry.read_bytes())
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if entry.name.endswith(".toml")
    )
    if not found:
        raise EpConfigError(
            f"no hardware profiles at {folder}: this installation of ep_backend is incomplete"
        )
    return tuple(found)


def shipped() -> tuple[Profile, ...]:
    """The profiles that belong to this installation, in the order in which they are tried."""
    return in_order(loads(content, name) for name, content in shipped_files())


def in_order(found: Iterable[Profile]) -> tuple[Profile, ...]:
    """Profiles in the order in which they are tried. Raises EpConfigError if two share a name or alias."""
    owners: dict[str, str] = {}
    result = sorted(
        found, key=lambda p: (p.recognition is None, p.recognition.order if p.recognition else 0, p.name)
    )
    for profile in result:
        for name in profile.names:
            if name in owners:
                raise EpConfigError(
                    f"profiles {owners[name]!r} and {profile.name!r} both claim the name {name!r}"
                )
            owners[name] = profile.name
    return tuple(result)


def is_path(requested: str) -> bool:
    """Whether EP_BACKEND_PROFILE names a file and not a profile."""
    return "/" in requested or requested.endswith(".toml")


def find(name: str, among: Iterable[Profile], also: Iterable[str] = ()) -> Profile:
    """The profile with this name or alias. Raises EpConfigError with the nearest name.

    ``also``: what else the caller would have understood in its place, for the message.
    """
    names = {known: profile for profile in among for known in profile.names}
    if name not in names:
        known = [*also, *sorted(names)]
        raise EpConfigError(
            f"there is no hardware profile {name!r}{env.nearest(name, known)} (known: {', '.join(known)})"
        )
    return names[name]


def load(requested: str = "auto") -> tuple[tuple[Profile, ...], str, bool]:
    """All profiles that may be chosen, the name of the one asked for (else "auto"), whether it is forced.

    ``requested`` is "auto", a name or alias, or the path of a file, whose profile takes the place of a
    shipped one of the same name. A name is forced, and so is a file that does not say how its profile is
    recognised; one that does is to be used where it fits. Raises EpConfigError.
    """
    known = shipped()
    requested = requested.strip() or "auto"
    if requested == "auto":
        return known, "auto", False
    if not is_path(requested):
        return known, find(requested, known, also=("auto",)).name, True
    own = load_file(requested)
    return beside_shipped(own, requested), own.name, own.recognition is None


def beside_shipped(own: Profile, where: str) -> tuple[Profile, ...]:
    """A user's own profile and the shipped ones whose place it does not take, in order.

    ``where`` is its file's name for messages. Raises EpConfigError if it claims a name of another.
    """
    try:
        return in_order([own, *(profile for profile in shipped() if profile.name != own.name)])
    except EpConfigError as error:
        raise EpConfigError(f"{where}: {error}") from None


def digest(requested: str = "auto") -> str:
    """Fingerprint of the files that `load` would read, or what cannot be read of them. Never raises."""
    sha = hashlib.sha256()
    try:
        for name, content in shipped_files():
            sha.update(name.encode() + b"\0" + content + b"\0")
        if is_path(requested.strip()):
            sha.update(_read(Path(requested.strip())))
    except (OSError, EpConfigError) as error:
        return str(error)
    return sha.hexdigest()[:16]


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a device or pipe might never end
            raise EpConfigError(f"{path}: there is no such file")
        if path.stat().st_size > _LARGEST_FILE:
            raise EpConfigError(f"{path}: larger than {_LARGEST_FILE} bytes, not a profile")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, EpConfigError):
            raise
        raise EpConfigError(f"{os.fsdecode(path)!r} cannot be read: {error}") from None
