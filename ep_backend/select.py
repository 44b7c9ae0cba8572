"""From the records of all ranks to one decision: profile, transport, environment, and the reason in words.

`select` is pure: the same records give the same decision on every rank, on any machine. `decide` loads the
profiles and calls it. `apply_env` is the only function here that changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import msgspec

from ep_backend import env, profiles, tuned
from ep_backend.errors import EpConfigError
from ep_backend.facts import (
    Facts,
    gather,
    islands,
    nodes,
    order_rates,
    parts,
    peer_group,
    reaches,
    short_of_shared_memory,
    uneven,
    unmet,
    word,
)
from ep_backend.probe import Record
from ep_backend.profiles import Profile, Setting
from ep_backend.transports import OF_GPUS, OLDEST_CUDA, TRANSPORTS

# Transports that exist. The others that profiles name are passed over, and the reason says so. A communicator
# narrows this to what its build has for its device.
AVAILABLE = frozenset({"cpu", "collective", "hier", *OF_GPUS})
OWN_WISH = "the communicator's configuration"
# The staggered order reads a row once for each of its ranks and does without bulk copies: it is chosen only
# where it was so many times faster.
STAGGERED_GAIN = 1.1


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
    """What a group of ranks will use. ``profile`` None: the machine fits none; ``sms`` None: no limit.
    ``chunk_scale``: what was tuned with it (EpConfig).
    ``peer_order``: how transport peer stores, "together" or "staggered"; ``peer_group``: ranks, one after
    another, behind one PCIe switch, which then send to one switch at a time. ``misfit``: why a profile that
    was asked for would not have been chosen. ``warnings``: what a user should be told unasked, a sentence
    each.
    """

    profile: str | None
    transport: str
    env: tuple[EnvValue, ...]
    reason: str
    engine: tuple[Argument, ...] = ()
    sms: int | None = None
    chunk_scale: float = 1.0
    peer_order: str = "together"
    peer_group: int = 1
    misfit: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Conflict(msgspec.Struct, frozen=True):
    """A variable that is already set, and not as the decision wants it. The found value stays.

    ``wanted``: the value that the decision has for it; or, as NAME=VALUE, that of another variable, which is
    not set because the two cannot be together.
    """

    name: str
    found: str
    wanted: str
    why: str

    def __str__(self) -> str:
        kept = f"{self.name}={self.found} is kept as it was found"
        return f"{kept}; ep_backend would set {self.wanted}. {self.why}"


def decide(
    records: Sequence[Record],
    requested_transport: str = "auto",
    *,
    requested_profile: str | None = None,
    transport_asked_by: str = OWN_WISH,
    available: frozenset[str] = AVAILABLE,
    shape: tuned.Shape | None = None,
    num_sms: int | None = None,
) -> Decision:
    """Load the profiles and `select`. All ranks get the same answer, or the same error, from equal records.

    ``records``: one per rank, in order of rank. ``requested_transport``: the communicator's own wish; "auto"
    leaves it to EP_BACKEND_TRANSPORT, then to the profile. ``transport_asked_by``: who has that wish, in the
    words of the reader. ``requested_profile``: in place of EP_BACKEND_PROFILE. ``shape``: of the exchanges,
    where that is known; nothing tuned is used otherwise. ``num_sms``: the communicator's own wish. Raises
    EpConfigError: ranks disagree, a profile file is wrong, or what was asked for cannot be had.
    """
    check_agreement(records)
    wish = requested_profile
    asked_by = "the command line"
    if wish is None:
        wish, asked_by = records[0].environment.get("EP_BACKEND_PROFILE", "auto"), "EP_BACKEND_PROFILE"
    try:
        known, name, forced = profiles.load(wish)
    except EpConfigError as error:
        if requested_profile is not None or wish == "auto":
            raise
        raise EpConfigError(f"{asked_by}: {error}") from error
    return select(
        records, known, requested_transport, profile=name, forced=forced, asked_by=asked_by,
        transport_asked_by=transport_asked_by, available=available, shape=shape, num_sms=num_sms,
    )  # fmt: skip


def select(
    records: Sequence[Record],
    known: Iterable[Profile],
    requested: str = "auto",
    *,
    profile: str = "auto",
    forced: bool = True,
    asked_by: str = "EP_BACKEND_PROFILE",
    transport_asked_by: str = OWN_WISH,
    available: frozenset[str] = AVAILABLE,
    shape: tuned.Shape | None = None,
    num_sms: int | None = None,
) -> Decision:
    """Choose profile, transport and environment for a group. Pure.

    ``known``: profiles, tried in the order given by `profiles.in_order`. ``requested``: a transport or
    "auto". ``profile``: a profile's name or alias, or "auto". ``forced``: use it whatever the machine is;
    else it only goes before the others. ``shape``, ``num_sms``: as for `decide`. Raises EpConfigError.
    """
    check_agreement(records)
    refused = env.get("EP_BACKEND_PEER_ACCESS", records[0].environment) == "0"
    facts = gather(records)
    known = profiles.in_order(known)
    chosen, why_profile = _profile(known, facts, profile, forced, asked_by)
    transport, why_transport = _transport(records, facts, chosen, requested, transport_asked_by, available)
    environment, engine = _settings(chosen, facts)
    wished = chosen if profile != "auto" and chosen is profiles.find(profile, known) else None
    limit, chunk_scale, why_sms, doubts = _sms(records, chosen, wished, transport, shape, num_sms)
    order, why_order = _peer_order(records, transport)
    why_level = _keep_from_failed(environment, facts, refused)
    return Decision(
        profile=chosen.name if chosen else None,
        transport=transport,
        env=tuple(EnvValue(n, s.value, s.why, s.source) for n, s in sorted(environment.items())),
        reason=" ".join(
            [
                why_profile,
                why_transport,
                *_ways(records, transport),
                *([why_order] if why_order else []),
                *([why_sms] if why_sms else []),
                *_remarks(facts, transport, refused, why_transport),
                *why_level,
            ]
        ),
        engine=tuple(
            Argument(e, n, s.value, s.why, s.source)
            for e in profiles.ENGINES
            for n, s in sorted(engine[e].items())
        ),
        sms=limit,
        chunk_scale=chunk_scale,
        peer_order=order,
        peer_group=peer_group(records) if order == "staggered" else 1,
        misfit=tuple(unmet(chosen.recognition.require, facts)) if chosen and chosen.recognition else (),
        warnings=doubts,
    )


def apply_env(decision: Decision, environ: MutableMapping[str, str] = os.environ) -> tuple[Conflict, ...]:
    """Set the decision's variables where nothing is set yet; nothing that is set is changed.

    Nor is anything set that one of the user's values makes meaningless, or that would make it so (`opposed`).
    Must run before NCCL starts. Returns the user's own values that differ, for the caller to report once.
    What was set is noted in the environment (`env.applied`): the processes below inherit it and do not take
    it for the user's.
    """
    conflicts = find_conflicts(decision, environ)
    env.apply({item.name: item.value for item in missing(decision, environ)}, environ)
    return conflicts


def missing(decision: Decision, environ: Mapping[str, str]) -> tuple[EnvValue, ...]:
    """What `apply_env` would set."""
    return tuple(item for item in decision.env if item.name not in environ and not opposed(item, environ))


def find_conflicts(decision: Decision, environ: Mapping[str, str]) -> tuple[Conflict, ...]:
    """What `apply_env` would return, without setting anything."""
    ours = env.applied(environ)
    found = []
    for item in decision.env:
        if environ.get(item.name, item.value) != item.value and item.name not in ours:
            found.append(Conflict(item.name, environ[item.name], item.value, item.why))
        elif other := opposed(item, environ):
            why = f"NCCL_P2P_LEVEL means nothing while NCCL_P2P_DISABLE is 1. {item.why}"
            found.append(Conflict(other, environ[other], f"{item.name}={item.value}", why))
    return tuple(found)


def opposed(item: EnvValue, environ: Mapping[str, str]) -> str:
    """The user's own variable beside which ``item`` makes no sense; empty if there is none.

    NCCL_P2P_DISABLE=1 makes a level meaningless, and only LOC says the same.
    """
    other = {"NCCL_P2P_LEVEL": "NCCL_P2P_DISABLE", "NCCL_P2P_DISABLE": "NCCL_P2P_LEVEL"}.get(item.name, "")
    if not environ.get(other, "").strip() or other in env.applied(environ):
        return ""
    both = {item.name: item.value, other: environ[other].strip()}
    return other if both["NCCL_P2P_DISABLE"] == "1" and both["NCCL_P2P_LEVEL"] != "LOC" else ""


def check_agreement(records: Sequence[Record]) -> None:
    """Raise EpConfigError, with every difference and its ranks, unless the ranks can decide alike.

    What ep_backend itself has set on a host follows from what the host is, and hosts may differ. It counts
    only where somebody has a value of their own for the same variable, which must then hold on all ranks.
    """
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
    for rank, record in enumerate(records):
        for name in views.keys() & record.applied.keys():
            views[name][rank] = record.applied[name]
    differences = []
    for key, texts in sorted(views.items()):
        if len(set(texts)) > 1:
            sides = []
            for text in dict.fromkeys(texts):
                ranks = [rank for rank, other in enumerate(texts) if other == text]
                ours = all(key in records[rank].applied for rank in ranks)
                sides.append(
                    f"{text or 'nothing'} on {ranks_in_words(ranks)}{' (set by ep_backend)' if ours else ''}"
                )
            differences.append(f"{key}: {', '.join(sides)}")
    if differences:
        raise EpConfigError(f"the ranks of the group are not set up alike: {'; '.join(differences)}")


def _profile(
    known: Sequence[Profile], facts: Facts, asked: str, forced: bool, asked_by: str
) -> tuple[Profile | None, str]:
    if asked == "auto":
        return _recognise(known, facts)
    first = profiles.find(asked, known)
    missing = unmet(first.recognition.require, facts) if first.recognition else []
    if forced:
        why = f"Profile {first.name}: asked for by {asked_by}."
        return first, why + (f" It would not have been chosen here: {'; '.join(missing)}." if missing else "")
    if not missing:
        return _recognise([first], facts)
    others, why = _recognise([profile for profile in known if profile is not first], facts)
    return others, f"Profile {first.name}, named by {asked_by}, does not fit: {'; '.join(missing)}. {why}"


def _recognise(known: Sequence[Profile], facts: Facts) -> tuple[Profile | None, str]:
    misses = []
    one_gpu = facts.gpus == "all" and not facts.several_gpus and not facts.several_hosts
    for profile in known:
        if profile.recognition is None:
            continue
        missing = unmet(profile.recognition.require, facts)
        if not missing:
            fits = profile.recognition.require
            held = [
                f"{n} is {word(getattr(fits, n))}"
                for n in fits.__struct_fields__
                if getattr(fits, n) is not None
            ]
            return profile, f"Profile {profile.name}: {', '.join(held)}."
        misses.append(f"{profile.name}: {missing[0]}")
    if one_gpu:
        return None, "No profile: they tell how GPUs reach each other, and one GPU has no other."
    return None, f"No profile fits this machine ({'; '.join(misses)}), so none sets anything for it."


def _transport(
    records: Sequence[Record],
    facts: Facts,
    profile: Profile | None,
    requested: str,
    asked_by: str,
    available: frozenset[str],
) -> tuple[str, str]:
    if requested == "auto":
        asked_by = "EP_BACKEND_TRANSPORT"
        requested = env.get(asked_by, records[0].environment)
    if requested != "auto":
        if requested not in TRANSPORTS:
            names = ("auto", *TRANSPORTS)
            raise EpConfigError(
                f"{asked_by} asks for the unknown transport {requested!r}{env.nearest(requested, names)}"
                f" (known: {', '.join(names)})"
            )
        obstacle = _obstacle(requested, records, facts, available)
        if obstacle:
            raise EpConfigError(f"{_asks(asked_by, requested)}{obstacle}")
        return requested, f"Transport {requested}: asked for by {asked_by}."
    together = facts.shares_memory and not facts.several_hosts
    place = "inside one machine" if together else f"across {facts.hosts} machines"
    if not facts.several_hosts and not facts.shares_memory:
        place = (
            "between ranks that share no memory (containers of a machine do with --ipc=host --network=host)"
        )
    wishes: tuple[str, ...] = ()
    if together and facts.gpus == "all":
        wishes = ("host",) if facts.several_gpus else ("peer", "host")  # one alone has no peers to reach
    if profile is not None:
        wishes = profile.transport.inside if together else profile.transport.across
    passed: dict[str, str] = {}
    for wish in dict.fromkeys((*wishes, "collective")):  # collective needs nothing of a group's machines
        obstacle = _obstacle(wish, records, facts, available)
        if not obstacle:
            over = [f"{other}, because {why}" for other, why in passed.items()]
            passed_over = f"; passed over: {'; '.join(over)}" if over else ""
            return wish, f"Transport {wish}: {place}{passed_over}."
        passed[wish] = obstacle
    of_reason = {why: [name for name, other in passed.items() if other == why] for why in passed.values()}
    reasons = [f"{' and '.join(names)}, because {why}" for why, names in of_reason.items()]
    raise EpConfigError(f"no transport can serve this group {place}: {'; '.join(reasons)}")


def _asks(asked_by: str, transport: str) -> str:
    return f"{asked_by} asks for transport {transport!r}, but "


def obstacle_to(transport: str, error: EpConfigError) -> str:
    """Why a communicator that was to use ``transport`` could not, without who asked for it."""
    return str(error).removeprefix(_asks(OWN_WISH, transport))


def _sms(
    records: Sequence[Record],
    profile: Profile | None,
    wished: Profile | None,
    transport: str,
    shape: tuned.Shape | None,
    asked: int | None,
) -> tuple[int | None, float, str, tuple[str, ...]]:
    """How many SMs an exchange may use, None for no limit; the scale of chunks that was tuned with it;
    why, where the reader may wonder; and warnings.

    ``wished``: ``profile``, if somebody named it. In this order: the communicator's own configuration,
    EP_BACKEND_NUM_SMS, the budget of a profile that was named, what was tuned, the budget of one that was
    recognised. The number steers how a call is cut into chunks, so all ranks must have the same.
    """
    if asked is not None:
        return asked, 1.0, "", ()
    wanted: int | None = env.get("EP_BACKEND_NUM_SMS", records[0].environment)
    if wanted is not None:
        sms = wanted or None
        return sms, 1.0, f"SMs of an exchange: {tuned.limit(sms)}, by EP_BACKEND_NUM_SMS.", ()
    budget = profile.sm_budget.sms if profile and profile.sm_budget else None
    if shape is None or transport not in OF_GPUS or (wished and wished.sm_budget):
        return budget, 1.0, "", ()
    problems = tuple(dict.fromkeys(record.tuned_problem for record in records if record.tuned_problem))
    found = [tuned.find(record.tuned_sms, shape, transport) for record in records]
    said = ["nothing" if e is None else tuned.choice(e.num_sms, e.chunk_scale) for e in found]
    if len(set(said)) > 1:
        sides = [
            f"{text} on {ranks_in_words(r for r, t in enumerate(said) if t == text)}"
            for text in dict.fromkeys(said)
        ]
        why = f"The ranks differ in what was tuned for SMs ({', '.join(sides)}), so none of it is used."
        return budget, 1.0, why, (*problems, why)
    if found[0] is None:
        return budget, 1.0, "", problems
    why = f"SMs of an exchange: {said[0]}, tuned on this machine for this shape on {found[0].date}."
    return found[0].num_sms, found[0].chunk_scale, why, problems


def _peer_order(records: Sequence[Record], transport: str) -> tuple[str, str]:
    """How transport peer stores, and why, where the reader may wonder. All ranks must do it alike; where they
    have measured different rates, the staggered order must have been faster for each. Rates of other groups
    behind switches do not count."""
    wanted = env.get("EP_BACKEND_PEER_ORDER", records[0].environment)
    if transport != "peer":
        return "together", ""
    if wanted != "auto":
        return wanted, f"Order of stores: {wanted}, by EP_BACKEND_PEER_ORDER."
    group = peer_group(records)
    known = [one for one in order_rates(records) if one.group == group]
    gains = {one.gain: one for one in known if one.gain is not None}
    least = min(gains, default=1.0)
    if least <= STAGGERED_GAIN:
        return "together", ""
    slower, faster = gains[least].together_bytes_per_s or 0, gains[least].staggered_bytes_per_s or 0
    return "staggered", (
        f"Order of stores: staggered, because these {len(gains[least].gpus)} GPUs, all at the same time, "
        f"each store {faster / 1e9:.1f} GB/s rank after rank and {slower / 1e9:.1f} GB/s to all in turn."
    )


def _ways(records: Sequence[Record], transport: str) -> list[str]:
    """Which GPUs reach each other in a transport where not all do, by the driver's numbers."""
    if transport != "mixed":
        return []
    numbers = {gpu.uuid: str(number) for number, gpu in enumerate(records[0].gpus)}
    found = islands(records)
    if len(found) == 1:
        return ["All rows go from GPU to GPU."]
    together = [
        f"between GPUs {', '.join(numbers.get(uuid, uuid) for uuid in island)}"
        for island in found
        if len(island) > 1
    ]
    return [f"Rows go from GPU to GPU {' and '.join(together)}, and through host memory everywhere else."]


