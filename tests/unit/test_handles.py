"""The life of exchanges, handles, received tensors and communicators."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from exchange import check_steps, make_call, make_result, own, run_steps, step
from harness import ranks

import ep_backend as ep
from ep_backend.reference import same_bits

CONFIG = ep.EpConfig(
    num_experts=5,
    top_k=2,
    hidden_size=16,
    max_tokens_per_rank=6,
    payload=torch.float32,
    num_channels=2,
    timeout_s=20.0,
)
BOTH = pytest.mark.parametrize("transport", ["cpu", "collective"])
LAYOUTS = pytest.mark.parametrize("layout", ["rank_major", "compact", "expert_major"])


def dispatch(c, seed=0, half=False, **more):
    call = make_call(c.config, c.world_size, c.rank, step([3] * c.world_size, seed=seed))
    given = (call.x, call.topk_ids, call.topk_weights)
    return c.dispatch_send(*given, **more) if half else c.dispatch(*given, **more)


def result(c, received, seed=0):
    return make_result(c.config, c.rank, step([3] * c.world_size, seed=seed), received)


def refused(action, *args, **kwargs):
    try:
        action(*args, **kwargs)
    except ep.EpArgumentError as error:
        return str(error)
    raise AssertionError("it was accepted")


def states_job(rank, group, transport, layout):
    with ep.Communicator(group, replace(CONFIG, transport=transport, layout=layout)) as c:
        handle = dispatch(c, half=True)
        assert (handle.state, handle.channel, handle.num_tokens, handle.tokens_per_rank) == ("sent", 0, 3, 6)
        assert handle.is_view == (layout == "rank_major")
        assert len(handle.valid_until) > 10
        assert ("next dispatch" in handle.valid_until) == handle.is_view
        nothing = torch.zeros(0, 16)
        assert "'sent'" in refused(c.combine, nothing, handle)
        assert "'sent'" in refused(c.combine_send, nothing, handle)
        assert "'sent'" in refused(c.combine_recv, handle)
        received = c.dispatch_recv(handle)
        assert handle.state == "received"
        assert "'received'" in refused(c.dispatch_recv, handle)
        assert "'received'" in refused(c.combine_recv, handle)
        y = result(c, received)
        c.combine_send(y, handle)
        assert handle.state == "returned"
        assert "'returned'" in refused(c.combine_send, y, handle)
        assert "'returned'" in refused(c.combine, y, handle)
        assert "'returned'" in refused(c.dispatch_recv, handle)
        assert "'returned'" in refused(c.release, handle)
        out = c.combine_recv(handle)
        assert handle.state == "combined"
        for message in (
            refused(c.combine, y, handle),
            refused(c.combine_send, y, handle),
            refused(c.combine_recv, handle),
            refused(c.dispatch_recv, handle),
            refused(c.release, handle),
        ):
            assert "'combined'" in message
            assert "wanted" in message
        # None of the refused calls was an exchange: all ranks still agree.
        received, handle = dispatch(c)
        assert torch.equal(c.combine(result(c, received), handle), out)
        return True


@LAYOUTS
@BOTH
def test_each_half_once(transport, layout):
    assert all(ranks(2).run(states_job, transport, layout))


def old_handles_job(rank, group, transport):
    config = replace(CONFIG, transport=transport)
    with ep.Communicator(group, config) as c, ep.Communicator(group, config) as other:
        received, dropped = dispatch(c, seed=1)
        y = result(c, received, seed=1)
        received, released = dispatch(c, seed=1, channel=1)
        c.release(released)
        assert released.state == "closed"
        assert "'closed'" in refused(c.combine, y, released)
        assert "'closed'" in refused(c.release, released)
        received, handle = dispatch(c, seed=2)  # closes the one on channel 0
        assert dropped.state == "closed"
        assert "'closed'" in refused(c.combine, y, dropped)
        _, foreign = dispatch(other)
        assert "another communicator" in refused(c.combine, y, foreign)
        assert foreign.state == "received"
        out = c.combine(result(c, received, seed=2), handle)
        # The same again on a channel that closed nothing.
        received, handle = dispatch(c, seed=2, channel=1)
        assert torch.equal(c.combine(result(c, received, seed=2), handle), out)
        return True


@BOTH
def test_old_and_foreign_handles(transport):
    assert all(ranks(2).run(old_handles_job, transport))


def dropped_steps():
    """Dispatch n is open at every point when dispatch n + 1 comes."""
    return [
        [(0, "send"), (1, "dispatch"), (1, "combine")],
        [(0, "dispatch"), (1, "dispatch"), (1, "combine")],
        [(0, "dispatch"), (0, "combine_send"), (1, "dispatch"), (1, "combine")],
        [(0, "send"), (1, "send"), (2, "send"), (2, "recv"), (2, "combine")],
    ]


@LAYOUTS
@pytest.mark.parametrize("number", range(4))
def test_dispatch_that_is_never_combined(number, layout):
    config = replace(CONFIG, layout=layout)
    steps = [step([n, 6 - n, n], seed=n) for n in range(3)]
    schedule = dropped_steps()[number]
    check_steps(config, steps, ranks(3).run(run_steps, config, steps, schedule))


def some_ranks_job(rank, group, transport, way):
    """Rank 1 does not combine: it releases, or dispatches the next; the others want their sums."""
    with ep.Communicator(group, replace(CONFIG, transport=transport)) as c:
        received, handle = dispatch(c, seed=1)
        y = result(c, received, seed=1)
        message = ""
        if rank == 1:
            if way == "release":
                c.release(handle)
        else:
            try:
                c.combine(y, handle)
            except ep.EpProtocolError as error:
                message = str(error)
            assert handle.state == "combined"
            assert "'combined'" in refused(c.combine, y, handle)
        c.check()
        received, handle = dispatch(c, seed=2)
        kept = own(received)
        return message, kept, c.combine(result(c, kept, seed=2), handle)


@BOTH
@pytest.mark.parametrize("way", ["release", "dispatch"])
def test_combine_skipped_on_one_rank(way, transport):
    answers = ranks(3).run(some_ranks_job, transport, way)
    assert [bool(message) for message, _, _ in answers] == [True, False, True]
    for message, _, _ in (answers[0], answers[2]):
        assert "rank 1 ended the exchange without a combine" in message
        assert "stays usable" in message
    results = [{transport: ({0: received}, {0: out})} for _, received, out in answers]
    check_steps(CONFIG, [step([3, 3, 3], seed=2)], results)


def last_exchange_job(rank, group, transport, action):
    """Ends with an exchange open: that must not hurt the next communicator."""
    with ep.Communicator(group, replace(CONFIG, transport=transport)) as c:
        handle = dispatch(c, half=True)
        if action == "received":
            c.dispatch_recv(handle)
    with ep.Communicator(group, replace(CONFIG, transport=transport)) as c:
        received, handle = dispatch(c)
        c.combine(result(c, received), handle)
    return True


@BOTH
@pytest.mark.parametrize("action", ["sent", "received"])
def test_destroy_with_an_open_exchange(action, transport):
    assert all(ranks(3).run(last_exchange_job, transport, action))


def use_after_destroy_job(rank, group, transport):
    c = ep.Communicator(group, replace(CONFIG, transport=transport))
    with c as same:
        assert same is c
        received, handle = dispatch(c)
        y = result(c, received)
    call = make_call(CONFIG, c.world_size, rank, step([3, 3]))
    given = (call.x, call.topk_ids, call.topk_weights)
    for action in (
        lambda: c.dispatch(*given),
        lambda: c.dispatch_send(*given),
        lambda: c.dispatch_recv(handle),
        lambda: c.combine(y, handle),
        lambda: c.combine_send(y, handle),
        lambda: c.combine_recv(handle),
        lambda: c.release(handle),
        c.check,
        c.recover,
        lambda: c.set_timeout(1.0),
        lambda: c.mask_ranks([1 - rank]),
    ):
        with pytest.raises(ep.EpError, match="destroyed"):
            action()
    c.destroy()
    c.destroy()
    assert c.transport == transport  # what it was may still be asked
    assert c.window_bytes > 0
    return True


@BOTH
def test_use_after_destroy(transport):
    assert all(ranks(2).run(use_after_destroy_job, transport))


def views_job(rank, group, transport, layout):
    c = ep.Communicator(group, replace(CONFIG, transport=transport, layout=layout))
    received, _ = dispatch(c)
    kept = own(received)
    torch.distributed.barrier(group)
    c.destroy()
    del c
    gc.collect()
    defined = kept.rows.isfinite()  # a view may hold any bits elsewhere
    assert torch.equal(received.rows[defined], kept.rows[defined])
    received.rows.fill_(1.0)  # writable, and nobody else's any more
    torch.distributed.barrier(group)
    return bool((received.rows == 1.0).all())


@LAYOUTS
@BOTH
def test_received_rows_outlive_the_communicator(transport, layout):
    assert all(ranks(2).run(views_job, transport, layout))


def mapped(word="ep_backend-window"):
    with open("/proc/self/maps") as maps:
        return sum(word in line for line in maps)


def leak_job(rank, group, transport):
    import os

    counts = []
    for _ in range(4):
        c = ep.Communicator(group, replace(CONFIG, transport=transport))
        alive = weakref.ref(c)
        received, handle = dispatch(c)
        c.combine(result(c, received), handle)
        del received, handle
        c.destroy()
        del c
        gc.collect()
        assert alive() is None
        torch.distributed.barrier(group)
        counts.append((len(os.listdir("/proc/self/fd")), mapped()))
    return counts


@BOTH
def test_nothing_is_left_after_destroy(transport):
    for counts in ranks(3).run(leak_job, transport):
        assert counts[-1] == counts[1]  # descriptors and mappings
        assert counts[-1][1] == 0


def forgotten_job(rank, group):
    """Without destroy: the garbage collector is enough."""
    c = ep.Communicator(group, replace(CONFIG, transport="cpu"))
    received, handle = dispatch(c)
    assert mapped() == 2
    rows = received.rows
    del c, received, handle
    gc.collect()
    one_left = mapped()
    del rows
    gc.collect()
    return one_left, mapped()


def test_a_view_keeps_only_its_own_window():
    assert ranks(2).run(forgotten_job) == [(1, 0), (1, 0)]


def exception_job(rank, group):
    with pytest.raises(KeyError), ep.Communicator(group, CONFIG) as c:
        raise KeyError("mine")
    with pytest.raises(ep.EpError, match="destroyed"):
        c.check()
    return True


def test_with_passes_errors_on():
    assert all(ranks(2).run(exception_job))


def attributes_job(rank, group):
    with ep.Communicator(group, replace(CONFIG, expert_map=(1, 0, 1, 1, 1))) as c:
        return c.rank, c.world_size, c.local_experts, c.transport, str(c.device), c.config.expert_map


def test_attributes():
    answers = ranks(3).run(attributes_job)
    assert [a[0] for a in answers] == [0, 1, 2]
    assert {a[1] for a in answers} == {3}
    assert [a[2] for a in answers] == [(1,), (0, 2, 3, 4), ()]
    assert {a[3] for a in answers} == {"cpu"}
    assert {a[4] for a in answers} == {"cpu"}


def many_job(rank, group):
    """Two communicators at once, with different configurations, in use in turns."""
    first, second = CONFIG, replace(CONFIG, layout="compact", transport="collective")
    with ep.Communicator(group, first) as a, ep.Communicator(None, second) as b:
        ra, ha = dispatch(a, seed=1)
        rb, hb = dispatch(b, seed=1)
        out = b.combine(result(b, rb, seed=1), hb)
        y = torch.zeros_like(ra.rows)
        assert ra.topk_ids is not None
        y[(ra.topk_ids >= 0).any(1)] = result(b, rb, seed=1)
        return torch.equal(a.combine(y, ha), out)


def test_two_communicators():
    assert all(ranks(3).run(many_job))


def reused_output_job(rank, group, transport):
    with ep.Communicator(group, replace(CONFIG, transport=transport)) as c:
        received, handle = dispatch(c)
        out = torch.full((3, 16), torch.nan)
        given = c.combine(result(c, received), handle, out=out)
        return given is out and bool(out.isfinite().all())


@BOTH
def test_out(transport):
    assert all(ranks(2).run(reused_output_job, transport))


def grad_job(rank, group, transport):
    """Tensors that carry gradients: values go through, no graph is recorded."""
    with ep.Communicator(group, replace(CONFIG, transport=transport)) as c:
        call = make_call(CONFIG, c.world_size, rank, step([3, 3]))
        x = torch.randn(3, 16, requires_grad=True)
        received, handle = c.dispatch(x, call.topk_ids, call.topk_weights.requires_grad_())
        y = torch.zeros(received.rows.shape).requires_grad_()
        out = c.combine(y * 2, handle)
        return not received.rows.requires_grad and not out.requires_grad


@BOTH
def test_tensors_with_gradients(transport):
    assert all(ranks(2).run(grad_job, transport))


def rows_and_ids_job(rank, group, transport):
    """Expert-major rows in memory of the caller's, and whose they are."""
    config = replace(CONFIG, transport=transport, layout="expert_major", expert_ids="global")
    with ep.Communicator(group, config) as c:
        received, handle = dispatch(c)
        want, counts = received.rows.clone(), received.rows_per_expert
        places = c.received_places(handle)
        capacity = c.world_size * 6
        assert (places.shape, places.dtype) == ((capacity, 2), torch.int32)
        seen = [0] * len(c.local_experts)
        for slot, row in enumerate(places.tolist()):
            source, token = divmod(slot, 6)
            call = make_call(config, c.world_size, source, step([3] * c.world_size))
            ids = call.topk_ids[token].tolist() if token < 3 else [-1] * 2
            for expert, place in zip(ids, row, strict=True):
                if expert not in c.local_experts:
                    assert place == -1
                    continue
                number = c.local_experts.index(expert)
                assert place == number * capacity + seen[number]
                seen[number] += 1
                assert same_bits(received.rows.flatten(0, 1)[place], call.x[token])
        assert seen == counts.tolist()
        handle = dispatch(c, half=True, channel=1)
        assert "was wanted" in refused(c.dispatch_recv, handle, rows=want[:, 1:])
        assert "contiguous" in refused(c.dispatch_recv, handle, rows=want.mT.contiguous().mT)
        rows = torch.full_like(want, torch.nan)
        again = c.dispatch_recv(handle, rows=rows)
        assert again.rows is rows
        assert all(same_bits(rows[e, :n], want[e, :n]) for e, n in enumerate(counts.tolist()))
    with ep.Communicator(group, replace(config, layout="compact")) as c:
        handle = dispatch(c, half=True)
        assert "expert_major" in refused(c.dispatch_recv, handle, rows=rows)
        c.dispatch_recv(handle)
        assert "expert_major" in refused(c.received_places, handle)


