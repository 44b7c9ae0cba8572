"""The process that touches the GPUs: ``main(request)`` prints a JSON line for each thing that it has tried.

It runs beside the processes of an engine, for seconds, with small allocations. It may hang or die with a sick
driver; `ep_backend.checks.supervise` sees to that.
"""

from __future__ import annotations

import faulthandler
import random
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from ep_backend.checks.data import Begin, Direction, Done, Fabric, Line, Note, Order, OrderRates, Request
from ep_backend.errors import EpError

BYTES = 16 << 20  # on each of the two GPUs, beside what CUDA itself takes
ORDER_BYTES = 2 << 20  # on each GPU, for each that stores into it
ROUNDS = 8
FLAG_ROUNDS = 500
TIMEOUT_S = 2.0  # of a wait on a GPU


def main(text: str) -> int:
    request = msgspec.json.decode(text, type=Request)
    # Nobody may be left who could end a worker that hangs in the driver.
    faulthandler.dump_traceback_later(request.limit_s, exit=True)
    try:
        import torch

        from ep_backend._native import HAS_CUDA, ops
    except (EpError, ImportError, OSError) as error:
        return _nothing(first_line(error))
    if not HAS_CUDA:
        return _nothing("this build of ep_backend has no CUDA kernels")
    found = torch.cuda.device_count()
    if found != len(request.gpus):
        return _nothing(f"CUDA shows {found} of {len(request.gpus)} GPUs to PyTorch {torch.__version__}")
    ordinals = {uuid: ordinal for ordinal, uuid in enumerate(request.gpus)}
    all_work = True
    for source, target in request.pairs:
        _say(Begin(source, target))
        direction, broken = try_direction(ops, ordinals[source], ordinals[target], source, target)
        _say(Done(direction))
        if broken:  # CUDA reports the same error from now on, whatever is asked: a fresh process goes on
            return 1
        all_work = all_work and direction.works is True
    for gpu in request.fabric:
        _say(Begin(gpu))
        _say(try_fabric(ops, ordinals[gpu], gpu))
    if request.order and all_work:
        _say(Begin())
        _say(try_orders(ops, [ordinals[gpu] for gpu in request.order.gpus], request.order))
    return 0


def try_direction(
    ops: Any, source: int, target: int, source_uuid: str, target_uuid: str, *, announce: bool = True,
    expected: int | None = None, timeout_s: float = TIMEOUT_S,
) -> tuple[Direction, bool]:  # fmt: skip
    """Try out one ordered pair, by CUDA's ordinals. Also returns whether CUDA failed on the way.

    ``announce`` False leaves the flags out, and ``expected`` looks for another pattern than the one that is
    stored: tests see with them that the check can fail.
    """
    result = Direction(source=source_uuid, target=target_uuid)
    known: dict[str, Any] = {}
    try:
        access, atomics = ops.gpu_pair_attributes(source, target)
        known = {"access": bool(access), "atomics": bool(atomics)}
        if not access:
            problem = "the driver offers no peer access"
            return msgspec.structs.replace(result, **known, works=False, problem=problem), False
        pair = ops.gpu_pair_create(source, target, BYTES)
    except RuntimeError as error:  # nothing has been stored yet: this says nothing about the path
        return msgspec.structs.replace(result, **known, problem=f"not tried: {first_line(error)}"), False
    broken = False
    try:
        known.update(_try_pair(ops, pair, announce, expected, timeout_s))
    except RuntimeError as error:
        known.update(works=False, problem=first_line(error))
        broken = True
    finally:
        ops.gpu_pair_destroy(pair)
    return msgspec.structs.replace(result, **known), broken


def _try_pair(ops: Any, pair: int, announce: bool, expected: int | None, timeout_s: float) -> dict[str, Any]:
    seed = random.getrandbits(31)
    timeout_us = round(timeout_s * 1e6)
    wanted = seed if expected is None else expected
    rounds, wrong = ops.gpu_pair_store(pair, seed, wanted, ROUNDS, announce, timeout_us)
    if wrong:
        return {
            "works": False,
            "problem": f"{wrong} words were read otherwise than they had been stored, in {ROUNDS} rounds",
        }
    if rounds < ROUNDS:
        return {
            "works": False,
            "problem": f"the flag of round {rounds + 1} of {ROUNDS} did not come within {timeout_s:g} s",
        }
    latency = ops.gpu_pair_latency(pair, FLAG_ROUNDS, timeout_us)
    return {
        "works": True,
        "store_bytes_per_s": ops.gpu_pair_bandwidth(pair, False),
        "copy_bytes_per_s": ops.gpu_pair_bandwidth(pair, True),
        "latency_s": latency if latency > 0 else None,
    }


def try_fabric(ops: Any, ordinal: int, gpu: str) -> Fabric:
    """Whether a fabric handle of one GPU can be exported and imported."""
    try:
        problem = ops.gpu_fabric_handle(ordinal)
    except RuntimeError as error:
        return Fabric(gpu, None, f"not tried: {first_line(error)}")
    return Fabric(gpu, not problem, problem)


def try_orders(ops: Any, ordinals: Sequence[int], of: OrderRates) -> Order:
    """Compare the orders of stores between the GPUs of ``of``, which all reach each other."""
    try:
        together, staggered = ops.gpu_order_rates(list(ordinals), of.group, ORDER_BYTES)
    except RuntimeError as error:
        return Order(msgspec.structs.replace(of, problem=f"not measured: {first_line(error)}"))
    rates = {"together_bytes_per_s": together, "staggered_bytes_per_s": staggered}
    return Order(msgspec.structs.replace(of, **rates))


def first_line(error: BaseException) -> str:
    """What an exception says, without the stack that PyTorch appends."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).removeprefix("ep_backend: ")


def _nothing(why: str) -> int:
    _say(Note(why))
    return 0


def _say(line: Line) -> None:
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()