def _remarks(facts: Facts, transport: str, refused: bool, said: str) -> list[str]:
    """What the reader should know beside the choice and has not been told."""
    remarks = []
    if refused and facts.gpus == "all":
        remarks.append("EP_BACKEND_PEER_ACCESS=0: no peer access is used.")
    elif _failure(facts) and _failure(facts) not in said:
        remarks.append(f"T{_failure(facts)[1:]}.")
    if short_of_shared_memory(facts, transport):
        space = (facts.shared_memory_bytes or 0) >> 20
        remarks.append(
            f"/dev/shm has {space} MiB and NCCL may need more to reach GPUs through the host"
            " (containers: start them with --ipc=host or --shm-size=1g)."
        )
    return remarks


def _failure(facts: Facts) -> str:
    """Which pairs of the group's GPUs do not reach each other and why, or an empty text."""
    reasons = (
        ("the data check of peer access failed", facts.failed_links),
        ("the driver offers no peer access", facts.closed_links),
    )
    said = []
    for why, links in reasons:
        named = ", ".join(" and ".join(sorted((link.a, link.b))) for link in links[:3])
        more = f", and {len(links) - 3} more pairs" if len(links) > 3 else ""
        said += [f"{why} between {named}{more}"] if links else []
    return ", and ".join(said)


