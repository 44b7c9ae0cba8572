"""Runs the worker that touches the GPUs, with a deadline for each answer and one for everything.

CUDA is never initialised in this process. A worker that hangs or dies takes nothing along: what it has
reported is kept, what it was at counts as failed, and a fresh worker goes on with the rest.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ep_backend.checks.data import Begin, Direction, Done, Fabric, Line, Note, Order, OrderRates, Request

ANSWER_S = 10.0  # for one direction, whose own waits are shorter
START_S = 60.0  # until the first line: importing torch from a cold disk takes long
MOST_WORKERS = 4  # each takes seconds to start
_LONGEST_LINE = 1 << 16
# Ended by somebody, a batch system or the kernel short of memory: says nothing about the GPUs.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A child finds the package where this process found it, and still its own standard library first.
_CODE = """
import sys
places = [n for n, path in enumerate(sys.path) if path.endswith("-packages")]
sys.path.insert(min(places, default=len(sys.path)), sys.argv[1])
from ep_backend.checks.worker import main
sys.exit(main(sys.argv[2]))
"""

Pair = tuple[str, str]


class Outcome(msgspec.Struct, kw_only=True):
    """What the workers found. Everything that was asked for is in here, tried or not; ``order`` if all
    ``directions`` work."""

    directions: dict[Pair, Direction] = {}
    fabric: dict[str, bool | None] = {}
    order: OrderRates | None = None
    problems: list[str] = []

    @property
    def all_work(self) -> bool:
        return all(direction.works for direction in self.directions.values())


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds: until the first line, for one answer, and (a time of the monotonic clock) for everything."""

    start_s: float
    answer_s: float
    end: float


def run(
    gpus: Sequence[str],
    pairs: Sequence[Pair],
    fabric: Sequence[str],
    *,
    order: OrderRates | None = None,
    environ: Mapping[str, str],
    deadline_s: float,
    answer_s: float = ANSWER_S,
    start_s: float = START_S,
    command: Sequence[str] | None = None,
) -> Outcome:
    """Try out ``pairs`` (source, target) and the fabric handles of ``fabric`` and, if all pairs work, compare
    the orders of stores between the GPUs of ``order``; all UUIDs among ``gpus``.

    Ends within ``deadline_s`` and a few seconds. ``command`` takes the place of the worker in tests; the
    request is appended to it.
    """
    limits = Limits(start_s=start_s, answer_s=answer_s, end=time.monotonic() + deadline_s)
    outcome = Outcome()
    why = ""
    for _ in range(MOST_WORKERS):
        request = Request(
            gpus=tuple(gpus),
            pairs=tuple(pair for pair in pairs if pair not in outcome.directions),
            fabric=tuple(gpu for gpu in fabric if gpu not in outcome.fabric),
            order=order if outcome.order is None and outcome.all_work else None,
            limit_s=max(limits.end - time.monotonic(), 0.0) + 5,
        )
        if why or not (request.pairs or request.fabric or request.order):
            break
        why = _follow(request, environ, command, limits, outcome)
    _fill_up(pairs, fabric, order, why or "the process that tries it broke too often", outcome)
    return outcome


def _fill_up(
    pairs: Sequence[Pair], fabric: Sequence[str], order: OrderRates | None, why: str, outcome: Outcome
) -> None:
    untried = [pair for pair in pairs if pair not in outcome.directions]
    for source, target in untried:
        outcome.directions[source, target] = Direction(
            source=source, target=target, problem=f"not tried: {why}"
        )
    no_fabric = [gpu for gpu in fabric if gpu not in outcome.fabric]
    outcome.fabric.update(dict.fromkeys(no_fabric))
    if untried:
        outcome.problems.append(
            f"peer access was not tried in {len(untried)} of {len(pairs)} directions: {why}"
        )
    if no_fabric:
        outcome.problems.append(f"fabric handles were not tried on {len(no_fabric)} GPUs: {why}")
    if order and outcome.order is None and outcome.all_work:
        _take(Order(msgspec.structs.replace(order, problem=f"not measured: {why}")), outcome)


