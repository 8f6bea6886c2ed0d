"""The sketch kernel's inner loop, written in the compiler's own vectors: elements are counted in pairs.

A histogram is usually one increment of memory an element, of which a core does about one a cycle and which no vector
instruction helps. Here it is one for two elements: each has a code of seven bits, its bin within a window of fifteen
octaves, and two codes together are the place in a table that is incremented. The table takes 64 KiB, but of a tensor's
values nearly all lie in few octaves, so that what is used of it stays in the first-level cache. What the processor's
vector units do meanwhile, the codes and the sum of squares, runs beside the increments.

Which two elements make a pair does not matter, so they are taken as they come out of the vectors with the fewest
shuffles; `element_of` says which one a bit of a mask stands for. The vectors have 256 bits, which AVX2 and its
successors do at once; other processors take several steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from probes.vectors import (
    FEATURES,
    all_of,
    called,
    indices,
    largest_of,
    least,
    load,
    loop,
    pointer,
    reduced,
    splat,
    total_of,
    with_squares,
)

GROUP = 32
"""Elements that are counted at once: tensors come in multiples of it."""
CODES = 15 * 8
"""Codes of a window, eight an octave."""
ALL_CODES = 128
"""With those of elements outside the window, which have several, so that zeros seldom wait for one another."""

AHEAD = 8192
"""Bytes from what is counted to what is asked of memory. Of 2, 4, 8 and 16 KiB all saved a quarter of the time of
tensors that had left the caches, and cost nothing where they had not (ours, Zen 3)."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SHORTS, _WORDS, _LONGS = ir.VectorType(_I16, 16), ir.VectorType(_I32, 8), ir.VectorType(_I64, 4)
_HALVES, _FLOATS = ir.VectorType(ir.HalfType(), 8), ir.VectorType(ir.FloatType(), 8)
_DOUBLES = ir.VectorType(ir.DoubleType(), 8)

READS_FLOAT16 = "+f16c" in FEATURES
"""Whether this processor converts float16, so that `count_float16` can be called."""

_found = types.Tuple((types.int16, types.uint16, types.int64, types.int64, types.float64))
_given = (types.int64, types.int64, types.uint16, types.uint32, types.int64, types.int64)
_intrinsic: Any = intrinsic  # as numba's own types know nothing of what it returns


@_intrinsic
def count_float32(_typing, source, size, base, step, table, masks):  # type: ignore[no-untyped-def]
    """Count elements in pairs: those of the bins from base to base + CODES - 1 by their codes, all others as outside.

    source  address of the elements; size is an int64, a multiple of GROUP
    base    uint16
    step    uint32, added for each pair: 1, or 2**32 - 1 to take back what was counted before
    table   address of uint32 [ALL_CODES, ALL_CODES], added to, at the codes of both elements of a pair
    masks   address of uint32 [size / GROUP], written: who is outside

    Returns the largest code (int16), not of this range if all are below the base or any above the window; the smallest
    (uint16), CODES if all are outside; how many are outside (int64); 0, as zeros are not looked for here (int64); and
    the sum of squares (float64).
    """
    return _found(*_given), partial(_count, read=_read_float32, bytes_each=4, shift=5, counts_zeros=False)


@_intrinsic
def count_bfloat16(_typing, source, size, base, step, table, masks):  # type: ignore[no-untyped-def]
    """The same of bfloat16, and how many are zero; size is at most 2**16."""
    return _found(*_given), partial(_count, read=_read_bfloat16, bytes_each=2, shift=5, counts_zeros=True)


@_intrinsic
def count_float16(_typing, source, size, base, step, table, masks):  # type: ignore[no-untyped-def]
    """The same of float16, of which bin 8 is the first of normal numbers, and the lowest base; the highest is 128."""
    return _found(*_given), partial(_count, read=_read_float16, bytes_each=2, shift=8, counts_zeros=True)


def element_of(bit, interleaved):  # type: ignore[no-untyped-def]
    """Which element of its group a bit of a mask stands for; float32's are interleaved."""
    return (bit & 16) + 8 * (bit & 1) + (bit >> 1 & 7) if interleaved else bit


