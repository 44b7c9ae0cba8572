"""Starting a communicator: all ranks start, or all raise the same reason and the group stays usable."""

import contextlib
import os
import re
import time
import warnings
from dataclasses import replace
from threading import Event
from unittest import mock

import pytest
import torch
from exchange import check_steps, one_by_one, run_steps, step
from harness import fresh_ranks, ranks

import ep_backend as ep
from ep_backend.communicator import prepare_nccl
from ep_backend.nvml import Link
from ep_backend.probe import Record
from ep_backend.rendezvous import within
from ep_backend.select import Decision
from ep_backend.transports.cpu import CpuTransport

CONFIG = ep.EpConfig(num_experts=6, top_k=2, hidden_size=128, max_tokens_per_rank=4, timeout_s=10.0)
STEPS = [step([2, 4, 0])]


def attempt(group, config, **more):
    """What the start of a communicator raises, and whether one can be made right afterwards."""
    message = ""
    try:
        ep.Communicator(group, config, **more).destroy()
    except ep.EpConfigError as error:
        message = str(error)
    return message


def test_what_may_wait_for_ever_is_left_behind():
    assert within(5, lambda: 7, "it") == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0, "it")
    never = Event()
    with pytest.raises(RuntimeError, match=r"connecting has not ended after 0\.1 s"):
        within(0.1, never.wait, "connecting")
    never.set()


def config_job(rank, group, configs):
    message = attempt(group, configs[rank])
    return message, run_steps(rank, group, CONFIG, STEPS, one_by_one(STEPS))


DIFFERENT = {
    "num_experts": 7,
    "top_k": 1,
    "hidden_size": 256,
    "max_tokens_per_rank": 5,
    "payload": torch.float16,
    "quantization": "fp8_block128",
    "out_dtype": torch.float32,
    "wire_dtype": torch.float32,
    "layout": "compact",
    "expert_map": (0, 0, 0, 1, 1, 2),
    "num_channels": 2,
}


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("name", DIFFERENT)
def test_different_configurations(name, odd):
    configs = [CONFIG] * 3
    configs[odd] = replace(CONFIG, **{name: DIFFERENT[name]})
    answers = ranks(3).run(config_job, configs)
    messages = {message for message, _ in answers}
    assert len(messages) == 1
    message = messages.pop()
    other = odd or 1
    assert f"rank 0 and rank {other} have different configurations" in message
    mine, theirs = getattr(configs[0], name), getattr(configs[other], name)
    assert f"{name}: {mine} against {theirs}" in message
    check_steps(CONFIG, STEPS, [results for _, results in answers])


def test_all_differences_are_named():
    configs = [CONFIG, replace(CONFIG, top_k=3, layout="compact"), CONFIG]
    for message, _ in ranks(3).run(config_job, configs):
        assert "top_k: 2 against 3" in message
        assert "layout: rank_major against compact" in message


def private_job(rank, group, configs):
    with ep.Communicator(group, configs[rank]) as c:
        ids = torch.tensor([[0, 5]])
        received, handle = c.dispatch(torch.ones(1, 128).bfloat16(), ids, torch.ones(1, 2), tokens_per_rank=1)
        out = c.combine(torch.ones(3, 128), handle)
        return received.topk_ids, out


def test_what_stays_on_a_rank_may_differ():
    configs = [CONFIG, replace(CONFIG, pad_id=99), replace(CONFIG, expert_ids="global", pad_id=-5)]
    answers = ranks(3).run(private_job, configs)
    assert all(torch.equal(out, torch.full((1, 128), 2.0).bfloat16()) for _, out in answers)
    assert [ids.unique().tolist() for ids, _ in answers] == [[-1, 0], [99], [0, 5]]


def device_job(rank, group, device):
    more = {"device": device} if rank == 1 else {}
    message = attempt(group, CONFIG, **more)
    return message, run_steps(rank, group, CONFIG, STEPS, one_by_one(STEPS))


@pytest.mark.parametrize("device", ["cuda", "gpu7"])
def test_device_of_one_rank(device):
    answers = ranks(3).run(device_job, device)
    for message, _ in answers:
        assert "rank 1 cannot start" in message
        assert device in message
    check_steps(CONFIG, STEPS, [results for _, results in answers])


def no_config_job(rank, group):
    return attempt(group, {"num_experts": 6} if rank == 0 else CONFIG)


def test_no_config_on_one_rank():
    for message in ranks(2).run(no_config_job):
        assert "rank 0 cannot start" in message
        assert "EpConfig was wanted" in message


def subgroup_job(rank, group):
    """Ranks 0 and 2 of three: their numbers in the group are 0 and 1."""
    import torch.distributed as dist

    part = dist.new_group([0, 2])
    if rank == 1:
        return attempt(part, CONFIG), None
    steps = [step([2, 3])]
    return "", run_steps(dist.get_rank(part), part, CONFIG, steps, one_by_one(steps))