def _follow(
    request: Request,
    environ: Mapping[str, str],
    command: Sequence[str] | None,
    limits: Limits,
    outcome: Outcome,
) -> str:
    """Follow one worker to its end. Returns why no other should be started; empty: another may go on."""
    try:
        worker = _Worker(request, environ, command)
    except OSError as error:
        return f"the process that tries it does not start: {error}"
    at: Begin | None = None
    heard = False
    last_words = ""
    since = time.monotonic()
    try:
        while True:
            allowed = limits.answer_s if heard else limits.start_s
            text = worker.line(min(since + allowed, limits.end))
            if text is None:
                break
            line = _decoded(text)
            if line is None:
                last_words = text.strip()[:200] or last_words
                continue
            heard, since = True, time.monotonic()
            if isinstance(line, Note):
                return line.text
            at = line if isinstance(line, Begin) else None
            if _was_asked(line, request):
                _take(line, outcome)
    except TimeoutError:
        waited = time.monotonic() - since
        if not heard:
            return f"the process that tries it said nothing within {waited:.2g} s"
        if at is None or waited < limits.answer_s / 2:
            return "the time for it was up"
        _failed(at, request, f"no answer within {waited:.2g} s", outcome)
        return ""
    finally:
        status = worker.end()
    ended = f"signal {-status}" if status < 0 else f"status {status}"
    ended = f"the process that tries it ended with {ended}" + (f" ({last_words})" if last_words else "")
    if not heard or -status in _FROM_OUTSIDE:
        return ended
    if at is not None:
        _failed(at, request, ended, outcome)
    return ""


def _was_asked(line: Line, request: Request) -> bool:
    if isinstance(line, Done):
        return (line.direction.source, line.direction.target) in request.pairs
    if isinstance(line, Fabric):
        return line.gpu in request.fabric
    if isinstance(line, Order) and request.order is not None:
        return (line.rates.gpus, line.rates.group) == (request.order.gpus, request.order.group)
    return False


def _take(line: Line, outcome: Outcome) -> None:
    if isinstance(line, Done):
        outcome.directions[line.direction.source, line.direction.target] = line.direction
    elif isinstance(line, Fabric):
        outcome.fabric[line.gpu] = line.works
        if line.problem:
            outcome.problems.append(f"fabric handle of {line.gpu}: {line.problem}")
    elif isinstance(line, Order):
        outcome.order = line.rates
        if line.rates.problem:
            outcome.problems.append(f"orders of stores: {line.rates.problem}")


def _failed(at: Begin, request: Request, problem: str, outcome: Outcome) -> None:
    if at.target:
        _take(Done(Direction(source=at.source, target=at.target, works=False, problem=problem)), outcome)
    elif at.source:
        _take(Fabric(at.source, False, problem), outcome)
    elif request.order is not None:
        _take(Order(msgspec.structs.replace(request.order, failed=True, problem=problem)), outcome)


def _decoded(text: str) -> Line | None:
    try:
        return msgspec.json.decode(text, type=Line)
    except msgspec.DecodeError:  # somebody else's words, or half of a line
        return None


class _Worker:
    """A child in a process group of its own, read line by line. Standard error counts as words, too."""

    def __init__(self, request: Request, environ: Mapping[str, str], command: Sequence[str] | None) -> None:
        # The kernels of a pair wait for each other, so a launch must not wait for its kernel.
        inherited = {name: text for name, text in environ.items() if name != "CUDA_LAUNCH_BLOCKING"}
        changes = {
            "CUDA_VISIBLE_DEVICES": ",".join(request.gpus),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "PYTHONSAFEPATH": "1",  # whatever lies in the working folder
        }
        if command is None:
            command = (sys.executable, "-c", _CODE, str(Path(__file__).parents[2]))
        self._process = subprocess.Popen(
            [*command, msgspec.json.encode(request).decode()],
            env={**inherited, **changes},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        self._unread = b""
        self._late = False  # what was last read came after its time
        self._ended = False

    def line(self, until: float) -> str | None:
        """The next line; None at the end. Raises TimeoutError at ``until``, a time of the monotonic clock.

        What lies ready then is still read once, for this process itself may have been late, but not a second
        time: a worker that talks without end has no more time than one that is silent.
        """
        with selectors.DefaultSelector() as ready:
            ready.register(self._out, selectors.EVENT_READ)
            while b"\n" not in self._unread and not self._ended:
                left = until - time.monotonic()
                if (left <= 0 and self._late) or not ready.select(max(left, 0.0)):
                    raise TimeoutError
                self._late = left <= 0
                more = os.read(self._out.fileno(), 1 << 16)
                self._ended = not more
                self._unread = (self._unread + more)[-_LONGEST_LINE:]
        if self._ended and not self._unread:
            return None
        text, _, self._unread = self._unread.partition(b"\n")
        return text.decode(errors="replace")

    def end(self) -> int:
        """Leave nothing of the group behind. Returns the exit status, negative for a signal."""
        if self._ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        status = self._process.poll()
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._out.close()
        # A process that the driver holds is not ended by a signal, and not waited for either.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        return status or 0
