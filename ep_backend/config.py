"""What a communicator is made for. Equal on all ranks; checked when it is made, not when it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ep_backend import env
from ep_backend._native import DTYPES, LAYOUTS, MAX_WORLD
from ep_backend.errors import EpConfigError

SCALE_BLOCK = 128  # elements that share one fp8 scale: csrc/common/numerics.h
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS, MAX_TOP_K, MAX_HIDDEN, MAX_TOKENS = 1024, 16, 16384, 16384
MAX_ROW_BYTES = 4 * MAX_HIDDEN  # of opaque rows: as long as the longest of the others
MAX_CHUNK_SCALE = 4.0  # and its inverse is the least
OF_SUMS = {
    "payload": torch.bfloat16,
    "payload_bytes": None,
    "scale_bytes": 0,
    "quantization": None,
    "layout": "rank_major",
    "expert_ids": "global",
    "pad_id": -1,
}  # what a configuration with sums_only must have
MAX_TIMEOUT_S = 86400  # a day, as for EP_BACKEND_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class EpConfig:
    """Shapes, number formats and behaviour of a communicator. Raises EpConfigError if they do not fit
    together."""

    num_experts: int
    """Experts of all ranks together, at most 1024."""
    top_k: int
    """Experts of a token, at most 16."""
    hidden_size: int
    """Elements of a row that combine takes and returns; also of a dispatched row unless the payload is
    opaque."""
    max_tokens_per_rank: int
    """Most tokens that a rank dispatches in one call, at most 16384. Windows are sized for it."""
    payload: torch.dtype = torch.bfloat16
    """dtype of ``x`` in dispatch: float32, float16, bfloat16, float8_e4m3fn (the caller quantised it and
    gives scales) or uint8 (opaque bytes)."""
    quantization: str | None = None
    """"fp8_block128": dispatch turns a float payload into float8_e4m3fn with one float32 scale per 1x128
    block."""
    payload_bytes: int | None = None
    """Bytes of an opaque row; a multiple of 16."""
    scale_bytes: int = 0
    """Bytes of the opaque scales of an opaque row; a multiple of 4."""
    out_dtype: torch.dtype | None = None
    """dtype of what combine returns. None: the payload's if that is a float32, float16 or bfloat16, else
    bfloat16."""
    wire_dtype: torch.dtype | None = None
    """dtype of the sums that travel back. None: ``out_dtype``. float32 is the more exact option."""
    layout: str = "rank_major"
    """"rank_major", "compact" or "expert_major": see ``Received``."""
    expert_ids: str = "local"
    """Received expert ids: "local" count this rank's experts, "global" are as the router gave them, those of
    other ranks too."""
    pad_id: int = -1
    """Received id of none: everywhere in slots without a token and in rows without an expert of this rank;
    with local ids, of experts of other ranks."""
    expert_map: tuple[int, ...] | None = None
    """Rank of each expert. None: contiguous, the first ``num_experts % world`` ranks hold one more."""
    scales_by_column: bool = False
    """Whether received scales of fp8 rows, expert-major, are one column after the other in memory, as GEMMs
    with scales of blocks read them: a transposed view of the same shape."""
    sums_only: bool = False
    """Only ``exchange_sums`` and ``exchange_sums_send`` can be called. There are no rows of its own, so
    ``payload`` and what belongs to it stay as they are by default, and so do ``layout`` and ``pad_id``;
    ``expert_ids`` must be "global"."""
    num_channels: int = 1
    """Exchanges that may be open at once, each with windows of its own."""
    num_sms: int | None = None
    """SMs of a GPU that an exchange may use. None: EP_BACKEND_NUM_SMS, else the budget of a profile that was
    named, else what `ep-backend tune` has chosen for this shape on this machine, else all of them."""
    chunk_scale: float | None = None
    """Size of the chunks that a GPU's kernels divide a call into, against their own choice; from 1/4 to 4.
    None: what `ep-backend tune` has chosen together with the number of SMs, where that is used, else 1."""
    timeout_s: float | None = None
    """Seconds a rank waits for a peer. None: EP_BACKEND_TIMEOUT_S."""
    transport: str = "auto"
    """Name of a transport, or "auto": EP_BACKEND_TRANSPORT, else what suits the machine."""

    def __post_init__(self) -> None:
        _check_range("num_experts", self.num_experts, MAX_EXPERTS)
        _check_range("top_k", self.top_k, min(MAX_TOP_K, self.num_experts))
        _check_range("hidden_size", self.hidden_size, MAX_HIDDEN)
        _check_range("max_tokens_per_rank", self.max_tokens_per_rank, MAX_TOKENS)
        _check_range("num_channels", self.num_channels, 16)
        if self.num_sms is not None:
            _check_range("num_sms", self.num_sms, 1024)
        if self.chunk_scale is not None and not _within(
            self.chunk_scale, 1 / MAX_CHUNK_SCALE, MAX_CHUNK_SCALE
        ):
            raise EpConfigError(
                f"chunk_scale is {self.chunk_scale!r}; a number from {1 / MAX_CHUNK_SCALE:g} to "
                f"{MAX_CHUNK_SCALE:g} was wanted"
            )
        _check_choice("layout", self.layout, tuple(LAYOUTS))
        _check_choice("expert_ids", self.expert_ids, ("local", "global"))
        _check_choice("payload", self.payload, tuple(DTYPES))
        _check_choice("quantization", self.quantization, (None, "fp8_block128"))
        _check_choice("out_dtype", self.out_dtype, (None, *FLOATS))
        _check_choice("wire_dtype", self.wire_dtype, (None, *FLOATS))
        if self.timeout_s is not None and (wrong := wrong_timeout(self.timeout_s)):
            raise EpConfigError(f"timeout_s is {wrong}")
        if not _whole(self.pad_id) or not -(2**31) <= self.pad_id < 2**31:
            raise EpConfigError(f"pad_id is {self.pad_id!r}; a 32-bit whole number was wanted")
        if self.expert_map is not None:
            if isinstance(self.expert_map, str) or not isinstance(self.expert_map, Sequence):
                raise EpConfigError(f"expert_map is {self.expert_map!r}; a tuple of ranks was wanted")
            object.__setattr__(self, "expert_map", tuple(self.expert_map))
            if len(self.expert_map) != self.num_experts or not all(map(_whole, self.expert_map)):
                raise EpConfigError(
                    f"expert_map has {len(self.expert_map)} entries; one rank for each of the "
                    f"{self.num_experts} experts was wanted"
                )
        if not isinstance(self.transport, str):
            raise EpConfigError(f"transport is {self.transport!r}; a name was wanted")
        if self.quantization and self.payload not in FLOATS:
            raise EpConfigError(f"quantization {self.quantization} needs a float payload, not {self.payload}")
        if self.scales_by_column and not (self.is_fp8 and self.layout == "expert_major"):
            raise EpConfigError("scales_by_column is for fp8 rows in the layout expert_major")
        if self.is_fp8 and self.hidden_size % SCALE_BLOCK:
            raise EpConfigError(
                f"fp8 needs a hidden_size that is a multiple of {SCALE_BLOCK}, not {self.hidden_size}"
            )
        if not isinstance(self.sums_only, bool):
            raise EpConfigError(f"sums_only is {self.sums_only!r}; True or False was wanted")
        if self.sums_only:
            for name, wanted in OF_SUMS.items():
                if (value := getattr(self, name)) != wanted:
                    raise EpConfigError(f"{name} is {value!r}; with sums_only {wanted!r} was wanted")
        elif self.is_opaque:
            if self.payload_bytes is None:
                raise EpConfigError("a uint8 payload is opaque and needs payload_bytes")
            _check_range("payload_bytes", self.payload_bytes, MAX_ROW_BYTES)
            if self.scale_bytes != 0:
                _check_range("scale_bytes", self.scale_bytes, MAX_ROW_BYTES)
            if self.scale_bytes % 4:
                raise EpConfigError(f"scale_bytes is {self.scale_bytes}; a multiple of 4 was wanted")
        elif self.payload_bytes is not None or self.scale_bytes:
            raise EpConfigError(
                "payload_bytes and scale_bytes are for a uint8 payload; others follow from hidden_size"
            )
        for name, size in (
            ("a dispatched row", self.row_bytes),
            ("a row on the way back", self.wire_row_bytes),
        ):
            if size % 16:
                raise EpConfigError(
                    f"{name} has {size} bytes; a multiple of 16 was wanted: change hidden_size or dtype"
                )

    @property
    def is_opaque(self) -> bool:
        return self.payload == torch.uint8

    @property
    def is_fp8(self) -> bool:
        return self.quantization is not None or self.payload == torch.float8_e4m3fn

    @property
    def x_dtype(self) -> torch.dtype:
        """dtype of what a transport dispatches: the payload, or, with ``sums_only``, bytes that say
        nothing."""
        return torch.uint8 if self.sums_only else self.payload

    @property
    def received_dtype(self) -> torch.dtype:
        """dtype of received rows: what stands in the window."""
        return torch.float8_e4m3fn if self.is_fp8 else self.x_dtype

    @property
    def row_width(self) -> int:
        """Elements of a dispatched row."""
        if self.sums_only:
            return -(-8 * self.top_k // 16) * 16  # a word for each weight: csrc/common/layout.h
        return self.payload_bytes if self.payload_bytes is not None else self.hidden_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a dispatched row in the window."""
        return self.row_width * self.received_dtype.itemsize

    @property
    def row_scale_bytes(self) -> int:
        """Bytes of the scales of a dispatched row in the window; 0 if it has none."""
        return self.hidden_size // SCALE_BLOCK * 4 if self.is_fp8 else self.scale_bytes

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.is_fp8 else torch.uint8

    @property
    def scale_width(self) -> int:
        """Elements of the scales of a dispatched row."""
        return self.row_scale_bytes // self.scale_dtype.itemsize

    @property
    def result_dtype(self) -> torch.dtype:
        if self.out_dtype is not None:
            return self.out_dtype
        return self.payload if self.payload in FLOATS else torch.bfloat16

    @property
    def sum_dtype(self) -> torch.dtype:
        """dtype of the sums that travel back."""
        return self.wire_dtype or self.result_dtype

    @property
    def wire_row_bytes(self) -> int:
        return self.hidden_size * self.sum_dtype.itemsize

    def timeout(self) -> float:
        """Seconds a rank waits for a peer."""
        return float(env.get("EP_BACKEND_TIMEOUT_S")) if self.timeout_s is None else self.timeout_s

    def expert_ranks(self, world: int) -> tuple[int, ...]:
        """Rank of each expert. Raises EpConfigError if ``expert_map`` does not fit the group."""
        if world > MAX_WORLD:
            raise EpConfigError(f"the group has {world} ranks; at most {MAX_WORLD} are possible")
        if self.expert_map is not None:
            wrong = [r for r in self.expert_map if not 0 <= r < world]
            if wrong:
                raise EpConfigError(f"expert_map names rank {wrong[0]}; the group has ranks 0 to {world - 1}")
            return tuple(self.expert_map)
        base, more = divmod(self.num_experts, world)
        return tuple(r for r in range(world) for _ in range(base + (r < more)))

    def window_shape(self, world: int, flags_per_source: int = 1) -> list[int]:
        """The fields of ``ExchangeShape`` (csrc/common/layout.h) in order."""
        weights_back = 0
        return [
            world,
            self.top_k,
            self.max_tokens_per_rank,
            self.row_bytes,
            self.row_scale_bytes,
            self.wire_row_bytes,
            flags_per_source,
            self.num_channels,
            weights_back,
        ]

    def differences(self, other: EpConfig) -> list[str]:
        """What differs, as "name: mine against other's". ``pad_id`` and ``expert_ids`` may: they stay on a
        rank."""
        private = {"pad_id", "expert_ids"}
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return [f"{name}: {a} against {b}" for name, a, b in pairs if a != b and name not in private]


def wrong_timeout(seconds: Any) -> str | None:
    """What is wrong with a timeout, as the end of a sentence; None if nothing is."""
    if _within(seconds, 0, MAX_TIMEOUT_S) and seconds > 0:
        return None
    return f"{seconds!r}; a number of seconds above 0 and at most {MAX_TIMEOUT_S} was wanted"


def _within(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_range(name: str, value: Any, most: int) -> None:
    if not _whole(value) or not 1 <= value <= most:
        raise EpConfigError(f"{name} is {value!r}; a whole number from 1 to {most} was wanted")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise EpConfigError(f"{name} is {value!r}; one of {', '.join(map(str, choices))} was wanted")
