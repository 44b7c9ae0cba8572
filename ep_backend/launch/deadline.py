"""A rank that gets no further ends itself, also where it waits in a driver or in NCCL."""

from __future__ import annotations

import faulthandler
import time


class Deadline:
    """Unless ``extend`` is called within ``seconds``, this process says where it is and exits with status
    1."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._arm()

    def _arm(self) -> None:
        self._since = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds, exit=True)

    def extend(self) -> None:
        if time.monotonic() - self._since > self._seconds / 20:  # arming starts a thread
            self._arm()

    def cancel(self) -> None:
        faulthandler.cancel_dump_traceback_later()
