"""Round trip of dispatch + combine over transport `peer` beside NCCL, in CUDA graphs, one process per GPU.

    python benchmarks/peer_round_trip.py --ranks 4 --tokens 1,8,64,4096 --json FILE

Both are timed in turns in one run and checked against the same sum. NCCL: all-gather of rows, ids, weights,
then a reduce-scatter of the partial sums, which is what vLLM's default all-to-all does. Nothing is computed
between dispatch and combine.
"""

import argparse
import json
import platform
import shlex
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ep_backend as ep
from ep_backend.bench.arguments import list_of, output_file, whole

ALIGN_CYCLES = 1_000_000  # the GPU sleeps while the host queues what is timed


def capture(exchange, times):
    exchange()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            exchange()
    return graph


def replay_us(graph, exchange, group):
    """Of the slowest rank; the ranks are aligned by an exchange that is not timed."""
    dist.barrier(group)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(ALIGN_CYCLES)
    exchange()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    slowest = torch.tensor(start.elapsed_time(end) * 1e3)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return float(slowest)


class Case:
    """One number of tokens: inputs, the sum that must come out, and both ways to get it."""

    def __init__(self, comm, tokens, args):
        config, world = comm.config, comm.world_size
        g = torch.Generator().manual_seed(tokens * 100 + comm.rank)
        x = torch.randn(tokens, args.hidden, generator=g).bfloat16()
        ids = torch.rand(tokens, args.experts, generator=g).topk(args.topk, dim=1).indices
        weights = torch.rand(tokens, args.topk, generator=g)
        self.x, self.ids, self.weights = (t.to(comm.device) for t in (x, ids, weights))
        self.out = torch.empty_like(self.x)
        owners = torch.tensor(config.expert_ranks(world), device=comm.device)
        self.want = torch.zeros(tokens, args.hidden, device=comm.device)
        for rank in range(world):
            here = owners[self.ids] == rank
            part = (self.x.float() * (self.weights * here).sum(1, keepdim=True)).bfloat16().float()
            self.want += torch.where(here.any(1, keepdim=True), part, 0.0)

        received, handle = comm.dispatch(self.x, self.ids, self.weights, tokens_per_rank=tokens)
        mine = (received.topk_ids != config.pad_id).any(1, keepdim=True)
        total = received.topk_weights.sum(1, keepdim=True)
        y = torch.where(mine, received.rows.float() * total, 0.0).bfloat16()
        comm.combine(y, handle, out=self.out)
        gathered = [torch.cat([torch.zeros_like(t)] * world) for t in (self.x, self.ids, self.weights)]

        def ours():
            _, handle = comm.dispatch(self.x, self.ids, self.weights, tokens_per_rank=tokens)
            comm.combine(y, handle, out=self.out)

        def nccl():
            for whole_, own in zip(gathered, (self.x, self.ids, self.weights), strict=True):
                dist.all_gather_into_tensor(whole_, own)
            dist.reduce_scatter_tensor(self.out, y)

        self.ways = {"peer": ours, "baseline_nccl": nccl}

    def correct(self, way):
        """Ours is exact; NCCL adds in bf16 on the way."""
        if way == "peer":
            return torch.equal(self.out, self.want.bfloat16())
        return torch.allclose(self.out.float(), self.want, rtol=0.05, atol=0.1)