def test_part_of_the_ranks():
    answers = ranks(3).run(subgroup_job)
    assert "not in the group" in answers[1][0]
    check_steps(CONFIG, [step([2, 3])], [answers[0][1], answers[2][1]])


def placement_job(rank, group, transport):
    """The map is right for four ranks and these are three."""
    config = replace(CONFIG, expert_map=(0, 1, 2, 3, 0, 1), transport=transport)
    return attempt(group, config)


@pytest.mark.parametrize("transport", ["cpu", "collective"])
def test_placement_beyond_the_group(transport):
    for message in ranks(3).run(placement_job, transport):
        assert "names rank 3" in message
        assert "0 to 2" in message


def misspelt_job(rank, group):
    with (
        mock.patch.dict(os.environ, {"EP_BACKEND_TRANSPROT": "cpu"}),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        with ep.Communicator(group, CONFIG):
            pass
    return [str(one.message) for one in seen]


def test_a_misspelt_variable_is_named():
    for said in ranks(2).run(misspelt_job):
        assert any("EP_BACKEND_TRANSPROT" in text and "EP_BACKEND_TRANSPORT" in text for text in said)


def transport_job(rank, group, names):
    return attempt(group, replace(CONFIG, transport=names[rank]))


@pytest.mark.parametrize("names", [("smoke",) * 2, ("peer",) * 2, ("cpu", "collective"), ("auto", "smoke")])
def test_transports_that_cannot_be(names):
    messages = ranks(2).run(transport_job, names)
    assert len(set(messages)) == 1
    assert any(name in messages[0] for name in names if name != "auto")
    assert messages[0]


def environment_job(rank, group, name, texts):
    """As if the ranks had been started with different environments."""
    with mock.patch.dict(os.environ, {name: texts[rank]}):
        message = attempt(group, replace(CONFIG, timeout_s=None))
    return message, run_steps(rank, group, CONFIG, STEPS, one_by_one(STEPS))


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("EP_BACKEND_TRANSPORT", ("cpu", "collective", "cpu")),
        ("EP_BACKEND_TRANSPORT", ("nonsense",) * 3),
        ("EP_BACKEND_PROFILE", ("cpu", "nvswitch", "cpu")),
        ("EP_BACKEND_TRAFFIC_CLASS", ("300", "", "")),  # which nothing on a CPU would read
        ("EP_BACKEND_STARTUP_TIMEOUT_S", ("soon", "", "")),
        ("EP_BACKEND_TIMEOUT_S", ("soon",) * 3),
        ("EP_BACKEND_TIMEOUT_S", ("3", "soon", "3")),
        ("EP_BACKEND_TIMEOUT_S", ("-1", "3", "3")),
    ],
)
def test_environment(name, texts):
    answers = ranks(3).run(environment_job, name, texts, timeout=40)
    for message, _ in answers:
        assert name in message or texts[0] in message, message
    check_steps(CONFIG, STEPS, [results for _, results in answers])


def prepared_job(rank, group):
    """That a transport is asked for on all ranks, one that these tensors have not, does not matter yet."""
    with mock.patch.dict(os.environ, {"EP_BACKEND_TRANSPORT": "peer"}):
        return len(prepare_nccl(group, torch.device("cpu")))


def test_nccl_is_prepared_whatever_transport_is_asked_for():
    assert ranks(3).run(prepared_job) == [3] * 3


def broken_job(rank, group, target, transport, culprit):
    failing = mock.patch(target, side_effect=OSError("injected"))
    with failing if rank == culprit else contextlib.nullcontext():
        message = attempt(group, replace(CONFIG, transport=transport))
    return message, run_steps(rank, group, CONFIG, STEPS, one_by_one(STEPS))


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize(
    ("target", "transport"),
    [
        ("os.memfd_create", "cpu"),
        ("os.posix_fallocate", "cpu"),
        ("socket.socket.listen", "cpu"),
        ("socket.socket.connect", "cpu"),
        ("socket.send_fds", "cpu"),
        ("socket.recv_fds", "cpu"),
        ("mmap.mmap", "cpu"),
        ("ep_backend.transports.cpu.NativeExchange", "cpu"),
        ("ep_backend.transports.collective.anonymous", "collective"),
        ("ep_backend.transports.collective.NativeExchange", "collective"),
        ("ep_backend.communicator.probe", "cpu"),
    ],
)
def test_one_rank_cannot_start(target, transport, culprit):
    answers = ranks(3).run(broken_job, target, transport, culprit, timeout=40)
    for message, _ in answers:
        assert "cannot start" in message
        assert "injected" in message or "cannot share memory" in message
    assert "injected" in answers[culprit][0]
    check_steps(CONFIG, STEPS, [results for _, results in answers])


