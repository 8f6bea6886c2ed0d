"""A chunk two elements at a time (`pairs.py`): the common case on other processors."""

from __future__ import annotations

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]

from probes import pairs
from probes.bit_planes import OCTAVE
from probes.chunk_counting import count_few, note, take_any, window_below
from probes.chunk_loops import as_float32, magnitude_at, reduce
from probes.chunk_scratch import (
    ALL_BINS,
    AT_COUNTS,
    AT_MASKS,
    AT_TABLE,
    BASE,
    BFLOAT16,
    BITS,
    CHUNK,
    FIRST_CODE,
    FIRST_OCTAVE,
    FLOAT16,
    FLOAT16_BINS,
    FLOAT32,
    FLOAT64,
    INF_BITS,
    LARGEST,
    LAST_CODE,
    LAST_OCTAVE,
    LEAST_NORMAL,
    NONE,
    SAME,
    SHIFT,
    SINGLY,
    SMALLEST,
    WIDE,
    pointer,
    trailing_zeros,
)
from probes.layout import BINS, SUM_OF_SQUARES, ZEROS
from probes.pairs import ALL_CODES, READS_FLOAT16, count_bfloat16, count_float32

_FEW_OUTSIDE = 64  # elements of a chunk outside the window, up to which these are counted one by one

_element_of = njit(pairs.element_of)
_count_float16 = pairs.count_float16 if READS_FLOAT16 else count_bfloat16  # which is then never called


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def is_paired(kind, seen):  # type: ignore[no-untyped-def]
    """Whether elements are counted in pairs as they are, in the window as it is."""
    if kind == FLOAT16:
        return READS_FLOAT16 and seen[BASE] >= FLOAT16_BINS + OCTAVE
    return kind != FLOAT64


