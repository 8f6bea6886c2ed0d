"""The sketch's CPU kernel: one compiled pass over the bits of the floats.

The tensor is taken in chunks of 1,024 elements, which stay in the first-level cache. Other dtypes, and the elements of
strided tensors, are written into such a chunk as float32, so no whole tensor is ever copied.

A histogram is the one thing that vector instructions do not help: each element is an increment of its own, of which a
core does about one a cycle. So two elements are counted by one increment, in a table of pairs: a chunk's first half
is paired with its second, each bin said as a code of seven bits within a window of fifteen octaves, and sums over rows
and columns of the table give the bins back. The few elements outside the window are looked for and counted one by one;
a chunk with many, with subnormals, or with Inf or NaN does without pairs. Increments of one place also wait for one
another (some seven cycles; ours), which is what tensors of many equal values suffer from: a chunk of a single bin is
measured and not counted, codes of zeros take turns, and the table of bins is there eight times. The inner loop, which
counts one chunk while it reads the next, is in `pairing.py`.

A call's fixed cost matters as much, since most tensors are small: addresses are handed over as integers (numba takes
0.2 µs to unpack an array), the tables belong to the calling thread and are cleared where they were used.
"""

from __future__ import annotations

import threading
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numba import carray, njit, prange, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from probes.errors import UnsupportedTensor
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
from probes.pairing import CODES as _CODES
from probes.pairing import WINDOW as _WINDOW
from probes.pairing import pair, pair_and_count, pair_sparse, pair_sparse_and_count
from probes.threads import SMALLEST_SHARE, threads_for

_CHUNK = 1024
_HALF = _CHUNK // 2
_ABOVE = 8  # bins between the largest value met when the window is placed and its upper end: an octave
_MOST_CHUNKS = 65535 // _HALF  # counted in pairs before a place of sixteen bits could overflow
_MOST_OUTSIDE = 64  # elements of a chunk that may lie outside the window
_BLOCK = 64  # elements among which these are looked for
_PATIENCE = 16  # chunks with more of them before the window is placed anew
_MOST_PLACES = 8  # after so many the tensor is too wide for pairs
_WORTH_PAIRS = 8 * _CHUNK  # elements below which the table of pairs costs more than it saves
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
_AT_PAIRS = 0  # uint16 [_CODES * _CODES]
_AT_BINS = _AT_PAIRS + 2 * _CODES * _CODES  # uint32 [_ALL_BINS * _WAYS]
_AT_CELLS = _AT_BINS + 4 * _ALL_BINS * _WAYS  # uint8 [HASH_CELLS + 64]: one more cell for what is no sample
_AT_CHUNK = _AT_CELLS + HASH_CELLS + 64  # uint32 [_CHUNK]
_AT_INDICES = _AT_CHUNK + 4 * _CHUNK  # uint16 [_CHUNK]
_AT_CODES = _AT_INDICES + 2 * _CHUNK  # uint16 [2, _HALF]: of the chunk in hand and of the one before
_AT_TALLIES = _AT_CODES + 2 * _CHUNK  # float64 [8]: as the last of a row of sums
_AT_SEEN = _AT_TALLIES + 64  # uint32 [16]
_SCRATCH = _AT_SEEN + 64

# What a share has seen, by its place in `seen`.
_LARGEST, _SMALLEST, _BITS, _LATEST = range(4)  # bits of magnitudes, of the latest chunk too; mantissa bits in use
_FIRST_BIN, _LAST_BIN = 4, 5  # of the table of bins, as far as it is used
_BASE, _PLACED, _LEFT_OUT = 6, 7, 8  # the window's first bin, 0: none; times placed; chunks it was no use for
_PAIRED, _LOW_CODE, _HIGH_CODE = 9, 10, 11  # chunks in the table of pairs, and its part in use
_WAITING, _TURN, _SPARSE = 12, 13, 14  # whether codes wait to be counted; where the next go; whether zeros are expected


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
            values = _plain(values)
        if not values.is_contiguous():
            values, times = without_repeats(values)
            size, columns, pitch, step = _as_matrix(values)
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