def pcie_job(rank, group, found, config):
    """Made-up GPUs on PCIe, of which only the second probe says ``found``; rows stay on the CPU."""
    asked = []

    def probe(device, *, neighbours=None):
        asked.append(neighbours)
        works = None if neighbours is None else found if rank == 0 else None
        link = Link(a="GPU-0", b="GPU-1", nvlink=False, ancestor="PHB", peer_works=works)
        return Record(host="h", boot_id="b", device=f"GPU-{rank}", links=(link,))

    both = mock.patch("ep_backend.communicator.available", return_value=frozenset({"collective", "peer"}))
    with mock.patch("ep_backend.communicator.probe", probe), both, ep.Communicator(group, config) as comm:
        return asked, comm.decision.profile, comm.transport, comm.decision.reason


def test_a_group_tries_out_its_gpus_once_it_knows_them():
    config = replace(CONFIG, transport="auto")
    for asked, profile, transport, reason in ranks(2).run(pcie_job, False, config):
        assert asked == [None, ("GPU-0", "GPU-1")]
        assert (profile, transport) == ("pcie_blackwell", "collective")
        assert "failed between GPU-0 and GPU-1" in reason
    for asked, *_ in ranks(2).run(pcie_job, False, replace(CONFIG, transport="collective")):
        assert asked == [None], "what was found would change nothing"


def budget_job(rank, group, path):
    given = []

    def transport(group, config, *_):
        given.append((config.num_sms, config.chunk_scale))
        return CpuTransport(group, config)

    names = {CpuTransport.name: transport}
    with (
        mock.patch.dict(os.environ, {"EP_BACKEND_PROFILE": path}),
        mock.patch.dict("ep_backend.communicator.TRANSPORTS", names),
    ):
        ep.Communicator(group, CONFIG).destroy()
        ep.Communicator(group, replace(CONFIG, num_sms=8)).destroy()
    return given


def test_the_sm_budget_of_a_profile_holds_where_the_caller_gives_none(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("""
        name = "own"
        description = "Mine."
        [transport]
        inside = ["cpu"]
        across = ["collective"]
        source = "me"
        [sm_budget]
        sms = 24
        source = "me"
    """)
    assert ranks(2).run(budget_job, str(file)) == [[(24, 1.0), (8, 1.0)]] * 2


def chunks_job(rank, group):
    """The scale of chunks that a transport gets: as decided, and of the communicator's own."""
    given = []

    def transport(group, config, *_):
        given.append((config.num_sms, config.chunk_scale))
        return CpuTransport(group, config)

    decided = Decision(
        profile=None, transport=CpuTransport.name, env=(), reason="tuned", sms=24, chunk_scale=2.0
    )
    with (
        mock.patch("ep_backend.communicator.decide", return_value=decided),
        mock.patch.dict("ep_backend.communicator.TRANSPORTS", {CpuTransport.name: transport}),
    ):
        ep.Communicator(group, CONFIG).destroy()
        ep.Communicator(group, replace(CONFIG, chunk_scale=1.0)).destroy()
    return given


def test_tuned_chunks_hold_where_the_caller_gives_none():
    assert ranks(2).run(chunks_job) == [[(24, 2.0), (24, 1.0)]] * 2


def open_things():
    with open("/proc/self/maps") as maps:
        windows = sum("ep_backend-window" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), windows


def failed_start_leaves_nothing_job(rank, group):
    counts = []
    for _ in range(3):
        with (
            mock.patch("socket.recv_fds", side_effect=OSError("injected"))
            if rank
            else contextlib.nullcontext()
        ):
            assert attempt(group, replace(CONFIG, timeout_s=0.5, transport="cpu"))
        import gc

        gc.collect()
        counts.append(open_things())
    return counts


def test_a_failed_start_leaves_nothing():
    for counts in ranks(2).run(failed_start_leaves_nothing_job):
        assert counts[0] == counts[-1]
        assert counts[-1][1] == 0


def absent_job(rank, group, late_s):
    if rank == 1 and late_s:
        time.sleep(late_s)
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    return attempt(group, CONFIG), time.monotonic() - start


def test_a_rank_dies_before_it_starts():
    """The group notices, and nobody waits longer than its timeout."""
    with fresh_ranks(2) as group:
        group.start(absent_job, 0)
        outcomes = group.outcomes(timeout=30)
    assert outcomes[1].exitcode == 3
    assert "rank 0 lost rank 1 while all of them met" in outcomes[0].value[0]


def test_a_rank_does_not_come():
    """Nobody waits for it as long as the group would."""
    with fresh_ranks(2, {"EP_BACKEND_STARTUP_TIMEOUT_S": "1"}) as group:
        group.start(absent_job, 600)
        said, seconds = group.outcomes(timeout=30, stopped=(1,))[0].value
    assert re.search(r"rank 0 waited 1\.\d s for rank 1 while all of them met", said)
    assert "EP_BACKEND_STARTUP_TIMEOUT_S" in said
    assert 0.9 < seconds < 10
