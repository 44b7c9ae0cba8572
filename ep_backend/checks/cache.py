"""One JSON file per machine with what the checks found, until it is started anew or its driver, GPUs, links
or this library change. Nothing here raises: without a usable folder nothing is remembered.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from ep_backend import __version__
from ep_backend.checks.data import Direction, OrderRates
from ep_backend.nvml import Gpu, Link

LIBRARY = Path(__file__).parents[1] / "libep_backend.so"
_LARGEST_FILE = 1 << 22
_POLL_S = 0.05


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The file. ``at``: when it was written, as seconds since 1970. ``fabric``: by UUID."""

    identity: str
    at: float = 0.0
    directions: tuple[Direction, ...] = ()
    orders: tuple[OrderRates, ...] = ()
    fabric: dict[str, bool | None] = {}
    problems: tuple[str, ...] = ()


def identity(gpus: Sequence[Gpu], links: Sequence[Link], driver: str, boot_id: str) -> str:
    """Everything on which the results depend, as text. Independent of the Python that asks."""
    try:
        status = LIBRARY.stat()
        library = [status.st_size, status.st_mtime_ns]
    except OSError:
        library = []
    facts = {
        "boot": boot_id,
        "driver": driver,
        "ep_backend": [__version__, *library],
        "gpus": sorted([gpu.uuid, gpu.bus_id, gpu.nvlinks, gpu.mig] for gpu in gpus),
        "links": sorted([link.a, link.b, link.nvlink, link.ancestor] for link in links),
    }
    return msgspec.json.encode(facts).decode()


class Cache:
    """The file of one machine. ``Cache(folder, ...)`` with folder None remembers nothing."""

    def __init__(self, folder: Path | None, gpus: Sequence[Gpu], identity: str) -> None:
        self.identity = identity
        self._file = None if folder is None else file_of(folder, "checks", gpus)

    def load(self) -> Entry:
        """What is remembered of this machine as it is; an empty entry if nothing is, or nothing usable."""
        empty = Entry(identity=self.identity)
        if self._file is None:
            return empty
        try:
            entry = msgspec.json.decode(read(self._file), type=Entry)
        except (OSError, msgspec.DecodeError):
            return empty
        return entry if entry.identity == self.identity else empty

    def save(self, entry: Entry) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            write(self._file, msgspec.json.encode(entry))

    @contextlib.contextmanager
    def locked(self, until: float) -> Iterator[bool]:
        """Whether no other process has it now. Waits until a time of the monotonic clock."""
        if self._file is None:
            yield True
            return
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._file.with_suffix(".lock"), flags, 0o600)
        except OSError:
            yield True
            return
        try:
            yield _lock(descriptor, until)
        finally:
            os.close(descriptor)  # lets go of the lock


def _lock(descriptor: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_S)
        except OSError:  # a file system without locks
            return True


def file_of(folder: Path, kind: str, gpus: Sequence[Gpu]) -> Path:
    """Where something of ``kind`` is remembered of the machine with these GPUs."""
    machine = hashlib.sha256("\n".join(sorted(gpu.uuid for gpu in gpus)).encode()).hexdigest()[:16]
    return folder / f"{kind}-{machine}.json"


def read(file: Path) -> bytes:
    """A file of the user's own. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as opened:
        if os.fstat(opened.fileno()).st_uid != os.geteuid():
            raise PermissionError(f"{file} is not ours")  # somebody else's word is not taken
        return opened.read(_LARGEST_FILE)


def write(file: Path, content: bytes) -> None:
    """Replace a file in one step, so that nobody reads half of it. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with open(descriptor, "wb") as opened:
            opened.write(content)
        os.replace(name, file)
    except OSError:
        os.unlink(name)
        raise


def folder(environ: Mapping[str, str]) -> Path | None:
    """The user's cache folder for this library, made if need be; None if there is none to write to.

    A container without a home gets one among the temporary files, so that its processes still share.
    A relative path would be another folder for each process; specifications.freedesktop.org/basedir wants
    it ignored.
    """
    candidates = []
    xdg, home = (Path(environ.get(name, "")) for name in ("XDG_CACHE_HOME", "HOME"))
    if xdg.is_absolute():
        candidates.append(xdg / "ep_backend")
    elif home.is_absolute():
        candidates.append(home / ".cache" / "ep_backend")
    candidates.append(Path(environ.get("TMPDIR") or "/tmp") / f"ep_backend-{os.geteuid()}")
    for path in candidates:
        with contextlib.suppress(OSError):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.lstat()
            mine = status.st_uid == os.geteuid() and not status.st_mode & 0o022
            if path.is_dir() and not path.is_symlink() and mine and os.access(path, os.W_OK):
                return path
    return None
