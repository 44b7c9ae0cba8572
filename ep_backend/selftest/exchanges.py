"""What a rank does in the phases local, node and network: exchange, and compare every bit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ep_backend import Communicator, EpConfig, Handle, Received, reference, rendezvous
from ep_backend.communicator import prepare_nccl
from ep_backend.errors import EpConfigError
from ep_backend.launch.processes import Note
from ep_backend.select import obstacle_to
from ep_backend.selftest import inputs
from ep_backend.selftest.plan import Case, Step


@dataclass(frozen=True, kw_only=True)
class Task:
    """The part of a phase that one group of ranks does; equal on all of them."""

    device: str
    """"cpu" or "cuda"."""
    transport: str
    """A name, or "auto": what is chosen for this group."""
    timeout_s: float
    """That a wait for a peer may last."""
    optional: bool = False
    """Whether a transport that cannot start here is left out."""
    cases: tuple[Case, ...] = ()
    gpu: int | None = None
    """Number of the GPU of a single rank; None: each rank has the one of its own number."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a group found out; the same on all its ranks."""

    transport: str
    reason: str = ""
    """Why this transport."""
    exchanges: int = 0
    cells: int = 0
    """Numbers that were compared, of all ranks."""
    wrong: tuple[tuple[int, str], ...] = ()
    """(rank, where and what) of each rank that got something else than the reference; the first of each."""
    left_out: str = ""
    """Why nothing was exchanged."""


def run(note: Note, task: Task) -> Result:
    """Every case of ``task``, up to the first that is wrong. Collective over the default group."""
    device = start_device(task)
    world, result = dist.get_world_size(), Result(transport=task.transport)
    for case in task.cases:
        note(f"{case}: start")
        try:
            comm = Communicator(None, case.config(world, task.transport, task.timeout_s), device=device)
        except EpConfigError as error:  # on all ranks together
            if task.optional and not result.exchanges:
                return replace(result, left_out=obstacle_to(task.transport, error))
            raise
        with comm:
            found = [_step(note, comm, case, number, step) for number, step in enumerate(case.steps)]
            comm.check()
        result = add(result, comm, found)
        if result.wrong:
            break
    return result


def add(result: Result, comm: Communicator, found: Sequence[tuple[str | None, int]]) -> Result:
    """``result`` with what all ranks found in exchanges of ``comm``: where each differs, or None, and how
    many cells were compared. Collective over the default group."""
    of_ranks = rendezvous.gather(
        None, (next((text for text, _ in found if text), None), sum(n for _, n in found))
    )
    return replace(
        result,
        transport=comm.transport,
        reason=comm.decision.reason,
        exchanges=result.exchanges + len(found),
        cells=result.cells + sum(cells for _, cells in of_ranks),
        wrong=tuple((rank, text) for rank, (text, _) in enumerate(of_ranks) if text),
    )


def start_device(task: Task) -> torch.device:
    """Use this rank's share of the machine. Collective over the default group."""
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    if task.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local if task.gpu is None else task.gpu)
    torch.cuda.set_device(device)
    prepare_nccl(None, device)
    return device


def _step(note: Note, comm: Communicator, case: Case, number: int, step: Step) -> tuple[str | None, int]:
    where = f"transport {comm.transport}, {case}, exchange {number} ({step})"
    note(where)
    text, cells = exchange(comm, step)
    return (f"{where}: {text}" if text else None), cells


def exchange(comm: Communicator, step: Step) -> tuple[str | None, int]:
    """One exchange: where this rank's result differs from the reference (None: nowhere), and how many cells
    were compared. A difference does not end it, so that the ranks stay in step."""
    config, world = comm.config, comm.world_size
    calls = [
        inputs.make_call(config, world, rank, seed=step.seed, count=count, routing=step.routing)
        for rank, count in enumerate(step.tokens)
    ]
    wanted = reference.dispatch(config, calls, step.slots)
    dtype = torch.float32 if step.exact else config.result_dtype
    results = [
        inputs.make_results(config, rank, wanted[rank], seed=step.seed, dtype=dtype) for rank in range(world)
    ]
    totals = reference.combine(config, calls, results, step.slots, comm.nodes)

    mine = calls[comm.rank]
    x, ids, weights = (t.to(comm.device) for t in (mine.x, mine.topk_ids, mine.topk_weights))
    scales = None if mine.scales is None else mine.scales.to(comm.device)
    handle: Handle
    if step.halves:
        handle = comm.dispatch_send(x, ids, weights, scales=scales, tokens_per_rank=step.slots)
        received = comm.dispatch_recv(handle)
    else:
        received, handle = comm.dispatch(x, ids, weights, scales=scales, tokens_per_rank=step.slots)
    got = on_cpu(received)
    y = results[comm.rank]
    if y.shape[:-1] != got.rows.shape[:-1]:  # which is a difference too; combine must be called all the same
        y = torch.zeros(*got.rows.shape[:-1], config.hidden_size, dtype=dtype)
    y = y.to(comm.device)
    if step.halves:
        comm.combine_send(y, handle)
        out = comm.combine_recv(handle)
    else:
        out = comm.combine(y, handle)
    total = out.cpu()
    comm.check()  # a timeout of a GPU is the reason for all that is wrong
    want = wanted[comm.rank]
    if got.rows_per_expert is None and comm.device.type == "cuda" and config.layout == "rank_major":
        want = replace(want, rows_per_expert=None)  # nobody counts them on a GPU
    text = reference.first_difference(config, got, want)
    text = text or reference.difference("combined", total, totals[comm.rank])
    return text, count_cells(config, want) + total.numel()


def on_cpu(received: Received) -> Received:
    """A copy that outlives the exchange."""
    return replace(received, **{name: t.cpu().clone() for name, t in vars(received).items() if t is not None})


def count_cells(config: EpConfig, want: Received) -> int:
    """Numbers of a dispatch's result that are compared: of rows and scales those that are defined."""
    rows = int(reference.defined_rows(config, want).sum())
    others: Sequence[torch.Tensor | None] = (
        want.topk_ids,
        want.topk_weights,
        want.tokens_per_source,
        want.rows_per_expert,
    )
    return rows * (config.row_width + config.scale_width) + sum(t.numel() for t in others if t is not None)
