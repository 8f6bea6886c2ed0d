"""How many threads a compiled loop should use: as many as torch does, where the work is worth it.

The loops run in numba's OpenMP threading layer. On Linux that is the very library that torch loads (libgomp), so the
threads are torch's own, which go on spinning for some milliseconds after each operation and would hold up any others.
As after torch's own operations, a forked child must set_num_threads(1), as DataLoader's workers do, or OpenMP ends it.
"""

from __future__ import annotations

import threading
from functools import cache
from importlib.util import find_spec

import numba
import torch

SMALLEST_SHARE = 1 << 16
"""Elements below which a second thread costs more than it saves: starting a team takes some 7 µs (ours)."""


def threads_for(elements: int) -> int:
    """Threads for a loop over so many elements, 1 or more; also tells numba."""
    most = min(torch.get_num_threads(), elements // SMALLEST_SHARE)
    if most < 2:
        return 1
    threads = min(most, _available())
    if threads > 1 and getattr(_told, "threads", 0) != threads:  # telling it takes longer than a small tensor
        numba.set_num_threads(threads)
        _told.threads = threads
    return threads


_told = threading.local()


@cache
def _available() -> int:
    """1 where numba has only the layer that two threads must not enter at once: autograd runs hooks on its own."""
    if not any(find_spec(f"numba.np.ufunc.{layer}") for layer in ("omppool", "tbbpool")):
        return 1
    launch()
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return most


def launch() -> None:
    """Start numba's threads, if they are not; before any loop that is shared is loaded, which starts them too.

    numba 0.68 then sets OpenMP's number of threads, which is torch's, to all cores, for the thread that starts them:
    here one that ends at once, or the user's number would not stay, and with it the last bits of torch's sums.
    """
    starting = threading.Thread(target=numba.get_num_threads)
    starting.start()
    starting.join()