@njit(cache=True, nogil=True, error_model="numpy")
def take_pairs(scratch, at, kind, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    """A whole chunk of a dtype that `is_paired`."""
    if seen[LARGEST] == 0:
        largest = reduce(as_float32(scratch, at, kind))[0]
        if largest < INF_BITS:
            seen[BASE] = max(seen[BASE], window_below(largest))
    high, low, outside, zeros, squares = _count_pairs(scratch, at, kind, seen, np.uint32(1))
    largest, smallest, fractions = np.uint32(0), NONE, np.uint32(0)
    if (
        outside - zeros > _FEW_OUTSIDE
        or np.int64(seen[BASE]) + high >= np.int64(seen[LARGEST] >> SHIFT)
        or np.int64(seen[BASE]) + low <= np.int64(seen[SMALLEST] >> SHIFT)
        or seen[BITS] < most_bits
    ):
        words = as_float32(scratch, at, kind)
        largest, smallest, fractions, zeros = reduce(words)
        if outside - zeros > _FEW_OUTSIDE and largest < INF_BITS and window_below(largest) != seen[BASE]:
            _count_pairs(scratch, at, kind, seen, NONE)
            empty(scratch, seen)
            seen[BASE] = window_below(largest)
            at, kind = words.ctypes.data, FLOAT32
            high, low, outside, _, squares = _count_pairs(scratch, at, kind, seen, np.uint32(1))
    many = outside - zeros > _FEW_OUTSIDE
    if many or (outside > zeros and not _count_beyond(scratch, at, kind, bins, indices, tallies, seen)):
        _count_pairs(scratch, at, kind, seen, NONE)
        take_any(as_float32(scratch, at, kind), bins, indices, tallies, seen, most_bits)
        seen[SINGLY] = WIDE if many else 0
        return
    if largest > 0:
        note(seen, largest, smallest, fractions)
    if outside == zeros:
        tallies[ZEROS - BINS] += zeros
    if zeros == CHUNK or (largest >> SHIFT == smallest >> SHIFT and largest > 0):
        seen[SINGLY] = SAME
    tallies[SUM_OF_SQUARES - BINS] += squares
    seen[FIRST_CODE] = min(seen[FIRST_CODE], np.uint32(low))
    seen[LAST_CODE] = max(seen[LAST_CODE], np.uint32(max(min(high, pairs.CODES - 1), 0)))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _count_pairs(scratch, at, kind, seen, step):  # type: ignore[no-untyped-def]
    """Count a chunk in the window as it is, or take it back with a step of -1: see `pairs.count_float32`."""
    table, masks, base = scratch + AT_TABLE, scratch + AT_MASKS, np.uint16(seen[BASE])
    if kind == FLOAT32:
        return count_float32(at, CHUNK, base, step, table, masks)
    if kind == BFLOAT16:
        return count_bfloat16(at, CHUNK, base, step, table, masks)
    return _count_float16(at, CHUNK, np.uint16(base - np.uint16(FLOAT16_BINS)), step, table, masks)


@njit(cache=True, nogil=True, error_model="numpy")
def _count_beyond(scratch, at, kind, bins, indices, tallies, seen):  # type: ignore[no-untyped-def]
    """Count what lies outside the window one by one; or nothing, and return False, if one is subnormal, Inf or NaN."""
    masks = carray(pointer(scratch + AT_MASKS), (CHUNK // pairs.GROUP,), np.uint32)
    largest, smallest, zeros, found = np.uint32(0), NONE, 0, 0
    for group in range(CHUNK // pairs.GROUP):
        members = np.uint64(masks[group])
        while members != 0:
            i = group * pairs.GROUP + _element_of(trailing_zeros(members), kind == FLOAT32)
            members &= members - np.uint64(1)
            bits = magnitude_at(at, kind, i)
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
def empty(scratch, seen):  # type: ignore[no-untyped-def]
    """Bring the table of pairs to the counts: a pair counts for both its codes."""
    low, high, base = np.int64(seen[FIRST_CODE]), np.int64(seen[LAST_CODE]), np.int64(seen[BASE])
    seen[FIRST_CODE], seen[LAST_CODE] = pairs.CODES, 0
    counts = carray(pointer(scratch + AT_COUNTS), (ALL_BINS,), np.uint64)
    totals = _row(scratch, pairs.CODES, low, high + 1)
    for code in range(low, high + 1):
        counts[base + code] += _add_and_clear(totals, _row(scratch, code, low, high + 1))
        for members in _row(scratch, code, pairs.CODES, ALL_CODES):
            counts[base + code] += members
        _row(scratch, code, pairs.CODES, ALL_CODES)[:] = 0
    for code in range(pairs.CODES, ALL_CODES):
        if code > pairs.CODES:
            _add_and_clear(totals, _row(scratch, code, low, high + 1))
        _row(scratch, code, pairs.CODES, ALL_CODES)[:] = 0
    for code in range(low, high + 1):
        counts[base + code] += totals[code - low]
        totals[code - low] = 0
    if low <= high:
        seen[FIRST_OCTAVE] = min(seen[FIRST_OCTAVE], np.uint32((base + low) // OCTAVE))
        seen[LAST_OCTAVE] = max(seen[LAST_OCTAVE], np.uint32((base + high) // OCTAVE))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _row(scratch, code, first, last):  # type: ignore[no-untyped-def]
    """A row of the table, from the first to before the last column."""
    at = scratch + AT_TABLE + 4 * (ALL_CODES * code + first)
    return carray(pointer(at), (max(last - first, 0),), np.uint32)


@njit(cache=True, nogil=True, error_model="numpy")
def _add_and_clear(totals, row):  # type: ignore[no-untyped-def]
    """Add a row of the table to the sums of its columns, clear it, and return its own sum."""
    total = np.uint32(0)
    for i in range(row.size):
        totals[i] = np.uint32(totals[i] + row[i])
        total = np.uint32(total + row[i])
        row[i] = np.uint32(0)
    return total
