"""Small exchanges on one GPU for compute-sanitizer (test_sanitizers.py), compared with the reference.

usage: sanitized.py own|bulk|mixed|staggered|sums|short

own: as the kernels divide tokens themselves; bulk: by bulk copies; mixed: some ranks write into each other's
GPU memory and others into memory of the host; staggered: rank after rank; sums: exchanges of sums, compared
with combines; short: combine is given memory that is too short for its result, which a memory checker must
notice.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gpu_jobs import of_sums
from one_gpu import differences, local_ranks

import ep_backend as ep
from ep_backend import reference
from ep_backend.selftest import inputs

PLANS = {"own": (), "bulk": (4, 1, 4, 1), "mixed": (), "staggered": ()}
PARTS = {("mixed", 3): ((0, 2), (1,))}
LAYOUTS = ("rank_major", "compact", "expert_major")
PAYLOADS = {
    "bf16": {"payload": torch.bfloat16},
    "fp32": {"payload": torch.float32},
    "fp8": {"payload": torch.bfloat16, "quantization": "fp8_block128"},
    "fp8 by the caller": {"payload": torch.float8_e4m3fn},
    "opaque": {"payload": torch.uint8, "payload_bytes": 272, "scale_bytes": 20},
}
# (ranks, T, tokens of each rank, routing)
EXCHANGES = (
    (1, 9, (9,), "uniform"),
    (3, 9, (9, 0, 4), "uniform"),
    (3, 1, (1, 1, 0), "uniform"),
    (3, 37, (37, 20, 37), "sparse"),
)


def config(world, **more):
    usual = {"num_experts": 2 * world + 2, "top_k": 3, "hidden_size": 256, "max_tokens_per_rank": 37}
    return ep.EpConfig(**{**usual, **more, "transport": "peer", "timeout_s": 60.0})


def exchanges(plan):
    """Every layout and payload; the number of exchanges, all of them right."""
    done = 0
    for layout in LAYOUTS:
        for name, payload in PAYLOADS.items():
            for world in (1, 3):
                # A few blocks: more would only take longer.
                wanted = config(world, layout=layout, num_sms=4, **payload)
                parts = PARTS.get((plan, world), ())
                stagger = int(plan == "staggered")
                with local_ranks(wanted, world, plan=PLANS[plan], parts=parts, stagger=stagger) as comms:
                    for number, (ranks, slots, tokens, routing) in enumerate(EXCHANGES):
                        if ranks != world:
                            continue
                        # One rank alone waits for nobody, so its kernels may be whole.
                        for whole in (False, True) if world == 1 and layout != "compact" else (False,):
                            how = {"seed": number, "routing": routing, "whole": whole}
                            found = differences(comms, tokens=tokens, slots=slots, **how)
                            assert not found, f"{layout}, {name}, T {slots}, {plan}: {found[0]}"
                            done += 1
    return done


def exchanges_of_sums():
    """Of one rank, which waits for nobody's weights; the number of exchanges, all of them right."""
    done = 0
    for name, hidden in itertools.product(("bf16", "fp32"), (256, 7168)):
        rows = config(
            1, layout="expert_major", expert_ids="global", hidden_size=hidden, num_sms=4, **PAYLOADS[name]
        )
        with local_ranks(rows, 1) as (by_expert,), local_ranks(of_sums(rows), 1) as (comm,):
            for slots, tokens in ((9, 9), (37, 20), (1, 0)):
                call = inputs.make_call(rows, 1, 0, seed=slots, count=tokens, routing="sparse")
                x, *given = (t.to(comm.device) for t in (call.x, call.topk_ids, call.topk_weights))
                received, handle = by_expert.dispatch(x, *given, tokens_per_rank=slots)
                places = by_expert.received_places(handle)
                y = received.rows.clone()
                want = by_expert.combine(y, handle)
                _, handle = by_expert.dispatch(x, *given, tokens_per_rank=slots)
                whole = comm.exchange_sums(y, places, *given, tokens_per_rank=slots, ends=(by_expert, handle))
                opened = comm.exchange_sums_send(y, places, *given, tokens_per_rank=slots)
                for got in (whole, comm.combine_recv(opened)):
                    different = reference.difference("sums", got.cpu(), want.cpu())
                    assert not different, f"{name}, hidden {hidden}, T {slots}: {different}"
                    done += 1
                comm.check()
    return done


def too_short():
    """A result of 9 rows written over one that has room for 1: behind it is nobody's memory."""
    with local_ranks(config(1), 1) as (comm,):
        ids = torch.zeros(9, 3, dtype=torch.int64, device=comm.device)
        ids += torch.arange(3, device=comm.device)
        x = torch.ones(9, 256, dtype=torch.bfloat16, device=comm.device)
        received, handle = comm.dispatch(x, ids, torch.ones(9, 3, device=comm.device))
        rows = received.rows.clone()
        out = torch.empty(1, 256, dtype=torch.bfloat16, device=comm.device)
        comm._transport.combine(handle.channel, rows, out)
        torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == "short":
        too_short()
    else:
        done = exchanges_of_sums() if sys.argv[1] == "sums" else exchanges(sys.argv[1])
        print(f"{done} exchanges, all right")
