"""Words for code in the compiler's own vectors that llvmlite has none for: `bit_planes.py` and `pairs.py` are written
in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils
from numba.core.registry import cpu_target

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
"""What numba compiles for, as `+f16c`."""

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_DOUBLE = ir.DoubleType()


class loop:  # noqa: N801 (reads as a statement)
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
            value.add_incoming(all_of(kind, start), entry)
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


def load(builder: Any, start: Any, place: Any, kind: Any, bytes_each: int = 1, align: int | None = None) -> Any:
    """A vector of this kind from an address and so many elements on; aligned as its elements unless told."""
    address = builder.gep(start, [builder.mul(place, ir.Constant(_I64, bytes_each))])
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=align or bytes_each)


def pointer(builder: Any, address: Any) -> Any:
    """To bytes, from an int64."""
    return builder.inttoptr(address, _I8.as_pointer())


def all_of(kind: Any, value: Any) -> Any:
    """A constant; of a vector, the same in each lane."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def indices(values: Iterable[int]) -> Any:
    """What a shuffle chooses."""
    chosen = list(values)
    return ir.Constant(ir.VectorType(_I32, len(chosen)), chosen)


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """A value in each lane."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, indices([0] * kind.count))


def least(builder: Any, one: Any, other: Any) -> Any:
    """The smaller of unsigned integers."""
    return builder.select(builder.icmp_unsigned("<", one, other), one, other)


def most(builder: Any, one: Any, other: Any) -> Any:
    """The larger of unsigned integers."""
    return builder.select(builder.icmp_unsigned(">", one, other), one, other)


def largest_of(builder: Any, one: Any, other: Any) -> Any:
    """The larger of signed integers."""
    return builder.select(builder.icmp_signed(">", one, other), one, other)


def with_squares(builder: Any, sums: list[Any], floats: Iterable[Any]) -> list[Any]:
    """Sums of float64 with the squares of vectors of float32 added in turn, so that none waits for the one before."""
    for k, single in enumerate(floats):
        lanes = ir.VectorType(_DOUBLE, single.type.count)
        values = builder.fpext(single, lanes)
        square = builder.fmul(values, values, flags=("contract",))
        sums[k % len(sums)] = builder.fadd(sums[k % len(sums)], square, flags=("contract",))
    return sums


def total_of(builder: Any, sums: Sequence[Any]) -> Any:
    """All lanes of vectors of float64 added up."""
    return reduced(builder, "fadd", reduce(builder.fadd, sums), ir.Constant(_DOUBLE, 0.0))


def reduced(builder: Any, how: str, lanes: Any, *start: Any) -> Any:
    """One value of a vector's lanes, as LLVM's `vector.reduce` has it."""
    kind = lanes.type
    name = f"llvm.vector.reduce.{how}.v{kind.count}" + ("f64" if start else f"i{kind.element.width}")
    signature = ir.FunctionType(kind.element, [*(value.type for value in start), kind])
    reduction = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(reduction, [*start, lanes], fastmath=("reassoc",) if start else ())


def called(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """The result of one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
