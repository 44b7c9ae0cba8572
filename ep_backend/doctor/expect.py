"""Expected times of the transport chosen on a machine that was looked at, and of NCCL. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from ep_backend.doctor import plan
from ep_backend.doctor.findings import used_directions
from ep_backend.doctor.plan import Expected, Shape
from ep_backend.doctor.warmup import WarmUp
from ep_backend.nvml import Gpu
from ep_backend.planning import hardware
from ep_backend.planning.hardware import Number
from ep_backend.probe import Record
from ep_backend.select import Decision

MODEL = "model, not measured"
FROM_NCCL = f"model of all-gather + reduce-scatter, from the all-reduces measured just now; {plan.NCCL_ERROR}"
NO_FORMULA = f"transport collective has no expected time: {plan.COLLECTIVE}"


class _Way(NamedTuple):
    """``seconds`` of a shape, ranks, tokens and dtype; None: ``basis`` says why. ``as_kept``: the machine is
    like those of the kept measurements, which hold some of the shapes."""

    name: str
    seconds: Callable[[Shape, int, int, str], float] | None
    basis: str
    as_kept: bool = False


def expect(
    record: Record,
    decision: Decision,
    warm_up: WarmUp,
    shape: Shape,
    tokens: Sequence[int],
    ranks: int,
    dtype: str,
    copy_bytes_per_s: float | None,
) -> list[Expected]:
    """Times of the transport chosen and, where NCCL was measured, of what engines do by themselves."""
    return [
        Expected(
            shape=shape.name,
            tokens=count,
            dtype=dtype,
            way=way.name,
            seconds=None if way.seconds is None else way.seconds(shape, ranks, count, dtype),
            basis=plan.CHECKED + way.basis.removeprefix(MODEL)
            if way.as_kept and plan.checked(way.name, shape, ranks, count)
            else way.basis,
        )
        for way in _ways(record, decision, warm_up, ranks, copy_bytes_per_s)
        for count in tokens
    ]


def _ways(
    record: Record, decision: Decision, warm_up: WarmUp, ranks: int, copy_bytes_per_s: float | None
) -> Iterable[_Way]:
    transport = decision.transport
    if transport == "peer":
        yield _peer(record, decision)
    elif transport == "host":
        yield _host(record, ranks)
    elif transport == "cpu" and copy_bytes_per_s is not None:
        yield _cpu(copy_bytes_per_s, record.cpus or 1)
    elif not record.used_gpus() or transport != "collective":
        unmeasured = "; nothing was measured" if transport == "mixed" else ""
        yield _Way(transport, None, f"no expectation: there is no formula for {transport}{unmeasured}")
    all_reduces = warm_up.times(ranks)
    more = f"; {NO_FORMULA}" if transport == "collective" else ""
    if all_reduces is not None:
        yield _Way("nccl", partial(plan.nccl_s, all_reduces=all_reduces), FROM_NCCL + more)
    elif record.used_gpus() and transport == "collective":
        yield _Way("nccl", None, f"no expectation: no all-reduce was measured{more}")


def _peer(record: Record, decision: Decision) -> _Way:
    rate, latency = _slowest_link(record)
    if rate is None or latency is None:
        return _Way("peer", None, "no expectation: the links were not measured")
    return _Way(
        "peer",
        partial(plan.peer_s, bytes_per_s=rate, latency_s=latency, sms=decision.sms),
        MODEL,
        on_h200(record),
    )


def _host(record: Record, ranks: int) -> _Way:
    """From rates of the table of links: memory of the host is not measured here."""
    found = _slowest_slot(record, ranks)
    if found is None:
        return _Way("host", None, "no expectation: for the GPUs' PCIe links no rate of host memory is known")
    rate, flag = found
    return _Way(
        "host",
        partial(plan.host_s, bytes_per_s=rate.value, latency_s=flag.value),
        f"{MODEL}; host memory is taken to move {rate.value / 1e9:.1f} GB/s each way at once, which doctor "
        f"does not measure ({rate.kind}: {rate.source})",
        on_h200(record) and rate.kind == "measured",
    )


def _cpu(copy_bytes_per_s: float, cpus: int) -> _Way:
    return _Way(
        "cpu",
        partial(plan.cpu_s, copy_bytes_per_s=copy_bytes_per_s, cpus=cpus),
        f"{MODEL}: fitted to 2 and 4 ranks on 2 cores, with this machine's copy rate",
    )


def _slowest_link(record: Record) -> tuple[float | None, float | None]:
    """Least store rate and longest latency between GPUs that are used; None if one was not measured."""
    directions = used_directions(record)
    rates = [one.store_bytes_per_s for one in directions if one.store_bytes_per_s]
    latencies = [one.latency_s for one in directions if one.latency_s]
    pairs = len(record.used_gpus()) * (len(record.used_gpus()) - 1)
    if not pairs or len(rates) < pairs or len(latencies) < pairs:
        return None, None
    return min(rates), max(latencies)


def _slowest_slot(record: Record, ranks: int) -> tuple[Number, Number] | None:
    """Rate of host memory and latency of a flag through it, of the GPU with the slowest PCIe link; None if
    one is not known."""
    found = [hardware.host_of(gpu.pcie_generation, gpu.lanes, ranks) for gpu in _used(record)]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(record.used_gpus()):
        return None
    return min(known, key=lambda one: one[0].value)


def on_h200(record: Record) -> bool:
    """Whether this is the kind of machine that the constants were measured on; nothing is decided by it."""
    return all("H200" in gpu.name and gpu.nvlinks for gpu in _used(record))


def _used(record: Record) -> list[Gpu]:
    used = set(record.used_gpus())
    return [gpu for gpu in record.gpus if gpu.uuid in used]
