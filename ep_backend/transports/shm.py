"""Memory that the processes of one machine share, without a name in any file system.

Each rank makes an anonymous file (memfd), or memory of its GPU that has a descriptor, and hands the
descriptor to the others over Unix sockets in the abstract namespace. The kernel frees all of it when the last
process is gone, however it ended.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from ep_backend.errors import EpConfigError
from ep_backend.rendezvous import PeerLostError
from ep_backend.surroundings import memory_room

TOKEN_BYTES = 16


def anonymous(size: int) -> mmap.mmap:
    """Zeroed memory of this process alone; pages exist once they are touched. Raises EpConfigError."""
    try:
        return mmap.mmap(-1, size)
    except OSError as error:
        raise EpConfigError(f"no memory of {size} bytes: {error}") from error


class DescriptorShare:
    """A descriptor of this rank, which it takes over, and the socket where peers fetch it. ``address`` goes
    to the peers, then ``fetch`` brings theirs."""

    def __init__(self, descriptor: int, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._fd = descriptor
        self._token = secrets.token_bytes(TOKEN_BYTES)
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.settimeout(timeout_s)
            name = f"\0ep_backend-{os.getpid()}-{secrets.token_hex(8)}"
            self._listener.bind(name)
            self._listener.listen(world)
        except OSError as error:
            self.close()
            raise EpConfigError(f"no socket to hand out memory: {error}") from error
        self.address = (name, self._token)

    def fetch(self, addresses: Sequence[tuple[str, bytes]]) -> list[int]:
        """Every rank's descriptor, in order of rank, for the caller to close. ``addresses``: of all ranks.
        Call it on all ranks at once."""
        wanted: dict[int, socket.socket] = {}
        found: list[int] = []
        try:
            # The kernel completes a connection before anybody accepts it, so all may first connect and then
            # serve.
            for peer, (name, token) in enumerate(addresses):
                if peer != self.rank:
                    wanted[peer] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    wanted[peer].settimeout(self.timeout_s)
                    wanted[peer].connect(name)
                    wanted[peer].sendall(token)
            for _ in range(self.world - 1):
                self._serve_one()
            for r in range(self.world):
                found.append(os.dup(self._fd) if r == self.rank else _receive(wanted[r]))
        except OSError as error:
            for descriptor in found:
                os.close(descriptor)
            raise PeerLostError(
                f"rank {self.rank} cannot share memory with its peers: {error}. They must run on one "
                "machine, as one user, in one network namespace"
            ) from error
        finally:
            for connection in wanted.values():
                connection.close()
            self.close()
        return found

    def _serve_one(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(self.timeout_s)
                # The name can be guessed by other users of the machine; the token and the user id cannot be
                # had.
                uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
                if uid != os.getuid() or connection.recv(TOKEN_BYTES, socket.MSG_WAITALL) != self._token:
                    continue
                socket.send_fds(connection, [b"w"], [self._fd])
                return

    def close(self) -> None:
        """Close the socket and the descriptor; mappings stay."""
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1
        listener = getattr(self, "_listener", None)
        if listener is not None:
            listener.close()

    def __del__(self) -> None:
        # Another rank may fail before this one's memory is used.
        self.close()


class WindowShare:
    """This rank's window in memory of the host. ``address`` goes to the peers, then ``map_peers`` takes the
    memory and maps theirs."""

    def __init__(self, size: int, rank: int, world: int, timeout_s: float) -> None:
        self.size, self._room = size, memory_room(Path("/"))
        self._memory = os.memfd_create(f"ep_backend-window-{rank}", os.MFD_CLOEXEC)
        self._share = DescriptorShare(self._memory, rank, world, timeout_s)
        self.address = (*self._share.address, self._room.limit)

    def map_peers(self, addresses: Sequence[tuple[str, bytes, str]]) -> list[mmap.mmap]:
        """Every rank's window, mapped, in order of rank; this rank's has all its pages, on the NUMA node of
        the calling thread. ``addresses``: of all ranks. Call it on all ranks at once."""
        try:
            self._take_memory([limit for _, _, limit in addresses])
            descriptors = self._share.fetch([(name, token) for name, token, _ in addresses])
        finally:
            self._share.close()
        try:
            return [mmap.mmap(descriptor, self.size) for descriptor in descriptors]
        except OSError as error:
            raise EpConfigError(f"a window of {self.size} bytes cannot be mapped: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _take_memory(self, limits: Sequence[str]) -> None:
        """All of this window's, now: the kernel ends a process that touches a page for which there is no
        room, and so it does where a control group has too little, hence the look before. ``limits``: what
        limits the memory of each rank."""
        sharing = limits.count(self._room.limit)
        if sharing * self.size > self._room.free:
            raise EpConfigError(
                f"windows of {sharing} ranks, {self.size / 2**20:.0f} MiB each, do not fit into the "
                f"{self._room.free / 2**20:.0f} MiB of memory that are left in {self._room.limit}; fewer "
                "tokens per rank (max_tokens_per_rank) need less"
            )
        try:
            os.posix_fallocate(self._memory, 0, self.size)
        except OSError as error:
            raise EpConfigError(f"no shared memory of {self.size} bytes: {error}") from error


def _receive(connection: socket.socket) -> int:
    _, fds, _, _ = socket.recv_fds(connection, 1, 1)
    if not fds:
        raise OSError("a peer did not send its window")
    return fds[0]
