"""What `ep-backend tune` has chosen on this machine, by shape: a JSON file in the user's cache folder.

The probe reads it. What is in it counts for the driver, the GPUs and the build of this library with which
it was measured, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from ep_backend.checks import cache
from ep_backend.nvml import Gpu

if TYPE_CHECKING:
    from ep_backend.config import EpConfig  # would load torch


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What the best choice depends on, beside the machine. ``row_bytes`` of a dispatched row with its
    scales, ``wire_row_bytes`` of one on the way back. ``tokens``: the most that a rank dispatches."""

    ranks: int
    hidden: int
    experts: int
    topk: int
    row_bytes: int
    wire_row_bytes: int
    layout: str
    tokens: int

    @staticmethod
    def of(config: EpConfig, ranks: int) -> Shape:
        return Shape(
            ranks=ranks,
            hidden=config.hidden_size,
            experts=config.num_experts,
            topk=config.top_k,
            row_bytes=config.row_bytes + config.row_scale_bytes,
            wire_row_bytes=config.wire_row_bytes,
            layout=config.layout,
            tokens=config.max_tokens_per_rank,
        )


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A choice. ``num_sms`` None: no limit was best. ``chunk_scale``: of EpConfig, with this number of SMs.
    ``date``: when, as YYYY-MM-DD."""

    shape: Shape
    transport: str
    num_sms: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None
    date: str
    chunk_scale: Annotated[float, msgspec.Meta(ge=0.25, le=4)] = 1.0

    def __str__(self) -> str:
        of = self.shape
        return (
            f"SMs: {choice(self.num_sms, self.chunk_scale)} ({self.date}) for {self.transport}, "
            f"{of.ranks} ranks, hidden {of.hidden}, {of.experts} experts, top-{of.topk}, rows of "
            f"{of.row_bytes} bytes and {of.wire_row_bytes} back, {of.layout}, up to {of.tokens} tokens"
        )

    def suits(self, shape: Shape, transport: str) -> bool:
        """Whether it was measured for this. It holds for fewer tokens too: no measured number was slow."""
        alike = msgspec.structs.replace(shape, tokens=self.shape.tokens) == self.shape
        return alike and shape.tokens <= self.shape.tokens and transport == self.transport


class _File(msgspec.Struct, frozen=True, kw_only=True):
    identity: str
    entries: tuple[Entry, ...]


def limit(num_sms: int | None) -> str:
    """A number of SMs in words."""
    return "no limit" if num_sms is None else str(num_sms)


def choice(num_sms: int | None, chunk_scale: float) -> str:
    """What was chosen, in words."""
    return limit(num_sms) + ("" if chunk_scale == 1 else f", chunks x {chunk_scale:g}")


def load(gpus: Sequence[Gpu], driver: str, environ: Mapping[str, str]) -> tuple[tuple[Entry, ...], str]:
    """What was tuned on this machine as it is, the newest first; and what is wrong with the file, if it
    cannot be used."""
    folder = cache.folder(environ) if gpus else None
    if folder is None:
        return (), ""
    file = cache.file_of(folder, "tuned", gpus)
    try:
        found = msgspec.json.decode(cache.read(file), type=_File)
    except FileNotFoundError:
        return (), ""
    except (OSError, msgspec.DecodeError) as error:
        return (), f"{file} cannot be used ({error}), so nothing that was tuned is; run ep-backend tune again"
    return (found.entries if found.identity == _identity(gpus, driver) else ()), ""


def store(entry: Entry, gpus: Sequence[Gpu], driver: str, environ: Mapping[str, str]) -> Path:
    """Add ``entry``, in the place of one for the same. Returns the file. Raises OSError."""
    folder = cache.folder(environ)
    if folder is None:
        raise OSError("there is no cache folder to write to")
    before, _ = load(gpus, driver, environ)
    kept = (e for e in before if (e.shape, e.transport) != (entry.shape, entry.transport))
    file = cache.file_of(folder, "tuned", gpus)
    content = _File(identity=_identity(gpus, driver), entries=(entry, *kept))
    cache.write(file, msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    return file


def find(entries: Sequence[Entry], shape: Shape, transport: str) -> Entry | None:
    """The newest that suits."""
    return next((entry for entry in entries if entry.suits(shape, transport)), None)


def _identity(gpus: Sequence[Gpu], driver: str) -> str:
    return cache.identity(gpus, (), driver, "")
