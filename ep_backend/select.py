"""From the records of all ranks to one decision: profile, transport, environment, and the reason in words.

`select` is pure: the same records give the same decision on every rank, on any machine. `decide` loads the
profiles and calls it. `apply_env` is the only function here that changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import msgspec

from ep_backend import env, profiles
from ep_backend.errors import EpConfigError
from ep_backend.probe import Record
from ep_backend.profiles import Condition, Profile, Setting

# Transports that exist. The others that profiles name are passed over, and the reason says so. A communicator
# narrows this to what its build has for its device.
AVAILABLE = frozenset({"cpu", "collective", "peer"})


class EnvValue(msgspec.Struct, frozen=True):
    """An environment variable that the chosen profile asks for, why, and who says so."""

    name: str
    value: str
    why: str
    source: str


class Argument(msgspec.Struct, frozen=True):
    """A command-line argument worth giving to an engine; an empty ``value`` means a bare switch."""

    engine: str
    name: str
    value: str
    why: str
    source: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a group of ranks will use. ``profile`` None: the machine fits none; ``sms`` None: the formula."""

    profile: str | None
    transport: str
    env: tuple[EnvValue, ...]
    reason: str
    engine: tuple[Argument, ...] = ()
    sms: int | None = None


class Conflict(msgspec.Struct, frozen=True):
    """A variable that is already set, and not as the decision wants it. The found value stays."""

    name: str
    found: str
    wanted: str
    why: str

    def __str__(self) -> str:
        kept = f"{self.name}={self.found} is kept as it was found"
        return f"{kept}; the profile would set {self.wanted}. {self.why}"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the records of a group say together, in the words of `profiles.Condition`. None: not known."""

    gpus: str
    several_gpus: bool
    nvlink: str | None
    peer_access: str | None
    pcie_switch: str | None
    several_hosts: bool
    hca: bool
    fabric: bool | None
    cuda_driver: str | None
    nccl: str | None
    shares_memory: bool  # all ranks see the same /dev/shm of one kernel
    hosts: int


def decide(
    records: Sequence[Record],
    requested_transport: str = "auto",
    *,
    requested_profile: str | None = None,
    available: frozenset[str] = AVAILABLE,
) -> Decision:
    """Load the profiles and `select`. All ranks get the same answer, or the same error, from equal records.

    ``records``: one per rank, in order of rank. ``requested_transport``: the communicator's own wish; "auto"
    leaves it to EP_BACKEND_TRANSPORT, then to the profile. ``requested_profile``: in place of
    EP_BACKEND_PROFILE. Raises EpConfigError: ranks disagree, a profile file is wrong, or what was asked for
    cannot be had.
    """
    check_agreement(records)
    wish = requested_profile
    asked_by = "the command line"
    if wish is None:
        wish, asked_by = records[0].environment.get("EP_BACKEND_PROFILE", "auto"), "EP_BACKEND_PROFILE"
    known, name = profiles.load(wish)
    return select(records, known, requested_transport, profile=name, asked_by=asked_by, available=available)


def select(
    records: Sequence[Record],
    known: Iterable[Profile],
    requested: str = "auto",
    *,
    profile: str = "auto",
    asked_by: str = "EP_BACKEND_PROFILE",
    available: frozenset[str] = AVAILABLE,
) -> Decision:
    """Choose profile, transport and environment for a group. Pure.

    ``known``: profiles, tried in the order given by `profiles.in_order`. ``requested``: a transport or
    "auto". ``profile``: a profile's name or alias, or "auto". Raises EpConfigError.
    """
    check_agreement(records)
    facts = gather(records)
    known = profiles.in_order(known)
    if profile == "auto":
        chosen, why_profile = _recognise(known, facts)
    else:
        chosen = profiles.find(profile, known)
        why_profile = f"Profile {chosen.name}: asked for by {asked_by}."
        missing = unmet(chosen.recognition.require, facts) if chosen.recognition else []
        if missing:
            why_profile += f" It would not have been chosen here: {'; '.join(missing)}."
    transport, why_transport = _transport(records, facts, chosen, requested, available)
    environment, engine = _settings(chosen, facts)
    return Decision(
        profile=chosen.name if chosen else None,
        transport=transport,
        env=tuple(EnvValue(n, s.value, s.why, s.source) for n, s in sorted(environment.items())),
        reason=f"{why_profile} {why_transport}",
        engine=tuple(
            Argument(e, n, s.value, s.why, s.source)
            for e in profiles.ENGINES
            for n, s in sorted(engine[e].items())
        ),
        sms=chosen.sm_budget.sms if chosen and chosen.sm_budget else None,
    )


def apply_env(decision: Decision, environ: MutableMapping[str, str] = os.environ) -> tuple[Conflict, ...]:
    """Set the decision's variables where nothing is set yet; nothing that is set is changed.

    Must run before NCCL starts. Returns the variables whose present value differs, for the caller to report
    once.
    """
    conflicts = find_conflicts(decision, environ)
    for item in decision.env:
        environ.setdefault(item.name, item.value)
    return conflicts


def find_conflicts(decision: Decision, environ: Mapping[str, str]) -> tuple[Conflict, ...]:
    """What `apply_env` would return, without setting anything."""
    return tuple(
        Conflict(item.name, environ[item.name], item.value, item.why)
        for item in decision.env
        if environ.get(item.name, item.value) != item.value
    )


def check_agreement(records: Sequence[Record]) -> None:
    """Raise EpConfigError, with every difference and its ranks, unless the ranks can decide alike."""
    if not records:
        raise EpConfigError("there are no records to decide from")
    views: dict[str, list[str]] = {}
    for rank, record in enumerate(records):
        view = {f"{name} version": text for name, text in record.versions.items()}
        view.update(record.environment)
        view["hardware profile files"] = record.profiles_digest
        view["computes on"] = "a GPU" if record.used_gpus() else "the CPU"
        for key, text in view.items():
            views.setdefault(key, [""] * len(records))[rank] = text
    differences = []
    for key, texts in sorted(views.items()):
        if len(set(texts)) > 1:
            sides = [
                f"{text or 'nothing'} on {_ranks(r for r, t in enumerate(texts) if t == text)}"
                for text in dict.fromkeys(texts)
            ]
            differences.append(f"{key}: {', '.join(sides)}")
    if differences:
        raise EpConfigError(f"the ranks of the group are not set up alike: {'; '.join(differences)}")


def gather(records: Sequence[Record]) -> Facts:
    """Facts about the group. Only the GPUs that the group uses count, and the links between them."""
    hosts: dict[str, list[Record]] = {}
    for record in records:
        hosts.setdefault(record.boot_id or record.host, []).append(record)
    shared = {(record.boot_id or record.host, record.shared_memory) for record in records}
    fabric = {record.fabric_works for record in records}
    return Facts(
        gpus="all" if all(record.used_gpus() for record in records) else "none",
        several_gpus=bool(_verdicts(hosts.values(), lambda link: True)),
        nvlink=_share(hosts.values(), lambda link: link.nvlink),
        peer_access=_share(hosts.values(), lambda link: link.peer_works),
        pcie_switch=_share(
            hosts.values(), lambda link: link.ancestor in ("LOC", "PIX", "PXB") if link.ancestor else None
        ),
        several_hosts=len(hosts) > 1,
        hca=all(any(record.hcas for record in host) for host in hosts.values()),
        fabric=False if False in fabric else None if None in fabric else True,
        cuda_driver=_lowest(record.cuda_driver for record in records),
        nccl=_lowest(record.versions.get("nccl", "") for record in records),
        shares_memory=len(shared) == 1,
        hosts=len(hosts),
    )


def unmet(condition: Condition, facts: Facts) -> list[str]:
    """The parts of ``condition`` that do not hold, in words; an empty list means that it holds."""
    missing = []
    for name in Condition.__struct_fields__:
        wanted = getattr(condition, name)
        if wanted is None:
            continue
        if name.endswith(("_below", "_at_least")):
            what, below = (
                (name[: -len("_below")], True)
                if name.endswith("_below")
                else (name[: -len("_at_least")], False)
            )
            found = getattr(facts, what)
            ok = found is not None and (profiles.version(found) < profiles.version(wanted)) == below
        else:
            found = getattr(facts, name)
            ok = found == wanted
        if not ok:
            missing.append(f"{name} must be {_word(wanted)} and is {_word(found)}")
    return missing


def _recognise(known: Sequence[Profile], facts: Facts) -> tuple[Profile | None, str]:
    misses = []
    for profile in known:
        if profile.recognition is None:
            continue
        missing = unmet(profile.recognition.require, facts)
        if not missing:
            fits = profile.recognition.require
            held = [
                f"{n} is {_word(getattr(fits, n))}"
                for n in fits.__struct_fields__
                if getattr(fits, n) is not None
            ]
            return profile, f"Profile {profile.name}: {', '.join(held)}."
        misses.append(f"{profile.name}: {missing[0]}")
    return None, f"No profile fits this machine ({'; '.join(misses)}), so nothing is set for it."


def _transport(
    records: Sequence[Record],
    facts: Facts,
    profile: Profile | None,
    requested: str,
    available: frozenset[str],
) -> tuple[str, str]:
    asked_by = "the communicator's configuration"
    if requested == "auto":
        requested, asked_by = (
            records[0].environment.get("EP_BACKEND_TRANSPORT", "auto").strip(),
            "EP_BACKEND_TRANSPORT",
        )
    if requested != "auto":
        if requested not in profiles.TRANSPORTS:
            names = ("auto", *profiles.TRANSPORTS)
            raise EpConfigError(
                f"{asked_by} asks for the unknown transport {requested!r}{env.nearest(requested, names)}"
                f" (known: {', '.join(names)})"
            )
        obstacle = _obstacle(requested, records, facts, available)
        if obstacle:
            raise EpConfigError(f"{asked_by} asks for transport {requested!r}, but {obstacle}")
        return requested, f"Transport {requested}: asked for by {asked_by}."
    together = facts.shares_memory and not facts.several_hosts
    place = "inside one machine" if together else f"across {facts.hosts} machines"
    if not facts.several_hosts and not facts.shares_memory:
        place = "between ranks that share no memory (containers? start them with --ipc=host --network=host)"
    wishes: tuple[str, ...] = ()
    if profile is not None:
        wishes = profile.transport.inside if together else profile.transport.across
    passed: list[str] = []
    for wish in (*wishes, "collective"):  # which every build has and every group can use
        obstacle = _obstacle(wish, records, facts, available)
        if not obstacle:
            passed_over = f"; passed over: {'; '.join(passed)}" if passed else ""
            return wish, f"Transport {wish}: {place}{passed_over}."
        passed.append(f"{wish}, because {obstacle}")
    raise EpConfigError(f"no transport can serve this group {place}: {'; '.join(dict.fromkeys(passed))}")


def _obstacle(transport: str, records: Sequence[Record], facts: Facts, available: frozenset[str]) -> str:
    """Why this group cannot use ``transport``, or an empty text."""
    if transport not in available:
        return f"it is not in this build, which has {' and '.join(sorted(available)) or 'none'}"
    if transport == "peer" and facts.several_hosts:
        return "this version maps GPU memory inside one machine only"
    if transport in ("cpu", "host") and not facts.shares_memory:
        return "the ranks share no memory"
    if transport == "cpu":
        for rank, record in enumerate(records):
            if record.device and record.device != "cpu":
                return f"it moves CPU tensors and rank {rank} computes on {record.device}"
    if transport in ("host", "peer") and facts.gpus == "none":
        return "it moves GPU tensors and no rank computes on a GPU"
    return ""


def _settings(
    profile: Profile | None, facts: Facts
) -> tuple[dict[str, Setting], dict[str, dict[str, Setting]]]:
    environment: dict[str, Setting] = {}
    engine: dict[str, dict[str, Setting]] = {name: {} for name in profiles.ENGINES}
    if profile is not None:
        blocks: list[Any] = [
            profile,
            *(block for block in profile.conditional if not unmet(block.when, facts)),
        ]
        for block in blocks:
            environment.update(block.environment)
            for name in profiles.ENGINES:
                engine[name].update(getattr(block.engine, name))
    return environment, engine


def _share(hosts: Iterable[Sequence[Record]], judge: Any) -> str | None:
    """How many pairs of used GPUs in a host satisfy ``judge``: none, some, all; None if one is unknown."""
    verdicts = _verdicts(hosts, judge)
    if None in verdicts:
        return None
    if verdicts == {True}:
        return "all"
    return "some" if True in verdicts else "none"


def _verdicts(hosts: Iterable[Sequence[Record]], judge: Any) -> set[bool | None]:
    """What ``judge`` says of the pairs of used GPUs in each host; empty where no host has a pair."""
    verdicts: set[bool | None] = set()
    for records in hosts:
        known: dict[frozenset[str], bool | None] = {}
        for link in (link for record in records for link in record.links):
            verdict = judge(link)
            pair = frozenset((link.a, link.b))
            # Ranks of one host may differ in what they were told; the worse answer counts.
            known[pair] = verdict if known.get(pair, True) is not False else False
        used = sorted({uuid for record in records for uuid in record.used_gpus()})
        if len(used) == 1:
            # One GPU of this host: how it reaches its neighbours tells what machine it is.
            verdicts.update(verdict for pair, verdict in known.items() if used[0] in pair)
        verdicts.update(known.get(frozenset((a, b))) for i, a in enumerate(used) for b in used[i + 1 :])
    return verdicts


def _lowest(texts: Iterable[str]) -> str | None:
    return min((text for text in texts if text), key=profiles.version, default=None)


def _word(value: Any) -> str:
    return {None: "unknown", True: "true", False: "false"}.get(value, str(value))


def _ranks(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0, 2-5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(str(r) for r in run) for run in runs)
    return f"rank {text}" if text.isdecimal() else f"ranks {text}"
