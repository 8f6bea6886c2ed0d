"""The CPU's loops for casting: one read and one write an element, scaling, rounding and overflow in between.

torch's own dtype casts would need a pass each for the scale, the limit, the cast, the way back and the scale
again, and decoding e4m3fn alone takes 8 times a clone (torch 2.13, CPU, 4M values). These loops have no
branch and 32-bit integers only, so that the compiler makes vector code of them, and allocate nothing.

Nearest-even comes from the adder itself: with c = 2^23·spacing, |x| + c has no bits below the spacing, and
the sum is rounded to even; c is taken off again. For formats with float32's own exponents c would overflow.
Their values are float32's with the last bits zero, so the bits are rounded as an integer, and a carry out of
the mantissa is what the exponent needs.

NaN compares as False throughout and so comes out as NaN.

Tiles that share a scale are read twice, the second time from the cache: largest magnitude, scale, rounding, and on
to the next. What the scales are is said in `scaling.py`.
"""

from __future__ import annotations

from functools import cache
from math import frexp
from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from probes import formats, scaling
from probes.formats import Format
from probes.kernel_cache import keep_to_sources
from probes.scaling import E4M3, E8M0_EXPONENTS, SMALLEST_EXPONENT, Scale, largest_exponent, largest_scale
from probes.threads import threads_for

Row = NDArray[np.float32]

_EXPONENT = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_MANTISSA_64 = np.int64((1 << 52) - 1)

_NEAREST, _NEAREST_BY_BITS, _NEAREST_BELOW_NORMAL, _STOCHASTIC, _TOWARD_ZERO = range(5)
_STRIP = 1024  # scales that are written out at a time, one for each value: they stay in the first-level cache

_CURRENT, _POWER_OF_TWO_UP, _POWER_OF_TWO_OCP, _TWO_LEVELS = range(4)

_E4M3_SMALLEST, _E4M3_LARGEST = np.float32(E4M3.smallest_subnormal), np.float32(E4M3.largest)
_E4M3_OCTAVE, _E4M3_ADDER = np.float32(2.0**E4M3.emin), np.float32(2.0 ** (23 - E4M3.mantissa_bits))


class _Rounding(NamedTuple):
    """What the loops need of a format, a rounding and a way to overflow."""

    mode: int
    floats: tuple[np.float32, ...]
    """2^emin; what the octave is multiplied by, for the adder or for the spacing; the magnitude from which nothing
    needs rounding; the largest value and the largest negative magnitude; and what is beyond those two"""
    integers: tuple[np.int32, ...]
    """For rounding by bits: mantissa bits to drop, a half of the last one kept less one, and whether to make ties even.
    """


class _Scaling(NamedTuple):
    """What the loops need to make a scale of a largest magnitude."""

    rule: int
    floats: tuple[np.float32, ...]
    """The format's largest value; the smallest and the largest float32 scale."""
    integers: tuple[np.int64, ...]
    """Exponents: what is taken off, the smallest and the largest; the mantissa field that must be exceeded."""


def finite_amax(values: Row) -> float:
    """Largest finite magnitude of a contiguous row; 0 where there is none."""
    bits, threads = values.view(np.int32), threads_for(values.size)
    largest = _finite_amax(bits) if threads == 1 else _finite_amax_shared(threads, bits)
    return float(np.int32(largest).view(np.float32))


def scale_of(amax: float, scale: Scale, target: Format) -> float:
    """The scale of a tensor of this largest magnitude, a float32: `scaling.scale_of` for one number."""
    return float(_scale(np.float32(amax), (*_scaling(scale, target), np.float32(1))))


def round_values(
    values: Row, out: Row, scale: float, target: Format, rounding: str, saturate: bool, stream: int = 0
) -> None:
    """out = cast(values / scale)·scale over contiguous rows. Not in place: the loops are vector code only if apart."""
    how, threads = (*_rounding(target, rounding, saturate), _keys(stream)), threads_for(values.size)
    if threads == 1:
        _round_row(values, out, 0, values.size, np.float32(scale), how)
    else:
        _round_row_shared(threads, values, out, np.float32(scale), how)


