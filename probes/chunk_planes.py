"""A chunk as bit planes (`bit_planes.py`): the common case, where the processor has the instructions."""

from __future__ import annotations

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]

from probes.bit_planes import (
    BELOW,
    OCTAVE,
    SPAN,
    WINDOW,
    WORDS,
    codes_bfloat16,
    codes_float32,
    count,
    zeros_of_bfloat16,
    zeros_of_float32,
)
from probes.chunk_counting import note, take_any, widen_range, window_below
from probes.chunk_loops import as_float32, magnitude_at, reduce
from probes.chunk_scratch import (
    AT_COUNTS,
    AT_LISTED,
    AT_OCTAVES,
    AT_PLANES,
    BASE,
    BFLOAT16,
    BITS,
    CHUNK,
    FIRST_OCTAVE,
    FLOAT32,
    HIGHEST_BASE,
    INF_BITS,
    LARGEST,
    LAST_OCTAVE,
    LEAST_NORMAL,
    LOWEST_BASE,
    MAGNITUDE,
    OCTAVES,
    SHIFT,
    SINGLY,
    SMALLEST,
    WAYS,
    WIDE,
    pointer,
)
from probes.layout import BIN_SHIFT, BINS, MANTISSA_BITS, SUM_OF_SQUARES, ZEROS

_MANY_LISTED = CHUNK // 8  # elements outside the window, from which on another one is looked for
_LOOKED_AT = CHUNK // 16  # elements for that
_FEW_UNCODED = CHUNK // 32  # outside the span, up to which they are counted one by one
_STRETCH = 64  # elements that are looked through at once for these
_EXPONENTS = 255  # of finite numbers


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def is_coded(kind, _seen):  # type: ignore[no-untyped-def]
    """Whether elements are coded as they are."""
    return kind in (FLOAT32, BFLOAT16)


