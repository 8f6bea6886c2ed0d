"""The CPU's loops for casting: one read and one write an element, scaling, rounding and overflow in between.

torch's own dtype casts would need a pass each for the scale, the limit, the cast, the way back and the scale
again, and decoding e4m3fn alone takes 8 times a clone (torch 2.13, CPU, 4M values). These loops have no
branch and 32-bit integers only, so that the compiler makes vector code of them: 2 times a clone, with nothing
allocated.

Nearest-even comes from the adder itself: with c = 1.5·2^23·spacing, x + c has no bits below the spacing, and
the sum is rounded to even; c is taken off again. For formats with float32's own exponents c would overflow.
Their values are float32's with the last bits zero, so the bits are rounded as an integer, and a carry out of
the mantissa is what the exponent needs.

NaN compares as False throughout and so comes out as NaN.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from probes.formats import Format

_EXPONENT = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)


def finite_amax(values: NDArray[np.float32]) -> float:
    """Largest finite magnitude of a contiguous row; 0 where there is none."""
    return float(np.int32(_finite_amax(values.view(np.int32))).view(np.float32))


def round_nearest(
    values: NDArray[np.float32], out: NDArray[np.float32], scale: float, target: Format, saturate: bool
) -> None:
    """out = cast(values / scale)·scale over contiguous rows, which may be the same."""
    if target.emin == -126:
        unused = 23 - target.mantissa_bits
        below_half, odd = np.int32((1 << unused >> 1) - (unused > 0)), np.int32(unused > 0)
        _, *limits = _bounds(target, saturate)
        _nearest_by_bits(values, out, np.float32(scale), np.int32(unused), below_half, odd, *limits)
    else:
        one_and_a_half = np.float32(1.5 * 2.0 ** (23 - target.mantissa_bits))
        _nearest(values, out, np.float32(scale), one_and_a_half, *_bounds(target, saturate))


def round_stochastic(
    values: NDArray[np.float32],
    out: NDArray[np.float32],
    scale: float,
    target: Format,
    saturate: bool,
    stream: int,
) -> None:
    """The same with stochastic rounding, on draws as `rounding.dither` makes them. For every format."""
    relative_spacing = np.float32(2.0**-target.mantissa_bits)
    keys = np.uint32(stream & 0xFFFFFFFF), np.uint32(stream >> 32 & 0xFFFFFFFF)
    _stochastic(values, out, np.float32(scale), relative_spacing, *_bounds(target, saturate), *keys)


@cache
def _bounds(target: Format, saturate: bool) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """2^emin; the magnitude from which nothing needs rounding; the largest value; what is beyond it."""
    beyond = target.largest if saturate else target.overflow
    assert beyond is not None  # Cast refuses to be anything but saturating then
    with np.errstate(over="ignore"):
        ceiling = np.float32(target.largest if saturate else 2.0 ** (target.emax + 1))
    return np.float32(2.0**target.emin), ceiling, np.float32(target.largest), np.float32(beyond)


@njit(cache=True, nogil=True, error_model="numpy")
def _finite_amax(bits):  # type: ignore[no-untyped-def]
    largest = np.int32(0)
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        largest = max(largest, magnitude if magnitude < _EXPONENT else np.int32(0))
    return largest


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(  # type: ignore[no-untyped-def]
    values, out, scale, one_and_a_half, smallest_octave, ceiling, largest, beyond
):
    for i in range(values.size):
        value = values[i]
        scaled = abs(value / scale)
        magnitude = np.float32(ceiling if scaled > ceiling else scaled)
        octave = np.int32(magnitude.view(np.int32) & _EXPONENT).view(np.float32)
        adder = max(octave, smallest_octave) * one_and_a_half
        rounded = (magnitude + adder) - adder
        rounded = beyond if rounded > largest else rounded
        out[i] = np.copysign(rounded * scale, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest_by_bits(  # type: ignore[no-untyped-def]
    values, out, scale, unused, below_half, odd, ceiling, largest, beyond
):
    for i in range(values.size):
        value = values[i]
        scaled = abs(value / scale)
        magnitude = np.float32(ceiling if scaled > ceiling else scaled)
        bits = magnitude.view(np.int32)
        carried = np.int32(bits + below_half + np.int32(np.int32(bits >> unused) & odd))
        rounded = np.int32(np.int32(carried >> unused) << unused).view(np.float32)
        limited = beyond if rounded > largest else rounded
        out[i] = np.copysign((limited if magnitude == magnitude else magnitude) * scale, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _stochastic(  # type: ignore[no-untyped-def]
    values, out, scale, relative_spacing, smallest_octave, ceiling, largest, beyond, first, second
):
    for i in range(values.size):
        value = values[i]
        scaled = abs(value / scale)
        magnitude = np.float32(ceiling if scaled > ceiling else scaled)
        octave = np.int32(magnitude.view(np.int32) & _EXPONENT).view(np.float32)
        spacing = max(octave, smallest_octave) * relative_spacing
        steps = magnitude / spacing
        below = np.floor(steps)
        draw = _hash(np.uint32(_hash(np.uint32(np.uint32(i) + first)) ^ second)) >> np.uint32(8)
        fraction = (steps - below) * np.float32(16777216)
        away = np.float32(1) if np.float32(np.int32(draw)) < fraction else np.float32(0)
        rounded = (below + away) * spacing
        rounded = beyond if rounded > largest or magnitude >= ceiling else rounded
        out[i] = np.copysign(rounded * scale, value)


@njit(cache=True, nogil=True, inline="always")
def _hash(z):  # type: ignore[no-untyped-def]
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(15))) * np.uint32(0xD35A2D97))
    return np.uint32(z ^ (z >> np.uint32(15)))
