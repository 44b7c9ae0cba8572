"""What the schema's types cannot say: the nearest valid name, values out of range, combinations that cannot
be. Every function raises EpConfigError naming the key.
"""

from __future__ import annotations

import itertools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from ep_backend import env
from ep_backend.errors import EpConfigError
from ep_backend.profile_schema import (
    ENGINES,
    Condition,
    Engine,
    Profile,
    Setting,
    version,
)
from ep_backend.transports import OF_GPUS, TRANSPORTS


def check_shape(value: Any, wanted: Any, key: str) -> None:
    """Find unknown keys and unknown words, for which msgspec's own message has no nearest name."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        check_shape(value, next(kind for kind in arguments if kind is not type(None)), key)
    elif origin is Literal:
        if isinstance(value, str) and value not in arguments:
            raise EpConfigError(
                f"{key}: unknown value {value!r}{env.nearest(value, arguments)} ({_list(arguments)})"
            )
    elif origin is tuple and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_shape(item, arguments[0], f"{key}[{index}]")
    elif origin is dict and isinstance(value, Mapping):
        for name, item in value.items():
            check_shape(item, arguments[1], _join(key, name))
            try:
                msgspec.convert(item, arguments[1], strict=True)
            except msgspec.ValidationError as error:  # of the whole file it would say [...] for the name
                raise EpConfigError(in_words(error, _join(key, name))) from None
    elif isinstance(wanted, type) and issubclass(wanted, msgspec.Struct) and isinstance(value, Mapping):
        hints = typing.get_type_hints(wanted)
        for name, item in value.items():
            if name not in hints:
                place = f"{key}: " if key else ""
                raise EpConfigError(
                    f"{place}unknown key {name!r}{env.nearest(str(name), hints)} ({_list(hints)})"
                )
            check_shape(item, hints[name], _join(key, name))


def in_words(error: msgspec.ValidationError, key: str = "") -> str:
    """msgspec's message with the key in front. ``key``: of what was converted; empty for the whole file."""
    text, _, path = str(error).partition(" - at `$")
    key = (key + path.rstrip("`")).lstrip(".") or "the file"
    text = text.removeprefix("Object ").replace("`object`", "a table")
    text = text.replace("Expected `str`", "Expected text in quotes")
    return f"{key}: {text[:1].lower()}{text[1:]}"


def check_meaning(profile: Profile) -> None:
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
        _check_environment(profile.environment, environment, f"{key}environment")
        for name in ENGINES:
            for argument in getattr(engine, name):
                if not re.fullmatch(r"--[a-z0-9][a-z0-9-]*", argument):
                    raise EpConfigError(
                        f"{key}engine.{name}: {argument!r} is not an argument (like --max-num-seqs)"
                    )
    _check_blocks(profile)
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
    for name in ("cpu", "host", "mixed"):
        if name in profile.transport.across:
            raise EpConfigError(f"transport.across: {name!r} is memory of one host and reaches no other")
    if profile.recognition is None:
        return
    require = profile.recognition.require
    gpus = require.gpus
    everywhere = (*profile.transport.inside, *profile.transport.across)
    if gpus == "none" and (wrong := sorted(OF_GPUS & set(everywhere))):
        raise EpConfigError(f"transport: {wrong[0]!r} needs GPUs, but recognition.require.gpus is 'none'")
    if gpus == "all" and "cpu" in everywhere:
        raise EpConfigError("transport: 'cpu' moves CPU tensors, but recognition.require.gpus is 'all'")
    broken = require.several_gpus is not False and require.peer_access in ("none", "some")
    if broken and "peer" in profile.transport.inside:
        raise EpConfigError(
            "transport.inside: 'peer' needs working peer access between all GPUs, but "
            f"recognition.require.peer_access is {require.peer_access!r}"
        )


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
    _check_links(condition, key)
    for what in ("cuda_driver", "nccl"):
        low, high = getattr(condition, f"{what}_at_least"), getattr(condition, f"{what}_below")
        for name, text in ((f"{what}_at_least", low), (f"{what}_below", high)):
            if text is not None and not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}", text):
                raise EpConfigError(f'{key}.{name}: {text!r} is not a version (like "13.0")')
        if low is not None and high is not None and version(low) >= version(high):
            raise EpConfigError(f"{key}: nothing is at least {low} and below {high}")


def _check_links(condition: Condition, key: str) -> None:
    """What `ep_backend.facts` can never find together about the pairs of a group's GPUs."""
    shares = (condition.nvlink, condition.peer_access, condition.pcie_switch)
    if condition.several_gpus is False and (
        condition.peer_level is not None or any(share in ("some", "all") for share in shares)
    ):
        raise EpConfigError(f"{key}: without several_gpus there are no pairs to ask about")
    if condition.nvlink == "none" and condition.fabric and condition.several_gpus is not False:
        raise EpConfigError(f"{key}: a fabric joins GPUs by NVLink, and nvlink is 'none'")
    access, level = condition.peer_access, condition.peer_level
    # Within LOC are no pairs and within SYS are all.
    possible = {
        "none": ("LOC",),
        "some": ("LOC", "PIX", "PXB", "PHB"),
        "all": ("PIX", "PXB", "PHB", "SYS"),
    }
    if access is not None and level is not None and level not in possible[access]:
        raise EpConfigError(f"{key}: peer_level cannot be {level!r} while peer_access is {access!r}")


def _check_environment(base: Mapping[str, Setting], environment: Mapping[str, Setting], key: str) -> None:
    """``base``: what holds on every machine, and what a conditional block adds to or replaces."""
    for name, setting in environment.items():
        try:
            known = env.variable(name)
            if known.kind != "set":
                raise EpConfigError(f"{name} steers ep_backend itself and cannot be set by a profile")
            known.parse(setting.value)
        except EpConfigError as error:
            raise EpConfigError(f"{key}.{name}: {error}") from None
    _check_together({**base, **environment}, key)


def _check_together(environment: Mapping[str, Setting], key: str) -> None:
    disabled = environment.get("NCCL_P2P_DISABLE")
    if disabled and disabled.value == "1" and "NCCL_P2P_LEVEL" in environment:
        raise EpConfigError(
            f"{key}: NCCL_P2P_LEVEL means nothing while NCCL_P2P_DISABLE is 1; keep one of them"
        )


def _check_blocks(profile: Profile) -> None:
    """Every two conditional blocks that can hold together. What three do wrong, two of them do."""
    for (i, first), (j, second) in itertools.combinations(enumerate(profile.conditional), 2):
        if _can_hold_together(first.when, second.when):
            _check_together(
                {**profile.environment, **first.environment, **second.environment},
                f"conditional[{i}] and conditional[{j}] can hold together",
            )


def _can_hold_together(first: Condition, second: Condition) -> bool:
    """Whether some group shows the facts of both."""
    both: dict[str, Any] = {}
    for name in Condition.__struct_fields__:
        facts = [fact for fact in (getattr(first, name), getattr(second, name)) if fact is not None]
        if name.endswith(("_at_least", "_below")):
            facts.sort(key=version, reverse=name.endswith("_at_least"))  # the stricter one first
        elif len(set(facts)) > 1:
            return False
        if facts:
            both[name] = facts[0]
    if both.get("gpus") == "none":  # there are no pairs, so each share of them is "none"
        both = {name: fact for name, fact in both.items() if name == "gpus" or fact not in ("none", False)}
    try:
        _check_condition(Condition(**both), "")
    except EpConfigError:
        return False
    return True


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


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _list(names: Iterable[Any]) -> str:
    return "known: " + ", ".join(str(name) for name in names)
