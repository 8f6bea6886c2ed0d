"""What a cast does to the elements of one bin: `grid.py` and `bins.py` once more, compiled, a bin at a time.

Every function here gives the six numbers of `grid.Expected` in its order, in units of the scale. They are what the
kernel over whole windows (`column_kernels.py`) takes for the bins that it cannot sum in closed form. The format's
figures come as one tuple, `Target`; `tests/test_columns.py` holds these functions equal to the plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from advisor.bins import ALWAYS_BITS, BIN_BITS, FINER_TOWARD_ZERO, LATTICE_BITS, LATTICE_FINER, SAME, SMALLEST
from probes.casts import Cast

NEAREST, STOCHASTIC, TOWARD_ZERO = 0, 1, 2
_ROUNDINGS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "zero": TOWARD_ZERO}
EXPONENT_FIELD = 0x7FF << 52
_OCTAVE_BIAS = 127
_LOWEST_OCTAVE = 2.0**-_OCTAVE_BIAS  # float32's subnormals count as that octave

# Inlined by LLVM, so that a loop around a call may become vector instructions; without numba's reference counts (numba
# 0.68), which it otherwise takes an array argument's of at every call: an eighth of the time. They allocate nothing.
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "forceinline": True,
    "_nrt": False,
}
inlined: Callable[..., Any] = njit(**_OPTIONS)
not_inlined: Callable[..., Any] = njit(**{**_OPTIONS, "forceinline": False})
summing: Callable[..., Any] = njit(**_OPTIONS, fastmath={"reassoc", "contract"})  # for sums in any order


class Target(NamedTuple):
    """A cast as its kernels see it: the format's figures, and how it rounds.

    `bottom` is 2^emin, `step` the spacing below it, `normal` the smallest normal value, `top` the spacing at `largest`.
    From `to_step`, `to_normal` and `to_beyond` on magnitudes round to `step`, to `normal` and beyond the largest value,
    where rounding is not stochastic.
    """

    mantissa_step: float
    bottom: float
    step: float
    normal: float
    largest: float
    top: float
    rounding: int
    saturates: bool
    scaled: bool
    to_step: float
    to_normal: float
    to_beyond: float

    @classmethod
    def of(cls, cast: Cast) -> Target:
        """That of a cast."""
        target, step, top = cast.format, cast.format.smallest_subnormal, cast.format.largest_spacing
        thresholds = ((step, step), (target.smallest_normal, step), (target.largest + top, top))
        return cls(
            2.0**-target.mantissa_bits,
            2.0**target.emin,
            step,
            target.smallest_normal,
            target.largest,
            top,
            _ROUNDINGS[cast.rounding],
            cast.saturate or cast.rounding == "zero",
            cast.scale is not None,
            *(_reached_from(value, below, cast.rounding) for value, below in thresholds),
        )


def _reached_from(value: float, below: float, rounding: str) -> float:
    """From where on magnitudes round to `value` or more, `below` being the spacing under it."""
    if rounding == "zero":
        return value
    step, to_even = value - below / 2, value / below / 2 % 1 == 0
    return step if to_even else math.nextafter(step, math.inf)


@inlined
def target_from(figures: Any) -> Target:
    """That whose fields are float64 [12]."""
    p = figures
    return Target(p[0], p[1], p[2], p[3], p[4], p[5], int(p[6]), p[7] > 0, p[8] > 0, p[9], p[10], p[11])


def _bits_of(_: Any, x: Any) -> Any:
    """The bits of a float64 as an int64."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), code


