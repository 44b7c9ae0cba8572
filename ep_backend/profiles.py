"""Hardware profiles: the strict schema of ``configs/*.toml`` and its loader.

A profile says how a kind of machine is recognised, which transports to use on it, and which settings of other
libraries to ask for, each with a source. Every mistake in a file raises EpConfigError naming the file, the
key, and the nearest valid name. The same `Condition` decides whether a profile fits and whether one of its
conditional blocks applies, so a new fact about machines is one new field here and its meaning in
`ep_backend.select`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.resources
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from ep_backend import env
from ep_backend.errors import EpConfigError

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

TRANSPORTS = ("cpu", "host", "peer", "hier", "collective")
ENGINES = ("vllm", "sglang")
_LARGEST_FILE = 1 << 20

Share = Literal["none", "some", "all"]
Level = Literal["LOC", "PIX", "PXB", "PHB", "SYS"]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a profile: unknown keys are errors, nothing changes after loading."""


class Condition(_Strict, frozen=True, kw_only=True):
    """Facts about the group that must all hold. A fact that the probe could not establish never holds.

    ``gpus``: whether the ranks compute on GPUs (a mixed group is refused). ``several_gpus``: a host has two
    or more that count, so that there are pairs to speak of. ``nvlink``, ``peer_access``, ``pcie_switch``: how
    many pairs of the group's GPUs inside a host have working NVLink; have passed the data check of peer
    access both ways; hang under common PCIe switches. ``peer_level``: the longest path, as NCCL_P2P_LEVEL
    counts, within which every pair has passed it (LOC: not even the nearest). ``fabric``: the group's GPUs
    are in one NVLink fabric across hosts, and handles were really exchanged. ``hca``: every host has an
    active InfiniBand/RoCE port. Versions are texts like "13.0" and are compared with the lowest of the
    group.
    """

    gpus: Literal["none", "all"] | None = None
    several_gpus: bool | None = None
    nvlink: Share | None = None
    peer_access: Share | None = None
    peer_level: Level | None = None
    pcie_switch: Share | None = None
    several_hosts: bool | None = None
    hca: bool | None = None
    fabric: bool | None = None
    cuda_driver_below: str | None = None
    cuda_driver_at_least: str | None = None
    nccl_below: str | None = None
    nccl_at_least: str | None = None


class Setting(_Strict, frozen=True, kw_only=True):
    """A value for something outside ep_backend, why it is wanted, and the source that says so."""

    value: str
    why: str
    source: str


class Engine(_Strict, frozen=True, kw_only=True):
    """Command-line arguments worth giving to the engines, by argument name."""

    vllm: dict[str, Setting] = {}
    sglang: dict[str, Setting] = {}


class Recognition(_Strict, frozen=True, kw_only=True):
    """How the profile is found by itself. Profiles are tried in rising ``order``; the first fit wins."""

    order: int
    require: Condition
    source: str


class Transport(_Strict, frozen=True, kw_only=True):
    """Transports in order of preference, for a group inside one host and for a group on several."""

    inside: tuple[str, ...]
    across: tuple[str, ...]
    source: str


class SmBudget(_Strict, frozen=True, kw_only=True):
    """Most streaming multiprocessors that dispatch and combine may use; ``num_sms`` of a communicator goes
    first."""

    sms: int
    source: str


class Conditional(_Strict, frozen=True, kw_only=True):
    """Settings that apply only where ``when`` holds; they replace those of the same name."""

    when: Condition
    environment: dict[str, Setting] = {}
    engine: Engine = Engine()


class Profile(_Strict, frozen=True, kw_only=True):
    """One hardware profile. Without ``recognition`` it is used only when it is asked for by name or path."""

    name: str
    description: str
    transport: Transport
    aliases: tuple[str, ...] = ()
    recognition: Recognition | None = None
    environment: dict[str, Setting] = {}
    engine: Engine = Engine()
    sm_budget: SmBudget | None = None
    conditional: tuple[Conditional, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


def from_dict(data: Any, where: str) -> Profile:
    """Check ``data`` (a parsed TOML document) and make a Profile of it.

    ``where`` is the file's name for messages. Raises EpConfigError for anything that is not a valid profile.
    """
    try:
        _check_shape(data, Profile, "")
        profile = msgspec.convert(data, Profile, strict=True)
        _check_meaning(profile)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".") or "the file"
        raise EpConfigError(f"{where}: {key}: {text[:1].lower()}{text[1:]}") from None
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