def _count(context, builder, signature, arguments, read, bytes_each, shift, counts_zeros):  # type: ignore[no-untyped-def]
    source, size, base, step, table, masks = arguments
    source = pointer(builder, source)
    table, masks = (builder.inttoptr(address, _I32.as_pointer()) for address in (table, masks))
    base_lanes = splat(builder, builder.shl(base, ir.Constant(_I16, shift)), _SHORTS)
    starts = ((_SHORTS, -1), (_SHORTS, -1), (_SHORTS, 0), (_I64, 0), (_DOUBLES, 0.0), (_DOUBLES, 0.0))
    with loop(builder, size, GROUP, *starts) as (i, carried, close):
        largest, smallest, zeros, outside, *sums = carried
        shorts, floats = read(builder, source, i)
        _prefetch(builder, source, i, bytes_each)
        codes, beyond = [], []
        for bits in shorts:
            magnitude = builder.shl(bits, all_of(_SHORTS, 1))
            code = builder.ashr(builder.sub(magnitude, base_lanes), all_of(_SHORTS, shift))  # wraps below the base
            within = least(builder, code, all_of(_SHORTS, CODES))
            largest = largest_of(builder, largest, code)
            smallest = least(builder, smallest, within)
            if counts_zeros:
                is_zero = builder.icmp_unsigned("==", magnitude, all_of(_SHORTS, 0))
                zeros = builder.sub(zeros, builder.sext(is_zero, _SHORTS))
            beyond.append(builder.icmp_unsigned("==", within, all_of(_SHORTS, CODES)))
            codes.append(builder.select(beyond[-1], ir.Constant(_SHORTS, [CODES + k % 8 for k in range(16)]), within))
        sums = with_squares(builder, sums, floats)
        members = builder.bitcast(builder.shuffle_vector(*beyond, indices(range(GROUP))), _I32)
        builder.store(members, builder.gep(masks, [builder.lshr(i, ir.Constant(_I64, 5))]), align=4)
        outside = builder.add(outside, builder.zext(builder.ctpop(members), _I64))
        _increment(builder, table, builder.or_(codes[0], builder.shl(codes[1], all_of(_SHORTS, 7))), step)
        largest, smallest, zeros, outside, *sums = close(largest, smallest, zeros, outside, *sums)
    found = (
        reduced(builder, "smax", largest),
        reduced(builder, "umin", smallest),
        outside,
        builder.zext(reduced(builder, "add", zeros), _I64),
        total_of(builder, sums),
    )
    return context.make_tuple(builder, signature.return_type, found)


def _prefetch(builder, source, i, bytes_each):  # type: ignore[no-untyped-def]
    """Ask for the lines that a later group reads, where there is one: what the processor fetches ahead by itself ends
    with each page."""
    for line in range(GROUP * bytes_each // 64):
        ahead = builder.add(builder.mul(i, ir.Constant(_I64, bytes_each)), ir.Constant(_I64, AHEAD + 64 * line))
        how = (ir.Constant(_I32, of) for of in (0, 3, 1))
        called(builder, "llvm.prefetch.p0", ir.VoidType(), builder.gep(source, [ahead]), *how)


def _increment(builder, table, places, step):  # type: ignore[no-untyped-def]
    longs = builder.bitcast(places, _LONGS)
    for k in range(4):
        four = builder.extract_element(longs, ir.Constant(_I32, k))
        for part in range(4):
            place = builder.and_(builder.lshr(four, ir.Constant(_I64, 16 * part)), ir.Constant(_I64, 0xFFFF))
            address = builder.gep(table, [place])
            builder.store(builder.add(builder.load(address, align=4), step), address, align=4)


# A group's elements: the upper 16 bits of each in two vectors, and all as float32 in four.


def _read_float32(builder, source, i):  # type: ignore[no-untyped-def]
    words = _loaded(builder, source, i, 4, _WORDS, 4)
    shorts = []
    for first, second in (words[:2], words[2:]):
        upper = builder.bitcast(builder.lshr(first, all_of(_WORDS, 16)), _SHORTS)
        every_other = indices(k + 16 * (k & 1) for k in range(16))
        shorts.append(builder.shuffle_vector(upper, builder.bitcast(second, _SHORTS), every_other))
    return shorts, [builder.bitcast(word, _FLOATS) for word in words]


def _read_bfloat16(builder, source, i):  # type: ignore[no-untyped-def]
    shorts = _loaded(builder, source, i, 2, _SHORTS, 2)
    floats = []
    for both in (builder.bitcast(short, _WORDS) for short in shorts):
        words = builder.shl(both, all_of(_WORDS, 16)), builder.and_(both, all_of(_WORDS, 0xFFFF0000))
        floats += [builder.bitcast(word, _FLOATS) for word in words]
    return shorts, floats


def _read_float16(builder, source, i):  # type: ignore[no-untyped-def]
    shorts = _loaded(builder, source, i, 2, _SHORTS, 2)
    halves = _loaded(builder, source, i, 2, _HALVES, 4)
    return shorts, [builder.fpext(half, _FLOATS) for half in halves]


def _loaded(builder, source, i, bytes_each, kind, count):  # type: ignore[no-untyped-def]
    """So many vectors from the i-th element on, one after another."""
    places = (builder.add(i, ir.Constant(_I64, kind.count * k)) for k in range(count))
    return [load(builder, source, place, kind, bytes_each) for place in places]
