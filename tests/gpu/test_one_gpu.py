"""Many ranks on one GPU, in one process, against the reference: many ranks, the largest shapes."""

import random
from dataclasses import replace

import pytest
import torch
from harness import Ranks
from one_gpu import MOST_STREAMS, LocalRank, differences, local_ranks, streams
from whole_numbers import Bank, factors_of

import ep_backend as ep
from ep_backend.selftest import inputs
from ep_backend.transports.gpu import window_bytes

pytestmark = pytest.mark.gpu
LAYOUTS = ("rank_major", "compact", "expert_major")
CONFIGS = {
    "bf16": {"payload": torch.bfloat16},
    "fp16 fp32-wire": {"payload": torch.float16, "wire_dtype": torch.float32},
    "fp32": {"payload": torch.float32, "expert_ids": "global", "pad_id": 1023},
    "fp8": {"payload": torch.bfloat16, "quantization": "fp8_block128"},
    "fp8 by the caller": {"payload": torch.float8_e4m3fn},
    "opaque": {"payload": torch.uint8, "payload_bytes": 272, "scale_bytes": 20},
}
PARTS = (
    ((0, 1), (2, 3)),
    ((0,), (1,), (2,), (3,)),
    ((0, 1, 2), (3,)),
    ((1, 3), (0, 2)),
    ((0, 1, 2, 3),),
    ((0, 1, 2), (3, 4), (5,)),
)
# 4 tokens a chunk, by bulk copies, which the kernels would not choose for few tokens.
BULK = (4, 1, 4, 1)
GROUPS = {16: 4, 33: 1, 72: 8}  # by number of ranks, for the staggered order
# Kernels of several ranks are under way at the same time, so each stream needs a hardware queue of its own.
ENVIRON = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}


@pytest.fixture(autouse=True, scope="module")
def a_gpu():
    if not torch.cuda.device_count():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="module")
def started():
    groups = []
    yield groups
    for group in groups:
        group.kill()


@pytest.fixture
def process(started):
    """One process for all tests here; another one after a failure."""
    if not started or not started[-1].alive:
        started.append(Ranks(1, ENVIRON))
    return started[-1]


def config(more, world, **common):
    usual = {
        "num_experts": 4 * world + 1,
        "top_k": 3,
        "hidden_size": 256,
        "max_tokens_per_rank": 80,
        "timeout_s": 10.0,
    }
    return ep.EpConfig(**{**usual, **more, **common, "transport": "peer"})


def exchanges_job(rank, group, config, world, cases, plan, parts=(), stagger=0):
    """The cases in halves and, where every rank has a stream of its own, whole in turns."""
    wrong, chance = [], random.Random(world)
    with local_ranks(config, world, plan=plan, parts=parts, stagger=stagger) as comms:
        on = streams(comms)
        # A whole compact dispatch waits for the GPU on the host, before the next rank's has been launched.
        may_be_whole = world <= MOST_STREAMS and config.layout != "compact"
        for number, (slots, routing) in enumerate(cases):
            whole = may_be_whole and number % 2 == 1
            tokens = [chance.choice((0, slots, chance.randint(0, slots))) for _ in comms]
            how = {"slots": slots, "seed": number, "routing": routing, "exact": number % 3 == 1}
            found = differences(comms, tokens=tokens, on=on, whole=whole, **how)
            wrong += [(slots, routing, whole, text) for text in found]
    return wrong


CASES = (
    (5, "uniform"),
    (5, "uniform"),
    (1, "uniform"),
    (1, "skew"),
    (40, "one_rank"),
    (40, "skew"),
    (13, "sparse"),
    (6, "none"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("world", "plan"), [(1, ()), (3, ()), (8, ()), (1, BULK), (4, BULK)], ids=lambda v: str(v)
)
def test_same_bits_as_the_reference(process, world, plan, name, layout):
    more = config(CONFIGS[name], world, layout=layout)
    (wrong,) = process.run(exchanges_job, more, world, CASES, plan, timeout=120)
    assert wrong == []


@pytest.mark.parametrize("scale", [0.25, 0.5, 2.0, 4.0])
def test_same_bits_with_chunks_of_another_size(process, scale):
    more = config(CONFIGS["bf16"], 3, chunk_scale=scale)
    (wrong,) = process.run(exchanges_job, more, 3, CASES, (), timeout=120)
    # Enough bytes for bulk copies, on GPUs that have them.
    long = config(CONFIGS["bf16"], 2, chunk_scale=scale, hidden_size=8192, max_tokens_per_rank=1300)
    wrong += process.run(exchanges_job, long, 2, ((1300, "uniform"),), (), timeout=120)[0]
    assert wrong == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("world", "stagger", "plan"), [(1, 1, ()), (3, 1, ()), (8, 4, ()), (4, 2, BULK)], ids=lambda v: str(v)
)
def test_same_bits_in_staggered_order(process, world, stagger, plan, name, layout):
    """A plan for bulk copies, too, which are not used then."""
    more = config(CONFIGS[name], world, layout=layout)
    (wrong,) = process.run(exchanges_job, more, world, CASES, plan, (), stagger, timeout=120)
    assert wrong == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_some_reach_each_other_and_others_do_not(process, parts, name, layout):
    """Rows inside a part go to the GPU's window, between parts through host memory."""
    world = sum(map(len, parts))
    more = config(CONFIGS[name], world, layout=layout)
    (wrong,) = process.run(exchanges_job, more, world, CASES, (), parts, timeout=120)
    assert wrong == []