def find(name: str, among: Iterable[Profile]) -> Profile:
    """The profile with this name or alias. Raises EpConfigError with the nearest name."""
    names = {known: profile for profile in among for known in profile.names}
    if name not in names:
        known = ", ".join(sorted(names))
        raise EpConfigError(
            f"there is no hardware profile {name!r}{env.nearest(name, names)} (known: {known})"
        )
    return names[name]


def load(requested: str = "auto") -> tuple[tuple[Profile, ...], str]:
    """All profiles that may be chosen, and the name of the one asked for ("auto" if none).

    ``requested`` is "auto", a name or alias, or the path of a file, whose profile takes the place of a
    shipped one of the same name. Raises EpConfigError.
    """
    known = shipped()
    requested = requested.strip() or "auto"
    if requested == "auto":
        return known, "auto"
    if not is_path(requested):
        return known, find(requested, known).name
    own = load_file(requested)
    return in_order([own, *(profile for profile in known if profile.name != own.name)]), own.name


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


def _check_shape(value: Any, wanted: Any, key: str) -> None:
    """Find unknown keys and unknown words, for which msgspec's own message has no nearest name."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        _check_shape(value, next(kind for kind in arguments if kind is not type(None)), key)
    elif origin is Literal:
        if isinstance(value, str) and value not in arguments:
            raise EpConfigError(
                f"{key}: unknown value {value!r}{env.nearest(value, arguments)} ({_list(arguments)})"
            )
    elif origin is tuple and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_shape(item, arguments[0], f"{key}[{index}]")
    elif origin is dict and isinstance(value, Mapping):
        for name, item in value.items():
            _check_shape(item, arguments[1], _join(key, name))
    elif isinstance(wanted, type) and issubclass(wanted, msgspec.Struct) and isinstance(value, Mapping):
        hints = typing.get_type_hints(wanted)
        for name, item in value.items():
            if name not in hints:
                place = f"{key}: " if key else ""
                raise EpConfigError(
                    f"{place}unknown key {name!r}{env.nearest(str(name), hints)} ({_list(hints)})"
                )
            _check_shape(item, hints[name], _join(key, name))


def _check_meaning(profile: Profile) -> None:
    """What types cannot say: names that must exist, values that must fit, combinations that cannot be."""
    for name in profile.names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "auto":
            raise EpConfigError(
                f"name: {name!r} is no usable name (small letters, digits, '_', and not 'auto')"
            )
    if len(set(profile.names)) < len(profile.names):
        raise EpConfigError("aliases: a name is given twice")
    if profile.recognition:
        _check_condition(profile.recognition.require, "recognition.require")
    _check_transport(profile)
    if profile.sm_budget and not 1 <= profile.sm_budget.sms <= 1024:
        raise EpConfigError(f"sm_budget.sms: {profile.sm_budget.sms} is out of range (1 to 1024)")
    blocks: list[tuple[str, dict[str, Setting], Engine]] = [("", profile.environment, profile.engine)]
    for index, block in enumerate(profile.conditional):
        key = f"conditional[{index}]."
        _check_condition(block.when, key + "when")
        if not block.environment and block.engine == Engine():
            raise EpConfigError(f"{key[:-1]}: has no effect, it sets nothing")
        blocks.append((key, block.environment, block.engine))
    for key, environment, engine in blocks:
        _check_environment(environment, f"{key}environment")
        for name in ENGINES:
            for argument in getattr(engine, name):
                if not re.fullmatch(r"--[a-z0-9][a-z0-9-]*", argument):
                    raise EpConfigError(
                        f"{key}engine.{name}: {argument!r} is not an argument (like --max-num-seqs)"
                    )
    for key, text in _prose(profile):
        if not text.strip():
            raise EpConfigError(f"{key}: must not be empty")


def _check_transport(profile: Profile) -> None:
    for key, names in (("inside", profile.transport.inside), ("across", profile.transport.across)):
        key = f"transport.{key}"
        if not names:
            raise EpConfigError(f"{key}: needs at least one transport ({_list(TRANSPORTS)})")
        for name in names:
            if name not in TRANSPORTS:
                raise EpConfigError(
                    f"{key}: unknown transport {name!r}{env.nearest(name, TRANSPORTS)} ({_list(TRANSPORTS)})"
                )
        if len(set(names)) < len(names):
            raise EpConfigError(f"{key}: a transport is listed twice")
    if "hier" in profile.transport.inside:
        raise EpConfigError("transport.inside: 'hier' joins several hosts and means nothing inside one")
    for name in ("cpu", "host"):
        if name in profile.transport.across:
            raise EpConfigError(f"transport.across: {name!r} is memory of one host and reaches no other")
    gpus = profile.recognition.require.gpus if profile.recognition else None
    everywhere = (*profile.transport.inside, *profile.transport.across)
    if gpus == "none" and {"peer", "host"} & set(everywhere):
        raise EpConfigError("transport: 'peer' and 'host' need GPUs, but recognition.require.gpus is 'none'")
    if gpus == "all" and "cpu" in everywhere:
        raise EpConfigError("transport: 'cpu' moves CPU tensors, but recognition.require.gpus is 'all'")


def _check_condition(condition: Condition, key: str) -> None:
    if condition == Condition():
        raise EpConfigError(f"{key}: is empty, it would always hold")
    if condition.gpus == "none" and any(
        fact is not None
        for fact in (
            condition.several_gpus,
            condition.nvlink,
            condition.peer_access,
            condition.peer_level,
            condition.pcie_switch,
            condition.fabric,
        )
    ):
        raise EpConfigError(f"{key}: asks for links between GPUs where gpus is 'none'")
    for what in ("cuda_driver", "nccl"):
        low, high = getattr(condition, f"{what}_at_least"), getattr(condition, f"{what}_below")
        for name, text in ((f"{what}_at_least", low), (f"{what}_below", high)):
            if text is not None and not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}", text):
                raise EpConfigError(f'{key}.{name}: {text!r} is not a version (like "13.0")')
        if low is not None and high is not None and version(low) >= version(high):
            raise EpConfigError(f"{key}: nothing is at least {low} and below {high}")


def _check_environment(environment: Mapping[str, Setting], key: str) -> None:
    for name, setting in environment.items():
        try:
            known = env.variable(name)
            if known.kind != "set":
                raise EpConfigError(f"{name} steers ep_backend itself and cannot be set by a profile")
            known.parse(setting.value)
        except EpConfigError as error:
            raise EpConfigError(f"{key}.{name}: {error}") from None
    disabled = environment.get("NCCL_P2P_DISABLE")
    if disabled and disabled.value == "1" and "NCCL_P2P_LEVEL" in environment:
        raise EpConfigError(
            f"{key}: NCCL_P2P_LEVEL means nothing while NCCL_P2P_DISABLE is 1; keep one of them"
        )


def _prose(profile: Profile) -> Iterator[tuple[str, str]]:
    """Every text that a reader relies on, with its key."""
    yield "description", profile.description
    yield "transport.source", profile.transport.source
    if profile.recognition:
        yield "recognition.source", profile.recognition.source
    if profile.sm_budget:
        yield "sm_budget.source", profile.sm_budget.source
    groups = [("environment", profile.environment), *_engine_groups("", profile.engine)]
    for index, block in enumerate(profile.conditional):
        key = f"conditional[{index}]."
        groups += [(f"{key}environment", block.environment), *_engine_groups(key, block.engine)]
    for key, settings in groups:
        for name, setting in settings.items():
            yield f"{key}.{name}.why", setting.why
            yield f"{key}.{name}.source", setting.source


def _engine_groups(key: str, engine: Engine) -> list[tuple[str, dict[str, Setting]]]:
    return [(f"{key}engine.{name}", getattr(engine, name)) for name in ENGINES]


def version(text: str) -> tuple[int, ...]:
    """The numbers of a version text, for comparison: "13.0" is (13,), so that "13" and "13.0" are equal."""
    numbers = [int(part) for part in re.findall(r"\d+", text)[:4]]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _list(names: Iterable[Any]) -> str:
    return "known: " + ", ".join(str(name) for name in names)