def _from_bits(_: Any, x: Any) -> Any:
    """The float64 of these bits."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), code


bits_of: Any = intrinsic(_bits_of)
from_bits: Any = intrinsic(_from_bits)


@inlined
def two_to(exponent: int) -> float:
    """2^exponent, of a normal float64."""
    return from_bits((exponent + 1023) << 52)


@inlined
def one_over(power: float) -> float:
    """1 / power, of a power of two, without dividing."""
    return from_bits((2046 << 52) - bits_of(power))


@inlined
def bin_of(magnitude: float) -> int:
    """The sketch's bin of a magnitude, -1 below all and a large number above all of float32's."""
    found = (bits_of(magnitude) >> 49) - ((1023 - _OCTAVE_BIAS) << BIN_BITS)
    return found if found >= 1 << BIN_BITS else int(magnitude * 2.0**129) if magnitude > 0 else -1


@inlined
def is_power_of_two(scale: float) -> bool:
    """Of a normal float64."""
    return bits_of(scale) & ((1 << 52) - 1) == 0


@inlined
def octave_of(u: float, target: Target) -> float:
    """2^max(floor(log2 u), emin)."""
    return max(from_bits(bits_of(u) & EXPONENT_FIELD), target.bottom)


@inlined
def lattice_of(edge: float, bits: int, finest: float) -> float:
    """What the elements of the bin that begins there are multiples of."""
    octave = max(from_bits(bits_of(edge) & EXPONENT_FIELD), _LOWEST_OCTAVE)
    return max(octave * two_to(-bits), finest)


@inlined
def in_units(x: float, scale: float, target: Target) -> float:
    """`bins._in_units` of one magnitude."""
    u = x / scale
    if not target.scaled:
        return u
    if target.rounding == TOWARD_ZERO:
        divided = float(np.float32(u))
        return u if np.isinf(divided) else divided
    return target.largest if abs(u - target.largest) <= SAME * target.largest else u


@inlined
def reaches(u: float, value: float, below: float, reached_from: float, target: Target) -> float:
    """Probability that u rounds to `value` or more, `below` being the spacing under it."""
    if target.rounding == STOCHASTIC:
        return min(max(u - (value - below), 0.0), below) / below
    return 1.0 if u >= reached_from else 0.0


@inlined
def outcome(
    nonzero: float, normal: float, beyond: float, squared: float, fourth: float, product: float, target: Target
) -> tuple[float, float, float, float, float, float]:
    """The six numbers, from what is reached; the moments are infinite where Inf or NaN may come out."""
    if beyond > 0 and not target.saturates:
        squared = fourth = product = np.inf
    return 1 - nonzero, max(nonzero - normal, 0.0), beyond, squared, fourth, product


@inlined
def at_point(u: float, target: Target) -> tuple[float, float, float, float, float, float]:
    """`Grid.at` of one magnitude."""
    within = min(u, target.largest)
    beyond = u - within
    spacing = octave_of(within, target) * target.mantissa_step
    w = within * one_over(spacing)
    if target.rounding == STOCHASTIC:
        f = w - np.floor(w)
        both_ways = f * (1 - f)
        squared = both_ways * spacing**2
        fourth = squared * (1 - 3 * both_ways) * spacing**2
        product = 0.0
    else:
        error = ((np.floor(w) if target.rounding == TOWARD_ZERO else np.rint(w)) - w) * spacing
        squared = error**2
        fourth, product = squared**2, within * error
    return outcome(
        reaches(u, target.step, target.step, target.to_step, target),
        reaches(u, target.normal, target.step, target.to_normal, target),
        reaches(u, target.largest + target.top, target.top, target.to_beyond, target),
        squared + beyond**2,
        fourth + (beyond**2) ** 2,
        product - u * beyond,
        target,
    )


@inlined
def in_cells(w: float, rounding: int) -> tuple[float, float, float]:
    """∫ δ², ∫ δ⁴ and ∫ v·δ from 0 to w on the even grid of spacing 1."""
    n = np.rint(w) if rounding == NEAREST else np.floor(w)
    t = w - n
    square = t * t
    if rounding == STOCHASTIC:
        return (
            n * (1 / 6) + square * (1 / 2 - t * (1 / 3)),
            n * (1 / 15) + square * (1 / 2 - t * (4 / 3 - t * (3 / 2 - t * (3 / 5)))),
            0.0,
        )
    cube = square * t
    third, fifth = cube * (1 / 3), cube * square * (1 / 5)
    if rounding == TOWARD_ZERO:
        return n * (1 / 3) + third, n * (1 / 5) + fifth, n * (1 - n) * 0.25 - n * (1 / 3) - n * square * 0.5 - third
    return n * (1 / 12) + third, n * (1 / 80) + fifth, n * (1 / 24) - n * square * 0.5 - third


@inlined
def antiderivatives(u: float, target: Target) -> tuple[float, float, float]:
    """`Grid._antiderivatives` of one magnitude."""
    octave = octave_of(u, target)
    spacing = octave * target.mantissa_step
    first, second, third = in_cells(u * one_over(spacing), target.rounding)
    cube, octave_square, bottom_square = spacing * spacing * spacing, octave * octave, target.bottom * target.bottom
    cubes = octave_square * octave - bottom_square * target.bottom
    fifths = octave_square * octave_square * octave - bottom_square * bottom_square * target.bottom
    whole = of_octaves(target.mantissa_step, target.rounding)
    return (
        first * cube - whole[0] * cubes,
        second * cube * spacing * spacing - whole[1] * fifths,
        third * cube - whole[2] * cubes,
    )


@inlined
def of_octaves(m: float, rounding: int) -> tuple[float, float, float]:
    """What the antiderivatives of the even grid have too much below 1, there being octaves: for ∫ δ² and ∫ v·δ in
    cubes of the octave, for ∫ δ⁴ in fifth powers. `m`: the spacing at 1."""
    square = m * m
    if rounding == NEAREST:
        return 1 / 12 * 6 / 7 * square, 1 / 80 * 30 / 31 * square * square, square / 24 * 6 / 7
    if rounding == STOCHASTIC:
        return 1 / 6 * 6 / 7 * square, 1 / 15 * 30 / 31 * square * square, 0.0
    return 1 / 3 * 6 / 7 * square, 1 / 5 * 30 / 31 * square * square, -(m / 8 + square / 16) * 8 / 7


@inlined
def reached_up_to(u: float, value: float, below: float, target: Target) -> float:
    """The antiderivative of `reaches`."""
    if target.rounding == STOCHASTIC:
        ramp = min(max(u - (value - below), 0.0), below)
        return ramp**2 / (2 * below) + max(u - value, 0.0)
    return max(u - (value if target.rounding == TOWARD_ZERO else value - below / 2), 0.0)


@inlined
def reached_within(low: float, high: float, value: float, below: float, target: Target) -> float:
    """The mean of `reaches` over [low, high)."""
    reached = reached_up_to(high, value, below, target) - reached_up_to(low, value, below, target)
    return min(max(reached / (high - low), 0.0), 1.0)


@inlined
def over_interval(low: float, high: float, target: Target) -> tuple[float, float, float, float, float, float]:
    """`Grid.over` of one interval."""
    width, largest = high - low, target.largest
    up = antiderivatives(min(high, largest), target)
    down = antiderivatives(min(low, largest), target)
    squared, fourth, product = (up[0] - down[0]) / width, (up[1] - down[1]) / width, (up[2] - down[2]) / width
    if high > largest:
        a, b = max(low - largest, 0.0), high - largest
        share = (b - a) / width
        both, ends = a * b, a * a + b * b
        squares = ends + both
        squared += share * (squares / 3)
        fourth += share * ((ends * squares - both * both) / 5)
        product += share * (-largest * (a + b) / 2 - squares / 3)
    return outcome(
        reached_within(low, high, target.step, target.step, target),
        reached_within(low, high, target.normal, target.step, target),
        reached_within(low, high, largest + target.top, target.top, target),
        squared,
        fourth,
        product,
        target,
    )


@inlined
def over_lattice(
    edge: float, end: float, low: float, high: float, bits: int, finest: float, scale: float, target: Target
) -> tuple[float, float, float, float, float, float]:
    """`Bins._of_lattice_points` of one bin from `edge` to `end`: the mean over the lattice points in it."""
    points = 1 << (min(max(bits, BIN_BITS), LATTICE_BITS) - BIN_BITS)
    apart = (end - edge) / points
    if target.rounding == NEAREST:
        found, sums = _nearest_over_points(edge, apart, points, low, high, finest, scale, target)
    else:
        found, sums = _over_points(edge, apart, points, low, high, finest, scale, target)
    if found == 0:
        return at_point(in_units(low, scale, target), target)
    a, b, c, d, e, f = sums
    return a / found, b / found, c / found, d / found, e / found, f / found


@summing
def _over_points(
    edge: float, apart: float, points: int, low: float, high: float, finest: float, scale: float, target: Target
) -> tuple[float, tuple[float, float, float, float, float, float]]:
    """How many points of the lattice elements can have, and the sums of the six numbers over these."""
    a = b = c = d = e = f = found = 0.0
    for j in range(points):
        value = edge + apart * j
        here = _is_there(value, low, high, finest)
        parts = at_point(in_units(value, scale, target), target)
        found += 1.0 if here else 0.0
        a += parts[0] if here else 0.0
        b += parts[1] if here else 0.0
        c += parts[2] if here else 0.0
        d += parts[3] if here else 0.0
        e += parts[4] if here else 0.0
        f += parts[5] if here else 0.0
    return found, (a, b, c, d, e, f)


@summing
def _nearest_over_points(
    edge: float, apart: float, points: int, low: float, high: float, finest: float, scale: float, target: Target
) -> tuple[float, tuple[float, float, float, float, float, float]]:
    """The same under rounding to nearest, without branches, so that the loop becomes vector instructions."""
    largest, same = target.largest, SAME * target.largest if target.scaled else -1.0
    lost = 1.0 if target.saturates else np.inf
    under = sub = over = squared = fourth = product = found = 0.0
    for j in range(points):
        value = edge + apart * j
        weight = 1.0 if _is_there(value, low, high, finest) else 0.0
        u = value / scale
        u = largest if abs(u - largest) <= same else u
        within = min(u, largest)
        beyond = u - within
        spacing = octave_of(within, target) * target.mantissa_step
        w = within * one_over(spacing)
        error = (np.rint(w) - w) * spacing
        square, square_beyond = error * error, beyond * beyond
        nonzero, normal = 1.0 if u >= target.to_step else 0.0, 1.0 if u >= target.to_normal else 0.0
        too_large = u >= target.to_beyond
        under += weight * (1 - nonzero)
        sub += weight * max(nonzero - normal, 0.0)
        over += weight if too_large else 0.0
        squared += weight * (square + square_beyond)
        fourth += weight * (square * square + square_beyond * square_beyond)
        product += weight * (within * error - u * beyond)
        found += weight
    if over > 0:
        squared, fourth, product = squared * lost, fourth * lost, np.inf if lost == np.inf else product
    return found, (under, sub, over, squared, fourth, product)


@inlined
def _is_there(value: float, low: float, high: float, finest: float) -> bool:
    """Whether an element can have this value of the lattice."""
    finer = value / finest
    return low <= value and value <= high and (finest <= SMALLEST or np.floor(finer) == finer)


@inlined
def is_cut(low: float, high: float, target: Target) -> bool:
    """`Grid.is_cut` of one interval."""
    if target.rounding == STOCHASTIC:
        return False
    half = 0.0 if target.rounding == TOWARD_ZERO else 0.5
    first, second = target.step - half * target.step, target.normal - half * target.step
    third = target.largest + target.top - half * target.top
    return low <= first <= high or low <= second <= high or low <= third <= high


@inlined
def in_bin(
    edge: float, end: float, low: float, high: float, bits: int, finest: float, scale: float, target: Target
) -> tuple[float, float, float, float, float, float]:
    """`Bins.outcomes` of one bin of the sketch, from `edge` to `end`, whose elements lie from `low` to `high`."""
    u, v = low / scale, high / scale
    spacing = octave_of(u, target) * target.mantissa_step
    lattice = lattice_of(edge, bits, finest) / scale
    if is_power_of_two(scale) and lattice >= spacing and v <= target.largest:
        return 0.0, 1.0 if low < target.normal * scale else 0.0, 0.0, 0.0, 0.0, 0.0
    finer = FINER_TOWARD_ZERO if target.rounding == TOWARD_ZERO else LATTICE_FINER
    coarse = bits <= ALWAYS_BITS or lattice * finer > spacing or is_cut(u, v, target)
    if (coarse and bits <= LATTICE_BITS) or high <= low:
        return over_lattice(edge, end, low, high, bits, finest, scale, target)
    return over_interval(u, v, target)
