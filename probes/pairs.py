"""The sketch kernel's inner loop, written in the compiler's own vectors: elements are counted in pairs.

A histogram is usually one increment of memory an element, of which a core does about one a cycle and which no vector
instruction helps. Here it is one for two elements: each has a code of seven bits, its bin within a window of fifteen
octaves, and two codes together are the place in a table that is incremented. The table takes 64 KiB, but of a tensor's
values nearly all lie in few octaves, so that what is used of it stays in the first-level cache. What the processor's
vector units do meanwhile, the codes and the sum of squares, runs beside the increments.

Which two elements make a pair does not matter, so they are taken as they come out of the vectors with the fewest
shuffles; `element_of` says which one a bit of a mask stands for. The vectors have 256 bits, which AVX2 and its
successors do at once; other processors take several steps.

numba's cache looks at the date of `kernels.py` only: touch that after a change here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

GROUP = 32
"""Elements that are counted at once: tensors come in multiples of it."""
CODES = 15 * 8
"""Codes of a window, eight an octave."""
ALL_CODES = 128
"""With those of elements outside the window, which have several, so that zeros seldom wait for one another."""

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_SHORTS, _WORDS, _LONGS = ir.VectorType(_I16, 16), ir.VectorType(_I32, 8), ir.VectorType(_I64, 4)
_HALVES, _FLOATS = ir.VectorType(ir.HalfType(), 8), ir.VectorType(ir.FloatType(), 8)
_DOUBLES = ir.VectorType(ir.DoubleType(), 8)

_features: str = cpu_target.target_context.codegen().magic_tuple()[2]
READS_FLOAT16 = "+f16c" in _features.split(",")
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
    return _found(*_given), partial(_count, read=_read_float32, shift=5, counts_zeros=False)


@_intrinsic
def count_bfloat16(_typing, source, size, base, step, table, masks):  # type: ignore[no-untyped-def]
    """The same of bfloat16, and how many are zero; size is at most 2**16."""
    return _found(*_given), partial(_count, read=_read_bfloat16, shift=5, counts_zeros=True)


@_intrinsic
def count_float16(_typing, source, size, base, step, table, masks):  # type: ignore[no-untyped-def]
    """The same of float16, of which bin 8 is the first of normal numbers, and the lowest base; the highest is 128."""
    return _found(*_given), partial(_count, read=_read_float16, shift=8, counts_zeros=True)


def element_of(bit, interleaved):  # type: ignore[no-untyped-def]
    """Which element of its group a bit of a mask stands for; float32's are interleaved."""
    return (bit & 16) + 8 * (bit & 1) + (bit >> 1 & 7) if interleaved else bit


def _count(context, builder, signature, arguments, read, shift, counts_zeros):  # type: ignore[no-untyped-def]
    source, size, base, step, table, masks = arguments
    source, table, masks = (builder.inttoptr(address, _I32.as_pointer()) for address in (source, table, masks))
    base_lanes = _splat(builder, builder.shl(base, ir.Constant(_I16, shift)), _SHORTS)
    starts = ((_SHORTS, -1), (_SHORTS, -1), (_SHORTS, 0), (_I64, 0), (_DOUBLES, 0.0), (_DOUBLES, 0.0))
    with _loop(builder, size, GROUP, *starts) as (i, carried, close):
        largest, smallest, zeros, outside, *sums = carried
        shorts, floats = read(builder, source, i)
        codes, beyond = [], []
        for bits in shorts:
            magnitude = builder.shl(bits, _all(_SHORTS, 1))
            code = builder.ashr(builder.sub(magnitude, base_lanes), _all(_SHORTS, shift))  # wraps below the base
            within = _least(builder, code, _all(_SHORTS, CODES))
            largest = builder.select(builder.icmp_signed(">", largest, code), largest, code)
            smallest = _least(builder, smallest, within)
            if counts_zeros:
                is_zero = builder.icmp_unsigned("==", magnitude, _all(_SHORTS, 0))
                zeros = builder.sub(zeros, builder.sext(is_zero, _SHORTS))
            beyond.append(builder.icmp_unsigned("==", within, _all(_SHORTS, CODES)))
            codes.append(builder.select(beyond[-1], ir.Constant(_SHORTS, [CODES + k % 8 for k in range(16)]), within))
        sums = _with_squares(builder, sums, floats)
        members = builder.bitcast(builder.shuffle_vector(*beyond, _indices(range(GROUP))), _I32)
        builder.store(members, builder.gep(masks, [builder.lshr(i, ir.Constant(_I64, 5))]), align=4)
        outside = builder.add(outside, builder.zext(builder.ctpop(members), _I64))
        _increment(builder, table, builder.or_(codes[0], builder.shl(codes[1], _all(_SHORTS, 7))), step)
        largest, smallest, zeros, outside, *sums = close(largest, smallest, zeros, outside, *sums)
    found = (
        _reduced(builder, "smax", largest),
        _reduced(builder, "umin", smallest),
        outside,
        builder.zext(_reduced(builder, "add", zeros), _I64),
        _reduced(builder, "fadd", builder.fadd(*sums), ir.Constant(ir.DoubleType(), 0.0)),
    )
    return context.make_tuple(builder, signature.return_type, found)


