"""What a cast does to the elements of one bin: `grid.py` and `bins.py` once more, compiled, a bin at a time.

Every function here gives the six numbers of `grid.Expected` in its order, in units of the scale. They are what the
kernel over whole windows (`column_kernels.py`) takes for the bins that it cannot sum in closed form. The format's
figures come as one tuple, `Target`; `tests/test_columns.py` holds these functions equal to the plain ones.
"""

from __future__ import annotations

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
MAGIC = 1.5 * 2.0**52  # added to what is below 2^51 and taken off again, it rounds to the nearest integer

inlined: Callable[..., Any] = njit(cache=True, nogil=True, error_model="numpy", inline="never")


class Target(NamedTuple):
    """A cast as its kernels see it: the format's figures, and how it rounds.

    `bottom` is 2^emin, `step` the spacing below it, `normal` the smallest normal value, `top` the spacing at `largest`.
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

    @classmethod
    def of(cls, cast: Cast) -> Target:
        """That of a cast."""
        target = cast.format
        return cls(
            2.0**-target.mantissa_bits,
            2.0**target.emin,
            target.smallest_subnormal,
            target.smallest_normal,
            target.largest,
            target.largest_spacing,
            _ROUNDINGS[cast.rounding],
            cast.saturate or cast.rounding == "zero",
            cast.scale is not None,
        )


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
def lattice_of(place: int, bits: int, finest: float) -> float:
    """What a bin's elements are multiples of."""
    octave = 2.0 ** float((place >> BIN_BITS) - _OCTAVE_BIAS)
    return max(octave * 2.0 ** -float(bits), finest)


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
def reaches(u: float, value: float, below: float, target: Target) -> float:
    """Probability that u rounds to `value` or more, `below` being the spacing under it."""
    if target.rounding == STOCHASTIC:
        return min(max(u - (value - below), 0.0), below) / below
    if target.rounding == TOWARD_ZERO:
        return 1.0 if u >= value else 0.0
    step = value - below / 2
    if value / below % 2 == 0:  # a tie goes to the even value
        return 1.0 if u >= step else 0.0
    return 1.0 if u > step else 0.0


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
    w = within / spacing
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
        reaches(u, target.step, target.step, target),
        reaches(u, target.normal, target.step, target),
        reaches(u, target.largest + target.top, target.top, target),
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
    if rounding == STOCHASTIC:
        return (
            n / 6 + t * t * (1 / 2 - t / 3),
            n / 15 + t * t * (1 / 2 - t * (4 / 3 - t * (3 / 2 - t * 3 / 5))),
            0.0,
        )
    cube = t * t * t
    if rounding == TOWARD_ZERO:
        return n / 3 + cube / 3, n / 5 + cube * t * t / 5, n * (1 - n) / 4 - n / 3 - n * t * t / 2 - cube / 3
    return n / 12 + cube / 3, n / 80 + cube * t * t / 5, n / 24 - n * t * t / 2 - cube / 3


@inlined
def antiderivatives(u: float, target: Target) -> tuple[float, float, float]:
    """`Grid._antiderivatives` of one magnitude."""
    octave = octave_of(u, target)
    m = target.mantissa_step
    spacing = octave * m
    first, second, third = in_cells(u / spacing, target.rounding)
    cube, octave_square, bottom_square = spacing * spacing * spacing, octave * octave, target.bottom * target.bottom
    cubes = octave_square * octave - bottom_square * target.bottom
    fifths = octave_square * octave_square * octave - bottom_square * bottom_square * target.bottom
    if target.rounding == NEAREST:
        a, b, c = 1 / 12, 1 / 80, m * m / 24 * 6 / 7
    elif target.rounding == STOCHASTIC:
        a, b, c = 1 / 6, 1 / 15, 0.0
    else:
        a, b, c = 1 / 3, 1 / 5, -(m / 8 + m * m / 16) * 8 / 7
    return (
        first * cube - a * m * m * 6 / 7 * cubes,
        second * cube * spacing * spacing - b * m * m * m * m * 30 / 31 * fifths,
        third * cube - c * cubes,
    )


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
    place: int, low: float, high: float, bits: int, finest: float, scale: float, target: Target, edges: Any
) -> tuple[float, float, float, float, float, float]:
    """`Bins._of_lattice_points` of one bin: the mean over the lattice points in it."""
    points = 1 << (min(max(bits, BIN_BITS), LATTICE_BITS) - BIN_BITS)
    edge, end = edges[place], edges[place + 1]
    a = b = c = d = e = f = 0.0
    found = 0
    for j in range(points):
        value = edge + (end - edge) / points * j
        if value < low or value > high or (finest > SMALLEST and value % finest != 0):
            continue
        found += 1
        parts = at_point(in_units(value, scale, target), target)
        a, b, c = a + parts[0], b + parts[1], c + parts[2]
        d, e, f = d + parts[3], e + parts[4], f + parts[5]
    if found == 0:
        return at_point(in_units(low, scale, target), target)
    return a / found, b / found, c / found, d / found, e / found, f / found


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
    place: int, low: float, high: float, bits: int, finest: float, scale: float, target: Target, edges: Any
) -> tuple[float, float, float, float, float, float]:
    """`Bins.outcomes` of one bin, whatever lies in it."""
    u, v = low / scale, high / scale
    spacing = octave_of(u, target) * target.mantissa_step
    lattice = lattice_of(place, bits, finest) / scale
    if is_power_of_two(scale) and lattice >= spacing and v <= target.largest:
        return 0.0, 1.0 if low < target.normal * scale else 0.0, 0.0, 0.0, 0.0, 0.0
    finer = FINER_TOWARD_ZERO if target.rounding == TOWARD_ZERO else LATTICE_FINER
    coarse = bits <= ALWAYS_BITS or lattice * finer > spacing or is_cut(u, v, target)
    if (coarse and bits <= LATTICE_BITS) or high <= low:
        return over_lattice(place, low, high, bits, finest, scale, target, edges)
    return over_interval(u, v, target)
