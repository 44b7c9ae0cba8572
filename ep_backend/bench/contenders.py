"""What the exchange benchmark compares: the library's transports, and what others do, its peers."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ep_backend import Communicator, Handle, Received
from ep_backend.bench import workload
from ep_backend.bench.workload import Inputs, Settings
from ep_backend.communicator import TRANSPORTS, available
from ep_backend.transports import OF_GPUS
from ep_backend.transports.collective import CollectiveTransport
from ep_backend.transports.hier import HierTransport
from ep_backend.transports.mixed import MixedTransport

# Left out on one machine: its GPUs have collective as the last resort, mixed is for GPUs of which only some
# reach each other, and hier is what works inside a machine, with copies.
ONLY_WHEN_ASKED = {
    "cuda": (CollectiveTransport.name, HierTransport.name, MixedTransport.name),
    "cpu": (HierTransport.name,),
}
BETWEEN_MACHINES = (CollectiveTransport.name, HierTransport.name)
BASELINE = {"cpu": "gloo", "cuda": "nccl"}  # plain collectives
ALL_TO_ALL = {"cpu": "gloo_all_to_all", "cuda": "nccl_all_to_all"}
PEERS = {"cpu": ("gloo", ALL_TO_ALL["cpu"]), "cuda": ("nccl", ALL_TO_ALL["cuda"], "flashinfer")}


class Contender(Protocol):
    """One way to dispatch and combine. All methods are collective over the default group."""

    name: str
    capturable: bool
    """Whether CUDA graphs can hold its exchanges. For GPUs only."""
    window_bytes: int | None
    """Bytes of this rank's windows; None if there are none."""

    def prepare(self, inputs: list[Inputs]) -> None:
        """Get ready for a case of equally large input sets."""

    def verify(self) -> bool:
        """Exchange each input set once, untimed, with the experts computed from what was received; keep their
        results for `combine`. Returns whether everything was right on this rank."""

    def dispatch(self, number: int) -> None:
        """Send input set ``number`` and receive."""

    def combine(self, out: torch.Tensor) -> None:
        """Return the results prepared for the dispatched set; ``out`` [tokens, hidden]."""

    def accepts(self, number: int, out: torch.Tensor) -> bool:
        """Whether ``out`` is what `combine` has to return for input set ``number``."""

    def details(self) -> dict[str, Any]:
        """What a reader of the results should know about how this case was run."""

    def destroy(self) -> None: ...


class Ours:
    """A transport of this library behind a communicator."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self._settings = name, settings
        self._comm = Communicator(None, settings.config(name), device=settings.device)
        self.capturable = self._comm.capturable
        self.window_bytes: int | None = self._comm.window_bytes
        self._inputs: list[Inputs] = []
        self._results: list[torch.Tensor] = []
        self._number = 0
        self._handle: Handle | None = None

    def prepare(self, inputs: list[Inputs]) -> None:
        self._inputs = inputs

    def verify(self) -> bool:
        self._results, correct = [], True
        for given in self._inputs:
            received, handle = self._send(given)
            self._results.append(self._compute(received))
            correct &= given.accepts(self._comm.combine(self._results[-1], handle))
        self._comm.check()
        return correct

    def dispatch(self, number: int) -> None:
        self._number = number
        _, self._handle = self._send(self._inputs[number])

    def combine(self, out: torch.Tensor) -> None:
        assert self._handle is not None
        self._comm.combine(self._results[self._number], self._handle, out=out)

    def accepts(self, number: int, out: torch.Tensor) -> bool:
        return self._inputs[number].accepts(out)

    def details(self) -> dict[str, Any]:
        details = {"layout": self._settings.layout, "window_bytes": self.window_bytes}
        num_sms = self._comm.decision.sms if self.name in OF_GPUS else None
        return details if num_sms is None else {**details, "num_sms": num_sms}

    def destroy(self) -> None:
        self._comm.destroy()

    def _send(self, given: Inputs) -> tuple[Received, Handle]:
        return self._comm.dispatch(
            given.x, given.ids, given.weights, scales=given.scales, tokens_per_rank=given.tokens
        )

    def _compute(self, received: Received) -> torch.Tensor:
        settings, experts = self._settings, self._comm.local_experts
        if settings.layout != "expert_major":
            assert received.topk_ids is not None
            assert received.topk_weights is not None
            return workload.weighted_sums(
                received.rows, received.scales, received.topk_ids, received.topk_weights, experts, settings
            )
        device = received.rows.device
        factors = workload.expert_factors(settings.experts, settings.hidden, settings.seed).to(device)
        y = torch.zeros(*received.rows.shape[:2], settings.hidden, dtype=settings.result_dtype, device=device)
        assert received.rows_per_expert is not None
        for e, count in enumerate(received.rows_per_expert.tolist()):
            scales = None if received.scales is None else received.scales[e, :count]
            rows = workload.dequantize(received.rows[e, :count], scales)
            y[e, :count] = (rows * factors[experts[e]]).to(y.dtype)
        return y


def names(device: str) -> tuple[str, ...]:
    """Our transports that can be measured on "cpu" or "cuda" with this build."""
    ours = available(torch.device(device))
    return tuple(name for name in TRANSPORTS if name in ours)


def defaults(device: str, *, several_machines: bool) -> tuple[str, ...]:
    """Those that are measured unless the caller chooses."""
    if several_machines:
        return tuple(name for name in names(device) if name in BETWEEN_MACHINES)
    return tuple(name for name in names(device) if name not in ONLY_WHEN_ASKED[device])


def start(name: str, settings: Settings) -> Contender:
    """Collective. Raises EpConfigError on all ranks."""
    # Other people's libraries are loaded only if they are asked for.
    if name == "flashinfer":
        from ep_backend.bench.flashinfer import FlashInfer

        return FlashInfer(settings)
    if name in BASELINE.values():
        from ep_backend.bench.allgather import AllGather

        return AllGather(name, settings)
    if name in ALL_TO_ALL.values():
        from ep_backend.bench.alltoall import AllToAll

        return AllToAll(name, settings)
    return Ours(name, settings)