def in_memory_order(values: Tensor) -> Tensor:
    """Every element in one contiguous row; a dense tensor is not copied, however its dimensions are permuted."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    dense = values.permute(order)
    return dense.view(-1) if dense.is_contiguous() else dense.reshape(-1)


def without_repeats(values: Tensor) -> tuple[Tensor, int]:
    """The tensor with each expanded dimension (stride 0) left out, and how many times that holds every element."""
    times = 1
    for dimension in range(values.dim() - 1, -1, -1):
        size = values.shape[dimension]
        if values.stride(dimension) == 0 and size > 1:
            values, times = values.select(dimension, 0), times * size
    return values, times


def _plain(values: Tensor) -> Tensor:
    """The same elements as a tensor of the plain kind, which has them where `data_ptr` says."""
    if values.layout is not torch.strided or not values.is_cpu:
        place = f"{values.layout} on {values.device}"
        raise UnsupportedTensor(f"a sketch on the CPU reads strided tensors there; this one is {place}")
    return values.detach().as_subclass(Tensor).resolve_neg()


def _as_matrix(held: Tensor) -> tuple[int, int, int, int]:
    """Elements, columns, and the strides of rows and of columns, in elements, as they lie in memory.

    0 columns: more than two strides would be needed.
    """
    dimensions: list[tuple[int, int]] = []  # size and stride, the widest stride first
    for stride, size in sorted(zip(held.stride(), held.shape, strict=True), key=itemgetter(0), reverse=True):
        if dimensions and dimensions[-1][1] == stride * size:
            dimensions[-1] = (dimensions[-1][0] * size, stride)
        elif size != 1:
            dimensions.append((size, stride))
    if len(dimensions) > 2:
        return held.numel(), 0, 0, 0
    (rows, pitch), (columns, step) = [(1, 0), (1, 1), *dimensions][-2:]
    return rows * columns, columns, pitch, step


def _to_pointer(_typing, address):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), code


_pointer: Any = intrinsic(_to_pointer)


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
    pairs = carray(_pointer(scratch + _AT_PAIRS), (_CODES * _CODES,), np.uint16)
    bins = carray(_pointer(scratch + _AT_BINS), (_ALL_BINS * _WAYS,), np.uint32)
    cells = carray(_pointer(scratch + _AT_CELLS), (HASH_CELLS + 64,), np.uint8)
    widened = carray(_pointer(scratch + _AT_CHUNK), (_CHUNK,), np.uint32)
    indices = carray(_pointer(scratch + _AT_INDICES), (_CHUNK,), np.uint16)
    tallies = carray(_pointer(scratch + _AT_TALLIES), (8,), np.float64)
    seen = carray(_pointer(scratch + _AT_SEEN), (16,), np.uint32)
    _begin(seen, extremes)
    most_bits = np.uint32(_most_bits(kind))
    in_place = kind == _FLOAT32 and columns == size and step == 1
    words = carray(_pointer(source), (size if in_place else 0,), np.uint32)
    stride = max(1, -(-size // SAMPLE))
    for start in range(first, last, _CHUNK):
        length = min(_CHUNK, last - start)
        if in_place:
            chunk = words[start : start + length]
        else:
            chunk = widened[:length]
            _widen(chunk, source, kind, start, columns, pitch, step)
        _sample(cells, chunk, (stride - start % stride) % stride, stride)
        if length < _CHUNK or seen[_BASE] == 0:
            _take_any(chunk, bins, indices, tallies, seen, most_bits)
            if last - start > _WORTH_PAIRS:
                _place_window(seen)
        else:
            _take(scratch, chunk, pairs, bins, indices, tallies, seen, most_bits)
        if seen[_PAIRED] == _MOST_CHUNKS:
            _unpair(scratch, pairs, bins, seen)
        elif seen[_LEFT_OUT] == _PATIENCE:
            _unpair(scratch, pairs, bins, seen)
            _place_window(seen)
            seen[_PLACED] += 1
    _unpair(scratch, pairs, bins, seen)


@njit(cache=True, nogil=True, error_model="numpy")
def _begin(seen, extremes):  # type: ignore[no-untyped-def]
    """What the slot has seen before: only what goes beyond it need be looked for."""
    known = carray(_pointer(extremes), (EXTREMES,), np.float32)
    bits = carray(_pointer(extremes), (EXTREMES,), np.uint32)
    seen[_LARGEST] = bits[AMAX]
    seen[_SMALLEST] = bits[MINUS_AMIN] & _MAGNITUDE
    seen[_BITS] = np.uint32(known[SIGNIFICANT_BITS])
    seen[_FIRST_BIN] = _ALL_BINS
    seen[_LAST_BIN] = 0
    seen[_BASE] = 0
    seen[_PAIRED] = 0
    seen[_LEFT_OUT] = 0
    seen[_LATEST] = 0
    seen[_PLACED] = 0
    seen[_WAITING] = 0
    seen[_TURN] = 0
    seen[_SPARSE] = 0


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _most_bits(kind):  # type: ignore[no-untyped-def]
    return _MOST_SIGNIFICANT_BITS[kind]


# One chunk. `_take` is the common case, `_take_sparse` the one with zeros, `_take_any` does without the table of pairs.


@njit(cache=True, nogil=True, error_model="numpy")
def _take(scratch, chunk, pairs, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    """A whole chunk, where there is a window."""
    base, words = seen[_BASE], chunk.ctypes.data
    codes, before = scratch + _AT_CODES + seen[_TURN] * 2 * _HALF, scratch + _AT_CODES + (1 - seen[_TURN]) * 2 * _HALF
    table, waiting, sparse = scratch + _AT_PAIRS, seen[_WAITING] > 0, seen[_SPARSE] > 0
    if sparse and waiting:
        found = pair_sparse_and_count(words, _HALF, base, codes, before, table)
    elif sparse:
        found = pair_sparse(words, _HALF, base, codes, before, table)
    else:
        found = (
            pair_and_count(words, _HALF, base, codes, before, table)
            if waiting
            else pair(words, _HALF, base, codes, before, table)
        )
        if found[1] == 0:
            sparse = True
            found = pair_sparse(words, _HALF, base, codes, before, table)
    largest, smallest, fractions, codeless, squares = found
    if sparse:
        smallest = np.uint32(smallest + np.uint32(1))
    seen[_WAITING] = 0
    seen[_SPARSE] = codeless > 0
    if largest == 0:
        tallies[ZEROS - BINS] += _CHUNK
        return
    low, high = smallest >> _SHIFT, largest >> _SHIFT
    outside = _outside(chunk, base) if low < base or high >= base + _WINDOW else 0
    if smallest < _LEAST_NORMAL or largest >= _INF_BITS or outside > _MOST_OUTSIDE:
        seen[_LEFT_OUT] += 1
        _take_any(chunk, bins, indices, tallies, seen, most_bits)
        return
    zeros = np.int64(codeless) - outside if sparse else 0
    tallies[ZEROS - BINS] += zeros
    tallies[SUM_OF_SQUARES - BINS] += squares
    _note(seen, largest, smallest, np.uint32(fractions & _FRACTION))
    if low == high:
        _widen_range(seen, low, low)
        bins[low * _WAYS] += np.uint32(_CHUNK - zeros)
        return
    if outside > 0:
        _widen_range(seen, low, high)
        _count_outside(chunk, bins, base)
    seen[_LOW_CODE] = min(seen[_LOW_CODE], low - base if low > base else np.uint32(0))
    last = high - base if zeros + outside == 0 else np.uint32(_CODES - 1)
    seen[_HIGH_CODE] = max(seen[_HIGH_CODE], last)
    seen[_PAIRED] += 1
    seen[_WAITING] = 1
    seen[_TURN] = 1 - seen[_TURN]


@njit(cache=True, nogil=True, error_model="numpy")
def _take_any(chunk, bins, indices, tallies, seen, most_bits):  # type: ignore[no-untyped-def]
    largest, smallest, fractions, zeros = _reduce(chunk)
    if largest == 0:
        tallies[ZEROS - BINS] += zeros
        return
    if largest >= _INF_BITS:
        largest, smallest, fractions = _without_nonfinite(chunk, tallies)
        high = np.uint32(_ALL_BINS - 1)
    else:
        tallies[SUM_OF_SQUARES - BINS] += _squares(chunk.view(np.float32))
        high = largest >> _SHIFT
    seen[_LATEST] = largest
    if largest > 0:
        _note(seen, largest, smallest, fractions)
        if smallest < _LEAST_NORMAL and seen[_BITS] < most_bits:
            seen[_BITS] = max(seen[_BITS], np.uint32(_significant_subnormal(chunk)))
    tallies[ZEROS - BINS] += zeros
    low = min(smallest >> _SHIFT, high)
    if low == high:
        bins[low * _WAYS] += np.uint32(chunk.size - zeros)
        _widen_range(seen, low, high)
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


@njit(cache=True, nogil=True, error_model="numpy")
def _outside(words, base):  # type: ignore[no-untyped-def]
    """How many elements have no code and are not zero."""
    found = np.uint32(0)
    for i in range(words.size):
        found = np.uint32(found + np.uint32(_is_outside(np.uint32(words[i] & _MAGNITUDE), base)))
    return np.int64(found)


@njit(cache=True, nogil=True, error_model="numpy")
def _count_outside(words, bins, base):  # type: ignore[no-untyped-def]
    """These, which are few: looked for where a block has one."""
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK]
        if _outside(block, base) > 0:
            for i in range(block.size):
                bits = np.uint32(block[i] & _MAGNITUDE)
                if _is_outside(bits, base):
                    bins[np.int64(bits >> _SHIFT) * _WAYS] += np.uint32(1)


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _is_outside(bits, base):  # type: ignore[no-untyped-def]
    return (np.uint32(np.uint32(bits >> _SHIFT) - base) >= np.uint32(_WINDOW)) & (bits != np.uint32(0))


@njit(cache=True, nogil=True, error_model="numpy")
def _place_window(seen):  # type: ignore[no-untyped-def]
    """Codes from an octave above the latest chunk's largest value downwards; subnormals never have one."""
    if seen[_LATEST] == 0 or seen[_PLACED] == _MOST_PLACES:
        seen[_BASE] = 0
        return
    high = np.int64(seen[_LATEST] >> _SHIFT) + _ABOVE
    seen[_BASE] = min(max(high + 1 - _WINDOW, 8), BINS - _WINDOW)
    seen[_LOW_CODE] = _CODES
    seen[_HIGH_CODE] = 0