def round_tiles(
    values: Row,
    out: Row,
    shape: tuple[int, int],
    tile: tuple[int, int],
    scale: Scale,
    target: Format,
    rounding: str,
    saturate: bool,
    stream: int = 0,
    over_all: float = 1.0,
) -> None:
    """The same over a matrix in row order, with a scale for each tile of `tile` rows and columns.

    over_all  for nvfp4, the scale over all tiles
    """
    how, scaled = (
        (*_rounding(target, rounding, saturate), _keys(stream)),
        (*_scaling(scale, target), np.float32(over_all)),
    )
    threads, (rows, columns) = threads_for(values.size), shape
    height, width = min(tile[0], rows), min(tile[1], columns)
    if height == 1:
        if columns % width == 0:
            rows, columns = 1, values.size  # no tile reaches over the end of a row, so all rows are one
        blocks = rows * -(-columns // width)
        if threads == 1:
            _round_blocks(values, out, 0, blocks, columns, width, scaled, how)
        else:
            _round_blocks_shared(threads, values, out, blocks, columns, width, scaled, how)
    elif height < rows:
        bands = -(-rows // height)
        if threads == 1:
            _round_bands(values, out, 0, bands, columns, height, width, scaled, how)
        else:
            _round_bands_shared(threads, values, out, bands, columns, height, width, scaled, how)
    elif threads == 1:
        _round_bands(values, out, 0, 1, columns, height, width, scaled, how)
    else:
        largest = _columns_amax_shared(threads, values.view(np.int32), rows, columns)
        scales = _scales_of(largest, width, scaled)
        _round_rows_shared(threads, values, out, rows, scales, how)


@cache
def _rounding(target: Format, rounding: str, saturate: bool) -> _Rounding:
    mode = {"stochastic": _STOCHASTIC, "zero": _TOWARD_ZERO}.get(rounding, _NEAREST)
    factor = 2.0 ** (23 - target.mantissa_bits) if mode == _NEAREST else 2.0**-target.mantissa_bits
    if mode == _NEAREST and target.emin == SMALLEST_EXPONENT:
        mode = _NEAREST_BY_BITS
    elif mode == _NEAREST and target.mantissa_bits == 23:
        mode, factor = _NEAREST_BELOW_NORMAL, 1.0
    with np.errstate(over="ignore"):
        ceiling = np.float32(-target.lowest if saturate else 2.0 ** (target.emax + 1))
    assert saturate or target.overflow is not None  # Cast refuses to be anything but saturating then
    overs = (target.largest, -target.lowest) if saturate else (target.overflow, target.overflow)
    floats = (2.0**target.emin, factor, ceiling, target.largest, -target.lowest, *overs)
    unused = 23 - target.mantissa_bits
    below_half = (1 << unused >> 1) - (unused > 0)
    return _Rounding(
        mode,
        tuple(np.float32(value) for value in floats),
        tuple(np.int32(n) for n in (unused, below_half, unused > 0)),
    )


@cache
def _scaling(scale: Scale, target: Format) -> _Scaling:
    mantissa, exponent = frexp(target.largest)
    smallest, highest = E8M0_EXPONENTS
    highest = min(highest, largest_exponent(target))
    if scale.rule == "e8m0":
        rule, taken_off, above = _POWER_OF_TWO_OCP, target.emax, 0
    elif scale.rule == "e8m0up" or scale.power_of_two:
        rule, taken_off, above = _POWER_OF_TWO_UP, exponent - 1, int((2 * mantissa - 1) * 2**52)
        smallest = smallest if scale.rule == "e8m0up" else SMALLEST_EXPONENT
    else:
        rule, taken_off, above = (_TWO_LEVELS if scale.rule == "nvfp4" else _CURRENT), 0, 0
    floats = (target.largest, 2.0**SMALLEST_EXPONENT, largest_scale(target.largest_magnitude))
    return _Scaling(
        rule,
        tuple(np.float32(value) for value in floats),
        tuple(np.int64(n) for n in (taken_off, smallest, highest, above)),
    )


def _keys(stream: int) -> tuple[np.uint32, np.uint32]:
    return np.uint32(stream & 0xFFFFFFFF), np.uint32(stream >> 32 & 0xFFFFFFFF)


@njit(cache=True, nogil=True, error_model="numpy")
def _finite_amax(bits):  # type: ignore[no-untyped-def]
    largest = np.int32(0)
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        largest = max(largest, magnitude if magnitude < _EXPONENT else np.int32(0))
    return largest


@njit(cache=True, nogil=True, error_model="numpy")
def _round_row(values, out, first, last, scale, how):  # type: ignore[no-untyped-def]
    scales = np.full(min(_STRIP, last - first), scale)
    for start in range(first, last, _STRIP):
        stop = min(start + _STRIP, last)
        _round(values[start:stop], out[start:stop], scales[: stop - start], start, how)


@njit(cache=True, nogil=True, error_model="numpy")
def _round_blocks(  # type: ignore[no-untyped-def]
    values, out, first, last, columns, width, scaled, how
):
    """Tiles of one row: as many at a time as a strip of scales holds."""
    per_row, at_once = -(-columns // width), max(_STRIP // width, 1)
    scales = np.empty(at_once * min(width, _STRIP), dtype=np.float32)
    bits = values.view(np.int32)
    index = first
    while index < last:
        row, block = index // per_row, index % per_row
        blocks = min(at_once, per_row - block, last - index)
        start, stop = row * columns + block * width, row * columns + min((block + blocks) * width, columns)
        if width > _STRIP:
            largest = np.int32(_finite_amax(bits[start:stop])).view(np.float32)
            scale = _scale(largest, scaled)
            _round_row(values, out, start, stop, scale, how)
        else:
            for left in range(start, stop, width):
                right = min(left + width, stop)
                largest = np.int32(_finite_amax(bits[left:right])).view(np.float32)
                scales[left - start : right - start] = _scale(largest, scaled)
            _round(values[start:stop], out[start:stop], scales[: stop - start], start, how)
        index += blocks


@njit(cache=True, nogil=True, error_model="numpy")
def _round_bands(  # type: ignore[no-untyped-def]
    values, out, first, last, columns, height, width, scaled, how
):
    """Tiles of several rows: all that are beside each other at a time."""
    rows, bits = values.size // columns, values.view(np.int32)
    for band in range(first, last):
        top, bottom = band * height, min((band + 1) * height, rows)
        scales = _scales_of(_columns_amax(bits, top, bottom, columns), width, scaled)
        _round_rows(values, out, top, bottom, scales, how)


@njit(cache=True, nogil=True, error_model="numpy")
def _round_rows(values, out, first, last, scales, how):  # type: ignore[no-untyped-def]
    """Rows that share a scale in each column; short ones several at a time."""
    columns, at_once = scales.size, max(_STRIP // scales.size, 1)
    strip = np.empty(columns * max(min(at_once, last - first), 1), dtype=np.float32)
    for start in range(0, strip.size, columns):
        strip[start : start + columns] = scales
    for start in range(first * columns, last * columns, strip.size):
        stop = min(start + strip.size, last * columns)
        _round(values[start:stop], out[start:stop], strip[: stop - start], start, how)


@njit(cache=True, nogil=True, error_model="numpy")
def _columns_amax(bits, first, last, columns):  # type: ignore[no-untyped-def]
    """Bit patterns [columns] of each column's largest finite magnitude over some rows; short ones several at a time."""
    strip = np.zeros(columns * max(min(_STRIP // columns, last - first), 1), dtype=np.int32)
    for start in range(first * columns, last * columns, strip.size):
        rows = bits[start : min(start + strip.size, last * columns)]
        for i in range(rows.size):
            magnitude = np.int32(rows[i] & _MAGNITUDE)
            strip[i] = max(strip[i], magnitude if magnitude < _EXPONENT else np.int32(0))
    largest = strip[:columns]
    for start in range(columns, strip.size, columns):
        for column in range(columns):
            largest[column] = max(largest[column], strip[start + column])
    return largest


@njit(cache=True, nogil=True, error_model="numpy")
def _scales_of(largest, width, scaled):  # type: ignore[no-untyped-def]
    """Scales [columns] of tiles of this many columns each."""
    scales = np.empty(largest.size, dtype=np.float32)
    if width == 1:
        for column in range(largest.size):
            scales[column] = _scale(np.int32(largest[column]).view(np.float32), scaled)
        return scales
    for left in range(0, largest.size, width):
        tile = largest[left : left + width]
        scales[left : left + width] = _scale(np.int32(tile.max()).view(np.float32), scaled)
    return scales


# The same, each thread with a share of its own. numba hands threads no tuple of tuples, so these are taken apart.


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _finite_amax_shared(shares, bits):  # type: ignore[no-untyped-def]
    largest = np.zeros(shares, dtype=np.int32)
    for share in prange(shares):
        first, last = _share(share, shares, bits.size)
        largest[share] = _finite_amax(bits[first:last])
    return largest.max()


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _round_row_shared(shares, values, out, scale, how):  # type: ignore[no-untyped-def]
    mode, floats, integers, keys = how
    for share in prange(shares):
        first, last = _share(share, shares, values.size)
        _round_row(values, out, first, last, scale, (mode, floats, integers, keys))


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _round_blocks_shared(shares, values, out, blocks, columns, width, scaled, how):  # type: ignore[no-untyped-def]
    (rule, limits, exponents, over_all), (mode, floats, integers, keys) = scaled, how
    for share in prange(shares):
        first, last = _share(share, shares, blocks)
        a_scale, a_value = (rule, limits, exponents, over_all), (mode, floats, integers, keys)
        _round_blocks(values, out, first, last, columns, width, a_scale, a_value)


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _round_bands_shared(  # type: ignore[no-untyped-def]
    shares, values, out, bands, columns, height, width, scaled, how
):
    (rule, limits, exponents, over_all), (mode, floats, integers, keys) = scaled, how
    for share in prange(shares):
        first, last = _share(share, shares, bands)
        a_scale, a_value = (rule, limits, exponents, over_all), (mode, floats, integers, keys)
        _round_bands(values, out, first, last, columns, height, width, a_scale, a_value)


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _columns_amax_shared(shares, bits, rows, columns):  # type: ignore[no-untyped-def]
    largest = np.zeros((shares, columns), dtype=np.int32)
    for share in prange(shares):
        first, last = _share(share, shares, rows)
        largest[share] = _columns_amax(bits, first, last, columns)
    for share in range(1, shares):
        largest[0] = np.maximum(largest[0], largest[share])
    return largest[0]


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _round_rows_shared(shares, values, out, rows, scales, how):  # type: ignore[no-untyped-def]
    mode, floats, integers, keys = how
    for share in prange(shares):
        first, last = _share(share, shares, rows)
        _round_rows(values, out, first, last, scales, (mode, floats, integers, keys))


@njit(cache=True, nogil=True, inline="always")
def _share(share, shares, units):  # type: ignore[no-untyped-def]
    return units * share // shares, units * (share + 1) // shares


@njit(cache=True, nogil=True, error_model="numpy")
def _scale(amax, scaled):  # type: ignore[no-untyped-def]
    """The scale for a largest magnitude."""
    rule, limits, exponents, over_all = scaled
    largest, smallest_scale, largest_scale = limits
    if not amax > 0:
        return np.float32(1)
    if rule == _CURRENT:
        return min(max(amax / largest, smallest_scale), largest_scale)
    if rule == _TWO_LEVELS:
        block = np.float32(min(np.float32(amax / largest) / over_all, _E4M3_LARGEST))
        octave = np.int32(block.view(np.int32) & _EXPONENT).view(np.float32)
        adder = max(octave, _E4M3_OCTAVE) * _E4M3_ADDER
        block = np.float32(max(np.float32(block + adder) - adder, _E4M3_SMALLEST))
        return min(block * over_all, largest_scale)
    taken_off, smallest, highest, above = exponents
    bits = np.float64(amax).view(np.int64)  # float64 has every float32 as a normal number
    power = (bits >> 52) - 1023 - taken_off
    if rule == _POWER_OF_TWO_UP:
        power += np.int64((bits & _MANTISSA_64) > above)
    power = min(max(power, smallest), highest)
    return np.float32(np.int64((power + 1023) << 52).view(np.float64))


@njit(cache=True, nogil=True, error_model="numpy")
def _round(values, out, scales, offset, how):  # type: ignore[no-untyped-def]
    """Each value by its scale; `offset` is the place of the first in the tensor, which its random draw depends on."""
    mode, floats, integers, keys = how
    if mode == _NEAREST:
        _nearest(values, out, scales, floats)
    elif mode == _NEAREST_BY_BITS:
        _nearest_by_bits(values, out, scales, floats, integers)
    elif mode == _NEAREST_BELOW_NORMAL:
        _nearest_below_normal(values, out, scales, floats)
    elif mode == _STOCHASTIC:
        _stochastic(values, out, scales, np.uint32(offset) + keys[0], floats, keys[1])
    else:
        _toward_zero(values, out, scales, floats)


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(values, out, scales, floats):  # type: ignore[no-untyped-def]
    smallest_octave, adder_of_one, ceiling, largest, lowest, beyond, below = floats
    for i in range(values.size):
        value, scale = values[i], scales[i]
        scaled = abs(value / scale)
        magnitude = np.float32(ceiling if scaled > ceiling else scaled)
        octave = np.int32(magnitude.view(np.int32) & _EXPONENT).view(np.float32)
        adder = max(octave, smallest_octave) * adder_of_one
        rounded = (magnitude + adder) - adder
        top, over = (lowest, below) if value < 0 else (largest, beyond)
        out[i] = np.copysign((over if rounded > top else rounded) * scale, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest_by_bits(values, out, scales, floats, integers):  # type: ignore[no-untyped-def]
    _, _, ceiling, largest, _, beyond, _ = floats
    unused, below_half, odd = integers
    for i in range(values.size):
        value, scale = values[i], scales[i]
        scaled = abs(value / scale)
        magnitude = np.float32(ceiling if scaled > ceiling else scaled)
        bits = magnitude.view(np.int32)
        carried = np.int32(bits + below_half + np.int32(np.int32(bits >> unused) & odd))
        rounded = np.int32(np.int32(carried >> unused) << unused).view(np.float32)
        limited = beyond if rounded > largest else rounded
        out[i] = np.copysign((limited if magnitude == magnitude else magnitude) * scale, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest_below_normal(values, out, scales, floats):  # type: ignore[no-untyped-def]
    """For formats with all of float32's mantissa bits, where the adder has no bit left to round a normal value by."""
    adder, _, ceiling, largest, _, beyond, _ = floats
    for i in range(values.size):
        value, scale = values[i], scales[i]
        scaled = abs(value / scale)
        magnitude = np.float32(ceiling if scaled > ceiling else scaled)
        rounded = (magnitude + adder) - adder if magnitude < adder else magnitude
        out[i] = np.copysign((beyond if rounded > largest else rounded) * scale, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _stochastic(values, out, scales, first, floats, second):  # type: ignore[no-untyped-def]
    smallest_octave, relative_spacing, ceiling, largest, lowest, beyond, below = floats
    for i in range(values.size):
        value, scale = values[i], scales[i]
        scaled = abs(value / scale)
        magnitude = np.float32(ceiling if scaled > ceiling else scaled)
        octave = np.int32(magnitude.view(np.int32) & _EXPONENT).view(np.float32)
        spacing = max(octave, smallest_octave) * relative_spacing
        steps = magnitude / spacing
        toward_zero = np.floor(steps)
        draw = _hash(np.uint32(_hash(np.uint32(np.uint32(i) + first)) ^ second)) >> np.uint32(8)
        fraction = (steps - toward_zero) * np.float32(16777216)
        away = np.float32(1) if np.float32(np.int32(draw)) < fraction else np.float32(0)
        rounded = (toward_zero + away) * spacing
        top, over = (lowest, below) if value < 0 else (largest, beyond)
        out[i] = np.copysign((over if rounded > top or magnitude >= ceiling else rounded) * scale, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _toward_zero(values, out, scales, floats):  # type: ignore[no-untyped-def]
    smallest_octave, relative_spacing, _, largest, lowest, beyond, below = floats
    for i in range(values.size):
        value, scale = values[i], scales[i]
        scaled = abs(value / scale)
        top, over = (lowest, below) if value < 0 else (largest, beyond)
        magnitude = np.float32(top if scaled > top else scaled)
        octave = np.int32(magnitude.view(np.int32) & _EXPONENT).view(np.float32)
        spacing = max(octave, smallest_octave) * relative_spacing
        rounded = np.floor(magnitude / spacing) * spacing
        out[i] = np.copysign((over if abs(value) == np.inf else rounded) * scale, value)


@njit(cache=True, nogil=True, inline="always")
def _hash(z):  # type: ignore[no-untyped-def]
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(15))) * np.uint32(0xD35A2D97))
    return np.uint32(z ^ (z >> np.uint32(15)))


keep_to_sources(_round_row, scaling, formats)
