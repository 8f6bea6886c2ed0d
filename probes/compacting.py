"""Rows of sketches without their empty bins: what is kept of a step.

A tensor fills some hundred of the two thousand bins of its row. One compiled pass goes over the rows that a step has
used, collects what is there and, on the host, leaves them empty for the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from probes import layout
from probes.apart import Apart
from probes.kernel_cache import keep_to_sources
from probes.layout import BINS, EXTREMES

TAIL = 5  # zeros, NaNs, +Infs, -Infs, sum of squares: the columns after the bins

_AT_ONCE = 8  # bins that are looked at together


class Compacted(NamedTuple):
    """R rows; N occupied bins in all.

    ends          int64 [R]: a row's bins end here, and the next one's begin
    bins, counts  uint16 [N], int64 [N]; bins rise within a row
    tails         float64 [R, TAIL]
    extremes      float32 [R, EXTREMES]
    """

    ends: NDArray[np.int64]
    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]
    tails: NDArray[np.float64]
    extremes: NDArray[np.float32]


class Compactor:
    """Compacts again and again, and keeps the memory that it takes. What it gives is put into `memory`, if given."""

    def __init__(self, memory: Apart | None = None) -> None:
        self._bins = np.empty(0, dtype=np.uint16)
        self._counts = np.empty(0, dtype=np.int64)
        self._keep = np.copy if memory is None else memory.copy_of

    def of(
        self,
        sums: NDArray[np.float64],
        extremes: NDArray[np.float32],
        rows: Sequence[int],
        nothing: NDArray[np.float32] | None = None,
    ) -> Compacted:
        """These rows of `sums` [rows, SUMS] and `extremes` [rows, EXTREMES], C-contiguous, in the order given.

        `nothing` [EXTREMES], where it is given: the rows are emptied, and these are the extremes of an empty one.
        """
        if len(self._bins) < len(rows) * BINS:
            self._bins, self._counts = np.empty(len(rows) * BINS, np.uint16), np.empty(len(rows) * BINS, np.int64)
        chosen, ends = np.array(rows, dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        tails = np.empty((len(rows), TAIL), dtype=np.float64)
        found = np.empty((len(rows), EXTREMES), dtype=np.float32)
        clears = nothing is not None
        emptied = found if nothing is None else nothing[None]
        occupied = _compact(sums, extremes, chosen, clears, emptied, self._bins, self._counts, ends, tails, found)
        keep = self._keep
        return Compacted(
            keep(ends), keep(self._bins[:occupied]), keep(self._counts[:occupied]), keep(tails), keep(found)
        )


@njit(cache=True, nogil=True, error_model="numpy")
def _compact(sums, extremes, rows, clears, emptied, bins, counts, ends, tails, found):  # type: ignore[no-untyped-def]
    occupied = 0
    for place in range(rows.size):
        row = rows[place]
        for first in range(0, BINS, _AT_ONCE):
            several = 0.0
            for b in range(first, first + _AT_ONCE):
                several += sums[row, b]  # counts: none is negative
            if several != 0.0:
                for b in range(first, first + _AT_ONCE):
                    if sums[row, b] != 0.0:
                        bins[occupied], counts[occupied] = b, np.int64(sums[row, b])
                        occupied += 1
                        if clears:
                            sums[row, b] = 0.0
        ends[place] = occupied
        # One by one: numba takes seconds to compile an array that is assigned to another.
        for i in range(TAIL):
            tails[place, i] = sums[row, BINS + i]
        for i in range(EXTREMES):
            found[place, i] = extremes[row, i]
        if clears:
            for i in range(BINS, sums.shape[1]):
                sums[row, i] = 0.0
            for i in range(EXTREMES):
                extremes[row, i] = emptied[0, i]
    return occupied


keep_to_sources(_compact, layout)
