"""The sketch on CUDA: one Triton kernel, launched once a tensor, reads it once and adds to its row.

Counting is the hard part: 2,048 bins fit into no thread's registers, and atomics on global memory come to one a clock
for an address, far too few where a tensor has most of its values in some thirty bins. `tl.histogram` counts in shared
memory from Triton 3.8 on; before (torch 2.13's CUDA builds bring 3.7.1) it compares each element with each bin by warp
votes, 226 instructions an element. In either it clears and reads all bins at each call. So the counters are our own: an
array of a program's shared memory, in three functions of LLVM IR (`shared_counts.ll`) that Triton links as it links
CUDA's libdevice. To count is one instruction, ATOMS.POPC.INC, which is made for threads of a warp that meet at an
address; others meet only at a bank of memory, where bins are a multiple of 32 apart, which is four octaves. Programs
are persistent: as many as the device holds at once, each reading every so many-th chunk of 16 KiB, and only at the end
does each add its bins that are not empty to the row, in float64, exact up to 2^53. In the loop no thread waits for
another, and none for a chunk that another warp still waits for.

What else there is to know is kept in five registers a thread, and told apart at the end:

    largest      the largest magnitude, as bits. If it is Inf's or NaN's, see below
    smallest     of magnitudes' bits less one, as unsigned integers: zero becomes the largest
    mantissas    the lowest bit set in any element decides; that of x is in (x - 1) & ~x, which is smaller the lower
                 it is
    squares      in float64, where those of float32 are exact; only sums are rounded, in an order that is not fixed
    zeros        share bin 0 with magnitudes below 2^-129: if there are none of these, the bin says it
    Inf, NaN     have bins of their own above all others, that only tell their sum

A program that has seen an Inf, a NaN or a subnormal number (below 2^-126) goes over its chunks again to count these
and to leave them out: such a tensor is read twice, in part or all of it. The count of distinct magnitudes is the first
program's business, at the same time: it hashes the sample into the same counters.

What it costs on an H100 (sm_90, Triton 3.9; from the machine code, not measured: no device was at hand):

    instructions in the loop    float32 11.1 an element, bfloat16 13.0, float16 10.8, float64 12.5; of these one shared
                                atomic (0.25 and 0.5 a byte) and at most 8 in the integer pipe
    atomics on global memory    about 250 a program (non-empty bins), 527 programs: 0.0001 a byte of 1 GB
    room                        at 1.755 GHz the integer pipe (64 a clock in each of 132 multiprocessors) would let
                                8.3 TB/s pass of float32 and 3.7 of bfloat16, conversions to float64 (16 a clock) 14.8
                                and 7.4; memory has 3.35. To read at 0.7 of what a copy reads and writes, some 3 TB/s, a
                                warp's shared atomic may take 14 clocks of a multiprocessor for float32, 7 for bfloat16
    estimate                    memory's speed for float32 and float64, near it for 16 bits, from some 50 MB on. What
                                shared atomics take is the open question: it depends on the values, and data made for
                                the purpose (powers of 16, all in one bank) takes 32 times as long

`benchmarks/sketch_cuda.py` measures all this where there is a device. The interpreter (TRITON_INTERPRET=1) runs the
same kernel, but counts by `tl.histogram`, as it cannot run LLVM IR; a test follows the compiled kernel's ways to see
that counters are cleared, added to and read with barriers between.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from probes import layout
from probes.errors import MissingTriton, UnsupportedTensor
from probes.in_memory import in_memory_order
from probes.layout import BIN_SHIFT, BINS, HASH_CELLS, MANTISSA_BITS, SAMPLE

try:
    import triton
    import triton.language as tl
    from triton.language import core
except ImportError as error:
    raise MissingTriton(
        "sketches on a CUDA device need Triton, which comes with CUDA builds of torch: "
        "install it (pip install triton), or sketch a copy on the CPU"
    ) from error

_WARPS = 8
_LANES = 32 * _WARPS
_PROGRAMS = 4  # on each multiprocessor: as many as its registers hold, so that none waits for another's end
_REGISTERS = 64  # a thread: of 65,536, for 4 programs of 256 threads
_CHUNK_BYTES = 1 << 14  # 64 a thread
_VECTOR_BYTES = 16  # the widest access
_INTERPRETED_PROGRAMS = 3  # they run one after the other
_MOST_ELEMENTS = 1 << 30  # of a program, whose counters have 32 bits

_READ_AS = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.float64,
}
_OPTIONS = {
    "num_warps": _WARPS,
    "maxnreg": _REGISTERS,
    "extern_libs": {"counters": str(Path(__file__).with_name("shared_counts.ll"))},
    "enable_fp_fusion": True,  # squares of float32 are exact in float64: it makes no difference
    "enable_reflect_ftz": False,
}

# Whether counters are in shared memory, which the interpreter, asked for once and for all, does not have.
_SHARED = tl.constexpr(not triton.knobs.runtime.interpret)

# Integers for whose sake no kernel is compiled anew where they are 1 or multiples of 16, as Triton otherwise does.
_ANY_VALUE = ("elements", "stride")

_ALL_BINS = tl.constexpr(1 << (31 - BIN_SHIFT))  # with those of Inf and NaN
_BINS = tl.constexpr(BINS)
_BIN_SHIFT = tl.constexpr(BIN_SHIFT)
_MANTISSA_BITS = tl.constexpr(MANTISSA_BITS)
_MANTISSA = tl.constexpr((1 << MANTISSA_BITS) - 1)
_SMALLEST_NORMAL = tl.constexpr(1 << MANTISSA_BITS)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(0x7F800000)
_NEGATIVE_INF = tl.constexpr(-0x00800000)  # as a signed integer
_BIAS = tl.constexpr(127)
_NONE = tl.constexpr(0xFFFFFFFF)
_ZEROS, _NANS = tl.constexpr(layout.ZEROS), tl.constexpr(layout.NANS)
_POSITIVE_INFS, _NEGATIVE_INFS = tl.constexpr(layout.POSITIVE_INFS), tl.constexpr(layout.NEGATIVE_INFS)
_SUM_OF_SQUARES = tl.constexpr(layout.SUM_OF_SQUARES)
_AMAX, _MINUS_AMIN = tl.constexpr(layout.AMAX), tl.constexpr(layout.MINUS_AMIN)
_SIGNIFICANT_BITS, _DISTINCT = tl.constexpr(layout.SIGNIFICANT_BITS), tl.constexpr(layout.DISTINCT)
_CELLS = tl.constexpr(HASH_CELLS)
_CELL_SHIFT = tl.constexpr(33 - HASH_CELLS.bit_length())
_SAMPLE = tl.constexpr(SAMPLE)
_SAMPLE_PART = tl.constexpr(2048)  # of the sample, at once: 8 a thread


def add(sums: Tensor, extremes: Tensor, values: Tensor) -> None:
    """Add a tensor to one slot, on its device, without waiting for it: one launch on the current stream.

    sums      float64 [SUMS], contiguous     } as laid out in `layout.py`, where `values` is
    extremes  float32 [EXTREMES], contiguous }
    values    float16, bfloat16, float32 or float64 (rounded to float32), of any shape. If the elements fill their
              memory, in any order of dimensions, they are read where they are; if not, a copy of them is

    Empty tensors add nothing. In a CUDA graph, what is captured adds again with each replay; the first call for a dtype
    compiles and loads a kernel, which must be done before a capture. Raises UnsupportedTensor.
    """
    if values.dtype not in _READ_AS or values.layout != torch.strided or values.device != sums.device:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _READ_AS)
        raise UnsupportedTensor(
            f"a sketch on {sums.device} takes dense {allowed} there, not {values.dtype}, {values.layout} on "
            f"{values.device}: convert or move the tensor first"
        )
    values = values.detach().resolve_neg()
    flat = values.view(-1) if values.is_contiguous() else in_memory_order(values).contiguous()  # one may have a stride
    elements, size = flat.numel(), flat.element_size()
    if elements == 0:
        return
    chunk, vector = _CHUNK_BYTES // size, _VECTOR_BYTES // size
    readers = max(min(-(-elements // chunk), _most_readers(flat.device)), -(-elements // _MOST_ELEMENTS))
    memory, stride = (flat.view(_READ_AS[flat.dtype]), sums, extremes), -(-elements // SAMPLE)
    shape = {"ROWS": chunk // (_LANES * vector), "LANES": _LANES, "VECTOR": vector}
    with torch.cuda.device_of(flat):
        _sketch[(1 + readers,)](*memory, elements, stride, **shape, **_OPTIONS)


@cache
def _most_readers(device: torch.device) -> int:
    """Programs that run at the same time, less the one that looks at the sample."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count - 1


