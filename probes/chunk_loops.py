"""The loops over the elements of a chunk, most of which become vector code, and those that write one as float32."""

from __future__ import annotations

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]

from probes.chunk_scratch import (
    AT_CHUNK,
    BFLOAT16,
    CHUNK,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INF_BITS,
    LEAST_NORMAL,
    MAGNITUDE,
    NONE,
    SHIFT,
    WAYS,
    pointer,
)
from probes.layout import BINS, HASH_CELLS, MANTISSA_BITS, NANS, NEGATIVE_INFS, POSITIVE_INFS, SUM_OF_SQUARES

_FRACTION = np.uint32((1 << MANTISSA_BITS) - 1)


@njit(cache=True, nogil=True, error_model="numpy")
def reduce(words):  # type: ignore[no-untyped-def]
    """Bits of the largest and of the smallest non-zero magnitude, the fraction bits of normals, and zeros."""
    largest, smallest, fractions, zeros = np.uint32(0), NONE, np.uint32(0), np.uint32(0)
    for i in range(words.size):
        bits = np.uint32(words[i] & MAGNITUDE)
        largest = max(largest, bits)
        smallest = min(smallest, np.uint32(bits - np.uint32(1)))
        fractions = np.uint32(fractions | (bits if bits >= LEAST_NORMAL else np.uint32(0)))
        zeros = np.uint32(zeros + np.uint32(bits == 0))
    return largest, np.uint32(smallest + np.uint32(1)), np.uint32(fractions & _FRACTION), np.int64(zeros)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def squares_of(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value * value
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def index(words, indices):  # type: ignore[no-untyped-def]
    """Where each element's bin begins in the table of bins, which is there eight times."""
    for i in range(words.size):
        indices[i] = np.uint16(np.uint32(np.uint32(words[i] & MAGNITUDE) >> SHIFT) << np.uint32(3))


@njit(cache=True, nogil=True, error_model="numpy")
def count_indices(bins, indices):  # type: ignore[no-untyped-def]
    whole = indices.size // WAYS * WAYS
    for i in range(0, whole, WAYS):
        for way in range(WAYS):
            bins[np.int64(indices[i + way]) + way] += np.uint32(1)
    for i in range(whole, indices.size):
        bins[np.int64(indices[i]) + i % WAYS] += np.uint32(1)


@njit(cache=True, nogil=True, error_model="numpy")
def sample(cells, at, kind, size, first, stride):  # type: ignore[no-untyped-def]
    """Hash cells hit by every stride-th of the finite, non-zero magnitudes (linear counting)."""
    if kind == FLOAT32:
        words = carray(pointer(at), (size,), np.uint32)
        for i in range(first, size, stride):
            _hit(cells, np.uint32(words[np.uint64(i)] & MAGNITUDE))  # unsigned, or numba looks at its sign
    else:
        for i in range(first, size, stride):
            _hit(cells, magnitude_at(at, kind, i))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _hit(cells, bits):  # type: ignore[no-untyped-def]
    cell = np.uint64(np.uint32(np.uint32(bits * np.uint32(0x9E3779B1)) >> np.uint32(20)))
    counts = np.uint32(bits - np.uint32(1)) < np.uint32(INF_BITS - np.uint32(1))
    cells[cell if counts else np.uint64(HASH_CELLS)] = np.uint8(1)


@njit(cache=True, nogil=True, error_model="numpy")
def without_nonfinite(words, tallies):  # type: ignore[no-untyped-def]
    """The rare chunk with Inf or NaN: count those, and reduce over the rest."""
    largest, smallest, fractions = np.uint32(0), NONE, np.uint32(0)
    values = words.view(np.float32)
    for i in range(words.size):
        bits = np.uint32(words[i] & MAGNITUDE)
        if bits < INF_BITS:
            largest = max(largest, bits)
            smallest = min(smallest, np.uint32(bits - np.uint32(1)))
            fractions = np.uint32(fractions | (bits if bits >= LEAST_NORMAL else np.uint32(0)))
            tallies[SUM_OF_SQUARES - BINS] += np.float64(values[i]) * np.float64(values[i])
        elif bits > INF_BITS:
            tallies[NANS - BINS] += 1
        elif words[i] == bits:
            tallies[POSITIVE_INFS - BINS] += 1
        else:
            tallies[NEGATIVE_INFS - BINS] += 1
    return largest, np.uint32(smallest + np.uint32(1)), np.uint32(fractions & _FRACTION)


@njit(cache=True, nogil=True, error_model="numpy")
def significant(fractions):  # type: ignore[no-untyped-def]
    """Mantissa bits in use after the leading one: the lowest bit set in any decides."""
    for unused in range(MANTISSA_BITS):
        if fractions >> np.uint32(unused) & np.uint32(1):
            return MANTISSA_BITS - unused
    return 0


@njit(cache=True, nogil=True, error_model="numpy")
def significant_subnormal(words):  # type: ignore[no-untyped-def]
    """The same for the subnormals of a chunk, each counted from its own leading one."""
    most = 0
    for i in range(words.size):
        bits = np.int64(words[i] & MAGNITUDE)
        if 0 < bits < 1 << MANTISSA_BITS:
            highest, lowest = 0, 22
            for position in range(MANTISSA_BITS):
                if bits >> position & 1:
                    highest = max(highest, position)
                    lowest = min(lowest, position)
            most = max(most, highest - lowest)
    return most


# Into a chunk.


@njit(cache=True, nogil=True, error_model="numpy")
def as_float32(scratch, at, kind):  # type: ignore[no-untyped-def]
    """The bits of a whole chunk as float32; other dtypes into the scratch."""
    if kind == FLOAT32:
        return carray(pointer(at), (CHUNK,), np.uint32)
    words = carray(pointer(scratch + AT_CHUNK), (CHUNK,), np.uint32)
    widen(words, at, kind, 0, CHUNK, 0, 1)
    return words


@njit(cache=True, nogil=True, error_model="numpy")
def widen(chunk, source, kind, start, columns, pitch, step):  # type: ignore[no-untyped-def]
    """The bits of a chunk's elements as float32, from wherever the strides say."""
    done, row, column = 0, start // columns, start % columns
    bytes_each = size_of(kind)
    while done < chunk.size:
        count = min(chunk.size - done, columns - column)
        at = pointer(source + (row * pitch + column * step) * bytes_each)
        part, span = chunk[done : done + count], (count - 1) * step + 1
        if kind == FLOAT32:
            _from_float32(part, carray(at, (span,), np.uint32), step)
        elif kind == BFLOAT16:
            _from_bfloat16(part, carray(at, (span,), np.uint16), step)
        elif kind == FLOAT16:
            _from_float16(part, carray(at, (span,), np.uint16), step)
        else:
            _from_float64(part, carray(at, (span,), np.float64), step)
        done, row, column = done + count, row + 1, 0


@njit(cache=True, nogil=True, error_model="numpy")
def _from_float32(chunk, source, step):  # type: ignore[no-untyped-def]
    if step == 1:
        for i in range(chunk.size):
            chunk[i] = source[i]
    else:
        for i in range(chunk.size):
            chunk[i] = source[i * step]


@njit(cache=True, nogil=True, error_model="numpy")
def _from_bfloat16(chunk, source, step):  # type: ignore[no-untyped-def]
    if step == 1:
        for i in range(chunk.size):
            chunk[i] = np.uint32(np.uint32(source[i]) << np.uint32(16))
    else:
        for i in range(chunk.size):
            chunk[i] = np.uint32(np.uint32(source[i * step]) << np.uint32(16))


@njit(cache=True, nogil=True, error_model="numpy")
def _from_float16(chunk, source, step):  # type: ignore[no-untyped-def]
    if step == 1:
        for i in range(chunk.size):
            chunk[i] = of_float16(source[i])
    else:
        for i in range(chunk.size):
            chunk[i] = of_float16(source[i * step])


@njit(cache=True, nogil=True, error_model="numpy")
def _from_float64(chunk, source, step):  # type: ignore[no-untyped-def]
    values = chunk.view(np.float32)
    for i in range(chunk.size):
        values[i] = np.float32(source[i * step])


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def of_float16(half):  # type: ignore[no-untyped-def]
    """A subnormal comes from its integer, so that a processor that flushes subnormals to zero does not matter."""
    word = np.uint32(half)
    bits = np.uint32(word & np.uint32(0x7FFF))
    exponent = np.uint32(112 << 23) if bits < np.uint32(0x7C00) else np.uint32(224 << 23)
    normal = np.uint32(np.uint32(bits << np.uint32(13)) + exponent)
    subnormal = np.float32(np.float32(np.int32(bits)) * np.float32(2.0**-24)).view(np.uint32)
    sign = np.uint32(np.uint32(word & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(sign | (normal if bits >= np.uint32(0x400) else subnormal))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def magnitude_at(at, kind, i):  # type: ignore[no-untyped-def]
    """The bits of one magnitude, as float32."""
    if kind == FLOAT32:
        return np.uint32(carray(pointer(at + 4 * i), (1,), np.uint32)[0] & MAGNITUDE)
    half = carray(pointer(at + 2 * i), (1,), np.uint16)[0]
    bits = np.uint32(np.uint32(half) << np.uint32(16)) if kind == BFLOAT16 else of_float16(half)
    return np.uint32(bits & MAGNITUDE)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def size_of(kind):  # type: ignore[no-untyped-def]
    return 4 if kind == FLOAT32 else 8 if kind == FLOAT64 else 2
