"""The sketch kernel's two inner loops where a vector counts its bits, written in the compiler's own vectors.

A histogram is usually one increment of memory an element, of which a core does about one a cycle and which no vector
instruction helps. Here few elements are counted alone. Each gets a code of eight bits, its bin's place in a span of 32
octaves, and the codes of 512 elements are written as bit planes: the k-th is a vector of 512 bits that holds bit k of
each code. `count` finds the members of a bin as the AND of the planes, or of their complements, of that bin's code, and
counts them with the vector's population count: 512 elements in three instructions a bin.

That is worth it for the octaves that hold most elements. So it is done for eight of the span, the window; the codes of
what lies in the others are written one after another, as a list, to be counted by increments. Of normal numbers that is
one in a hundred.

Elements may stand in the planes in any order, as long as it is the same in each, which saves most of the shuffles of
turning bytes into planes.

All this needs AVX-512 with VBMI2, VPOPCNTDQ and GFNI, as Intel's server processors have them from Ice Lake on and AMD's
from Zen 4 on. On others `kernels.py` counts in pairs (`pairs.py`).
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from probes.vectors import (
    FEATURES,
    all_of,
    called,
    indices,
    least,
    load,
    loop,
    most,
    pointer,
    reduced,
    splat,
    total_of,
    with_squares,
)

CHUNK = 2048
"""Elements that are coded, and counted, at once."""
BLOCK = 512
"""Elements of a vector's worth of bits."""
BLOCKS = CHUNK // BLOCK
OCTAVE = 8
"""Bins in an octave."""
SPAN = 256
"""Codes, the first for what lies below the span, zeros among it, and the last for what lies above."""
BELOW = 128
"""The code of the window's first bin."""
WINDOW = 64
"""Bins of the window."""
PLANES = 8
WORDS = BLOCK // 64
"""uint64 in a plane of a block, and the parts of a count."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _SHORTS, _BITS = ir.VectorType(_I8, 64), ir.VectorType(_I16, 32), ir.VectorType(_I64, WORDS)

AVAILABLE = {"+avx512bw", "+avx512vbmi", "+avx512vbmi2", "+avx512vpopcntdq", "+gfni"} <= FEATURES
"""Whether this processor has the instructions."""

_found = types.Tuple((types.uint8, types.uint8, types.int64, types.int64, types.float64))
_given = (types.int64, types.int64, types.int64, types.int64)
_intrinsic: Any = intrinsic  # as numba's own types know nothing of what it returns


@_intrinsic
def codes_float32(_typing, source, base, planes, listed):  # type: ignore[no-untyped-def]
    """Turn a chunk into bit planes of codes: a bin's is what it is above base - BELOW, from 0 to 255 at most.

    source  address of the elements [CHUNK]
    base    int64, the window's first bin, at least BELOW
    planes  address of uint64 [BLOCKS, PLANES, WORDS], written
    listed  address of uint8 [CHUNK + 64], written: codes from 1 on that are not the window's

    Returns the largest code (uint8); the smallest but for 0, less one (uint8), not of this range if all are 0; how many
    codes are listed, and how many are 0, zeros or not (int64); and the sum of squares (float64).
    """
    return _found(*_given), partial(_code, read_upper=_upper_of_float32, read_floats=_float32s, lanes=4, bytes_each=4)


@_intrinsic
def codes_bfloat16(_typing, source, base, planes, listed):  # type: ignore[no-untyped-def]
    """The same of bfloat16."""
    return _found(*_given), partial(
        _code, read_upper=_bfloat16s, read_floats=_floats_of_bfloat16, lanes=8, bytes_each=2
    )


@_intrinsic
def zeros_of_float32(_typing, source):  # type: ignore[no-untyped-def]
    """How many elements of a chunk at this address are zero, of either sign."""
    return types.int64(types.int64), partial(_zeros, kind=ir.VectorType(_I32, 16))


@_intrinsic
def zeros_of_bfloat16(_typing, source):  # type: ignore[no-untyped-def]
    """The same of bfloat16."""
    return types.int64(types.int64), partial(_zeros, kind=_SHORTS)


@_intrinsic
def count(_typing, planes, first, last, counts):  # type: ignore[no-untyped-def]
    """Add how many elements of a chunk each bin has, in the octaves of the window from first to last (int64).

    planes  address of uint64 [BLOCKS, PLANES, WORDS]
    counts  address of uint64 [WINDOW, WORDS]: of each bin in eight parts
    """
    return types.void(types.int64, types.int64, types.int64, types.int64), _count


def _code(context, builder, signature, arguments, read_upper, read_floats, lanes, bytes_each):  # type: ignore[no-untyped-def]
    source, base, planes, listed = arguments
    source, out, listed = (pointer(builder, address) for address in (source, planes, listed))
    below = builder.trunc(builder.sub(base, ir.Constant(_I64, BELOW)), _I16)
    below_lanes = splat(builder, below, _SHORTS)
    starts = (_BYTES, 0), (_BYTES, 255), (_I64, 0), (_I64, 0)
    with loop(builder, ir.Constant(_I64, CHUNK), BLOCK, *starts) as (i, carried, close):
        largest, smallest, length, beneath = carried
        blocks = []
        for part in range(BLOCK // 64):
            start = builder.mul(builder.add(i, ir.Constant(_I64, 64 * part)), ir.Constant(_I64, bytes_each))
            code = _bytes_of_codes(builder, read_upper(builder, builder.gep(source, [start])), below_lanes)
            blocks.append(code)
            largest = most(builder, largest, code)
            smallest = least(builder, smallest, builder.sub(code, all_of(_BYTES, 1)))  # 0 becomes 255
            is_beneath = builder.icmp_unsigned("==", code, all_of(_BYTES, 0))
            beneath = builder.add(beneath, _set_bits(builder, is_beneath))
            length = _listed(builder, code, is_beneath, listed, length)
        for k, plane in enumerate(_planes(builder, blocks)):
            place = builder.gep(out, [builder.add(i, ir.Constant(_I64, 8 * WORDS * k))])
            builder.store(plane, builder.bitcast(place, plane.type.as_pointer()), align=64)
        largest, smallest, length, beneath = close(largest, smallest, length, beneath)
    # A loop of its own: beside other readings of the same memory LLVM 22 loads single elements.
    doubles = ir.VectorType(ir.DoubleType(), lanes)
    with loop(builder, ir.Constant(_I64, CHUNK), 64, *[(doubles, 0.0)] * (64 // lanes)) as (i, sums, close):
        start = builder.mul(i, ir.Constant(_I64, bytes_each))
        sums = close(*with_squares(builder, sums, read_floats(builder, builder.gep(source, [start]))))
    found = (
        reduced(builder, "umax", largest),
        reduced(builder, "umin", smallest),
        length,
        beneath,
        total_of(builder, sums),
    )
    return context.make_tuple(builder, signature.return_type, found)


def _bytes_of_codes(builder, shorts, below):  # type: ignore[no-untyped-def]
    """Codes of 64 elements, given by their upper 16 bits in two vectors, a byte each in some order."""
    above = []
    for upper in shorts:
        bins = builder.lshr(builder.shl(upper, all_of(_SHORTS, 1)), all_of(_SHORTS, 5))
        above.append(called(builder, "llvm.usub.sat.v32i16", _SHORTS, bins, below))
    return called(builder, "llvm.x86.avx512.packuswb.512", _BYTES, *above)


def _listed(builder, code, is_beneath, listed, length):  # type: ignore[no-untyped-def]
    """Write those of 64 codes that are neither 0 nor the window's after what is listed; gives what is listed now."""
    beyond = builder.icmp_unsigned(">=", builder.sub(code, all_of(_BYTES, BELOW)), all_of(_BYTES, WINDOW))
    chosen = builder.and_(beyond, builder.not_(is_beneath))
    together = called(builder, "llvm.x86.avx512.mask.compress.v64i8", _BYTES, code, all_of(_BYTES, 0), chosen)
    place = builder.gep(listed, [length])
    builder.store(together, builder.bitcast(place, _BYTES.as_pointer()), align=1)
    return builder.add(length, _set_bits(builder, chosen))


