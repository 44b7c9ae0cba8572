"""``EventOverlap``, and on which CUDA stream a call runs. On the CPU there is nothing to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch

from ep_backend.errors import EpArgumentError

T = TypeVar("T")


class EventHandle:
    """A point in the work of a CUDA stream, the current one if none is given; done already where this process
    uses no GPU."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.event: torch.cuda.Event | None = None
        if stream is not None or torch.cuda.is_initialized():
            self.event = torch.cuda.Event()
            self.event.record(stream or torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """The current stream waits for the event."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """``event``: None where a call did not finish asynchronously. ``extra_tensors``: kept for as long as this
    object lives."""

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None
    ) -> None:
        self.event, self.extra_tensors = event, extra_tensors

    def current_stream_wait(self) -> None:
        """The current stream waits for the event. Raises EpArgumentError if there is none."""
        if self.event is None:
            raise EpArgumentError("there is no event to wait for: the call was made without async_finish")
        self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


class Streams:
    """The communication stream of a ``Buffer``, and the order of its calls on whatever streams they run."""

    def __init__(self) -> None:
        self._comm: torch.cuda.Stream | None = None
        self._last: tuple[torch.cuda.Event, torch.cuda.Stream] | None = None

    @property
    def comm(self) -> torch.cuda.Stream:
        """Made when it is first asked for, with high priority. Raises EpArgumentError without a GPU."""
        if self._comm is None:
            if not torch.cuda.is_available():
                raise EpArgumentError("there is no GPU here, and so no communication stream")
            self._comm = torch.cuda.Stream(priority=-1)
        return self._comm

    def run(
        self,
        act: Callable[[], T],
        given: Iterable[Any],
        *,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[T, EventOverlap]:
        """Run ``act``; its result and the event that DeepEP would return with it.

        On a GPU it runs on the current stream or, with ``previous_event`` or ``async_finish``, on the
        communication stream, which then waits for that event or for the current stream. It never overtakes an
        earlier call; calls that a CUDA graph captures know none. ``given``: what it uses and the caller may
        free; only tensors count. What it returns belongs to the stream that it ran on, whatever
        ``allocate_on_comm_stream`` says.
        """
        if previous_event is not None and not isinstance(previous_event, EventOverlap):
            raise EpArgumentError(f"previous_event is {previous_event!r}; an EventOverlap was wanted")
        if allocate_on_comm_stream and not (async_finish and previous_event is not None):
            raise EpArgumentError("allocate_on_comm_stream needs previous_event and async_finish")
        used = _tensors(given)
        if not any(t.is_cuda for t in used):
            return act(), EventOverlap(EventHandle() if async_finish else None)
        current, aside = torch.cuda.current_stream(), async_finish or previous_event is not None
        stream = self.comm if aside else current
        capturing = torch.cuda.is_current_stream_capturing()
        if aside:
            before = None if previous_event is None else previous_event.event
            with torch.cuda.stream(stream):
                stream.wait_stream(current) if before is None else before.current_stream_wait()
        if self._last is not None and self._last[1] != stream and not capturing:
            stream.wait_event(self._last[0])
        with torch.cuda.stream(stream):
            result = act()
            done = EventHandle(stream)
        assert done.event is not None
        if not capturing:
            self._last = done.event, stream
        for t in used:
            t.record_stream(stream)
        if not aside:
            return result, EventOverlap()
        made = _tensors([result])
        for t in made:
            t.record_stream(current)
        if not async_finish:
            current.wait_event(done.event)
            return result, EventOverlap()
        return result, EventOverlap(done, (*used, *made))


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found
