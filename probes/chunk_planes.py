"""A chunk as bit planes (`bit_planes.py`): the common case, where the processor has the instructions."""

from __future__ import annotations

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]

from probes import bit_planes
from probes.bit_planes import BLOCK, CODES, OCTAVE, PLANES, WORDS, codes, count
from probes.chunk_counting import count_few, note, take_any, window_below
from probes.chunk_loops import reduce
from probes.chunk_scratch import (
    AT_COUNTS,
    AT_PLANES,
    BASE,
    BITS,
    FEW_OUTSIDE,
    FIRST_OCTAVE,
    INF_BITS,
    LARGEST,
    LAST_OCTAVE,
    LEAST_NORMAL,
    MAGNITUDE,
    NONE,
    SHIFT,
    SMALLEST,
    pointer,
    trailing_zeros,
)
from probes.layout import BINS, SUM_OF_SQUARES, ZEROS

_element_of = njit(bit_planes.element_of)


@njit(cache=True, nogil=True, error_model="numpy")
def take_planes(scratch, chunk, padding, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    """A chunk of a multiple of GROUP, of which the last elements, zeros, are no part of the tensor."""
    address, base = chunk.ctypes.data, np.int64(seen[BASE])
    high, low, outside, squares = codes(address, chunk.size, np.uint16(base), scratch + AT_PLANES)
    few = outside <= FEW_OUTSIDE
    if few and outside > 0 and not _count_outside(scratch, chunk, outside, bins, indices, tallies, seen):
        take_any(scratch, chunk, padding, bins, indices, tallies, seen, most_bits)
        return
    lowest, highest = base + low, base + high
    if (
        not few
        or highest >= np.int64(seen[LARGEST] >> SHIFT)
        or lowest <= np.int64(seen[SMALLEST] >> SHIFT)
        or seen[BITS] < most_bits
    ):
        largest, smallest, fractions, zeros = reduce(chunk)
        if not few:
            if largest == 0:
                tallies[ZEROS - BINS] += zeros - padding
                return
            if largest >= INF_BITS or smallest < LEAST_NORMAL:
                take_any(scratch, chunk, padding, bins, indices, tallies, seen, most_bits)
                return
            tallies[ZEROS - BINS] += zeros
            lowest, highest = np.int64(smallest >> SHIFT), np.int64(largest >> SHIFT)
            if lowest < base or highest >= base + CODES:
                base = np.int64(window_below(largest))
                seen[BASE] = base
                codes(address, chunk.size, np.uint16(base), scratch + AT_PLANES)
        note(seen, largest, smallest, fractions)
    tallies[ZEROS - BINS] -= padding
    tallies[SUM_OF_SQUARES - BINS] += squares
    _count_window(scratch, chunk.size, base, lowest, highest, seen)
    while lowest < base:
        highest, base = base - 1, max(base - CODES, np.int64(OCTAVE))
        codes(address, chunk.size, np.uint16(base), scratch + AT_PLANES)
        _count_window(scratch, chunk.size, base, lowest, highest, seen)


@njit(cache=True, nogil=True, error_model="numpy")
def _count_outside(scratch, chunk, outside, bins, indices, tallies, seen):  # type: ignore[no-untyped-def]
    """Count the few elements of plane 7 one by one; or none, and return False, if one is subnormal, Inf or NaN."""
    planes = carray(pointer(scratch + AT_PLANES), (chunk.size // BLOCK, PLANES, WORDS), np.uint64)
    largest, smallest, zeros, found = np.uint32(0), NONE, 0, 0
    for block in range(chunk.size // BLOCK):
        for word in range(WORDS):
            members = planes[block, PLANES - 1, word]
            while members != 0:
                bit = trailing_zeros(members)
                members &= members - np.uint64(1)
                bits = np.uint32(chunk[block * BLOCK + _element_of(word, bit)] & MAGNITUDE)
                if bits == 0:
                    zeros += 1
                elif bits < LEAST_NORMAL or bits >= INF_BITS:
                    return False
                else:
                    largest, smallest = max(largest, bits), min(smallest, bits)
                    indices[found] = np.uint16(bits >> SHIFT)
                    found += 1
    tallies[ZEROS - BINS] += zeros
    count_few(bins, indices[:found], largest, smallest, seen)
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _count_window(scratch, size, base, lowest, highest, seen):  # type: ignore[no-untyped-def]
    """Count what the planes say, where the chunk has no bins below the lowest and above the highest."""
    first, last = (max(lowest, base) - base) // OCTAVE, (min(highest, base + CODES - 1) - base) // OCTAVE
    count(scratch + AT_PLANES, size, first, last, scratch + AT_COUNTS + base * (8 * WORDS))
    seen[FIRST_OCTAVE] = min(seen[FIRST_OCTAVE], np.uint32(base // OCTAVE + first))
    seen[LAST_OCTAVE] = max(seen[LAST_OCTAVE], np.uint32(base // OCTAVE + last))