def _obstacle(transport: str, records: Sequence[Record], facts: Facts, available: frozenset[str]) -> str:
    """Why this group cannot use ``transport``, or an empty text."""
    if transport in OF_GPUS and facts.gpus == "none":
        return "it moves GPU tensors and no rank computes on a GPU"
    if facts.gpus != "none" and not available & OF_GPUS:
        return "this build has no CUDA kernels"
    if transport == "cpu":
        for rank, record in enumerate(records):
            if record.device and record.device != "cpu":
                return f"it moves CPU tensors and rank {rank} computes on {record.device}"
        if facts.gpus != "none":
            return "it moves CPU tensors and the ranks compute on GPUs"
    if transport not in available:
        *others, last = [name for name in TRANSPORTS if name in available] or ["none"]
        return f"it is not in this build, which has {', '.join(others)}{' and ' * bool(others)}{last}"
    if transport == "peer" and facts.several_hosts:
        return "this version maps GPU memory inside one machine only"
    if transport in ("cpu", "host", "mixed") and not facts.shares_memory:
        return "the ranks share no memory"
    if facts.gpus != "none" and (old := _old_driver(records)):
        return old
    if transport == "hier":
        return uneven(nodes(records))
    if transport in ("peer", "mixed") and (why := _no_peer_access(records)):
        return why
    # One record may stand for all GPUs of a machine, and ranks may share a GPU.
    if transport == "mixed" and all(len(each) == 1 for each in (*islands(records), *parts(records))):
        return "no two of its GPUs are known to reach each other's memory"
    return _failure(facts) if transport == "peer" else ""