def _increment(builder, table, places, step):  # type: ignore[no-untyped-def]
    longs = builder.bitcast(places, _LONGS)
    for k in range(4):
        four = builder.extract_element(longs, ir.Constant(_I32, k))
        for part in range(4):
            place = builder.and_(builder.lshr(four, ir.Constant(_I64, 16 * part)), ir.Constant(_I64, 0xFFFF))
            address = builder.gep(table, [place])
            builder.store(builder.add(builder.load(address, align=4), step), address, align=4)


def _with_squares(builder, sums, floats):  # type: ignore[no-untyped-def]
    """Add the squares of vectors of numbers to sums, in turn, so that no addition waits for the one just before."""
    for k, single in enumerate(floats):
        values = builder.fpext(single, _DOUBLES)
        square = builder.fmul(values, values, flags=("contract",))
        sums[k % len(sums)] = builder.fadd(sums[k % len(sums)], square, flags=("contract",))
    return sums


# A group's elements: the upper 16 bits of each in two vectors, and all as float32 in four.


def _read_float32(builder, source, i):  # type: ignore[no-untyped-def]
    words = [_load(builder, source, i, 4, 8 * k, _WORDS) for k in range(4)]
    shorts = []
    for first, second in (words[:2], words[2:]):
        upper = builder.bitcast(builder.lshr(first, _all(_WORDS, 16)), _SHORTS)
        every_other = _indices(k + 16 * (k & 1) for k in range(16))
        shorts.append(builder.shuffle_vector(upper, builder.bitcast(second, _SHORTS), every_other))
    return shorts, [builder.bitcast(word, _FLOATS) for word in words]


def _read_bfloat16(builder, source, i):  # type: ignore[no-untyped-def]
    shorts = [_load(builder, source, i, 2, 16 * k, _SHORTS) for k in range(2)]
    floats = []
    for both in (builder.bitcast(short, _WORDS) for short in shorts):
        words = builder.shl(both, _all(_WORDS, 16)), builder.and_(both, _all(_WORDS, 0xFFFF0000))
        floats += [builder.bitcast(word, _FLOATS) for word in words]
    return shorts, floats


def _read_float16(builder, source, i):  # type: ignore[no-untyped-def]
    shorts = [_load(builder, source, i, 2, 16 * k, _SHORTS) for k in range(2)]
    halves = [_load(builder, source, i, 2, 8 * k, _HALVES) for k in range(4)]
    return shorts, [builder.fpext(half, _FLOATS) for half in halves]


# What llvmlite has no word for.


class _loop:  # noqa: N801 (reads as a statement)
    """A loop of i from 0 while below `end`, with values carried from one round to the next.

    Entered, it gives i, the values, and a function to close the round with, which takes their next ones and gives the
    last ones. The body runs at least once.
    """

    def __init__(self, builder: Any, end: Any, step: int, *carried: tuple[Any, Any]) -> None:
        self._builder, self._end, self._step, self._carried = builder, end, step, carried

    def __enter__(self) -> tuple[Any, list[Any], Any]:
        builder, entry = self._builder, self._builder.block
        self._body, self._done = builder.append_basic_block("round"), builder.append_basic_block("done")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self._i = builder.phi(_I64)
        self._i.add_incoming(ir.Constant(_I64, 0), entry)
        self._values = []
        for kind, start in self._carried:
            value = builder.phi(kind)
            value.add_incoming(_all(kind, start), entry)
            self._values.append(value)
        return self._i, list(self._values), self._close

    def _close(self, *following: Any) -> Sequence[Any]:
        builder = self._builder
        advanced = builder.add(self._i, ir.Constant(_I64, self._step))
        for value, after in zip((self._i, *self._values), (advanced, *following), strict=True):
            value.add_incoming(after, builder.block)
        builder.cbranch(builder.icmp_signed("<", advanced, self._end), self._body, self._done)
        builder.position_at_end(self._done)
        return following

    def __exit__(self, *_: object) -> None:
        pass


def _load(builder: Any, start: Any, i: Any, bytes_each: int, offset: int, kind: Any) -> Any:
    index = builder.add(i, ir.Constant(_I64, offset))
    address = builder.gep(builder.bitcast(start, ir.IntType(8).as_pointer()), [_times(builder, index, bytes_each)])
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=bytes_each)


def _times(builder: Any, index: Any, factor: int) -> Any:
    return builder.mul(index, ir.Constant(_I64, factor))


def _all(kind: Any, value: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _indices(values: Any) -> Any:
    chosen = list(values)
    return ir.Constant(ir.VectorType(_I32, len(chosen)), chosen)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, _indices([0] * kind.count))


def _least(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.icmp_unsigned("<", one, other), one, other)


def _reduced(builder: Any, how: str, lanes: Any, *start: Any) -> Any:
    kind = lanes.type
    name = f"llvm.vector.reduce.{how}.v{kind.count}" + ("f64" if start else f"i{kind.element.width}")
    signature = ir.FunctionType(kind.element, [*(value.type for value in start), kind])
    reduction = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(reduction, [*start, lanes], fastmath=("reassoc",) if start else ())