@njit(cache=True, nogil=True, error_model="numpy")
def take_planes(scratch, at, kind, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    """A whole chunk of a dtype that `is_coded`."""
    base = np.int64(seen[BASE])
    high, low, listed, beneath, squares = _code(scratch, at, kind, base)
    below, zeros = base - BELOW, 0
    if beneath > 0:
        zeros = _zeros(at, kind)
        if zeros == CHUNK:
            tallies[ZEROS - BINS] += zeros
            return
    lowest, highest = below + 1 + low, below + high
    if (
        beneath > zeros
        or high == SPAN - 1
        or highest >= np.int64(seen[LARGEST] >> SHIFT)
        or lowest <= np.int64(seen[SMALLEST] >> SHIFT)
        or seen[BITS] < most_bits
    ):
        words = as_float32(scratch, at, kind)
        largest, smallest, fractions, zeros = reduce(words)
        lowest, highest = np.int64(smallest >> SHIFT), np.int64(largest >> SHIFT)
        if not _are_coded(base, lowest, highest) and not _count_uncoded(
            words, base, smallest, largest, bins, indices, seen
        ):
            base = np.int64(window_below(largest))
            if not _are_coded(base, lowest, highest):
                seen[SINGLY] = WIDE
                take_any(words, bins, indices, tallies, seen, most_bits)
                return
            _, _, listed, _, squares = _code(scratch, at, kind, base)
        note(seen, largest, smallest, fractions)
    tallies[ZEROS - BINS] += zeros
    tallies[SUM_OF_SQUARES - BINS] += squares
    if listed > 0:
        _count_listed(scratch, listed, base, bins)
        widen_range(seen, lowest, highest)
    first, last = max(lowest - base, 0) // OCTAVE, min(highest - base, WINDOW - 1) // OCTAVE
    if first <= last:
        count(scratch + AT_PLANES, first, last, scratch + AT_COUNTS + base * (8 * WORDS))
        seen[FIRST_OCTAVE] = min(seen[FIRST_OCTAVE], np.uint32(base // OCTAVE + first))
        seen[LAST_OCTAVE] = max(seen[LAST_OCTAVE], np.uint32(base // OCTAVE + last))
    if listed >= _MANY_LISTED or base != np.int64(seen[BASE]):
        seen[BASE] = _best_base(scratch, at, kind, lowest // OCTAVE, highest // OCTAVE)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _code(scratch, at, kind, base):  # type: ignore[no-untyped-def]
    if kind == BFLOAT16:
        return codes_bfloat16(at, base, scratch + AT_PLANES, scratch + AT_LISTED)
    return codes_float32(at, base, scratch + AT_PLANES, scratch + AT_LISTED)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _are_coded(base, lowest, highest):  # type: ignore[no-untyped-def]
    """Whether the bins from lowest to highest are of normal numbers with a code each, where a window begins there."""
    return base - BELOW < lowest and highest < min(base - BELOW + SPAN - 1, BINS)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _zeros(at, kind):  # type: ignore[no-untyped-def]
    return zeros_of_bfloat16(at) if kind == BFLOAT16 else zeros_of_float32(at)


@njit(cache=True, nogil=True, error_model="numpy")
def _count_uncoded(words, base, smallest, largest, bins, indices, seen):  # type: ignore[no-untyped-def]
    """Count the elements outside the span one by one; or nothing, and return False, if they are many or not normal."""
    if smallest < LEAST_NORMAL or largest >= INF_BITS:
        return False
    first = np.uint32(np.uint32(base - BELOW + 1) << SHIFT)
    coded = np.uint32((SPAN - 2) << BIN_SHIFT)
    found, above = 0, 0
    for start in range(0, CHUNK, _STRETCH):
        stretch, some = words[start : start + _STRETCH], np.uint32(0)
        for i in range(_STRETCH):
            bits = np.uint32(stretch[i] & MAGNITUDE)
            some |= np.uint32(np.uint32(np.uint32(bits - first) >= coded) & np.uint32(bits != 0))
        if some == 0:
            continue
        for i in range(_STRETCH):
            bits = np.uint32(stretch[i] & MAGNITUDE)
            if np.uint32(bits - first) >= coded and bits != 0:
                indices[found] = np.uint16(bits >> SHIFT)
                found += 1
                above += int(bits >= first)
        if found > _FEW_UNCODED:
            return False
    widen_range(seen, smallest >> SHIFT, largest >> SHIFT)
    for i in range(found):
        bins[np.int64(indices[i]) * WAYS] += np.uint32(1)
    if above > 0:
        bins[(base - BELOW + SPAN - 1) * WAYS] -= np.uint32(above)  # which are listed; it may wrap, and wraps back
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _count_listed(scratch, listed, base, bins):  # type: ignore[no-untyped-def]
    codes = carray(pointer(scratch + AT_LISTED), (listed,), np.uint8)
    for i in range(listed):
        bins[(base - BELOW + np.int64(codes[i])) * WAYS + i % WAYS] += np.uint32(1)


@njit(cache=True, nogil=True, error_model="numpy")
def _best_base(scratch, at, kind, first, last):  # type: ignore[no-untyped-def]
    """Where the window begins that holds most of a chunk, by a sample of it; its exponents are from first to last."""
    octaves = carray(pointer(scratch + AT_OCTAVES), (_EXPONENTS,), np.uint32)
    octaves[first : last + 1] = 0
    for i in range(0, CHUNK, CHUNK // _LOOKED_AT):
        octaves[magnitude_at(at, kind, i) >> np.uint32(MANTISSA_BITS)] += np.uint32(1)
    best, most, held = first, np.int64(0), np.int64(0)
    for end in range(first, last + 1):
        held += np.int64(octaves[end])
        if end - OCTAVES >= first:
            held -= np.int64(octaves[end - OCTAVES])
        if held > most:
            best, most = end, held
    base = np.int64((best + 1 - OCTAVES) * OCTAVE)
    return np.uint32(min(max(base, np.int64(LOWEST_BASE)), np.int64(HIGHEST_BASE)))