@njit(cache=True, nogil=True, error_model="numpy")
def _unpair(scratch, pairs, bins, seen):  # type: ignore[no-untyped-def]
    """What waits is counted; sums over the table's rows and columns go to the bins, and the table is cleared."""
    if seen[_WAITING] > 0:
        waiting = carray(_pointer(scratch + _AT_CODES + (1 - np.int64(seen[_TURN])) * 2 * _HALF), (_HALF,), np.uint16)
        for i in range(_HALF):
            pairs[waiting[i]] += np.uint16(1)
        seen[_WAITING] = 0
    if seen[_PAIRED] > 0:
        low, high, base = np.int64(seen[_LOW_CODE]), np.int64(seen[_HIGH_CODE]), np.int64(seen[_BASE])
        columns = np.zeros(_CODES, dtype=np.uint32)
        for row in range(low, high + 1):
            total = _take_row(pairs[row * _CODES : (row + 1) * _CODES], columns)
            columns[row] = np.uint32(columns[row] + total)
        last = high if high < _WINDOW else _WINDOW - 1
        for code in range(low, last + 1):
            bins[(base + code) * _WAYS] += columns[code]
        _widen_range(seen, base + low, base + last)
    seen[_PAIRED] = 0
    seen[_LEFT_OUT] = 0
    seen[_LOW_CODE] = _CODES
    seen[_HIGH_CODE] = 0


