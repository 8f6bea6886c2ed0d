"""The sketch's CPU kernel: one compiled pass over the bits of the floats.

The tensor is taken in chunks of 2,048 elements, which stay in the first-level cache. Those of a dtype that is not read
as it is, or of a tensor with strides, are written into such a chunk as float32, so no whole tensor is ever copied.

Where the processor has the instructions, a chunk is counted as bit planes (`chunk_planes.py`) in the eight octaves that
hold most of it, and by increments in the 24 around them. A chunk with more than a few elements outside these, with
subnormals, Inf or NaN is counted by increments alone (`chunk_counting.py`), as are a tensor's last few. Increments of
one place wait for one another, so that table of bins is there eight times.

On other processors two elements are counted by one increment (`chunk_pairs.py`), within a window of fifteen octaves. A
chunk of which more lies outside of it than a few elements moves the window, or is taken back and counted by single
increments, as are small tensors, for which emptying the table of pairs costs more than it saves.

Either way a chunk is read again if its codes say that it may go beyond the largest and smallest value met so far.

A call's fixed cost matters as much, since most tensors are small: addresses are handed over as integers (numba takes
0.2 µs to unpack an array), the tables belong to the calling thread and are cleared where they were used.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numba import carray, njit, prange  # type: ignore[attr-defined]
from torch import Tensor

from probes import (
    bit_planes,
    chunk_counting,
    chunk_loops,
    chunk_pairs,
    chunk_planes,
    chunk_scratch,
    layout,
    pairs,
    threads,
    vectors,
)
from probes.bit_planes import OCTAVE
from probes.chunk_counting import take_any, window_below
from probes.chunk_loops import sample, size_of, widen
from probes.chunk_pairs import empty, is_paired, take_pairs
from probes.chunk_planes import is_coded, take_planes
from probes.chunk_scratch import (
    ALL_BINS,
    AT_BINS,
    AT_CELLS,
    AT_CHUNK,
    AT_COUNTS,
    AT_INDICES,
    AT_SEEN,
    AT_TALLIES,
    BASE,
    BFLOAT16,
    BITS,
    CHUNK,
    FIRST_BIN,
    FIRST_CODE,
    FIRST_OCTAVE,
    FLOAT16,
    FLOAT16_BINS,
    FLOAT32,
    FLOAT64,
    IN_PAIRS,
    LARGEST,
    LAST_BIN,
    LAST_CODE,
    LAST_OCTAVE,
    MAGNITUDE,
    PARTS,
    SCRATCH,
    SINGLY,
    SMALLEST,
    WAYS,
    pointer,
)
from probes.errors import UnsupportedTensor
from probes.in_memory import as_matrix, in_memory_order, plain, without_repeats
from probes.kernel_cache import keep_to_sources
from probes.layout import AMAX, BINS, DISTINCT, EXTREMES, HASH_CELLS, MINUS_AMIN, SAMPLE, SIGNIFICANT_BITS, SUMS
from probes.threads import SMALLEST_SHARE, threads_for

_LEAST_VECTORED = 4 * CHUNK if IN_PAIRS else 0  # elements of a share: to empty the table of pairs costs as well (ours)
_MOST_PAIRED = 1 << 31  # elements, after which the table of uint32 is emptied
_is_taken, _take_chunk = (is_paired, take_pairs) if IN_PAIRS else (is_coded, take_planes)

_KINDS = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float64: FLOAT64,
}
_MOST_SIGNIFICANT_BITS = (23, 7, 10, 23)  # by kind
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


class _Scratch(threading.local):
    """A thread's tables, all zero between calls. autograd's threads have their own."""

    def __init__(self) -> None:
        self.shares = 0
        self.address = 0

    def grow(self, shares: int) -> None:
        self.memory = np.zeros(shares * SCRATCH + 64, dtype=np.uint8)
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


@njit(cache=True, nogil=True, error_model="numpy")
def _add(sums, extremes, scratch, source, kind, size, columns, pitch, step, times):  # type: ignore[no-untyped-def]
    _read(scratch, extremes, source, kind, 0, size, size, columns, pitch, step)
    _merge(sums, extremes, scratch, 1, times)


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _add_shared(  # type: ignore[no-untyped-def]
    shares, sums, extremes, scratch, source, kind, size, columns, pitch, step, times
):
    chunks = -(-size // CHUNK)
    for share in prange(shares):
        first = chunks * share // shares * CHUNK
        last = min(chunks * (share + 1) // shares * CHUNK, size)
        _read(scratch + share * SCRATCH, extremes, source, kind, first, last, size, columns, pitch, step)
    _merge(sums, extremes, scratch, shares, times)


@njit(cache=True, nogil=True, error_model="numpy")
def _read(scratch, extremes, source, kind, first, last, size, columns, pitch, step):  # type: ignore[no-untyped-def]
    """Elements from first to last, into a share's scratch."""
    bins = carray(pointer(scratch + AT_BINS), (ALL_BINS * WAYS,), np.uint32)
    cells = carray(pointer(scratch + AT_CELLS), (HASH_CELLS + 64,), np.uint8)
    widened = carray(pointer(scratch + AT_CHUNK), (CHUNK,), np.uint32)
    indices = carray(pointer(scratch + AT_INDICES), (CHUNK,), np.uint16)
    tallies = carray(pointer(scratch + AT_TALLIES), (8,), np.float64)
    seen = carray(pointer(scratch + AT_SEEN), (16,), np.uint32)
    _begin(seen, extremes, kind)
    most_bits = np.uint32(_most_bits(kind))
    in_a_row = columns == size and step == 1
    vectored = last - first >= _LEAST_VECTORED
    stride = max(1, -(-size // SAMPLE))
    for start in range(first, last, CHUNK):
        length = min(CHUNK, last - start)
        at, held = source + start * size_of(kind), kind
        single = length < CHUNK or not vectored or seen[SINGLY] != 0
        if not in_a_row or (kind != FLOAT32 if single else not _is_taken(kind, seen)):
            at, held = scratch + AT_CHUNK, FLOAT32
            widen(widened[:length], source, kind, start, columns, pitch, step)
        if single:
            words = carray(pointer(at), (length,), np.uint32)
            take_any(words, bins, indices, tallies, seen, most_bits)
        else:
            _take_chunk(scratch, at, held, bins, indices, tallies, seen, most_bits)
        sample(cells, at, held, length, (stride - start % stride) % stride, stride)
        if IN_PAIRS and (start - first) % _MOST_PAIRED == _MOST_PAIRED - CHUNK:
            empty(scratch, seen)
    if IN_PAIRS and vectored:
        empty(scratch, seen)


@njit(cache=True, nogil=True, error_model="numpy")
def _begin(seen, extremes, kind):  # type: ignore[no-untyped-def]
    """What the slot has seen before: only what goes beyond it need be looked for."""
    known = carray(pointer(extremes), (EXTREMES,), np.float32)
    bits = carray(pointer(extremes), (EXTREMES,), np.uint32)
    seen[LARGEST] = bits[AMAX]
    seen[SMALLEST] = bits[MINUS_AMIN] & MAGNITUDE
    seen[BITS] = np.uint32(known[SIGNIFICANT_BITS])
    seen[FIRST_BIN] = ALL_BINS
    seen[LAST_BIN] = 0
    seen[FIRST_OCTAVE] = ALL_BINS
    seen[LAST_OCTAVE] = 0
    seen[BASE] = window_below(seen[LARGEST])
    if IN_PAIRS and kind == FLOAT16:
        seen[BASE] = min(max(seen[BASE], np.uint32(FLOAT16_BINS + OCTAVE)), np.uint32(FLOAT16_BINS + 16 * OCTAVE))
    seen[FIRST_CODE], seen[LAST_CODE] = pairs.CODES, 0
    seen[SINGLY] = 0


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _most_bits(kind):  # type: ignore[no-untyped-def]
    return _MOST_SIGNIFICANT_BITS[kind]


@njit(cache=True, nogil=True, error_model="numpy")
def _merge(sums, extremes, scratch, shares, times):  # type: ignore[no-untyped-def]
    """Add all shares to the slot, and leave their scratch as it was."""
    row = carray(pointer(sums), (SUMS,), np.float64)
    best = carray(pointer(extremes), (EXTREMES,), np.float32)
    all_cells = carray(pointer(scratch + AT_CELLS), (HASH_CELLS,), np.uint8)
    for share in range(shares):
        at = scratch + share * SCRATCH
        counts = carray(pointer(at + AT_COUNTS), (ALL_BINS, PARTS), np.uint64)
        bins = carray(pointer(at + AT_BINS), (ALL_BINS, WAYS), np.uint32)
        tallies = carray(pointer(at + AT_TALLIES), (8,), np.float64)
        seen = carray(pointer(at + AT_SEEN), (16,), np.uint32)
        for b in range(np.int64(seen[FIRST_BIN]), np.int64(seen[LAST_BIN]) + 1):
            total = np.uint32(0)
            for way in range(WAYS):
                total = np.uint32(total + bins[b, way])
                bins[b, way] = np.uint32(0)
            if b < BINS:
                row[b] += np.float64(np.int64(total) * times)
        for b in range(np.int64(seen[FIRST_OCTAVE]) * OCTAVE, np.int64(seen[LAST_OCTAVE] + 1) * OCTAVE):
            members = np.uint64(0)
            for part in range(PARTS):
                members += counts[b, part]
                counts[b, part] = np.uint64(0)
            row[b] += np.float64(np.int64(members) * times)
        for i in range(tallies.size):
            row[BINS + i] += tallies[i] * times
            tallies[i] = 0.0
        magnitudes = seen[LARGEST : SMALLEST + 1].view(np.float32)
        best[AMAX] = max(best[AMAX], magnitudes[0])
        best[MINUS_AMIN] = max(best[MINUS_AMIN], -magnitudes[1])
        best[SIGNIFICANT_BITS] = max(best[SIGNIFICANT_BITS], np.float32(seen[BITS]))
        if share > 0:
            cells = carray(pointer(at + AT_CELLS), (HASH_CELLS,), np.uint8)
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


keep_to_sources(
    _add,
    bit_planes,
    chunk_counting,
    chunk_loops,
    chunk_pairs,
    chunk_planes,
    chunk_scratch,
    layout,
    pairs,
    threads,
    vectors,
)
