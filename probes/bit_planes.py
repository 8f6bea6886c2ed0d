"""The sketch kernel's two inner loops, written in the compiler's own vectors.

A histogram is usually one increment of memory an element, of which a core does about one a cycle and which no vector
instruction helps. Here no element is counted alone. `codes` gives each element a code of seven bits, four for its
octave and three for its place in the octave, and writes the codes as bit planes: the k-th plane of a block of 512
elements is a vector of 512 bits that holds bit k of each code. `count` then finds the members of a bin as the AND of
the planes, or of their complements, of that bin's code, and counts them with the vector's population count: 512
elements in three instructions a bin. Only octaves that occur are looked at, so a tensor costs what its dynamic range
does, and many equal values, whose increments would wait for one another, cost nothing extra.

Elements may stand in the planes of their block in any order, as long as it is the same in each, which saves most of the
shuffles of turning bytes into planes; `element_of` says which.

All this needs AVX-512 with VPOPCNTDQ and GFNI, as Intel's server processors have them from Ice Lake on and AMD's from
Zen 4 on. On others `kernels.py` counts in pairs (`pairs.py`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probes.vectors import (
    FEATURES,
    all_of,
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

BLOCK = 512
"""Elements of a vector's worth of bits."""
GROUP = 2 * BLOCK
"""Elements that `count` takes at once: tensors come in multiples of it."""
OCTAVE = 8
"""Codes in an octave."""
CODES = 16 * OCTAVE
PLANES = 8
WORDS = BLOCK // 64
"""uint64 in a plane of a block, and the parts of a count."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _SHORTS, _BITS = ir.VectorType(_I8, 64), ir.VectorType(_I16, 32), ir.VectorType(_I64, WORDS)
_FLOATS, _DOUBLES = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.DoubleType(), 16)

AVAILABLE = {"+avx512bw", "+avx512vbmi", "+avx512vpopcntdq", "+gfni"} <= FEATURES
"""Whether this processor has the instructions."""


_intrinsic: Any = intrinsic  # as numba's own types know nothing of what it returns


@_intrinsic
def codes(_typing, words, size, base, planes):  # type: ignore[no-untyped-def]
    """Turn elements into bit planes of codes: those of the bins from base to base + 127 have the codes 0 to 127.

    words   address of uint32 [size]: bits of float32; size is an int64, a multiple of 512
    base    uint16
    planes  address of uint64 [size / 512, 8, 8], written; elements outside of the window are in plane 7

    Returns the largest code (int8) and the smallest (uint8), not of this range if all elements lie outside of the
    window; how many do (int64); and the sum of squares (float64).
    """
    found = types.Tuple((types.int8, types.uint8, types.int64, types.float64))
    return found(types.int64, types.int64, types.uint16, types.int64), _code


def element_of(word, bit):  # type: ignore[no-untyped-def]
    """Which element of its 512 a bit of a plane stands for: in numba, of integers 0 to 7 and 0 to 63."""
    byte = bit ^ 7
    return 64 * word + 32 * (byte & 1) + (byte >> 1)


@_intrinsic
def count(_typing, planes, size, first, last, counts):  # type: ignore[no-untyped-def]
    """Add how many elements have each code, in the octaves (8 codes) of the window from first to last (int64).

    planes  address of uint64 [size / 512, 8, 8]; size is an int64, a multiple of 1,024
    counts  address of uint64 [128, 8]: of each code in eight parts
    """
    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), _count


def _code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
    words, size, base, planes = arguments
    source, out = pointer(builder, words), pointer(builder, planes)
    base_lanes = splat(builder, base, _SHORTS)
    starts = ((_BYTES, -128), (_BYTES, 255), (_BITS, 0), (_DOUBLES, 0.0), (_DOUBLES, 0.0))
    with loop(builder, size, BLOCK, *starts) as (i, carried, close):
        largest, smallest, outside, *sums = carried
        blocks = []
        for part in range(BLOCK // 64):
            places = (builder.add(i, ir.Constant(_I64, 64 * part + 16 * k)) for k in range(4))
            words = [load(builder, source, place, _SHORTS, 4) for place in places]
            code = _bytes_of_codes(builder, words, base_lanes)
            largest, smallest = largest_of(builder, largest, code), least(builder, smallest, code)
            blocks.append(code)
            sums = with_squares(builder, sums, [builder.bitcast(bits, _FLOATS) for bits in words])
        bits = _planes(builder, blocks)
        for k, plane in enumerate(bits):
            place = builder.gep(out, [builder.add(i, ir.Constant(_I64, 8 * WORDS * k))])
            builder.store(plane, builder.bitcast(place, plane.type.as_pointer()), align=64)
        outside = builder.add(outside, _population(builder, bits[-1]))
        largest, smallest, outside, *sums = close(largest, smallest, outside, *sums)
    found = (
        reduced(builder, "smax", largest),
        reduced(builder, "umin", smallest),
        reduced(builder, "add", outside),
        total_of(builder, sums),
    )
    return context.make_tuple(builder, signature.return_type, found)


def _bytes_of_codes(builder, words, base):  # type: ignore[no-untyped-def]
    """Codes of 64 elements, four vectors of 16, at most 255, a byte each in some order."""
    halves = []
    for pair in (words[:2], words[2:]):
        upper = builder.shuffle_vector(*pair, indices(range(1, 64, 2)))  # sign, exponent and 7 bits of the mantissa
        bins = builder.lshr(builder.shl(upper, all_of(_SHORTS, 1)), all_of(_SHORTS, 5))
        above_base = builder.sub(bins, base)  # wraps below it
        most = all_of(_SHORTS, 255)
        halves.append(least(builder, above_base, most))
    return builder.bitcast(builder.or_(halves[0], builder.shl(halves[1], all_of(_SHORTS, 8))), _BYTES)


def _planes(builder, blocks):  # type: ignore[no-untyped-def]
    """Eight planes of eight vectors of bytes."""
    kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES, _I8])
    affine = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.vgf2p8affineqb.512")
    unit = ir.Constant(_BYTES, [1 << k % 8 for k in range(64)])
    together = indices(8 * (k % 8) + k // 8 for k in range(64))
    rows = []  # of 8 × 64 bits, of one vector's elements
    for block in blocks:
        turned = builder.call(affine, [unit, block, ir.Constant(_I8, 0)])  # 8 × 8 bits in each 64
        by_plane = builder.shuffle_vector(turned, turned, together)
        rows.append(builder.bitcast(by_plane, _BITS))
    return _transposed(builder, rows)


def _transposed(builder, rows):  # type: ignore[no-untyped-def]
    """Eight vectors of eight, of which the k-th has what is k-th in each of the given ones."""
    for apart in (1, 2, 4):
        low = [k + (0 if k & apart == 0 else 8 - apart) for k in range(8)]
        high = [k + apart for k in low]
        turned = list(rows)
        for k in (k for k in range(8) if k & apart == 0):
            pair = rows[k], rows[k + apart]
            turned[k] = builder.shuffle_vector(*pair, indices(low))
            turned[k + apart] = builder.shuffle_vector(*pair, indices(high))
        rows = turned
    return rows


def _count(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
    planes, size, first, last, counts = arguments
    source, out = pointer(builder, planes), pointer(builder, counts)
    group = GROUP // BLOCK
    one = ir.Constant(_I64, 1)
    octaves = builder.add(builder.sub(last, first), one)
    with loop(builder, size, GROUP) as (i, _, close_groups):
        bits = [
            [
                load(builder, source, builder.add(i, ir.Constant(_I64, BLOCK * block + 8 * WORDS * k)), _BITS, align=64)
                for k in range(PLANES)
            ]
            for block in range(group)
        ]
        places = [_minterms(builder, of_block[:3], of_block[7]) for of_block in bits]
        with loop(builder, octaves, 1) as (step, _, close):
            octave = builder.add(first, step)
            unwanted = [
                splat(builder, builder.sub(builder.and_(builder.lshr(octave, ir.Constant(_I64, k)), one), one), _BITS)
                for k in range(4)
            ]
            members = []
            for of_block in bits:
                agreeing = [builder.xor(plane, flip) for plane, flip in zip(of_block[3:7], unwanted, strict=True)]
                upper, lower = builder.and_(*agreeing[:2]), builder.and_(*agreeing[2:])
                members.append(builder.and_(upper, lower))
            start = builder.mul(octave, ir.Constant(_I64, OCTAVE * 8 * WORDS))
            for place in range(OCTAVE):
                address = builder.gep(out, [builder.add(start, ir.Constant(_I64, place * 8 * WORDS))])
                total = builder.load(builder.bitcast(address, _BITS.as_pointer()), align=64)
                found = [
                    _population(builder, builder.and_(member, of_block[place]))
                    for member, of_block in zip(members, places, strict=True)
                ]
                total = builder.add(total, builder.add(*found))
                builder.store(total, builder.bitcast(address, _BITS.as_pointer()), align=64)
            close()
        close_groups()
    return context.get_dummy_value()


def _minterms(builder, planes, none):  # type: ignore[no-untyped-def]
    """Who has each of the eight values that three planes can say, and is not in the plane `none`."""
    complements = [builder.xor(plane, all_of(_BITS, -1)) for plane in planes]
    within = builder.xor(none, all_of(_BITS, -1))
    found = []
    for value in range(8):
        first, second, third = ((planes if value >> k & 1 else complements)[k] for k in range(3))
        found.append(builder.and_(builder.and_(builder.and_(first, second), third), within))
    return found


def _population(builder: Any, bits: Any) -> Any:
    kind = ir.FunctionType(_BITS, [_BITS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{WORDS}i64"), [bits])
