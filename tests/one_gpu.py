"""Several ranks on one GPU, all in this process: for results and for memory checkers, not for times.

    with local_ranks(config, 4) as comms:
        assert differences(comms, tokens=[3, 0, 5, 5], slots=5) == []

Every rank is a communicator without a process group. Its window is plain memory of the GPU; with ``parts``,
ranks of different parts write into pinned memory of the host. Launches are small: all of them fit the GPU
together. Each half is launched for all ranks before the next one, so nothing waits for a kernel that is not
there yet, in one stream too and under tools that run one kernel at a time. Whole dispatches and combines wait
for each other; they need a stream each.
"""

import contextlib
from dataclasses import replace

import torch

import ep_backend as ep
from ep_backend import reference
from ep_backend.arguments import Arguments
from ep_backend.selftest import inputs
from ep_backend.selftest.exchanges import on_cpu
from ep_backend.transports.gpu import Windows, window_bytes
from ep_backend.transports.peer import PeerTransport

MOST_STREAMS = 8  # more may share a hardware queue, and then a kernel stands behind one that waits for it


class LocalTransport(PeerTransport):
    """All of the transport but what its ranks do together. ``windows``: of all ranks; ``mailboxes``: the same
    in host memory, for ranks of different ``parts``."""

    def __init__(self, config, rank, windows, plan, mailboxes=(), parts=(), stagger=0):
        self._stagger = stagger
        self._config, self._device, self._plan = config, windows[rank].device, plan
        self._rank, self._world, self._names = rank, len(windows), range(len(windows))
        self.window_bytes = window_bytes(config, len(windows))
        self._start(self._seen(windows, mailboxes, parts), config.num_sms)

    def _seen(self, windows, mailboxes, parts):
        addresses = [window.data_ptr() for window in windows]
        own = windows[self._rank]
        if not parts:
            return Windows(addresses, own)
        (part,) = (part for part in parts if self._rank in part)
        for rank, mailbox in enumerate(mailboxes):
            if rank == self._rank or rank not in part:
                addresses[rank] = mailbox.data_ptr()
        return Windows(addresses, own, direct=part, keep=mailboxes)

    def destroy(self):
        torch.cuda.synchronize(self._device)
        self._free()


class LocalRank(ep.Communicator):
    """All of a communicator but its meeting with the others."""

    def __init__(self, config, rank, windows, plan, *more):
        self.config, self.rank, self.world_size = config, rank, len(windows)
        self.device = windows[rank].device
        self.local_experts = tuple(e for e, r in enumerate(config.expert_ranks(len(windows))) if r == rank)
        self._arguments = Arguments(config, self.world_size, len(self.local_experts), self.device)
        self._transport = LocalTransport(config, rank, windows, plan, *more)
        self._handles = [None] * config.num_channels
        self._alive = True


@contextlib.contextmanager
def local_ranks(config, world, *, plan=(), parts=(), stagger=0, device="cuda:0"):
    """``world`` communicators on one GPU; each has its share of SMs unless ``config.num_sms`` says less.

    ``plan``, how tokens are divided: () for the kernels' own choice, else tokens per chunk, segments of a
    row, warps per token, and whether by bulk copies (1 or 0). ``parts``: as for
    `MixedTransport`; () for one window each. ``stagger``: as for `PeerTransport`.
    """
    device = torch.device(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    share = max(1, sms // (world * config.num_channels))
    config = replace(config, num_sms=min(share, config.num_sms or share))
    size = window_bytes(config, world)
    windows = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(world)]
    mailboxes = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(world if parts else 0)]
    torch.cuda.synchronize(device)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(LocalRank(config, r, windows, plan, mailboxes, parts, stagger))
            for r in range(world)
        ]


def streams(comms):
    """One for each rank, or one for all if there are many."""
    if len(comms) > MOST_STREAMS:
        return [torch.cuda.Stream()] * len(comms)
    return [torch.cuda.Stream() for _ in comms]


def differences(comms, *, tokens, slots, seed=0, routing="uniform", exact=False, on=None, whole=False):
    """One exchange of all ranks, compared bit by bit with `ep_backend.reference`: what differs, in words.

    ``tokens``: of each rank; ``slots``: T. ``exact``: the experts' results are float32. ``on``: a stream for
    each rank, the current one if None. ``whole``: dispatch and combine are one kernel each, else halves.
    """
    config, world = comms[0].config, len(comms)
    calls = [
        inputs.make_call(config, world, rank, seed=seed, count=count, routing=routing)
        for rank, count in enumerate(tokens)
    ]
    wanted = reference.dispatch(config, calls, slots)
    dtype = torch.float32 if exact else config.result_dtype
    ys = [inputs.make_results(config, rank, want, seed=seed, dtype=dtype) for rank, want in enumerate(wanted)]
    totals = reference.combine(config, calls, ys, slots)
    received, outs = exchange(comms, calls, ys, slots, on or [torch.cuda.current_stream()] * world, whole)
    found = []
    for rank in range(world):
        want = wanted[rank]
        if config.layout == "rank_major":
            want = replace(want, rows_per_expert=None)  # nobody counts them on a GPU
        different = reference.first_difference(config, received[rank], want)
        if different := different or reference.difference("combined", outs[rank], totals[rank]):
            found.append(f"rank {rank}: {different}")
    return found


def exchange(comms, calls, ys, slots, on, whole):
    """What each rank received and what its combine returned; what goes in and out is on the CPU."""
    device = comms[0].device

    def moved(t):
        return None if t is None else t.to(device)

    def each(act, *of_rank):
        """``act`` on every rank, on its stream, before the next thing happens on any."""
        made = []
        for rank, stream in enumerate(on):
            with torch.cuda.stream(stream):
                made.append(act(comms[rank], *(one[rank] for one in of_rank)))
        return made

    given = [(*map(moved, (call.x, call.topk_ids, call.topk_weights)), moved(call.scales)) for call in calls]
    results = [moved(y) for y in ys]
    torch.cuda.synchronize(device)  # everything above came from another stream

    def dispatch(comm, parts):
        call = comm.dispatch if whole else comm.dispatch_send
        return call(*parts[:3], scales=parts[3], tokens_per_rank=slots)

    opened = each(dispatch, given)
    if whole:
        received, handles = [r for r, _ in opened], [handle for _, handle in opened]
    else:
        received, handles = each(lambda comm, handle: comm.dispatch_recv(handle), opened), opened
    copies = each(lambda comm, r: on_cpu(r), received)
    if whole:
        outs = each(lambda comm, y, handle: comm.combine(y, handle), results, handles)
    else:
        each(lambda comm, y, handle: comm.combine_send(y, handle), results, handles)
        outs = each(lambda comm, handle: comm.combine_recv(handle), handles)
    sums = each(lambda comm, out: out.cpu(), outs)
    for comm in comms:
        comm.check()
    return copies, sums
