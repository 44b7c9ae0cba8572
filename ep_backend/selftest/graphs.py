"""What a rank does in the phase graph: replay one captured exchange, each time with other tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from ep_backend import Communicator, EpConfig, Received, reference
from ep_backend.launch.processes import Note
from ep_backend.selftest import inputs
from ep_backend.selftest.exchanges import Result, Task, add, count_cells, on_cpu, start_device
from ep_backend.selftest.plan import Case, Step, graph_steps

LAYOUTS = ("rank_major", "expert_major")  # compact waits for the GPU and is not captured
SLOTS = 24
REPLAYS = 20
EAGER_EVERY = 5  # every so many replays is a call as usual instead


def run(note: Note, task: Task) -> Result:
    """Both layouts, up to the first that is wrong. Collective over the default group."""
    device = start_device(task)
    world, result = dist.get_world_size(), Result(transport=task.transport)
    for layout in LAYOUTS:
        case = Case("bf16", layout, graph_steps(world, SLOTS, REPLAYS))
        note(f"{case}: start")
        with Communicator(None, case.config(world, task.transport, task.timeout_s), device=device) as comm:
            if not comm.capturable:
                reason = f"CUDA graphs cannot hold exchanges of transport {comm.transport}"
                return replace(result, transport=comm.transport, reason=comm.decision.reason, left_out=reason)
            note(f"{case}: capture")
            captured = _Captured(comm, case.steps[0])
            found = [_replay(note, captured, case, number) for number in range(len(case.steps))]
            comm.check()
        result = add(result, comm, found)
        if result.wrong:
            break
    return result


def _replay(note: Note, captured: _Captured, case: Case, number: int) -> tuple[str | None, int]:
    eager = number % EAGER_EVERY == EAGER_EVERY - 1
    where = f"{case}, {'eager call' if eager else 'replay'} {number} ({case.steps[number]})"
    note(where)
    text, cells = captured.replay(case.steps[number], eager=eager)
    return (f"{where}: {text}" if text else None), cells


def answers(config: EpConfig, rank: int, experts: torch.Tensor, received: Received) -> torch.Tensor:
    """The y of ``rank``, float32: rows times a small whole number, which is exact on every processor; of the
    rank, or expert-major of the expert. ``experts``: global ids of the local ones. NaN where nobody reads."""
    rows = received.rows.float()
    if config.layout == "expert_major":
        assert received.rows_per_expert is not None
        places = torch.arange(rows.shape[1], device=rows.device)
        live = places[None, :] < received.rows_per_expert[:, None]
        y = rows * (experts + 1.0)[:, None, None]
    else:
        assert received.topk_ids is not None
        live = (received.topk_ids != config.pad_id).any(1)
        y = rows * (rank + 2.0)
    return torch.where(live[..., None], y, torch.nan)


def wanted(config: EpConfig, world: int, rank: int, step: Step) -> tuple[Received, torch.Tensor]:
    """What ``rank`` must receive in ``step``, and what combine must return for its tokens that count."""
    calls = [_call(config, world, r, step, count) for r, count in enumerate(step.tokens)]
    received = reference.dispatch(config, calls, step.slots)
    owners = torch.tensor(config.expert_ranks(world))
    results = [answers(config, r, (owners == r).nonzero().flatten(), received[r]) for r in range(world)]
    return received[rank], reference.combine(config, calls, results, step.slots)[rank]


def _call(config: EpConfig, world: int, rank: int, step: Step, count: int) -> reference.Call:
    """The first ``count`` of the tokens that are in this rank's tensors in ``step``; finite rows, for the
    experts to multiply."""
    full = inputs.make_call(config, world, rank, seed=step.seed, count=step.slots, routing=step.routing)
    g = torch.Generator().manual_seed(step.seed * 1009 + rank)
    x = torch.randn(full.x.shape, generator=g).to(full.x.dtype)
    return reference.Call(x[:count], full.topk_ids[:count], full.topk_weights[:count])


class _Captured:
    """A graph of one exchange, and the tensors that it reads and writes."""

    def __init__(self, comm: Communicator, step: Step) -> None:
        self._comm, config = comm, comm.config
        call = self._tokens(step)
        self._inputs = [t.to(comm.device) for t in (call.x, call.topk_ids, call.topk_weights)]
        self._count = torch.tensor([step.slots], dtype=torch.int32, device=comm.device)
        shape = step.slots, config.hidden_size
        self._out = torch.empty(shape, dtype=config.result_dtype, device=comm.device)
        self._experts = torch.tensor(comm.local_experts, device=comm.device)
        self._kept = self._exchange(step.slots)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._keep(self._exchange(step.slots))

    def replay(self, step: Step, *, eager: bool) -> tuple[str | None, int]:
        """One exchange: where it differs from the reference, or None, and how many cells were compared."""
        comm, config = self._comm, self._comm.config
        call, now = self._tokens(step), step.tokens[self._comm.rank]
        for tensor, new in zip(self._inputs, (call.x, call.topk_ids, call.topk_weights), strict=True):
            tensor.copy_(new)
        self._count.fill_(now)
        self._out.fill_(-1)
        if eager:
            self._keep(self._exchange(step.slots))
        else:
            self._graph.replay()
        out, got = self._out.cpu(), on_cpu(self._kept)
        comm.check()
        want, total = wanted(config, comm.world_size, comm.rank, step)
        if got.rows_per_expert is None:
            want = replace(want, rows_per_expert=None)  # nobody counts them in this layout on a GPU
        text = reference.first_difference(config, got, want)
        rest = torch.full_like(out[now:], -1)  # rows of tokens that do not count are left as they were
        text = text or reference.difference("combined", out, torch.cat([total, rest]))
        return text, count_cells(config, want) + out.numel()

    def _tokens(self, step: Step) -> reference.Call:
        return _call(self._comm.config, self._comm.world_size, self._comm.rank, step, step.slots)

    def _exchange(self, slots: int) -> Received:
        """What came, as it was before combine; the result stands in ``_out``."""
        comm = self._comm
        received, handle = comm.dispatch(*self._inputs, tokens_per_rank=slots, num_tokens=self._count)
        copy = _copy(received)
        y = answers(comm.config, comm.rank, self._experts, received)
        comm.combine(y, handle, out=self._out)
        return copy

    def _keep(self, received: Received) -> None:
        for name, tensor in vars(received).items():
            if tensor is not None:
                getattr(self._kept, name).copy_(tensor)


def _copy(received: Received) -> Received:
    return replace(received, **{name: t.clone() for name, t in vars(received).items() if t is not None})
