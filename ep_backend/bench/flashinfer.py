"""FlashInfer's one-sided all-to-all over NVLink (``flashinfer.comm.MoeAlltoAll``, 0.6.8 to 0.7.2) as a peer.

It is called as vLLM 0.26 calls it: rows, scales, ids and weights are dispatched, the ids of slots without a
token are marked, and combine takes results that lie anywhere. Received rows come in no certain order, another
one each time, so results that were computed from one dispatch do not fit the next. In timed exchanges every
row that a rank sends back is therefore the same: whole numbers whose sum over the ranks of a token is exact.
The experts' own results are compared before and after.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from ep_backend import rendezvous
from ep_backend.bench import workload
from ep_backend.bench.workload import Inputs, Settings
from ep_backend.errors import EpConfigError

TOP_KS = (1, 2, 4, 6, 8, 10, 16, 22)  # that its kernels are compiled for
MAX_RANKS = 64


class FlashInfer:
    """Collective. Raises EpConfigError on all ranks if it is not installed or cannot do what is asked."""

    name = "flashinfer"
    capturable = True

    def __init__(self, settings: Settings) -> None:
        check(settings)
        self._settings = settings
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        library, _ = rendezvous.together(None, load)
        self._exchange, _ = rendezvous.together(None, lambda: self._make(library))
        # Older releases return memory of their own, which is copied to where the bench wants it.
        self._takes_output = "output" in inspect.signature(self._exchange.combine).parameters
        self._version = library.version
        self.window_bytes: int | None = int(self._exchange.workspace_size_per_rank)
        of_rank = settings.experts // self._ranks
        self._experts = tuple(range(self._rank * of_rank, (self._rank + 1) * of_rank))
        local = torch.full((settings.experts + 1,), -1, dtype=torch.int64)  # [-1]: of slots without a token
        local[list(self._experts)] = torch.arange(of_rank)
        self._local = local.to(settings.device)

    def prepare(self, inputs: list[Inputs]) -> None:
        self._inputs, self._tokens = inputs, inputs[0].tokens
        self._payloads = [_payloads(given) for given in inputs]
        rows = torch.stack([row_of(rank, self._settings.hidden) for rank in range(self._ranks)])
        rows = rows.to(self._settings.device)
        self._sums = [_sums(given.ids, rows, self._settings.experts) for given in inputs]
        like = rows[self._rank].to(self._settings.result_dtype)
        self._results = like.expand(self._ranks, self._tokens, -1).contiguous()

    def verify(self) -> bool:
        correct = True
        for number, given in enumerate(self._inputs):
            self.dispatch(number)
            results = self._compute(given)
            out = torch.empty_like(given.expected, dtype=self._settings.result_dtype)
            self._return(results.view_as(self._results), out)
            correct &= given.accepts(out)
        return correct

    def dispatch(self, number: int) -> None:
        self._received = self._exchange.dispatch(
            self._inputs[number].ids,
            self._payloads[number],
            self._tokens,
            invalid_token_expert_id=-1,
            expert_id_payload_index=len(self._payloads[number]) - 2,
        )

    def combine(self, out: torch.Tensor) -> None:
        self._return(self._results, out)

    def accepts(self, number: int, out: torch.Tensor) -> bool:
        return torch.equal(out.float(), self._sums[number])

    def details(self) -> dict[str, Any]:
        return {"flashinfer": self._version, "window_bytes": self.window_bytes}

    def destroy(self) -> None:
        """Its memory is FlashInfer's, which keeps it for the next of the same size."""

    def _make(self, library: SimpleNamespace) -> Any:
        settings, ranks = self._settings, self._ranks
        gpus = torch.cuda.device_count()
        mapping = library.Mapping(ranks, self._rank, gpus, tp_size=ranks, moe_ep_size=ranks)
        return library.MoeAlltoAll(
            mapping,
            max_num_tokens=max(settings.tokens),
            top_k=settings.topk,
            num_experts=settings.experts,
            hidden_size=settings.hidden,
            mnnvl_config=library.MnnvlConfig(comm_backend=library.TorchDistBackend()),
        )

    def _return(self, results: torch.Tensor, out: torch.Tensor) -> None:
        if self._takes_output:
            self._exchange.combine(results, self._tokens, output=out)
        else:
            out.copy_(self._exchange.combine(results, self._tokens))

    def _compute(self, given: Inputs) -> torch.Tensor:
        """[ranks * tokens, hidden] of what was received."""
        rows, *scales, ids, weights = (part.flatten(0, 1) for part in self._received)
        return workload.weighted_sums(
            rows.view(given.sent.dtype),
            scales[0] if scales else None,
            self._local[ids.long()],
            weights,
            self._experts,
            self._settings,
        )


def check(settings: Settings) -> None:
    """Raises EpConfigError if FlashInfer has no kernels for it."""
    wrong = None
    if settings.result_dtype == torch.float32:
        wrong = "float32 rows"
    elif settings.topk not in TOP_KS:
        wrong = f"top-{settings.topk}"
    elif settings.experts % settings.ranks:
        wrong = f"{settings.experts} experts on {settings.ranks} ranks"
    elif settings.ranks > MAX_RANKS:
        wrong = f"{settings.ranks} ranks"
    if wrong:
        raise EpConfigError(f"--peers: flashinfer cannot exchange {wrong}")


def load() -> SimpleNamespace:
    """What is used of the library. Raises EpConfigError if it is not installed."""
    try:
        import flashinfer
        from flashinfer.comm import Mapping, MoeAlltoAll
        from flashinfer.comm.mnnvl import MnnvlConfig, TorchDistBackend
    except ImportError as error:
        raise EpConfigError(
            f"--peers: flashinfer is not installed here ({error}); pip install flashinfer-python does it"
        ) from error
    return SimpleNamespace(
        version=flashinfer.__version__,
        Mapping=Mapping,
        MoeAlltoAll=MoeAlltoAll,
        MnnvlConfig=MnnvlConfig,
        TorchDistBackend=TorchDistBackend,
    )


def row_of(rank: int, hidden: int) -> torch.Tensor:
    """[hidden] float32, what ``rank`` sends back in timed exchanges: whole numbers from -6 to 6, so that
    sums over at most 22 ranks are exact in bfloat16."""
    return (torch.arange(hidden) + 5 * rank) % 13 - 6.0


def _payloads(given: Inputs) -> list[torch.Tensor]:
    """Everything that travels, [tokens, ...] each; float8 as bytes."""
    rows = given.sent.view(torch.uint8) if given.sent.itemsize == 1 else given.sent
    scales = [] if given.sent_scales is None else [given.sent_scales]
    return [rows, *scales, given.ids, given.weights]


def _sums(ids: torch.Tensor, rows: torch.Tensor, experts: int) -> torch.Tensor:
    """[tokens, hidden] float32: for each token the sum of ``rows`` [ranks, hidden] of the ranks that it goes
    to, each once. ``ids``: [tokens, topk]."""
    goes = torch.zeros(ids.shape[0], rows.shape[0], device=rows.device)
    goes.scatter_(1, ids.long() // (experts // rows.shape[0]), 1.0)
    return goes.double().matmul(rows.double()).float()