@triton.jit(do_not_specialize=_ANY_VALUE)
def _sketch(  # type: ignore[no-untyped-def]
    values,
    sums,
    extremes,
    elements,
    stride,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The first program looks at the sample, each `stride` elements apart; the others read chunks in turn."""
    if tl.program_id(0) == 0:
        _add_distinct(values, extremes, elements, stride)
    else:
        _add_chunks(values, sums, extremes, elements, ROWS, LANES, VECTOR)


@triton.jit
def _add_chunks(  # type: ignore[no-untyped-def]
    values, sums, extremes, elements, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Every so many-th chunk of ROWS · LANES · VECTOR elements. A thread has VECTOR neighbours in each of ROWS rows."""
    ROW: tl.constexpr = LANES * VECTOR
    CHUNK: tl.constexpr = ROWS * ROW
    first, step, chunks = tl.program_id(0) - 1, tl.num_programs(0) - 1, elements // CHUNK
    column = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    place = tl.arange(0, ROWS)[:, None, None] * ROW + column
    counts = _cleared(_ALL_BINS)
    largest = tl.zeros([LANES], tl.int32)
    below = tl.full([LANES], _NONE, tl.uint32)
    unused = tl.full([LANES], _NONE, tl.uint32)
    squares = tl.zeros([LANES], tl.float64)
    for chunk in range(first, chunks, step):
        bits = _bits(tl.load(values + tl.cast(chunk, tl.int64) * CHUNK + place))
        counts, largest, below, unused, squares = _seen(bits, counts, largest, below, unused, squares)
    padding = 0
    if chunks % step == first:  # whose turn it is with the rest; its last row is filled up with zeros
        start = tl.cast(chunks, tl.int64) * CHUNK
        rows = tl.cdiv(elements - start, ROW).to(tl.int32)
        padding = (start + rows * ROW - elements).to(tl.int32)
        for row in range(rows):
            left = (elements - start - row * ROW).to(tl.int32)
            bits = _bits(tl.load(values + start + row * ROW + column, mask=column < left, other=0))
            counts, largest, below, unused, squares = _seen(bits, counts, largest, below, unused, squares)

    amax, least = tl.max(largest, axis=0), tl.min(below, axis=0)
    counts, bins = _counted(counts, _ALL_BINS), tl.arange(0, _ALL_BINS)
    zeros = tl.sum(tl.where(bins == 0, counts, 0), axis=0) - padding
    positive, negative, square = tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.sum(squares, axis=0)
    significant = -_power(tl.min(unused, axis=0) & _MANTISSA) + _MANTISSA_BITS
    if (amax >= _INF) | (least < _SMALLEST_NORMAL - 1):
        amax, zeros, positive, negative, significant, square = _seen_again(
            values, elements, first, step, ROWS, LANES, VECTOR
        )
    nans = tl.sum(tl.where(bins >= _BINS, counts, 0), axis=0) - positive - negative
    counts = tl.where(bins == 0, counts - padding - zeros, counts)

    tl.atomic_add(sums + bins, counts.to(tl.float64), mask=(counts > 0) & (bins < _BINS), sem="relaxed")
    _add(sums + _ZEROS, zeros)
    _add(sums + _NANS, nans)
    _add(sums + _POSITIVE_INFS, positive)
    _add(sums + _NEGATIVE_INFS, negative)
    if amax > 0:
        tl.atomic_add(sums + _SUM_OF_SQUARES, square, sem="relaxed")
        tl.atomic_max(extremes + _AMAX, _float(amax), sem="relaxed")
        tl.atomic_max(extremes + _MINUS_AMIN, -_float((least + 1).to(tl.int32)), sem="relaxed")
        tl.atomic_max(extremes + _SIGNIFICANT_BITS, significant.to(tl.float32), sem="relaxed")


@triton.jit
def _seen(bits, counts, largest, below, unused, squares):  # type: ignore[no-untyped-def]
    """What each thread knows, after more elements [rows, LANES, VECTOR]: nothing passes between threads here.

    largest  int32, of the magnitudes' bits, Inf and NaN included
    below    uint32, of these less one, the smallest: for zero that is the largest number
    unused   uint32, the zeros after the lowest bit that any element has, as a mask of ones
    squares  float64, their sum
    """
    value = _float(bits).to(tl.float64)
    squares += tl.sum(tl.sum(value * value, axis=2), axis=0)
    bits &= _MAGNITUDE
    counts = _count(counts, bits >> _BIN_SHIFT, _ALL_BINS)
    largest = tl.maximum(largest, tl.max(tl.max(bits, axis=2), axis=0))
    less = (bits - 1).to(tl.uint32)
    below = tl.minimum(below, tl.min(tl.min(less, axis=2), axis=0))
    unused = tl.minimum(unused, tl.min(tl.min(less & ~bits.to(tl.uint32), axis=2), axis=0))
    return counts, largest, below, unused, squares


@triton.jit
def _seen_again(  # type: ignore[no-untyped-def]
    values, elements, first, step, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """A program's elements, where some are Inf, NaN or subnormal: what could not be told apart in passing."""
    ROW: tl.constexpr = LANES * VECTOR
    column = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.zeros([LANES], tl.int32)
    zeros = tl.zeros([LANES], tl.int32)
    positive = tl.zeros([LANES], tl.int32)
    negative = tl.zeros([LANES], tl.int32)
    significant = tl.zeros([LANES], tl.int32)
    squares = tl.zeros([LANES], tl.float64)
    for chunk in range(first, tl.cdiv(elements, ROWS * ROW), step):
        for row in range(ROWS):
            place = tl.cast(chunk, tl.int64) * (ROWS * ROW) + row * ROW + column
            within = place < elements
            bits = _bits(tl.load(values + place, mask=within, other=0))
            positive += tl.sum((bits == _INF).to(tl.int32), axis=1)
            negative += tl.sum((bits == _NEGATIVE_INF).to(tl.int32), axis=1)
            bits &= _MAGNITUDE
            zeros += tl.sum((within & (bits == 0)).to(tl.int32), axis=1)
            bits = tl.where(bits < _INF, bits, 0)
            value = _float(bits).to(tl.float64)
            squares += tl.sum(value * value, axis=1)
            largest = tl.maximum(largest, tl.max(bits, axis=1))
            fraction = bits & _MANTISSA
            highest = tl.where(bits < _SMALLEST_NORMAL, _exponent(fraction), _MANTISSA_BITS)
            used = tl.where(fraction == 0, 0, highest - _exponent(fraction & -fraction))
            significant = tl.maximum(significant, tl.max(used, axis=1))
    return (
        tl.max(largest, axis=0),
        tl.sum(zeros, axis=0),
        tl.sum(positive, axis=0),
        tl.sum(negative, axis=0),
        tl.max(significant, axis=0),
        tl.sum(squares, axis=0),
    )


@triton.jit
def _add_distinct(values, extremes, elements, stride):  # type: ignore[no-untyped-def]
    """Linear counting, as in `sketch.py`. No count of cells has its result so near a half that a logarithm matters."""
    counts = _cleared(_CELLS)
    for part in range(_SAMPLE // _SAMPLE_PART):
        place = (tl.arange(0, _SAMPLE_PART) + part * _SAMPLE_PART).to(tl.int64) * stride
        bits = _bits(tl.load(values + place, mask=place < elements, other=0)) & _MAGNITUDE
        cell = ((bits.to(tl.uint32) * 0x9E3779B1) >> _CELL_SHIFT).to(tl.int32)
        counts = _count(counts, tl.where((bits > 0) & (bits < _INF), cell, _CELLS), _CELLS)
    hit = tl.sum((_counted(counts, _CELLS) > 0).to(tl.int32), axis=0)
    if hit > 0:
        empty = tl.maximum(-hit + _CELLS, 1).to(tl.float64)
        distinct = tl.minimum(tl.floor(tl.log(empty / _CELLS) * -_CELLS.value + 0.5), _CELLS)
        tl.atomic_max(extremes + _DISTINCT, distinct.to(tl.float32), sem="relaxed")


@triton.jit
def _add(place, count):  # type: ignore[no-untyped-def]
    tl.atomic_add(place, count.to(tl.float64), mask=count > 0, sem="relaxed")


@triton.jit
def _cleared(COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Counters at zero: of the program, in shared memory, or of the interpreter, in the tensor that is returned."""
    if _SHARED:
        _clear_shared(tl.arange(0, COUNTERS))
        tl.debug_barrier()
    return tl.zeros([1 if _SHARED else COUNTERS], tl.int32)


@triton.jit
def _count(counts, counters, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One more for each of these int32, of any shape. Nobody asks how often COUNTERS itself was among them."""
    if _SHARED:
        _count_shared(counters)
    else:
        counters = tl.ravel(counters)
        counts += tl.histogram(counters, COUNTERS, mask=counters < COUNTERS)
    return counts


@triton.jit
def _counted(counts, COUNTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    if _SHARED:
        tl.debug_barrier()
        counts = _counted_shared(tl.arange(0, COUNTERS))
    return counts


@core.extern
def _clear_shared(counter, _semantic=None):  # type: ignore[no-untyped-def]
    return _linked("probes_clear", counter, _semantic)


@core.extern
def _count_shared(counter, _semantic=None):  # type: ignore[no-untyped-def]
    return _linked("probes_count", counter, _semantic)


@core.extern
def _counted_shared(counter, _semantic=None):  # type: ignore[no-untyped-def]
    return _linked("probes_counted", counter, _semantic)


def _linked(name, counter, semantic):  # type: ignore[no-untyped-def]
    """A function of `shared_counts.ll`, for each element of an int32 tensor whose threads hold none twice."""
    signature = {(core.dtype("int32"),): (name, core.dtype("int32"))}
    return core.extern_elementwise("", "", [counter], signature, is_pure=False, _semantic=semantic)


@triton.jit
def _power(ones):  # type: ignore[no-untyped-def]
    """How many bits a mask of ones has, up to 23."""
    return _exponent((ones + 1).to(tl.int32))


@triton.jit
def _exponent(number):  # type: ignore[no-untyped-def]
    """floor(log2) of int32 from 1 to 2^24."""
    return (number.to(tl.float32).to(tl.int32, bitcast=True) >> _MANTISSA_BITS) - _BIAS


@triton.jit
def _bits(loaded):  # type: ignore[no-untyped-def]
    """int32: a float32's bits."""
    if loaded.dtype == tl.int32:
        return loaded
    if loaded.dtype == tl.int16:  # bfloat16
        return loaded.to(tl.int32) << 16
    return loaded.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):  # type: ignore[no-untyped-def]
    return bits.to(tl.float32, bitcast=True)
