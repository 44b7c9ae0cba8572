"""A server process with everything it starts: its log, its health, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ep_backend.errors import EpError

TERM_GRACE_S = 15.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ServerError(EpError):
    """The server (or its benchmark client) ended or did not answer; the message holds the end of its log."""


class Session:
    """A command in a session of its own. Leaving the context ends every process of that session.

    Engines start workers that outlive their parent if only the parent is killed, and then hold the port.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.command = list(command)
        self.log = log
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Session:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def returncode(self) -> int | None:
        """Exit status of the command itself, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """Exit status; ServerError if the command is still running after `timeout_s`."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.error(f"still running after {timeout_s:.0f} s") from None

    def error(self, what: str) -> ServerError:
        return ServerError(
            f"{what}: {' '.join(self.command[:6])} ...\n--- end of {self.log}\n{self.tail(25)}"
        )

    def text(self) -> str:
        """The whole log."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int) -> str:
        """The last lines of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 32768))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def members(self) -> list[int]:
        """Ids of the living processes of the session, children of children included."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                state, session = fields[0], int(fields[3])
                if session == self.pid and state not in "ZX":
                    found.append(int(entry))
        return found

    def stop(self) -> None:
        """Ask to end, then kill. Returns when no process of the session is left."""
        if self._process is None:
            return
        try:
            self._signal(signal.SIGTERM)
            self._gone_within(TERM_GRACE_S)
        finally:
            # Also after a second Ctrl-C.
            self._signal(signal.SIGKILL)
        if not self._gone_within(TERM_GRACE_S):
            raise ServerError(f"processes {self.members()} of {self.command[:4]} do not end")
        self._process.wait()
        self._process = None

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _gone_within(self, seconds: float) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._process.poll()  # reap, or it stays as a zombie
            if not self.members():
                return True
            time.sleep(0.1)
        return False


# The server is on this machine; a proxy of the environment is for others.
open_local = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether nothing listens at this TCP port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _end_with_parent() -> None:
    """In the new process: ask the kernel for a SIGTERM when whoever started it is gone, even by kill -9."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def wait_until_healthy(
    session: Session, url: str, timeout_s: float, progress: Callable[[str], None]
) -> float:
    """Seconds until `url` answered 200. ServerError if the server ends first or the time is over."""
    begin = time.monotonic()
    told = begin
    while True:
        if session.returncode() is not None:
            raise session.error(f"the server ended with status {session.returncode()} before it was ready")
        try:
            with open_local(url, timeout=5) as answer:
                if answer.status == 200:
                    return time.monotonic() - begin
        except (urllib.error.URLError, OSError):
            pass
        now = time.monotonic()
        if now - begin > timeout_s:
            raise session.error(f"the server was not ready after {timeout_s:.0f} s")
        if now - told >= 10:
            told = now
            progress(f"  {now - begin:4.0f} s  {session.tail(1)}")
        time.sleep(0.5)
