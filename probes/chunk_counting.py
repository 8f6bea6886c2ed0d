"""A chunk by increments of one, whatever is in it, and what a share notes of every chunk."""

from __future__ import annotations

import numpy as np
from numba import njit

from probes.bit_planes import OCTAVE
from probes.chunk_loops import (
    count_indices,
    index,
    reduce,
    significant,
    significant_subnormal,
    squares_of,
    without_nonfinite,
)
from probes.chunk_scratch import (
    ALL_BINS,
    BITS,
    CODED_OCTAVES,
    FIRST_BIN,
    INF_BITS,
    LARGEST,
    LAST_BIN,
    LEAST_NORMAL,
    LOWEST_BASE,
    OCTAVES,
    SAME,
    SHIFT,
    SINGLY,
    SMALLEST,
    WAYS,
    WIDE,
)
from probes.layout import BINS, MANTISSA_BITS, SUM_OF_SQUARES, ZEROS


@njit(cache=True, nogil=True, error_model="numpy")
def take_any(chunk, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    """A chunk, or less, by its bits as float32."""
    largest, smallest, fractions, zeros = reduce(chunk)
    is_wide = (
        np.int64(largest >> np.uint32(MANTISSA_BITS)) - np.int64(smallest >> np.uint32(MANTISSA_BITS)) >= CODED_OCTAVES
    )
    seen[SINGLY] = WIDE if seen[SINGLY] == WIDE and is_wide else 0
    if largest == 0:
        tallies[ZEROS - BINS] += zeros
        seen[SINGLY] = SAME
        return
    if largest >= INF_BITS:
        largest, smallest, fractions = without_nonfinite(chunk, tallies)
        high = np.uint32(ALL_BINS - 1)
    else:
        tallies[SUM_OF_SQUARES - BINS] += squares_of(chunk.view(np.float32))
        high = largest >> SHIFT
    if largest > 0:
        note(seen, largest, smallest, fractions)
        if smallest < LEAST_NORMAL and seen[BITS] < most_bits:
            seen[BITS] = max(seen[BITS], np.uint32(significant_subnormal(chunk)))
    tallies[ZEROS - BINS] += zeros
    low = min(smallest >> SHIFT, high)
    if low == high:
        bins[low * WAYS] += np.uint32(chunk.size - zeros)
        widen_range(seen, low, high)
        seen[SINGLY] = SAME
        return
    if zeros > 0:
        low = np.uint32(0)
        bins[0] -= np.uint32(zeros)  # zero shares bin 0 with the smallest subnormals; it may wrap, and wraps back
    widen_range(seen, low, high)
    index(chunk, indices)
    count_indices(bins, indices[: chunk.size])


@njit(cache=True, nogil=True, error_model="numpy")
def count_few(bins, indices, largest, smallest, seen):  # type: ignore[no-untyped-def]
    """Count normal numbers by their bins, one by one; the largest and the smallest are given by their bits."""
    for i in range(indices.size):
        bins[np.int64(indices[i]) * WAYS] += np.uint32(1)
    if indices.size > 0:
        widen_range(seen, smallest >> SHIFT, largest >> SHIFT)
        note(seen, largest, smallest, np.uint32(0))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def note(seen, largest, smallest, fractions):  # type: ignore[no-untyped-def]
    seen[LARGEST] = max(seen[LARGEST], largest)
    seen[SMALLEST] = min(seen[SMALLEST], smallest)
    if seen[BITS] < np.uint32(MANTISSA_BITS):
        seen[BITS] = max(seen[BITS], np.uint32(significant(fractions)))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def widen_range(seen, low, high):  # type: ignore[no-untyped-def]
    seen[FIRST_BIN] = min(seen[FIRST_BIN], np.uint32(low))
    seen[LAST_BIN] = max(seen[LAST_BIN], np.uint32(high))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def window_below(largest):  # type: ignore[no-untyped-def]
    """The first bin of the window whose last octave is that of a magnitude, by its bits; no zeros or subnormals."""
    octave = np.int64(largest >> np.uint32(MANTISSA_BITS))
    return np.uint32(max((octave + np.int64(1) - OCTAVES) * OCTAVE, np.int64(LOWEST_BASE)))
