"""Everything that ep_backend raises on purpose."""

from __future__ import annotations

from functools import partial
from typing import Any


class EpError(RuntimeError):
    """Base of all errors of ep_backend."""


class EpArgumentError(EpError, ValueError):
    """A call's argument is wrong: shape, dtype, device, an expert id, too many tokens. Nothing has been
    sent."""


class EpConfigError(EpError, ValueError):
    """A configuration, profile or environment variable is wrong, or ranks have different ones."""


class EpProtocolError(EpError):
    """A peer did something that the exchange protocol does not allow, such as not taking part in a
    combine."""


class EpTimeoutError(EpError, TimeoutError):
    """A peer did not answer before the deadline, or the connection to it was lost. The communicator is
    stopped until ``recover()`` or a new one.

    Attributes: ``rank`` (who raises), ``peer`` (who is blamed; -1 if it is not known), ``phase``
    ("dispatch", "combine" or "a host sum"), ``channel``, ``epoch_expected``, ``epoch_seen``, ``waited_s``
    (seconds), ``reported_by`` (the rank whose deadline passed first), ``missing`` (all ranks whose flag had
    not come), ``lost`` (whether torch.distributed failed before the deadline: the peer has usually
    ended, or has given up first).
    """

    def __init__(
        self,
        *,
        rank: int,
        peer: int,
        phase: str,
        channel: int = 0,
        epoch_expected: int = -1,
        epoch_seen: int = -1,
        waited_s: float = 0.0,
        reported_by: int | None = None,
        missing: tuple[int, ...] = (),
        lost: bool = False,
        detail: str = "",
    ) -> None:
        self.rank, self.peer, self.phase, self.channel = rank, peer, phase, channel
        self.epoch_expected, self.epoch_seen, self.waited_s = epoch_expected, epoch_seen, waited_s
        self.reported_by = rank if reported_by is None else reported_by
        self.missing, self.lost, self.detail = missing, lost, detail
        who = f"rank {peer}" if peer >= 0 else "a peer"
        if lost:
            text = f"rank {rank} lost the connection to {who} in {phase}, after {waited_s:.1f} s"
        elif self.reported_by == rank:
            text = f"rank {rank} waited {waited_s:.1f} s in {phase} for {who}"
        else:
            text = f"rank {rank} stopped in {phase}: rank {self.reported_by} stopped first and blames {who}"
        if epoch_expected >= 0:
            text += f" (channel {channel}, exchange {epoch_expected}, last seen {epoch_seen})"
        if len(missing) > 1:
            text += f"; nothing came from ranks {', '.join(map(str, missing))}"
        super().__init__(text + (f": {detail}" if detail else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would pickle the message alone; engines send exceptions between processes.
        fields = (
            "rank",
            "peer",
            "phase",
            "channel",
            "epoch_expected",
            "epoch_seen",
            "waited_s",
            "reported_by",
        )
        return partial(
            EpTimeoutError,
            **{name: getattr(self, name) for name in (*fields, "missing", "lost", "detail")},
        ), ()