def left_open_job(rank, group, config, parts, stagger):
    """Exchanges that nobody combines, at every point where one can be left; the next one must be right."""
    wrong = []
    with local_ranks(config, 4, parts=parts, stagger=stagger) as comms:
        device = comms[0].device
        for point in ("sent", "received", "returned"):
            x = torch.ones(6, config.hidden_size, dtype=config.payload, device=device)
            ids = torch.arange(config.top_k, device=device).expand(6, -1)
            weights = torch.ones(6, config.top_k, device=device)
            handles = [comm.dispatch_send(x, ids, weights, tokens_per_rank=6) for comm in comms]
            received = []
            if point != "sent":
                received = [c.dispatch_recv(handle) for c, handle in zip(comms, handles, strict=True)]
            if point == "returned":
                for comm, rows, handle in zip(comms, received, handles, strict=True):
                    comm.combine_send(rows.rows, handle)
            found = differences(comms, tokens=[5, 0, 7, 3], slots=7, on=streams(comms), whole=True)
            wrong += [(point, text) for text in found]
    return wrong


@pytest.mark.parametrize(("parts", "stagger"), [(PARTS[0], 0), ((), 1)])
def test_exchanges_left_open(process, parts, stagger):
    wanted = config({"payload": torch.bfloat16}, 4)
    (wrong,) = process.run(left_open_job, wanted, parts, stagger, timeout=60)
    assert wrong == []


def graphs_job(rank, group, config, world):
    """Captured exchanges in staggered order, replayed with other rows, between eager ones."""
    wrong, slots = [], 24
    with local_ranks(config, world, stagger=2) as comms:
        on, device = streams(comms), comms[0].device
        given = []
        for r in range(world):
            call = inputs.make_call(config, world, r, seed=1, count=slots - r, routing="uniform")
            # Its rows are any bits, NaN too.
            x = torch.randint(1, 9, call.x.shape, generator=torch.Generator().manual_seed(r)).to(call.x.dtype)
            given.append([t.to(device) for t in (x, call.topk_ids, call.topk_weights)])
        outs = [torch.empty_like(x) for x, _, _ in given]

        def answers(rows, ids):
            return torch.where((ids != config.pad_id).any(1, keepdim=True), rows, torch.nan)

        def exchange(comm):
            received, handle = comm.dispatch(*given[comm.rank], tokens_per_rank=slots)
            comm.combine(answers(received.rows, received.topk_ids), handle, out=outs[comm.rank])

        def replay(comm):
            graphs[comm.rank].replay()

        def on_all(act):
            torch.cuda.synchronize()
            for comm, stream in zip(comms, on, strict=True):
                with torch.cuda.stream(stream):
                    act(comm)
            torch.cuda.synchronize()

        # A kernel's first launch loads it, which waits for those that run.
        wrong += differences(comms, tokens=[slots] * world, slots=slots, on=on, whole=True)
        x, ids, _ = given[0]
        answers(x, ids.int())
        on_all(exchange)
        want = [out.clone() for out in outs]
        assert all(out.isfinite().all() and out.all() for out in want)
        graphs = []
        for comm, stream in zip(comms, on, strict=True):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream):
                exchange(comm)
        for number in range(1, 7):
            for (x, _, _), out in zip(given, outs, strict=True):
                x.mul_(2)  # exact, and so are all sums of it
                out.fill_(-1)
            on_all(exchange if number % 3 == 0 else replay)
            wrong += [(number, r) for r in range(world) if not torch.equal(outs[r], want[r] * 2**number)]
        for comm in comms:
            comm.check()
    return wrong


def test_graphs_in_staggered_order(process):
    (wrong,) = process.run(graphs_job, config({"payload": torch.bfloat16}, 4), 4, timeout=60)
    assert wrong == []


def absent_job(rank, group, config):
    """Rank 1 of 3 does not come, to a dispatch or to a combine: what the others say."""
    said = []
    for phase in ("dispatch", "combine"):
        with local_ranks(config, 3, stagger=1) as comms:
            device, on = comms[0].device, streams(comms)
            x = torch.ones(6, config.hidden_size, dtype=config.payload, device=device)
            ids = torch.arange(config.top_k, device=device).expand(6, -1)
            weights = torch.ones(6, config.top_k, device=device)
            torch.cuda.synchronize()
            opened = []
            for comm, stream in zip(comms, on, strict=True):
                with torch.cuda.stream(stream):
                    if phase == "combine" or comm.rank != 1:
                        opened.append((comm, stream, *comm.dispatch(x, ids, weights, tokens_per_rank=6)))
            for comm, stream, received, handle in opened if phase == "combine" else ():
                with torch.cuda.stream(stream):
                    if comm.rank != 1:
                        comm.combine(received.rows, handle)
            torch.cuda.synchronize()
            for comm in (comms[0], comms[2]):
                try:
                    comm.check()
                except ep.EpTimeoutError as error:
                    said.append((comm.rank, error.peer, error.phase))
    return said


