"""How fast this machine copies memory, which limits transport `cpu`."""

from __future__ import annotations

import ctypes
import threading
import time

BYTES = 64 << 20  # of each buffer: more than caches hold
SECONDS = 0.2


def copy_rate(threads: int, size: int = BYTES, seconds: float = SECONDS) -> float:
    """Bytes per second that ``threads`` copy together, each between two buffers of its own, for about
    ``seconds``. The same as the ``copy_bytes_per_s`` of `ep-backend bench`, without processes and torch."""
    rates = [0.0] * threads
    ready = threading.Barrier(threads)

    def copy(number: int) -> None:
        source, target = (ctypes.create_string_buffer(size) for _ in range(2))
        ctypes.memset(source, 1, size)  # pages that nobody wrote are all one page of zeros
        ctypes.memset(target, 0, size)
        copies = 0
        ready.wait()
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not copies:
            ctypes.memmove(target, source, size)  # other threads run meanwhile
            copies += 1
        rates[number] = copies * size / elapsed

    workers = [threading.Thread(target=copy, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)