@BOTH
def test_rows_where_they_are_wanted(transport):
    ranks(2).run(rows_and_ids_job, transport)


def scales_by_column_job(rank, group, transport):
    """The same scales in another order of memory, whole and in halves."""
    fields = {"payload": torch.bfloat16, "hidden_size": 256, "quantization": "fp8_block128"}
    config = replace(CONFIG, transport=transport, layout="expert_major", **fields)
    with (
        ep.Communicator(group, config) as by_row,
        ep.Communicator(group, replace(config, scales_by_column=True)) as by_column,
    ):
        want, _ = dispatch(by_row)
        got = [dispatch(by_column)[0], by_column.dispatch_recv(dispatch(by_column, half=True))]
        for received in got:
            assert received.scales.mT.is_contiguous()
            for e, n in enumerate(want.rows_per_expert.tolist()):
                assert torch.equal(received.scales[e, :n], want.scales[e, :n])


@BOTH
def test_scales_by_column(transport):
    ranks(2).run(scales_by_column_job, transport)


def sums_job(rank, group, transport, dtype):
    """Results of one exchange's rows, by expert, go back by another: as if they went by their own."""
    common = replace(CONFIG, transport=transport, payload=dtype, expert_ids="global")
    common = replace(common, wire_dtype=torch.float32)
    sums = replace(common, payload=torch.bfloat16, out_dtype=dtype, sums_only=True)
    with (
        ep.Communicator(group, replace(common, layout="expert_major")) as by_expert,
        ep.Communicator(group, common) as by_rank,
        ep.Communicator(group, sums) as c,
    ):
        received, there = dispatch(by_expert)
        y, places = result(by_expert, received), by_expert.received_places(there)
        want = by_expert.combine(y, there)
        call = make_call(common, c.world_size, rank, step([3] * c.world_size))
        given = (call.topk_ids, call.topk_weights)
        for known in (places, None):
            assert same_bits(c.exchange_sums(y, known, *given), want)
            handle = c.exchange_sums_send(y, known, *given, channel=1)
            out = torch.full_like(want, torch.nan)
            assert same_bits(c.exchange_sums(y, known, *given, out=out), want)  # between the halves
            assert same_bits(c.combine_recv(handle), want)
        for known in (places, None):
            received, there = dispatch(by_expert)
            assert same_bits(c.exchange_sums(y, known, *given, ends=(by_expert, there)), want)
            assert there.state == "closed"
        assert "closed" in refused(c.exchange_sums, y, places, *given, ends=(by_expert, there))
        received, opened = dispatch(by_rank)
        assert "of their own" in refused(c.exchange_sums, y, places, *given, ends=(by_rank, opened))
        by_rank.combine(result(by_rank, received), opened)  # is left as it was
        assert "out" in refused(c.exchange_sums, y, places, *given, out=want[1:])
        assert "at most" in refused(c.exchange_sums, y, places, *given, tokens_per_rank=2)
        assert f"[M, {c.config.top_k}]" in refused(c.exchange_sums, y, places, given[0][0], given[1])
        assert "topk_ids" in refused(c.exchange_sums, y, places, given[0][:, 1:], given[1])
        assert "topk_weights" in refused(c.exchange_sums, y, places, given[0], given[1][1:])
        assert "places" in refused(c.exchange_sums, y, places[1:], *given)
        assert "contiguous" in refused(c.exchange_sums, y, places.T.contiguous().T, *given)
        for other in (by_expert, by_rank):
            assert "sums_only" in refused(other.exchange_sums, y, places, *given)
            assert "sums_only" in refused(other.exchange_sums_send, y, places, *given)
        handle = c.exchange_sums_send(y, places, *given)
        for action in (c.dispatch, c.dispatch_send):
            assert "sums_only" in refused(action, call.x, *given)
        for action in (c.combine, c.combine_send):
            assert "'returned'; 'received' was wanted" in refused(action, y, handle)
        assert same_bits(c.combine_recv(handle), want)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_of_the_rows_of_another_exchange(transport, dtype):
    ranks(3).run(sums_job, transport, dtype)
