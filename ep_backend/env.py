"""The one registry of environment variables that ep_backend reads or sets.

A variable of kind "read" steers this library and is read through `get`, never through ``os.environ``
directly. A variable of kind "set" belongs to a library below or beside us (NCCL, NVSHMEM); a hardware profile
may give it a value, and only a variable that stands here may be given one.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from ep_backend.errors import EpConfigError
from ep_backend.transports import TRANSPORTS

PREFIX = "EP_BACKEND_"
APPLIED = "EP_BACKEND_APPLIED"


@dataclass(frozen=True)
class Variable:
    """One environment variable: what it is called, what it may hold, and what it does.

    ``minimum`` and ``maximum`` are inclusive and concern numbers; ``choices`` lists every accepted text.
    ``per_host``: hosts may need different values, so the ranks of a group need not agree on it.
    """

    name: str
    kind: Literal["read", "set"]
    type: Literal["str", "int", "float"]
    default: str | int | float | None
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    per_host: bool = False

    def parse(self, text: str) -> Any:
        """``text`` as the variable's type. Raises EpConfigError with what came and what was wanted."""
        value: Any = text.strip()
        if self.type != "str":
            try:
                value = int(value) if self.type == "int" else float(value)
            except ValueError:
                raise self._error(text) from None
            if not math.isfinite(value):
                raise self._error(text)
            if self.minimum is not None and value < self.minimum:
                raise self._error(text)
            if self.maximum is not None and value > self.maximum:
                raise self._error(text)
        elif (self.choices and value not in self.choices) or (self._one_word and text.split() != [text]):
            raise self._error(text)
        return value

    @property
    def _one_word(self) -> bool:
        """Blanks separate what `apply` notes, and mean nothing in lists for other libraries."""
        return self.kind == "set" and self.type == "str" and not self.choices

    @property
    def wanted(self) -> str:
        """What an acceptable value looks like, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self._one_word:
            return "a text without blanks"
        words = {"str": "a text", "int": "a whole number", "float": "a number"}[self.type]
        if self.minimum is not None:
            words += f" from {self.minimum:g}"
        if self.maximum is not None:
            words += f" to {self.maximum:g}"
        return words

    def _error(self, text: str) -> EpConfigError:
        hint = nearest(text.strip(), self.choices) if self.choices else ""
        return EpConfigError(f"{self.name}={text!r} is not usable: wanted {self.wanted}{hint}")


def nearest(word: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the name most like ``word``, or an empty text if none is like it."""
    by_lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(word[:100].lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


def _read(
    name: str, type: Literal["str", "int", "float"], default: Any, help: str, **limits: Any
) -> Variable:
    return Variable(name, "read", type, default, help, **limits)


def _set(name: str, help: str, *, choices: tuple[str, ...] = (), maximum: int | None = None) -> Variable:
    if choices:
        return Variable(name, "set", "str", None, help, choices=choices)
    return Variable(name, "set", "int", None, help, minimum=0, maximum=maximum)


def _set_text(name: str, help: str, *, per_host: bool = False) -> Variable:
    return Variable(name, "set", "str", None, help, per_host=per_host)


_SWITCH = ("0", "1")

# What each foreign variable means: docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html and
# docs.nvidia.com/nvshmem/api/gen/env.html; GLOO_SOCKET_IFNAME:
# docs.pytorch.org/docs/stable/distributed.html#choosing-the-network-interface-to-use.
VARIABLES: tuple[Variable, ...] = (
    _read(
        "EP_BACKEND_TIMEOUT_S",
        "float",
        30.0,
        "Seconds that a wait for another rank may last before EpTimeoutError.",
        minimum=0.001,
        maximum=86400,
    ),
    _read(
        "EP_BACKEND_STARTUP_TIMEOUT_S",
        "float",
        300.0,
        "The same deadline until an engine is ready to serve, and of meetings when communicators are made.",
        minimum=0.001,
        maximum=86400,
    ),
    _read(
        "EP_BACKEND_TRANSPORT",
        "str",
        "auto",
        "Transport to use: auto lets the profile decide, a name forces one.",
        choices=("auto", *TRANSPORTS),
    ),
    _read(
        "EP_BACKEND_NODE",
        "str",
        "",
        "Divides a machine: ranks with another name count as on another one. NCCL heeds NCCL_HOSTID.",
    ),
    _read(
        "EP_BACKEND_PROFILE",
        "str",
        "auto",
        "Hardware profile: auto recognises it; a name or alias forces one; a path adds a TOML file of yours.",
    ),
    _read(
        "EP_BACKEND_PEER_ACCESS",
        "str",
        "auto",
        "auto: peer access between GPUs counts where it works; 0: as if it had failed everywhere.",
        choices=("auto", "0"),
    ),
    _read(
        "EP_BACKEND_PEER_ORDER",
        "str",
        "auto",
        "How transport peer stores: each row to all its ranks, or rank after rank; auto: what was faster.",
        choices=("auto", "together", "staggered"),
    ),
    _read(
        "EP_BACKEND_NUM_SMS",
        "int",
        None,
        "SMs of a GPU that an exchange may use; 0: no limit. Not set: what was tuned, or a profile says.",
        minimum=0,
        maximum=1024,
    ),
    _read(
        "EP_BACKEND_TRAFFIC_CLASS",
        "int",
        None,
        "Traffic class of what transport collective sends through NCCL; on InfiniBand its service level.",
        minimum=0,
        maximum=255,
    ),
    _read(
        "EP_BACKEND_CUDA",
        "str",
        "auto",
        "At build time: auto builds CUDA kernels where nvcc is found, 0 never, 1 with NVIDIA's wheels.",
        choices=("auto", "0", "1"),
    ),
    _read(
        "EP_BACKEND_PROVIDE_DEEP_EP",
        "str",
        "0",
        "1: in vLLM and SGLang, import deep_ep gives ep_backend.compat.deep_ep; not beside DeepEP itself.",
        choices=_SWITCH,
    ),
    _read(
        "EP_BACKEND_TEST_SCALE_COMBINE",
        "float",
        1.0,
        "Tests only: engine adapters multiply the combined result by this, to see a check fail.",
    ),
    _read(
        APPLIED,
        "str",
        "",
        "Not for you: NAME=VALUE of what ep_backend itself has set, so that it is not taken for yours.",
    ),
    _read(
        "CUDA_VISIBLE_DEVICES",
        "str",
        "",
        "Read by the probe to learn which GPUs this process uses; it may hold ordinals or UUIDs.",
    ),
    _read(
        "CUDA_DEVICE_ORDER",
        "str",
        "FASTEST_FIRST",
        "CUDA's; read by the probe: unless it is PCI_BUS_ID, the numbers of unlike GPUs may mean others.",
    ),
    _set(
        "NCCL_P2P_LEVEL",
        "Longest path over which NCCL uses peer-to-peer access.",
        choices=("LOC", "NVL", "PIX", "PXB", "PHB", "SYS"),
    ),
    _set("NCCL_P2P_DISABLE", "1 switches NCCL's peer-to-peer transport off.", choices=_SWITCH),
    _set(
        "NCCL_SHM_DISABLE",
        "1 switches NCCL's shared-memory transport off: GPUs of a host without peer access use the network.",
        choices=_SWITCH,
    ),
    _set(
        "NCCL_SHM_USE_CUDA_MEMCPY",
        "1 lets NCCL's shared-memory transport copy with cudaMemcpy.",
        choices=_SWITCH,
    ),
    _set(
        "NCCL_CUMEM_ENABLE",
        "1 lets NCCL allocate with cuMem; needed for windows that peers map.",
        choices=_SWITCH,
    ),
    _set("NCCL_CUMEM_HOST_ENABLE", "1 lets NCCL allocate host memory with cuMem.", choices=_SWITCH),
    _set(
        "NCCL_NVLS_ENABLE", "NVLink SHARP multicast: 0 off, 1 on, 2 NCCL's default.", choices=("0", "1", "2")
    ),
    _set(
        "NCCL_MNNVL_ENABLE", "NVLink across nodes: 0 off, 1 on or fail, 2 automatic.", choices=("0", "1", "2")
    ),
    _set("NCCL_IB_DISABLE", "1 switches NCCL's InfiniBand/RoCE transport off.", choices=_SWITCH),
    _set("NCCL_IB_SL", "InfiniBand service level of NCCL's traffic.", maximum=15),
    _set("NCCL_IB_TC", "InfiniBand/RoCE traffic class of NCCL's traffic.", maximum=255),
    _set("NCCL_IB_ADAPTIVE_ROUTING", "1 lets the fabric route NCCL's packets adaptively.", choices=_SWITCH),
    _set_text(
        "NCCL_IB_HCA",
        "InfiniBand/RoCE adapters for NCCL: prefixes, like mlx5_0:1,mlx5_1; = before them exact, ^ others.",
        per_host=True,
    ),
    Variable(
        "NCCL_IB_GID_INDEX",
        "set",
        "int",
        None,
        "Global identifier that NCCL uses with RoCE; -1 lets NCCL choose.",
        minimum=-1,
        maximum=255,
        per_host=True,
    ),
    _set_text(
        "NCCL_SOCKET_IFNAME",
        "IP interfaces for NCCL: prefixes like eth,ib0; = before them exact names, ^ all others.",
        per_host=True,
    ),
    _set_text(
        "NCCL_ALGO",
        "Algorithms for NCCL, like Ring,Tree; ^ before them: all others. Since 2.24 also by function.",
    ),
    _set_text(
        "NCCL_PROTO",
        "Protocols for NCCL of LL, LL128 and Simple; ^ before them: all others. Since 2.24 also by function.",
    ),
    _set_text(
        "GLOO_SOCKET_IFNAME",
        "IP interfaces for gloo, by name, like eth0,eth1; as many on every rank.",
        per_host=True,
    ),
    _set("NVSHMEM_IB_SL", "InfiniBand service level of NVSHMEM programs beside us.", maximum=15),
    _set(
        "NVSHMEM_CUMEM_HANDLE_TYPE",
        "Kind of handle under which NVSHMEM shares its heap.",
        choices=("FILE_DESCRIPTOR", "FABRIC"),
    ),
)

_BY_NAME = {variable.name: variable for variable in VARIABLES}


def variable(name: str) -> Variable:
    """The registered variable ``name``. Raises EpConfigError, with the nearest name, if there is none."""
    found = _BY_NAME.get(name)
    if found is None:
        raise EpConfigError(f"{name} is not a registered environment variable{nearest(name, _BY_NAME)}")
    return found


def get(name: str, environ: Mapping[str, str] | None = None) -> Any:
    """The parsed value of a variable of kind "read": from the environment, or its default.

    An empty value counts as unset. Raises EpConfigError with what came and what was wanted.
    """
    entry = variable(name)
    if entry.kind != "read":
        raise EpConfigError(f"{name} is set by profiles and not read by ep_backend")
    text = (os.environ if environ is None else environ).get(name, "")
    return entry.parse(text) if text.strip() else entry.default


def applied(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of kind "set" that ep_backend has set, here or in a process above, and that still hold that
    value."""
    environ = os.environ if environ is None else environ
    noted = (entry.partition("=") for entry in environ.get(APPLIED, "").split())
    return {
        name: value
        for name, _, value in noted
        if value and environ.get(name) == value and name in _BY_NAME and _BY_NAME[name].kind == "set"
    }


def apply(values: Mapping[str, str], environ: MutableMapping[str, str]) -> None:
    """Set what is not set yet, and note in EP_BACKEND_APPLIED that it was us."""
    ours = applied(environ)
    ours.update((name, value) for name, value in values.items() if name not in environ)
    environ.update(ours)
    environ[APPLIED] = " ".join(f"{name}={value}" for name, value in sorted(ours.items()))


def is_set(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether a variable of kind "read" has a value that is not empty."""
    return bool((os.environ if environ is None else environ).get(variable(name).name, "").strip())


def wrong_values(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """One sentence for each variable that ep_backend reads and whose value it cannot use."""
    wrong = []
    for variable in VARIABLES:
        if variable.kind == "read":
            try:
                get(variable.name, environ)
            except EpConfigError as error:
                wrong.append(str(error))
    return tuple(wrong)


def misspelt(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """One sentence for each variable with our prefix and no meaning: mostly typing errors."""
    names = sorted(os.environ if environ is None else environ)
    ours = [known for known in _BY_NAME if known.startswith(PREFIX)]
    return tuple(
        f"{name} is set but means nothing to ep_backend{nearest(name, ours)}"
        for name in names
        if name.startswith(PREFIX) and name not in _BY_NAME
    )
