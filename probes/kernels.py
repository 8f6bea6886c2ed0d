"""The sketch's CPU kernel: one compiled pass over the bits of the floats.

The tensor is taken in chunks of 2,048 elements, which stay in the first-level cache. Other dtypes, the elements of
strided tensors and a tensor's last few are written into such a chunk as float32, so no whole tensor is ever copied.

Where the processor has the instructions, a chunk is counted as bit planes (`chunk_planes.py`), in which bins are codes
of seven bits within a window of sixteen octaves. Elements outside it, zeros among them, are looked up and counted one
by one where they are few; where they are many, the zeros are counted in a second reading, and further windows below the
first take the rest. A chunk is also read again if its codes say that it may go beyond the largest and smallest value
met so far. One with subnormals, Inf or NaN is counted by single increments (`chunk_counting.py`). Increments of one
place wait for one another, so that table of bins is there eight times.

On other processors two elements are counted by one increment (`chunk_pairs.py`), within a window of fifteen octaves,
and whole chunks of bfloat16 and float16 as they are. A chunk of which more lies outside of it than a few elements moves
the window, or is taken back and counted by single increments, as are the tensor's last few and small tensors, for which
emptying the table of pairs costs more than it saves.

Read like this, a tensor that is no longer in the cache takes nearly twice as long as to be summed (ours, Zen 4: 0.27 ns
an element and thread, the sum 0.15), and it is such tensors that a training step leaves behind.

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
from probes.bit_planes import GROUP, OCTAVE
from probes.chunk_counting import take_any, window_below
from probes.chunk_loops import sample, size_of, widen
from probes.chunk_pairs import empty, is_paired, take_pairs
from probes.chunk_planes import take_planes
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

_LEAST_PAIRED = 4 * CHUNK  # elements of a share, below which to empty the table costs more than it saves (ours)
_MOST_PAIRED = 1 << 31  # elements, after which the table of uint32 is emptied
_UNIT = 1 if IN_PAIRS else GROUP
_take = take_any if IN_PAIRS else take_planes

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
    whole_row = columns == size and step == 1
    in_place = kind == FLOAT32 and whole_row
    paired = IN_PAIRS and last - first >= _LEAST_PAIRED
    words = carray(pointer(source), (size if in_place else 0,), np.uint32)
    stride = max(1, -(-size // SAMPLE))
    for start in range(first, last, CHUNK):
        length = min(CHUNK, last - start)
        whole = -(-length // _UNIT) * _UNIT
        first_sampled = (stride - start % stride) % stride
        if paired and length == CHUNK and not seen[SINGLY]:
            at, held = source + start * size_of(kind), kind
            if not whole_row or not is_paired(kind, seen):
                at, held = scratch + AT_CHUNK, FLOAT32
                widen(widened, source, kind, start, columns, pitch, step)
            take_pairs(scratch, at, held, bins, indices, tallies, seen, most_bits)
            sample(cells, at, held, CHUNK, first_sampled, stride)
            if (start - first) % _MOST_PAIRED == _MOST_PAIRED - CHUNK:
                empty(scratch, seen)
            continue
        if in_place and whole == length:
            chunk = words[start : start + length]
        else:
            chunk = widened[:whole]
            widen(chunk[:length], source, kind, start, columns, pitch, step)
            chunk[length:] = np.uint32(0)
        _take(scratch, chunk, whole - length, bins, indices, tallies, seen, most_bits)
        sample(cells, chunk.ctypes.data, FLOAT32, length, first_sampled, stride)
    if paired:
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