@njit(cache=True, nogil=True, error_model="numpy")
def _take_row(row, columns):  # type: ignore[no-untyped-def]
    """Add a row of the table to the columns' sums, clear it, and return its own sum."""
    total = np.uint32(0)
    for i in range(_CODES):
        count = np.uint32(row[i])
        total = np.uint32(total + count)
        columns[i] = np.uint32(columns[i] + count)
    for i in range(_CODES):
        row[i] = np.uint16(0)
    return total


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
def _sample(cells, words, first, stride):  # type: ignore[no-untyped-def]
    """Hash cells hit by every stride-th of the finite, non-zero magnitudes (linear counting)."""
    for i in range(first, words.size, stride):
        bits = np.uint32(words[i] & _MAGNITUDE)
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
    bytes_each = 4 if kind == _FLOAT32 else 8 if kind == _FLOAT64 else 2
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
        bins = carray(_pointer(at + _AT_BINS), (_ALL_BINS, _WAYS), np.uint32)
        tallies = carray(_pointer(at + _AT_TALLIES), (8,), np.float64)
        seen = carray(_pointer(at + _AT_SEEN), (16,), np.uint32)
        for b in range(np.int64(seen[_FIRST_BIN]), np.int64(seen[_LAST_BIN]) + 1):
            count = np.uint32(0)
            for way in range(_WAYS):
                count = np.uint32(count + bins[b, way])
                bins[b, way] = np.uint32(0)
            if b < BINS:
                row[b] += np.float64(np.int64(count) * times)
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
