"""The sketch kernel's inner loop, written in the compiler's own vectors.

Two kinds of work take about as long as each other and use different parts of a core: vector instructions that find
extremes, squares and bins, and increments, one by one, of a table in memory. A compiler's vectoriser puts one after the
other, since it makes no vector code of a loop that also increments; a core that meets them in turns does both at once.
So each round of this loop takes 32 elements of a chunk, and counts 16 pairs of the chunk before. Both in 0.2 ns an
element, 0.36 one after the other (ours, on Zen 4).

The vectors have 16 lanes; LLVM splits them for processors whose own are shorter. Nothing here is particular to one.

numba's cache looks at the date of `kernels.py` only: touch that after a change here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probes.layout import BIN_SHIFT

LANES = 16
CODES = 128
NO_CODES = 8  # codes that stand for "none", in turn, so that increments of one place need not wait for each other
WINDOW = CODES - NO_CODES  # bins that have a code

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(_I16, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)


def _intrinsic(sparse: bool, count: bool) -> Any:
    """`pair`, of one of its four kinds.

    words   address of uint32 [2·half]: bits of float32; half is a multiple of 16
    half    int64
    base    uint32: the bin that has code 0
    codes   address of uint16 [half]: code of i + 128 · code of (half + i) is written here
    before  address of uint16 [half]: the same of the chunk before
    table   address of uint16 [CODES²]: one is added for each of these; the caller sees to it that none overflows
    sparse  zeros are expected: the smallest is of the bits minus 1, as an unsigned number, so that zero is the largest;
            and codes for none take turns. Otherwise elements that have no code are not counted, and all get the same
    count   there is a chunk before

    Returns the largest and the smallest of the bits of magnitudes, all these bits or-ed, how many elements have no
    code (uint32), and the sum of squares (float64).
    """

    @intrinsic
    def pair(_typing, words, half, base, codes, before, table):  # type: ignore[no-untyped-def]
        def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            found = _loop(builder, *arguments, sparse=sparse, count=count)
            return context.make_tuple(builder, signature.return_type, found)

        found = types.Tuple((types.uint32, types.uint32, types.uint32, types.uint32, types.float64))
        return found(types.int64, types.int64, types.uint32, types.int64, types.int64, types.int64), code

    return pair


def _loop(  # type: ignore[no-untyped-def]
    builder, words, half, base, codes, before, table, *, sparse, count
):
    entry = builder.block
    body, done = builder.append_basic_block("pairs"), builder.append_basic_block("paired")
    first_words = builder.inttoptr(words, _I32.as_pointer())
    second_words = builder.gep(first_words, [half])
    out, earlier = (builder.inttoptr(address, _I16.as_pointer()) for address in (codes, before))
    places = builder.inttoptr(table, _I16.as_pointer())
    base_lanes = _splat(builder, base)
    builder.branch(body)

    builder.position_at_end(body)
    i = builder.phi(_I64)
    accumulators = [builder.phi(_WORDS) for _ in range(4)] + [builder.phi(_DOUBLES) for _ in range(2)]
    largest, smallest, union, codeless, *squares = accumulators
    pair_of_codes = None
    new_squares = []
    for place, start in enumerate((first_words, second_words)):
        bits = builder.load(builder.bitcast(builder.gep(start, [i]), _WORDS.as_pointer()), align=2)
        values = builder.fpext(builder.bitcast(bits, _FLOATS), _DOUBLES)
        square = builder.fmul(values, values, flags=("contract",))
        new_squares.append(builder.fadd(squares[place], square, flags=("contract",)))
        bits = builder.and_(bits, _lanes(0x7FFFFFFF))
        largest = _most(builder, ">", largest, bits)
        smallest = _most(builder, "<", smallest, builder.sub(bits, _lanes(1)) if sparse else bits)
        union = builder.or_(union, bits)
        code = builder.sub(builder.lshr(bits, _lanes(BIN_SHIFT)), base_lanes)
        if sparse:
            none = builder.icmp_unsigned(">=", code, _lanes(WINDOW))
            codeless = builder.sub(codeless, builder.sext(none, _WORDS))
            code = builder.select(none, ir.Constant(_WORDS, [WINDOW + k % NO_CODES for k in range(LANES)]), code)
        else:
            code = _most(builder, "<", code, _lanes(WINDOW))
        pair_of_codes = code if place == 0 else builder.or_(pair_of_codes, builder.shl(code, _lanes(7)))
    narrow = builder.trunc(pair_of_codes, _SHORTS)
    builder.store(narrow, builder.bitcast(builder.gep(out, [i]), _SHORTS.as_pointer()), align=2)
    if count:
        for lane in range(LANES):
            index = builder.load(builder.gep(earlier, [builder.add(i, ir.Constant(_I64, lane))]))
            at = builder.gep(places, [builder.zext(index, _I64)])
            builder.store(builder.add(builder.load(at), ir.Constant(_I16, 1)), at)
    following = builder.add(i, ir.Constant(_I64, LANES))
    body_end = builder.block
    builder.cbranch(builder.icmp_signed("<", following, half), body, done)

    i.add_incoming(ir.Constant(_I64, 0), entry)
    i.add_incoming(following, body_end)
    results = [largest, smallest, union, codeless, *new_squares]
    beginnings = [_lanes(0), _lanes(0xFFFFFFFF), _lanes(0), _lanes(0), *[ir.Constant(_DOUBLES, [0.0] * LANES)] * 2]
    for accumulator, beginning, result in zip(accumulators, beginnings, results, strict=True):
        accumulator.add_incoming(beginning, entry)
        accumulator.add_incoming(result, body_end)

    builder.position_at_end(done)
    over_lanes = zip(("umax", "umin", "or", "add"), results, strict=False)
    both_squares = builder.fadd(*new_squares, flags=("reassoc",))
    total = _reduction(builder, "fadd", _DOUBLES, ir.DoubleType())
    start = ir.Constant(ir.DoubleType(), 0.0)
    return [
        *(builder.call(_reduction(builder, how, _WORDS), [result]) for how, result in over_lanes),
        builder.call(total, [start, both_squares], fastmath=("reassoc",)),
    ]


def _reduction(builder: Any, how: str, lanes: Any, *start: Any) -> Any:
    kind = "f64" if start else "i32"
    signature = ir.FunctionType(lanes.element, [*start, lanes])
    return cgutils.get_or_insert_function(builder.module, signature, f"llvm.vector.reduce.{how}.v{LANES}{kind}")


def _lanes(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_WORDS, ir.Undefined), _lanes(0))


def _most(builder: Any, comparison: str, a: Any, b: Any) -> Any:
    """The larger (">") or smaller ("<") of unsigned lanes: LLVM knows the pattern."""
    return builder.select(builder.icmp_unsigned(comparison, a, b), a, b)


pair = _intrinsic(sparse=False, count=False)
pair_and_count = _intrinsic(sparse=False, count=True)
pair_sparse = _intrinsic(sparse=True, count=False)
pair_sparse_and_count = _intrinsic(sparse=True, count=True)
