"""The schema of hardware profiles, as frozen structs.

The same `Condition` decides whether a profile fits and whether one of its conditional blocks applies, so a
new fact about machines is one new field here and its meaning in `ep_backend.facts`.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

ENGINES = ("vllm", "sglang")

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
    """One hardware profile. Without ``recognition`` it is used only when it is asked for."""

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


def version(text: str) -> tuple[int, ...]:
    """The numbers of a version text, for comparison: "13.0" is (13,), so that "13" and "13.0" are equal."""
    numbers = [int(part) for part in re.findall(r"\d+", text)[:4]]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