def _old_driver(records: Sequence[Record]) -> str:
    """The kernels are one CUDA 13 binary; an older driver cannot load it."""
    for rank, record in enumerate(records):
        if record.cuda_driver and profiles.version(record.cuda_driver) < OLDEST_CUDA:
            return (
                f"rank {rank} has NVIDIA driver {record.driver}, which serves CUDA {record.cuda_driver}; "
                "driver 580 or newer (CUDA 13.0) was wanted"
            )
    return ""


def _no_peer_access(records: Sequence[Record]) -> str:
    if records[0].environment.get("EP_BACKEND_PEER_ACCESS", "").strip() == "0":
        return "EP_BACKEND_PEER_ACCESS=0 forbids it"
    for rank, record in enumerate(records):
        sliced = [gpu.uuid for gpu in record.gpus if gpu.mig and gpu.uuid in record.used_gpus()]
        if len(records) > 1 and (sliced or any(uuid.startswith("MIG-") for uuid in record.used_gpus())):
            return f"rank {rank} uses a slice of a GPU (MIG), which reaches no other"
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


def _keep_from_failed(environment: dict[str, Setting], facts: Facts, refused: bool) -> list[str]:
    """Put level LOC into ``environment`` where NCCL would else use peer access that failed, and say so.

    A profile is chosen by what most links are, and its level (or none, which leaves NCCL its own) may reach a
    pair whose data check failed. LOC is never, like NCCL_P2P_DISABLE=1, and a level of the user's own takes
    its place. ``refused``: the user forbids peer access, so that nothing may be reached; what the links are
    is not known then.
    """
    level, off = environment.get("NCCL_P2P_LEVEL"), environment.get("NCCL_P2P_DISABLE")
    if not facts.failed_links or (off is not None and off.value == "1"):
        return []
    if level is None:
        who, reached = "NCCL by itself", True
    else:
        who, reached = f"level {level.value}", any(reaches(level.value, link) for link in facts.failed_links)
    why = f"{who} reaches GPUs between which the data check failed"
    if refused:
        reached = level is None or level.value != "LOC"
        why = f"{who} uses peer access, and EP_BACKEND_PEER_ACCESS=0 forbids it"
    if not reached:
        return []
    environment["NCCL_P2P_LEVEL"] = Setting(
        value="LOC",
        why=f"Never peer access: {why}.",
        source="https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-p2p-level",
    )
    return [f"NCCL_P2P_LEVEL=LOC, because {why}."]


def ranks_in_words(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0, 2-5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(str(r) for r in run) for run in runs)
    return f"rank {text}" if text.isdecimal() else f"ranks {text}"