def run_rank(rank, port, args):
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    device = torch.device("cuda", rank)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "nccl", init_method=address, rank=rank, world_size=args.ranks, device_id=device, timeout=limit
    )
    group = dist.new_group(backend="gloo", timeout=limit)
    results = []
    for dtype in ("bf16", "fp8"):
        config = ep.EpConfig(
            num_experts=args.experts,
            top_k=args.topk,
            hidden_size=args.hidden,
            max_tokens_per_rank=max(args.tokens),
            quantization="fp8_block128" if dtype == "fp8" else None,
            transport="peer",
        )
        with ep.Communicator(group, config, device=device) as comm:
            for tokens in args.tokens:
                results += measure(comm, tokens, dtype, args, group)
                if rank == 0:
                    print(results[-2:] if dtype == "bf16" else results[-1:], flush=True)
    dist.barrier(group)
    dist.destroy_process_group()
    if rank == 0:
        document = {
            "machine": {
                "gpu": torch.cuda.get_device_name(),
                "gpus": args.ranks,
                "system": platform.platform(),
            },
            "versions": {
                "ep_backend": ep.__version__,
                "torch": torch.__version__,
                "nccl": str(torch.cuda.nccl.version()),
            },
            "command": shlex.join(sys.argv),
            "results": results,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def measure(comm, tokens, dtype, args, group):
    """One line per way: median and 99th percentile over replays, per exchange."""
    if dtype == "fp8":
        return [fp8_line(comm, tokens, args, group)]
    case, times = Case(comm, tokens, args), args.times(tokens)
    graphs = {way: capture(exchange, times) for way, exchange in case.ways.items()}
    taken = {way: [] for way in graphs}
    for _ in range(args.replays):
        for way, graph in graphs.items():
            taken[way].append(replay_us(graph, case.ways[way], group) / times)
    lines = []
    for way, graph in graphs.items():
        case.out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        lines.append(line(way, tokens, dtype, taken[way], case.correct(way), group))
    comm.check()
    return lines


def fp8_line(comm, tokens, args, group):
    """Rows are quantised inside dispatch; the result is checked against the rows as they arrived."""
    times = args.times(tokens)
    g = torch.Generator().manual_seed(tokens * 100 + comm.rank)
    x = torch.randn(tokens, args.hidden, generator=g).bfloat16().to(comm.device)
    ids = torch.rand(tokens, args.experts, generator=g).topk(args.topk, dim=1).indices.to(comm.device)
    weights = torch.ones(tokens, args.topk, device=comm.device)
    received, handle = comm.dispatch(x, ids, weights, tokens_per_rank=tokens)
    mine = (received.topk_ids != comm.config.pad_id).any(1, keepdim=True)
    blocks = received.rows.float().unflatten(1, (-1, 128)) * received.scales[..., None]
    y = torch.where(mine, blocks.flatten(1), 0.0).bfloat16()
    out = comm.combine(y, handle)
    ranks_of = torch.tensor(comm.config.expert_ranks(comm.world_size), device=comm.device)[ids]
    visited = torch.stack([(ranks_of == r).any(1) for r in range(comm.world_size)]).sum(0)
    correct = torch.allclose(out.float(), x.float() * visited[:, None], rtol=0.07, atol=0.05)

    def exchange():
        _, handle = comm.dispatch(x, ids, weights, tokens_per_rank=tokens)
        comm.combine(y, handle, out=out)

    first = out.clone()
    graph = capture(exchange, times)
    taken = [replay_us(graph, exchange, group) / times for _ in range(args.replays)]
    comm.check()
    return line("peer", tokens, "fp8", taken, correct and torch.equal(out, first), group)


def line(way, tokens, dtype, taken, correct, group):
    all_correct = torch.tensor(int(correct))
    dist.all_reduce(all_correct, op=dist.ReduceOp.MIN, group=group)
    times = torch.tensor(taken, dtype=torch.float64)
    return {
        "transport": way,
        "tokens": tokens,
        "phase": "round_trip",
        "dtype": dtype,
        "median_us": round(float(times.median()), 2),
        "p99_us": round(float(times.quantile(0.99)), 2),
        "correct": bool(all_correct),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=whole(1), default=torch.cuda.device_count())
    parser.add_argument("--tokens", type=list_of(whole(1)), default=(1, 8, 32, 64, 128, 256, 4096))
    parser.add_argument("--hidden", type=whole(128), default=7168)
    parser.add_argument("--experts", type=whole(1), default=256)
    parser.add_argument("--topk", type=whole(1), default=8)
    parser.add_argument("--replays", type=whole(1), default=20)
    parser.add_argument("--port", type=whole(1), default=29571)
    parser.add_argument("--json", type=output_file, required=True)
    args = parser.parse_args()
    args.times = exchanges_in_a_graph
    mp.spawn(run_rank, args=(args.port, args), nprocs=args.ranks)


def exchanges_in_a_graph(tokens):
    return 20 if tokens < 1000 else 4


if __name__ == "__main__":
    main()