def test_a_rank_that_does_not_come_in_staggered_order(process):
    wanted = config({"payload": torch.bfloat16}, 3, timeout_s=0.5)
    (said,) = process.run(absent_job, wanted, timeout=60)
    assert said == [(0, 1, "dispatch"), (2, 1, "dispatch"), (0, 1, "combine"), (2, 1, "combine")]


@pytest.mark.parametrize(
    ("plan", "staggered"), [((), False), (BULK, False), ((), True)], ids=["own plan", "bulk", "staggered"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world", "hidden"), [(16, 1000), (33, 136), (72, 264)])
def test_many_ranks(process, world, hidden, layout, plan, staggered):
    """More ranks than a word has bits; rows of an odd number of 16 bytes; most experts and top-k."""
    more = {"hidden_size": hidden, "num_experts": 1024, "top_k": 16, "max_tokens_per_rank": 20}
    wanted = config(more, world, layout=layout, payload=torch.bfloat16)
    cases = ((3, "uniform"), (1, "skew"), (5, "sparse"))
    (wrong,) = process.run(
        exchanges_job, wanted, world, cases, plan, (), GROUPS[world] * staggered, timeout=300
    )
    assert wrong == []


@pytest.mark.parametrize("plan", [(), BULK], ids=["own plan", "bulk"])
@pytest.mark.parametrize("layout", LAYOUTS[::2])
@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("bf16", 16384),
        ("bf16", 16376),
        ("fp32", 16380),
        ("fp32", 16384),
        ("fp16 fp32-wire", 16376),
        ("fp8", 16384),
        ("opaque", 16376),
    ],
)
def test_long_rows(process, name, hidden, layout, plan):
    more = {**CONFIGS[name], "hidden_size": hidden, "max_tokens_per_rank": 9}
    if name == "opaque":
        more |= {"payload_bytes": 4 * 16384, "scale_bytes": 16380}
    wanted = config(more, 3, layout=layout)
    cases = ((9, "uniform"), (9, "uniform"), (2, "skew"))
    (wrong,) = process.run(exchanges_job, wanted, 3, cases, plan, timeout=120)
    assert wrong == []


def most_tokens_job(rank, group, config, world):
    """Whole numbers, compared on the GPU: rows where they came and what combine returned."""
    wrong = []
    with local_ranks(config, world) as comms:
        device = comms[0].device
        banks = [Bank(config, world, r, 1, config.max_tokens_per_rank, 5, device) for r in range(world)]
        for slots in (config.max_tokens_per_rank, config.max_tokens_per_rank - 1):
            given = [(bank.x[0, :slots], bank.ids[0, :slots], bank.weights[0, :slots]) for bank in banks]
            handles = [
                comm.dispatch_send(*parts, tokens_per_rank=slots)
                for comm, parts in zip(comms, given, strict=True)
            ]
            for comm, handle in zip(comms, handles, strict=True):
                received = comm.dispatch_recv(handle)
                live = (received.topk_ids != config.pad_id).any(1, keepdim=True)
                sent = torch.cat([x for x, _, _ in given])
                if not torch.equal(torch.where(live, received.rows, 0), torch.where(live, sent, 0)):
                    wrong.append((slots, comm.rank, "rows"))
                factor = factors_of(comm)[received.topk_ids.long()] * received.topk_weights
                y = torch.where(live, received.rows.float() * factor.sum(1, keepdim=True), torch.nan)
                comm.combine_send(y, handle)
            for comm, handle, bank in zip(comms, handles, banks, strict=True):
                if not torch.equal(comm.combine_recv(handle), bank.out[0, :slots]):
                    wrong.append((slots, comm.rank, "combined"))
        for comm in comms:
            comm.check()
    return wrong


@pytest.mark.parametrize(("world", "hidden"), [(2, 2056), (4, 136), (16, 8)])
def test_most_tokens(process, world, hidden):
    more = {"hidden_size": hidden, "num_experts": 1024, "top_k": 16, "max_tokens_per_rank": 16384}
    wanted = config(more, world, payload=torch.float32)
    (wrong,) = process.run(most_tokens_job, wanted, world, timeout=120)
    assert wrong == []


def crowded_job(rank, group, config):
    """Communicators whose waiting blocks would not all fit the GPU are refused; the others go on."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    crowd = replace(config, num_channels=16, num_sms=sms)
    window = torch.zeros(window_bytes(crowd, 1), dtype=torch.uint8, device="cuda:0")
    with local_ranks(config, 2) as comms:
        try:
            LocalRank(crowd, 0, [window], ())
            said = ""
        except RuntimeError as error:
            said = str(error)
        return said, differences(comms, tokens=[5, 3], slots=5)


def test_launches_that_do_not_fit_the_gpu_are_refused(process):
    ((said, wrong),) = process.run(crowded_job, config({}, 2), timeout=60)
    assert "blocks are reserved by other channels" in said
    assert "use fewer SMs" in said
    assert wrong == []