def _set_bits(builder: Any, mask: Any) -> Any:
    """How many of a vector's lanes are true."""
    return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(mask.type.count))), _I64)


def _planes(builder, blocks):  # type: ignore[no-untyped-def]
    """Eight planes of eight vectors of bytes."""
    unit = ir.Constant(_BYTES, [1 << k % 8 for k in range(64)])
    together = indices(8 * (k % 8) + k // 8 for k in range(64))
    rows = []  # of 8 × 64 bits, of one vector's elements
    for block in blocks:
        none = ir.Constant(_I8, 0)
        turned = called(builder, "llvm.x86.vgf2p8affineqb.512", _BYTES, unit, block, none)  # 8 × 8 bits in each 64
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
    planes, first, last, counts = arguments
    source, out = pointer(builder, planes), pointer(builder, counts)
    one = ir.Constant(_I64, 1)
    blocks = [
        [
            load(builder, source, ir.Constant(_I64, (BLOCK * block) + 8 * WORDS * k), _BITS, align=64)
            for k in range(PLANES)
        ]
        for block in range(BLOCKS)
    ]
    places = [_minterms(builder, bits[:3]) for bits in blocks]
    within = [builder.and_(bits[7], builder.xor(bits[6], all_of(_BITS, -1))) for bits in blocks]
    octaves = builder.add(builder.sub(last, first), one)
    with loop(builder, octaves, 1) as (step, _, close):
        octave = builder.add(first, step)
        unwanted = [
            splat(builder, builder.sub(builder.and_(builder.lshr(octave, ir.Constant(_I64, k)), one), one), _BITS)
            for k in range(3)
        ]
        members = []
        for bits, inside in zip(blocks, within, strict=True):
            for plane, flip in zip(bits[3:6], unwanted, strict=True):
                inside = builder.and_(inside, builder.xor(plane, flip))
            members.append(inside)
        start = builder.mul(octave, ir.Constant(_I64, OCTAVE * 8 * WORDS))
        for place in range(OCTAVE):
            address = builder.gep(out, [builder.add(start, ir.Constant(_I64, place * 8 * WORDS))])
            total = builder.load(builder.bitcast(address, _BITS.as_pointer()), align=64)
            for member, of_block in zip(members, places, strict=True):
                both = builder.and_(member, of_block[place])
                total = builder.add(total, called(builder, f"llvm.ctpop.v{WORDS}i64", _BITS, both))
            builder.store(total, builder.bitcast(address, _BITS.as_pointer()), align=64)
        close()
    return context.get_dummy_value()


def _minterms(builder, planes):  # type: ignore[no-untyped-def]
    """Who has each of the eight values that three planes can say."""
    complements = [builder.xor(plane, all_of(_BITS, -1)) for plane in planes]
    found = []
    for value in range(8):
        first, second, third = ((planes if value >> k & 1 else complements)[k] for k in range(3))
        found.append(builder.and_(builder.and_(first, second), third))
    return found


def _zeros(_context, builder, _signature, arguments, kind):  # type: ignore[no-untyped-def]
    source, bytes_each = pointer(builder, arguments[0]), kind.element.width // 8
    with loop(builder, ir.Constant(_I64, CHUNK), 4 * kind.count, *[(_I64, 0)] * 4) as (i, totals, close):
        for k in range(4):
            bits = load(builder, source, builder.add(i, ir.Constant(_I64, k * kind.count)), kind, bytes_each)
            is_zero = builder.icmp_unsigned("==", builder.shl(bits, all_of(kind, 1)), all_of(kind, 0))
            totals[k] = builder.add(totals[k], _set_bits(builder, is_zero))
        totals = close(*totals)
    return reduce(builder.add, totals)


# 64 elements: the upper 16 bits of each in two vectors, and all as float32, in as many lanes as are the soonest made
# float64 (ours, Zen 4): four that come from memory, eight that do not.


def _upper_of_float32(builder, source):  # type: ignore[no-untyped-def]
    halves = [load(builder, source, ir.Constant(_I64, 16 * k), _SHORTS, 4) for k in range(4)]
    every_other = indices(range(1, 64, 2))
    return [builder.shuffle_vector(*halves[k : k + 2], every_other) for k in (0, 2)]


def _float32s(builder, source):  # type: ignore[no-untyped-def]
    kind = ir.VectorType(ir.FloatType(), 4)
    return [load(builder, source, ir.Constant(_I64, 4 * k), kind, 4) for k in range(16)]


def _bfloat16s(builder, source):  # type: ignore[no-untyped-def]
    return [load(builder, source, ir.Constant(_I64, 32 * k), _SHORTS, 2) for k in range(2)]


def _floats_of_bfloat16(builder, source):  # type: ignore[no-untyped-def]
    kind, floats = ir.VectorType(_I32, 8), []
    for both in (load(builder, source, ir.Constant(_I64, 16 * k), kind, 2) for k in range(4)):
        words = builder.shl(both, all_of(kind, 16)), builder.and_(both, all_of(kind, 0xFFFF0000))
        floats += [builder.bitcast(word, ir.VectorType(ir.FloatType(), 8)) for word in words]
    return floats
