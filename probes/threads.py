"""Compiled loops on as many threads as torch uses.

numba's own parallel loops are not taken: its default threading layer must not be entered from two threads at once,
and autograd runs hooks on threads of its own. Work is handed out in small shares, because torch's threads go on
spinning for a while after an operation of theirs, and whoever finds a core taken should get less of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

SMALLEST_SHARE = 1 << 16
"""Elements below which a second thread costs more than it saves: handing work over takes some 20 µs (ours)."""

_SHARES_A_THREAD = 8


def in_shares(run: Callable[[int, int], object], units: int, elements: int) -> None:
    """Call run(first, last) until [0, units) is done: once, or for several shares on threads of their own.

    elements  what all units together hold
    """
    threads = min(torch.get_num_threads(), units, elements // SMALLEST_SHARE)
    if threads < 2:
        run(0, units)
        return
    shares = min(threads * _SHARES_A_THREAD, units, elements // SMALLEST_SHARE)
    bounds = pairwise(units * share // shares for share in range(shares + 1))
    waiting = iter(list(bounds))  # taking the next from a list's iterator needs no lock of ours
    others = [_pool(os.getpid()).submit(_work_off, run, waiting) for _ in range(threads - 1)]
    _work_off(run, waiting)
    for other in others:
        if not other.cancel():  # never started: nothing is left for it
            other.result()


def _work_off(run: Callable[[int, int], object], waiting: Iterator[tuple[int, int]]) -> None:
    for first, last in waiting:
        run(first, last)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One for each process, because threads do not survive a fork."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="casts")
