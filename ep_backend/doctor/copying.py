"""How fast this machine copies memory, which limits transport `cpu`."""

from __future__ import annotations

import ctypes
import threading
import time

BYTES = 64 << 20  # of each buffer: more than caches hold
SECONDS = 0.1  # of each round
ROUNDS = 6  # where others use the machine too, a single one says half of what it can


def copy_rate(threads: int, size: int = BYTES, seconds: float = SECONDS) -> float:
    """Bytes per second that ``threads`` copy together, each between two buffers of its own, in the best of
    ROUNDS rounds of about ``seconds``. The same as the ``copy_bytes_per_s`` of `ep-backend bench`, without
    processes and torch."""
    rates = [[0.0] * threads for _ in range(ROUNDS)]
    ready = threading.Barrier(threads)

    def copy(number: int) -> None:
        source, target = (ctypes.create_string_buffer(size) for _ in range(2))
        ctypes.memset(source, 1, size)  # pages that nobody wrote are all one page of zeros
        ctypes.memset(target, 0, size)
        for together in rates:
            copies = 0
            ready.wait()
            start = time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or not copies:
                ctypes.memmove(target, source, size)  # other threads run meanwhile
                copies += 1
            together[number] = copies * size / elapsed

    workers = [threading.Thread(target=copy, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(sum(together) for together in rates)
