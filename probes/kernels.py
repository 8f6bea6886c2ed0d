"""The sketch's CPU kernel: one compiled pass over the bits of the floats.

The tensor is taken in chunks of 2,048 elements, which stay in the first-level cache. Other dtypes, the elements of
strided tensors and a tensor's last few are written into such a chunk as float32, so no whole tensor is ever copied.

Where the processor has the instructions, a chunk is counted as bit planes (`bit_planes.py`), in which bins are codes of
seven bits within a window of sixteen octaves. Elements outside it, zeros among them, are looked up and counted one by
one where they are few; where they are many, the zeros are counted in a second reading, and further windows below the
first take the rest. A chunk is also read again if its codes say that it may go beyond the largest and smallest value
met so far. One with subnormals, Inf or NaN is counted by single increments. Increments of one place wait for one
another, so that table of bins is there eight times.

On other processors two elements are counted by one increment (`pairs.py`), within a window of fifteen octaves, and
whole chunks of bfloat16 and float16 as they are. A chunk of which more lies outside of it than a few elements moves the
window, or is taken back and counted by single increments, as are the tensor's last few and small tensors, for which
emptying the table of pairs costs more than it saves.

Read like this, a tensor that is no longer in the cache takes nearly twice as long as to be summed (ours, Zen 4: 0.27 ns
an element and thread, the sum 0.15), and it is such tensors that a training step leaves behind.

A call's fixed cost matters as much, since most tensors are small: addresses are handed over as integers (numba takes
0.2 µs to unpack an array), the tables belong to the calling thread and are cleared where they were used.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numba import carray, njit, prange, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from probes import bit_planes, layout, pairs, threads, vectors
from probes.bit_planes import BLOCK, CODES, GROUP, OCTAVE, PLANES, WORDS, codes, count
from probes.errors import UnsupportedTensor
from probes.in_memory import as_matrix, in_memory_order, plain, without_repeats
from probes.kernel_cache import keep_to_sources
from probes.layout import (
    AMAX,
    BIN_SHIFT,
    BINS,
    DISTINCT,
    EXTREMES,
    HASH_CELLS,
    MANTISSA_BITS,
    MINUS_AMIN,
    NANS,
    NEGATIVE_INFS,
    POSITIVE_INFS,
    SAMPLE,
    SIGNIFICANT_BITS,
    SUM_OF_SQUARES,
    SUMS,
    ZEROS,
)
from probes.pairs import ALL_CODES, READS_FLOAT16, count_bfloat16, count_float32
from probes.threads import SMALLEST_SHARE, threads_for

_CHUNK = 2048
_FEW_OUTSIDE = 64  # elements of a chunk outside the window, up to which these are counted one by one
_LEAST_PAIRED = 4 * _CHUNK  # elements of a share, below which to empty the table costs more than it saves (ours)
_MOST_PAIRED = 1 << 31  # elements, after which the table of uint32 is emptied
_FLOAT16_BINS = 112 * OCTAVE  # from float16's bin of a number to float32's
_WAYS = 8
_ALL_BINS = BINS + 8  # Inf and NaN fall into the last eight

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INF_BITS = np.uint32(0x7F800000)
_LEAST_NORMAL = np.uint32(1 << MANTISSA_BITS)
_FRACTION = np.uint32((1 << MANTISSA_BITS) - 1)
_SHIFT = np.uint32(BIN_SHIFT)
_NONE = np.uint32(0xFFFFFFFF)

_FLOAT32, _BFLOAT16, _FLOAT16, _FLOAT64 = range(4)
_KINDS = {
    torch.float32: _FLOAT32,
    torch.bfloat16: _BFLOAT16,
    torch.float16: _FLOAT16,
    torch.float64: _FLOAT64,
}
_MOST_SIGNIFICANT_BITS = (23, 7, 10, 23)  # by kind
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})

# A share's scratch, by the byte where each part starts.
_AT_PLANES = 0  # of a chunk's codes
_AT_COUNTS = _AT_PLANES + _CHUNK  # uint64 [_ALL_BINS, WORDS]
_AT_BINS = _AT_COUNTS + 8 * _ALL_BINS * WORDS  # uint32 [_ALL_BINS * _WAYS]
_AT_CELLS = _AT_BINS + 4 * _ALL_BINS * _WAYS  # uint8 [HASH_CELLS + 64]: one more cell for what is no sample
_AT_CHUNK = _AT_CELLS + HASH_CELLS + 64  # uint32 [_CHUNK]
_AT_INDICES = _AT_CHUNK + 4 * _CHUNK  # uint16 [_CHUNK]
_AT_TALLIES = _AT_INDICES + 2 * _CHUNK  # float64 [8]: as the last of a row of sums
_AT_SEEN = _AT_TALLIES + 64  # uint32 [16]
_AT_TABLE = _AT_SEEN + 64  # uint32 [ALL_CODES, ALL_CODES]: pairs
_AT_MASKS = _AT_TABLE + 4 * ALL_CODES * ALL_CODES  # uint32 [_CHUNK / 32]: who in a chunk of pairs is outside the window
_SCRATCH = _AT_MASKS + 4 * _CHUNK // pairs.GROUP

# What a share has seen, by its place in `seen`.
_LARGEST, _SMALLEST, _BITS = range(3)  # bits of magnitudes; mantissa bits in use
_FIRST_BIN, _LAST_BIN = 3, 4  # of the table of bins, as far as it is used
_FIRST_OCTAVE, _LAST_OCTAVE = 5, 6  # of the counts, as far as they are used
_BASE = 7  # the window's first bin
_FIRST_CODE, _LAST_CODE = 8, 9  # of the table of pairs, as far as it is used
_SINGLY = 10  # why the next chunk is better counted by increments of one, after the last: else 0
_SAME, _WIDE = 1, 2  # all in one bin or zero; much outside any window


class _Scratch(threading.local):
    """A thread's tables, all zero between calls. autograd's threads have their own."""

    def __init__(self) -> None:
        self.shares = 0
        self.address = 0

    def grow(self, shares: int) -> None:
        self.memory = np.zeros(shares * _SCRATCH + 64, dtype=np.uint8)
        self.address = -(-self.memory.ctypes.data // 64) * 64
        self.shares = shares


_scratch = _Scratch()


def add(sums: int, extremes: int, values: Tensor) -> None:
    """Add a CPU tensor to one slot: the addresses of its row of sums and of extremes (see `sketch.py`).

    Raises UnsupportedTensor for another dtype, and where the elements do not lie in this machine's memory with strides.
    """
    kind = _KINDS.get(values.dtype)
    if kind is None:
        raise unsupported(values)
    size, pitch, step, times = values.numel(), 0, 1, 1
    columns = size
    try:
        if (
            type(values) not in _PLAIN_TYPES
            or values.layout is not torch.strided
            or values.is_neg()
            or not values.is_cpu
        ):
            values = plain(values)
        if not values.is_contiguous():
            values, times = without_repeats(values)
            size, columns, pitch, step = as_matrix(values)
            if columns == 0:
                values, columns, pitch, step = in_memory_order(values), size, 0, 1
        source = values.data_ptr()
    except RuntimeError as error:  # as for those within torch.func's transforms
        raise UnsupportedTensor(f"a sketch reads tensors that have memory: {error}") from error
    if size == 0:
        return
    if source == 0:
        raise UnsupportedTensor(f"this tensor of {size} elements has no memory that a sketch could read")
    shares = threads_for(size) if size >= 2 * SMALLEST_SHARE else 1
    if shares > _scratch.shares:
        _scratch.grow(shares)
    if shares == 1:
        _add(sums, extremes, _scratch.address, source, kind, size, columns, pitch, step, times)
    else:
        _add_shared(shares, sums, extremes, _scratch.address, source, kind, size, columns, pitch, step, times)


def unsupported(values: Tensor) -> UnsupportedTensor:
    """What to raise for a tensor of a dtype that is not floating, or of one with 8 bits or less."""
    allowed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _KINDS))
    return UnsupportedTensor(f"a sketch takes {allowed}; this tensor is {values.dtype}: convert it first")


def _to_pointer(_typing, address):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), code


def _to_trailing_zeros(_typing, word):  # type: ignore[no-untyped-def]
    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), code


_pointer: Any = intrinsic(_to_pointer)
_trailing_zeros: Any = intrinsic(_to_trailing_zeros)
_element_of = njit(bit_planes.element_of)
_paired_element_of = njit(pairs.element_of)
_count_float16 = pairs.count_float16 if READS_FLOAT16 else count_bfloat16  # which is then never called


@njit(cache=True, nogil=True, error_model="numpy")
def _add(sums, extremes, scratch, source, kind, size, columns, pitch, step, times):  # type: ignore[no-untyped-def]
    _read(scratch, extremes, source, kind, 0, size, size, columns, pitch, step)
    _merge(sums, extremes, scratch, 1, times)


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _add_shared(  # type: ignore[no-untyped-def]
    shares, sums, extremes, scratch, source, kind, size, columns, pitch, step, times
):
    chunks = -(-size // _CHUNK)
    for share in prange(shares):
        first = chunks * share // shares * _CHUNK
        last = min(chunks * (share + 1) // shares * _CHUNK, size)
        _read(scratch + share * _SCRATCH, extremes, source, kind, first, last, size, columns, pitch, step)
    _merge(sums, extremes, scratch, shares, times)


@njit(cache=True, nogil=True, error_model="numpy")
def _read(scratch, extremes, source, kind, first, last, size, columns, pitch, step):  # type: ignore[no-untyped-def]
    """Elements from first to last, into a share's scratch."""
    bins = carray(_pointer(scratch + _AT_BINS), (_ALL_BINS * _WAYS,), np.uint32)
    cells = carray(_pointer(scratch + _AT_CELLS), (HASH_CELLS + 64,), np.uint8)
    widened = carray(_pointer(scratch + _AT_CHUNK), (_CHUNK,), np.uint32)
    indices = carray(_pointer(scratch + _AT_INDICES), (_CHUNK,), np.uint16)
    tallies = carray(_pointer(scratch + _AT_TALLIES), (8,), np.float64)
    seen = carray(_pointer(scratch + _AT_SEEN), (16,), np.uint32)
    _begin(seen, extremes, kind)
    most_bits = np.uint32(_most_bits(kind))
    whole_row = columns == size and step == 1
    in_place = kind == _FLOAT32 and whole_row
    paired = _IN_PAIRS and last - first >= _LEAST_PAIRED
    words = carray(_pointer(source), (size if in_place else 0,), np.uint32)
    stride = max(1, -(-size // SAMPLE))
    for start in range(first, last, _CHUNK):
        length = min(_CHUNK, last - start)
        whole = -(-length // _UNIT) * _UNIT
        first_sampled = (stride - start % stride) % stride
        if paired and length == _CHUNK and not seen[_SINGLY]:
            at, held = source + start * _bytes_each(kind), kind
            if not whole_row or not _is_paired(kind, seen):
                at, held = scratch + _AT_CHUNK, _FLOAT32
                _widen(widened, source, kind, start, columns, pitch, step)
            _take_pairs(scratch, at, held, bins, indices, tallies, seen, most_bits)
            _sample(cells, at, held, _CHUNK, first_sampled, stride)
            if (start - first) % _MOST_PAIRED == _MOST_PAIRED - _CHUNK:
                _empty(scratch, seen)
            continue
        if in_place and whole == length:
            chunk = words[start : start + length]
        else:
            chunk = widened[:whole]
            _widen(chunk[:length], source, kind, start, columns, pitch, step)
            chunk[length:] = np.uint32(0)
        _take(scratch, chunk, whole - length, bins, indices, tallies, seen, most_bits)
        _sample(cells, chunk.ctypes.data, _FLOAT32, length, first_sampled, stride)
    if paired:
        _empty(scratch, seen)


@njit(cache=True, nogil=True, error_model="numpy")
def _begin(seen, extremes, kind):  # type: ignore[no-untyped-def]
    """What the slot has seen before: only what goes beyond it need be looked for."""
    known = carray(_pointer(extremes), (EXTREMES,), np.float32)
    bits = carray(_pointer(extremes), (EXTREMES,), np.uint32)
    seen[_LARGEST] = bits[AMAX]
    seen[_SMALLEST] = bits[MINUS_AMIN] & _MAGNITUDE
    seen[_BITS] = np.uint32(known[SIGNIFICANT_BITS])
    seen[_FIRST_BIN] = _ALL_BINS
    seen[_LAST_BIN] = 0
    seen[_FIRST_OCTAVE] = _ALL_BINS
    seen[_LAST_OCTAVE] = 0
    seen[_BASE] = _window_below(seen[_LARGEST])
    if _IN_PAIRS and kind == _FLOAT16:
        seen[_BASE] = min(max(seen[_BASE], np.uint32(_FLOAT16_BINS + OCTAVE)), np.uint32(_FLOAT16_BINS + 16 * OCTAVE))
    seen[_FIRST_CODE], seen[_LAST_CODE] = pairs.CODES, 0
    seen[_SINGLY] = 0


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _most_bits(kind):  # type: ignore[no-untyped-def]
    return _MOST_SIGNIFICANT_BITS[kind]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _bytes_each(kind):  # type: ignore[no-untyped-def]
    return 4 if kind == _FLOAT32 else 8 if kind == _FLOAT64 else 2


# One chunk. `_take_planes` is the common case; `_take_any` counts by increments, whatever there is.


@njit(cache=True, nogil=True, error_model="numpy")
def _take_planes(scratch, chunk, padding, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    """A chunk of a multiple of GROUP, of which the last elements, zeros, are no part of the tensor."""
    address, base = chunk.ctypes.data, np.int64(seen[_BASE])
    high, low, outside, squares = codes(address, chunk.size, np.uint16(base), scratch + _AT_PLANES)
    few = outside <= _FEW_OUTSIDE
    if few and outside > 0 and not _count_outside(scratch, chunk, outside, bins, indices, tallies, seen):
        _take_any(scratch, chunk, padding, bins, indices, tallies, seen, most_bits)
        return
    lowest, highest = base + low, base + high
    if (
        not few
        or highest >= np.int64(seen[_LARGEST] >> _SHIFT)
        or lowest <= np.int64(seen[_SMALLEST] >> _SHIFT)
        or seen[_BITS] < most_bits
    ):
        largest, smallest, fractions, zeros = _reduce(chunk)
        if not few:
            if largest == 0:
                tallies[ZEROS - BINS] += zeros - padding
                return
            if largest >= _INF_BITS or smallest < _LEAST_NORMAL:
                _take_any(scratch, chunk, padding, bins, indices, tallies, seen, most_bits)
                return
            tallies[ZEROS - BINS] += zeros
            lowest, highest = np.int64(smallest >> _SHIFT), np.int64(largest >> _SHIFT)
            if lowest < base or highest >= base + CODES:
                base = np.int64(_window_below(largest))
                seen[_BASE] = base
                codes(address, chunk.size, np.uint16(base), scratch + _AT_PLANES)
        _note(seen, largest, smallest, fractions)
    tallies[ZEROS - BINS] -= padding
    tallies[SUM_OF_SQUARES - BINS] += squares
    _count_window(scratch, chunk.size, base, lowest, highest, seen)
    while lowest < base:
        highest, base = base - 1, max(base - CODES, np.int64(OCTAVE))
        codes(address, chunk.size, np.uint16(base), scratch + _AT_PLANES)
        _count_window(scratch, chunk.size, base, lowest, highest, seen)


@njit(cache=True, nogil=True, error_model="numpy")
def _count_outside(scratch, chunk, outside, bins, indices, tallies, seen):  # type: ignore[no-untyped-def]
    """Count the few elements of plane 7 one by one; or none, and return False, if one is subnormal, Inf or NaN."""
    planes = carray(_pointer(scratch + _AT_PLANES), (chunk.size // BLOCK, PLANES, WORDS), np.uint64)
    largest, smallest, zeros, found = np.uint32(0), _NONE, 0, 0
    for block in range(chunk.size // BLOCK):
        for word in range(WORDS):
            members = planes[block, PLANES - 1, word]
            while members != 0:
                bit = _trailing_zeros(members)
                members &= members - np.uint64(1)
                bits = np.uint32(chunk[block * BLOCK + _element_of(word, bit)] & _MAGNITUDE)
                if bits == 0:
                    zeros += 1
                elif bits < _LEAST_NORMAL or bits >= _INF_BITS:
                    return False
                else:
                    largest, smallest = max(largest, bits), min(smallest, bits)
                    indices[found] = np.uint16(bits >> _SHIFT)
                    found += 1
    tallies[ZEROS - BINS] += zeros
    _count_few(bins, indices[:found], largest, smallest, seen)
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _count_few(bins, indices, largest, smallest, seen):  # type: ignore[no-untyped-def]
    """Count normal numbers by their bins, one by one; the largest and the smallest are given by their bits."""
    for i in range(indices.size):
        bins[np.int64(indices[i]) * _WAYS] += np.uint32(1)
    if indices.size > 0:
        _widen_range(seen, smallest >> _SHIFT, largest >> _SHIFT)
        _note(seen, largest, smallest, np.uint32(0))


@njit(cache=True, nogil=True, error_model="numpy")
def _count_window(scratch, size, base, lowest, highest, seen):  # type: ignore[no-untyped-def]
    """Count what the planes say, where the chunk has no bins below the lowest and above the highest."""
    first, last = (max(lowest, base) - base) // OCTAVE, (min(highest, base + CODES - 1) - base) // OCTAVE
    count(scratch + _AT_PLANES, size, first, last, scratch + _AT_COUNTS + base * (8 * WORDS))
    seen[_FIRST_OCTAVE] = min(seen[_FIRST_OCTAVE], np.uint32(base // OCTAVE + first))
    seen[_LAST_OCTAVE] = max(seen[_LAST_OCTAVE], np.uint32(base // OCTAVE + last))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _window_below(largest):  # type: ignore[no-untyped-def]
    """The first bin of the window whose last octave is that of a magnitude, by its bits; no zeros or subnormals."""
    octave = np.int64(largest >> np.uint32(MANTISSA_BITS))
    return np.uint32(max(octave + np.int64(1) - _OCTAVES, np.int64(1)) * OCTAVE)


@njit(cache=True, nogil=True, error_model="numpy")
def _take_any(_scratch, chunk, padding, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    chunk = chunk[: chunk.size - padding]
    largest, smallest, fractions, zeros = _reduce(chunk)
    is_wide = np.int64(largest >> np.uint32(MANTISSA_BITS)) - np.int64(smallest >> np.uint32(MANTISSA_BITS)) >= _OCTAVES
    seen[_SINGLY] = _WIDE if seen[_SINGLY] == _WIDE and is_wide else 0
    if largest == 0:
        tallies[ZEROS - BINS] += zeros
        seen[_SINGLY] = _SAME
        return
    if largest >= _INF_BITS:
        largest, smallest, fractions = _without_nonfinite(chunk, tallies)
        high = np.uint32(_ALL_BINS - 1)
    else:
        tallies[SUM_OF_SQUARES - BINS] += _squares(chunk.view(np.float32))
        high = largest >> _SHIFT
    if largest > 0:
        _note(seen, largest, smallest, fractions)
        if smallest < _LEAST_NORMAL and seen[_BITS] < most_bits:
            seen[_BITS] = max(seen[_BITS], np.uint32(_significant_subnormal(chunk)))
    tallies[ZEROS - BINS] += zeros
    low = min(smallest >> _SHIFT, high)
    if low == high:
        bins[low * _WAYS] += np.uint32(chunk.size - zeros)
        _widen_range(seen, low, high)
        seen[_SINGLY] = _SAME
        return
    if zeros > 0:
        low = np.uint32(0)
        bins[0] -= np.uint32(zeros)  # zero shares bin 0 with the smallest subnormals; it may wrap, and wraps back
    _widen_range(seen, low, high)
    _index(chunk, indices)
    _count(bins, indices[: chunk.size])


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _note(seen, largest, smallest, fractions):  # type: ignore[no-untyped-def]
    seen[_LARGEST] = max(seen[_LARGEST], largest)
    seen[_SMALLEST] = min(seen[_SMALLEST], smallest)
    if seen[_BITS] < np.uint32(MANTISSA_BITS):
        seen[_BITS] = max(seen[_BITS], np.uint32(_significant(fractions)))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _widen_range(seen, low, high):  # type: ignore[no-untyped-def]
    seen[_FIRST_BIN] = min(seen[_FIRST_BIN], np.uint32(low))
    seen[_LAST_BIN] = max(seen[_LAST_BIN], np.uint32(high))


# The same where `_take_planes` cannot be.


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _is_paired(kind, seen):  # type: ignore[no-untyped-def]
    """Whether elements are counted in pairs as they are, in the window as it is."""
    if kind == _FLOAT16:
        return READS_FLOAT16 and seen[_BASE] >= _FLOAT16_BINS + OCTAVE
    return kind != _FLOAT64


@njit(cache=True, nogil=True, error_model="numpy")
def _take_pairs(scratch, at, kind, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    """A whole chunk of a dtype that `_is_paired`."""
    if seen[_LARGEST] == 0:
        largest = _reduce(_as_float32(scratch, at, kind))[0]
        if largest < _INF_BITS:
            seen[_BASE] = max(seen[_BASE], _window_below(largest))
    high, low, outside, zeros, squares = _count_pairs(scratch, at, kind, seen, np.uint32(1))
    largest, smallest, fractions = np.uint32(0), _NONE, np.uint32(0)
    if (
        outside - zeros > _FEW_OUTSIDE
        or np.int64(seen[_BASE]) + high >= np.int64(seen[_LARGEST] >> _SHIFT)
        or np.int64(seen[_BASE]) + low <= np.int64(seen[_SMALLEST] >> _SHIFT)
        or seen[_BITS] < most_bits
    ):
        words = _as_float32(scratch, at, kind)
        largest, smallest, fractions, zeros = _reduce(words)
        if outside - zeros > _FEW_OUTSIDE and largest < _INF_BITS and _window_below(largest) != seen[_BASE]:
            _count_pairs(scratch, at, kind, seen, _NONE)
            _empty(scratch, seen)
            seen[_BASE] = _window_below(largest)
            at, kind = words.ctypes.data, _FLOAT32
            high, low, outside, _, squares = _count_pairs(scratch, at, kind, seen, np.uint32(1))
    many = outside - zeros > _FEW_OUTSIDE
    if many or (outside > zeros and not _count_beyond(scratch, at, kind, bins, indices, tallies, seen)):
        _count_pairs(scratch, at, kind, seen, _NONE)
        _take_any(scratch, _as_float32(scratch, at, kind), 0, bins, indices, tallies, seen, most_bits)
        seen[_SINGLY] = _WIDE if many else 0
        return
    if largest > 0:
        _note(seen, largest, smallest, fractions)
    if outside == zeros:
        tallies[ZEROS - BINS] += zeros
    if zeros == _CHUNK or (largest >> _SHIFT == smallest >> _SHIFT and largest > 0):
        seen[_SINGLY] = _SAME
    tallies[SUM_OF_SQUARES - BINS] += squares
    seen[_FIRST_CODE] = min(seen[_FIRST_CODE], np.uint32(low))
    seen[_LAST_CODE] = max(seen[_LAST_CODE], np.uint32(max(min(high, pairs.CODES - 1), 0)))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _count_pairs(scratch, at, kind, seen, step):  # type: ignore[no-untyped-def]
    """Count a chunk in the window as it is, or take it back with a step of -1: see `pairs.count_float32`."""
    table, masks, base = scratch + _AT_TABLE, scratch + _AT_MASKS, np.uint16(seen[_BASE])
    if kind == _FLOAT32:
        return count_float32(at, _CHUNK, base, step, table, masks)
    if kind == _BFLOAT16:
        return count_bfloat16(at, _CHUNK, base, step, table, masks)
    return _count_float16(at, _CHUNK, np.uint16(base - np.uint16(_FLOAT16_BINS)), step, table, masks)


@njit(cache=True, nogil=True, error_model="numpy")
def _count_beyond(scratch, at, kind, bins, indices, tallies, seen):  # type: ignore[no-untyped-def]
    """Count what lies outside the window one by one; or nothing, and return False, if one is subnormal, Inf or NaN."""
    masks = carray(_pointer(scratch + _AT_MASKS), (_CHUNK // pairs.GROUP,), np.uint32)
    largest, smallest, zeros, found = np.uint32(0), _NONE, 0, 0
    for group in range(_CHUNK // pairs.GROUP):
        members = np.uint64(masks[group])
        while members != 0:
            i = group * pairs.GROUP + _paired_element_of(_trailing_zeros(members), kind == _FLOAT32)
            members &= members - np.uint64(1)
            bits = _magnitude_at(at, kind, i)
            if bits == 0:
                zeros += 1
            elif bits < _LEAST_NORMAL or bits >= _INF_BITS:
                return False
            else:
                largest, smallest = max(largest, bits), min(smallest, bits)
                indices[found] = np.uint16(bits >> _SHIFT)
                found += 1
    tallies[ZEROS - BINS] += zeros
    _count_few(bins, indices[:found], largest, smallest, seen)
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def _empty(scratch, seen):  # type: ignore[no-untyped-def]
    """Bring the table of pairs to the counts: a pair counts for both its codes."""
    low, high, base = np.int64(seen[_FIRST_CODE]), np.int64(seen[_LAST_CODE]), np.int64(seen[_BASE])
    seen[_FIRST_CODE], seen[_LAST_CODE] = pairs.CODES, 0
    counts = carray(_pointer(scratch + _AT_COUNTS), (_ALL_BINS, WORDS), np.uint64)
    totals = _row(scratch, pairs.CODES, low, high + 1)
    for code in range(low, high + 1):
        counts[base + code, 1] += _add_and_clear(totals, _row(scratch, code, low, high + 1))
        for members in _row(scratch, code, pairs.CODES, ALL_CODES):
            counts[base + code, 1] += members
        _row(scratch, code, pairs.CODES, ALL_CODES)[:] = 0
    for code in range(pairs.CODES, ALL_CODES):
        if code > pairs.CODES:
            _add_and_clear(totals, _row(scratch, code, low, high + 1))
        _row(scratch, code, pairs.CODES, ALL_CODES)[:] = 0
    for code in range(low, high + 1):
        counts[base + code, 0] += totals[code - low]
        totals[code - low] = 0
    if low <= high:
        seen[_FIRST_OCTAVE] = min(seen[_FIRST_OCTAVE], np.uint32((base + low) // OCTAVE))
        seen[_LAST_OCTAVE] = max(seen[_LAST_OCTAVE], np.uint32((base + high) // OCTAVE))


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _row(scratch, code, first, last):  # type: ignore[no-untyped-def]
    """A row of the table, from the first to before the last column."""
    at = scratch + _AT_TABLE + 4 * (ALL_CODES * code + first)
    return carray(_pointer(at), (max(last - first, 0),), np.uint32)


@njit(cache=True, nogil=True, error_model="numpy")
def _add_and_clear(totals, row):  # type: ignore[no-untyped-def]
    """Add a row of the table to the sums of its columns, clear it, and return its own sum."""
    total = np.uint32(0)
    for i in range(row.size):
        totals[i] = np.uint32(totals[i] + row[i])
        total = np.uint32(total + row[i])
        row[i] = np.uint32(0)
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _as_float32(scratch, at, kind):  # type: ignore[no-untyped-def]
    """The bits of a whole chunk as float32; other dtypes into the scratch."""
    if kind == _FLOAT32:
        return carray(_pointer(at), (_CHUNK,), np.uint32)
    words = carray(_pointer(scratch + _AT_CHUNK), (_CHUNK,), np.uint32)
    _widen(words, at, kind, 0, _CHUNK, 0, 1)
    return words


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _magnitude_at(at, kind, i):  # type: ignore[no-untyped-def]
    """The bits of one magnitude, as float32."""
    if kind == _FLOAT32:
        return np.uint32(carray(_pointer(at + 4 * i), (1,), np.uint32)[0] & _MAGNITUDE)
    half = carray(_pointer(at + 2 * i), (1,), np.uint16)[0]
    bits = np.uint32(np.uint32(half) << np.uint32(16)) if kind == _BFLOAT16 else _of_float16(half)
    return np.uint32(bits & _MAGNITUDE)


_IN_PAIRS = not bit_planes.AVAILABLE
if _IN_PAIRS:
    _take, _UNIT, _OCTAVES = _take_any, 1, pairs.CODES // OCTAVE
else:
    _take, _UNIT, _OCTAVES = _take_planes, GROUP, CODES // OCTAVE


# The loops that become vector code.


@njit(cache=True, nogil=True, error_model="numpy")
def _reduce(words):  # type: ignore[no-untyped-def]
    """Bits of the largest and of the smallest non-zero magnitude, the fraction bits of normals, and zeros."""
    largest, smallest, fractions, zeros = np.uint32(0), _NONE, np.uint32(0), np.uint32(0)
    for i in range(words.size):
        bits = np.uint32(words[i] & _MAGNITUDE)
        largest = max(largest, bits)
        smallest = min(smallest, np.uint32(bits - np.uint32(1)))
        fractions = np.uint32(fractions | (bits if bits >= _LEAST_NORMAL else np.uint32(0)))
        zeros = np.uint32(zeros + np.uint32(bits == 0))
    return largest, np.uint32(smallest + np.uint32(1)), np.uint32(fractions & _FRACTION), np.int64(zeros)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _squares(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value * value
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _index(words, indices):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        indices[i] = np.uint16(np.uint32(np.uint32(words[i] & _MAGNITUDE) >> _SHIFT) << np.uint32(3))


@njit(cache=True, nogil=True, error_model="numpy")
def _count(bins, indices):  # type: ignore[no-untyped-def]
    whole = indices.size // _WAYS * _WAYS
    for i in range(0, whole, _WAYS):
        for way in range(_WAYS):
            bins[np.int64(indices[i + way]) + way] += np.uint32(1)
    for i in range(whole, indices.size):
        bins[np.int64(indices[i]) + i % _WAYS] += np.uint32(1)


@njit(cache=True, nogil=True, error_model="numpy")
def _sample(cells, at, kind, size, first, stride):  # type: ignore[no-untyped-def]
    """Hash cells hit by every stride-th of the finite, non-zero magnitudes (linear counting)."""
    for i in range(first, size, stride):
        bits = _magnitude_at(at, kind, i)
        cell = np.int64(np.uint32(np.uint32(bits * np.uint32(0x9E3779B1)) >> np.uint32(20)))
        counts = np.uint32(bits - np.uint32(1)) < np.uint32(_INF_BITS - np.uint32(1))
        cells[cell if counts else HASH_CELLS] = np.uint8(1)


@njit(cache=True, nogil=True, error_model="numpy")
def _without_nonfinite(words, tallies):  # type: ignore[no-untyped-def]
    """The rare chunk with Inf or NaN: count those, and reduce over the rest."""
    largest, smallest, fractions = np.uint32(0), _NONE, np.uint32(0)
    values = words.view(np.float32)
    for i in range(words.size):
        bits = np.uint32(words[i] & _MAGNITUDE)
        if bits < _INF_BITS:
            largest = max(largest, bits)
            smallest = min(smallest, np.uint32(bits - np.uint32(1)))
            fractions = np.uint32(fractions | (bits if bits >= _LEAST_NORMAL else np.uint32(0)))
            tallies[SUM_OF_SQUARES - BINS] += np.float64(values[i]) * np.float64(values[i])
        elif bits > _INF_BITS:
            tallies[NANS - BINS] += 1
        elif words[i] == bits:
            tallies[POSITIVE_INFS - BINS] += 1
        else:
            tallies[NEGATIVE_INFS - BINS] += 1
    return largest, np.uint32(smallest + np.uint32(1)), np.uint32(fractions & _FRACTION)


@njit(cache=True, nogil=True, error_model="numpy")
def _significant(fractions):  # type: ignore[no-untyped-def]
    """Mantissa bits in use after the leading one: the lowest bit set in any decides."""
    for unused in range(MANTISSA_BITS):
        if fractions >> np.uint32(unused) & np.uint32(1):
            return MANTISSA_BITS - unused
    return 0


@njit(cache=True, nogil=True, error_model="numpy")
def _significant_subnormal(words):  # type: ignore[no-untyped-def]
    """The same for the subnormals of a chunk, each counted from its own leading one."""
    most = 0
    for i in range(words.size):
        bits = np.int64(words[i] & _MAGNITUDE)
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
def _widen(chunk, source, kind, start, columns, pitch, step):  # type: ignore[no-untyped-def]
    """The bits of a chunk's elements as float32, from wherever the strides say."""
    done, row, column = 0, start // columns, start % columns
    bytes_each = _bytes_each(kind)
    while done < chunk.size:
        count = min(chunk.size - done, columns - column)
        at = _pointer(source + (row * pitch + column * step) * bytes_each)
        part, span = chunk[done : done + count], (count - 1) * step + 1
        if kind == _FLOAT32:
            _from_float32(part, carray(at, (span,), np.uint32), step)
        elif kind == _BFLOAT16:
            _from_bfloat16(part, carray(at, (span,), np.uint16), step)
        elif kind == _FLOAT16:
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
            chunk[i] = _of_float16(source[i])
    else:
        for i in range(chunk.size):
            chunk[i] = _of_float16(source[i * step])


@njit(cache=True, nogil=True, error_model="numpy")
def _from_float64(chunk, source, step):  # type: ignore[no-untyped-def]
    values = chunk.view(np.float32)
    for i in range(chunk.size):
        values[i] = np.float32(source[i * step])


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _of_float16(half):  # type: ignore[no-untyped-def]
    """A subnormal comes from its integer, so that a processor that flushes subnormals to zero does not matter."""
    word = np.uint32(half)
    bits = np.uint32(word & np.uint32(0x7FFF))
    exponent = np.uint32(112 << 23) if bits < np.uint32(0x7C00) else np.uint32(224 << 23)
    normal = np.uint32(np.uint32(bits << np.uint32(13)) + exponent)
    subnormal = np.float32(np.float32(np.int32(bits)) * np.float32(2.0**-24)).view(np.uint32)
    sign = np.uint32(np.uint32(word & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(sign | (normal if bits >= np.uint32(0x400) else subnormal))


# Out of the scratch.


@njit(cache=True, nogil=True, error_model="numpy")
def _merge(sums, extremes, scratch, shares, times):  # type: ignore[no-untyped-def]
    """Add all shares to the slot, and leave their scratch as it was."""
    row = carray(_pointer(sums), (SUMS,), np.float64)
    best = carray(_pointer(extremes), (EXTREMES,), np.float32)
    all_cells = carray(_pointer(scratch + _AT_CELLS), (HASH_CELLS,), np.uint8)
    for share in range(shares):
        at = scratch + share * _SCRATCH
        counts = carray(_pointer(at + _AT_COUNTS), (_ALL_BINS, WORDS), np.uint64)
        bins = carray(_pointer(at + _AT_BINS), (_ALL_BINS, _WAYS), np.uint32)
        tallies = carray(_pointer(at + _AT_TALLIES), (8,), np.float64)
        seen = carray(_pointer(at + _AT_SEEN), (16,), np.uint32)
        for b in range(np.int64(seen[_FIRST_BIN]), np.int64(seen[_LAST_BIN]) + 1):
            total = np.uint32(0)
            for way in range(_WAYS):
                total = np.uint32(total + bins[b, way])
                bins[b, way] = np.uint32(0)
            if b < BINS:
                row[b] += np.float64(np.int64(total) * times)
        for b in range(np.int64(seen[_FIRST_OCTAVE]) * OCTAVE, np.int64(seen[_LAST_OCTAVE] + 1) * OCTAVE):
            members = np.uint64(0)
            for part in range(WORDS):
                members += counts[b, part]
                counts[b, part] = np.uint64(0)
            row[b] += np.float64(np.int64(members) * times)
        for i in range(tallies.size):
            row[BINS + i] += tallies[i] * times
            tallies[i] = 0.0
        magnitudes = seen[_LARGEST : _SMALLEST + 1].view(np.float32)
        best[AMAX] = max(best[AMAX], magnitudes[0])
        best[MINUS_AMIN] = max(best[MINUS_AMIN], -magnitudes[1])
        best[SIGNIFICANT_BITS] = max(best[SIGNIFICANT_BITS], np.float32(seen[_BITS]))
        if share > 0:
            cells = carray(_pointer(at + _AT_CELLS), (HASH_CELLS,), np.uint8)
            for i in range(HASH_CELLS):
                all_cells[i] |= cells[i]
                cells[i] = 0
    hit = 0
    for i in range(HASH_CELLS):
        hit += all_cells[i]
        all_cells[i] = 0
    if hit > 0:
        distinct = round(HASH_CELLS * np.log(HASH_CELLS / max(HASH_CELLS - hit, 1)))
        best[DISTINCT] = max(best[DISTINCT], np.float32(min(distinct, HASH_CELLS)))


keep_to_sources(_add, bit_planes, pairs, vectors, layout, threads)
