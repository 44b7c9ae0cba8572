"""How long the ranks of an engine take to agree on a step: gloo's all-reduce beside `HostSum`.

    python benchmarks/host_sum.py --ranks 2,4,8 --json FILE

The ranks are processes of this machine. Each works (keeps its core busy) for a while before every sum, as an
engine does, and is then timed from its call to the sum; every sum is checked. Microseconds, median of rank 0.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ep_backend.host_sum import HostSum

ROUNDS, WARMUP = 400, 100
WORK_S = (0.0, 0.003)
NUMBERS = 6  # per rank, as vLLM's second model runner has


def measure(rank, world, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    host_sum = HostSum(None, 8 * world, 30.0)
    ways = {"gloo": dist.all_reduce, "host_sum": host_sum.all_reduce}
    for work in WORK_S:
        times = {name: [] for name in ways}
        for number in range(WARMUP + ROUNDS):
            for name, way in ways.items():
                values = torch.zeros(NUMBERS, world, dtype=torch.int32)
                values[:, rank] = number + rank
                until = time.perf_counter() + work
                while time.perf_counter() < until:
                    pass
                start = time.perf_counter()
                way(values)
                taken = time.perf_counter() - start
                if values.tolist() != [[number + r for r in range(world)]] * NUMBERS:
                    raise SystemExit(f"{name}: a sum is wrong: {values}")
                if number >= WARMUP:
                    times[name].append(taken * 1e6)
        if rank == 0:
            for name, taken in times.items():
                deciles = statistics.quantiles(taken, n=10)
                results.append(
                    {
                        "ranks": world,
                        "work_before_ms": work * 1e3,
                        "way": name,
                        "median_us": round(statistics.median(taken), 1),
                        "p10_us": round(deciles[0], 1),
                        "p90_us": round(deciles[-1], 1),
                    }
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8", help="numbers of ranks, one run each (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    with mp.Manager() as manager:
        results = manager.list()
        for world in (int(text) for text in args.ranks.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(measure, (world, folder, results), nprocs=world)
        document = {
            "machine": {"cpus": len(os.sched_getaffinity(0)), "processor": platform.processor()},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "command": f"python benchmarks/host_sum.py --ranks {args.ranks}",
            "results": list(results),
        }
    print(f"{'ranks':>5} {'work before':>12} {'way':>9} {'median us':>10} {'p10':>8} {'p90':>8}")
    for row in document["results"]:
        print(
            f"{row['ranks']:>5} {row['work_before_ms']:>9g} ms {row['way']:>9} {row['median_us']:>10} "
            f"{row['p10_us']:>8} {row['p90_us']:>8}"
        )
    if args.json:
        with open(args.json, "w") as file:
            file.write(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
