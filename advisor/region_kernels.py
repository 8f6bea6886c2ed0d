"""Sums over the bins of one region of a cast's grid, for `column_kernels.py`: an even part, octaves, or bin by bin."""

from __future__ import annotations

from typing import Any

import numpy as np

from advisor.bins import ALWAYS_BITS, FINER_TOWARD_ZERO, LATTICE_BITS, LATTICE_FINER
from advisor.layout_kernels import (
    BEFORE,
    COUNT,
    EDGE,
    ENERGY,
    FOURTH,
    OCTAVE,
    PER_WIDTH,
    SHIFT,
    UNEVEN,
    powers,
)
from advisor.outcome_kernels import (
    NEAREST,
    STOCHASTIC,
    TOWARD_ZERO,
    Target,
    antiderivatives,
    bin_of,
    in_bin,
    in_cells,
    inlined,
    is_power_of_two,
    lattice_of,
    not_inlined,
    octave_of,
    of_octaves,
    one_over,
    summing,
    two_to,
)

# What is summed up for a slot and cast: rates over all steps; errors of the step at hand, in units of its scale; and
# errors over all steps, energies in recorded units, `GAINED_*` without the loss scale.
UNDER, SUB, OVER, SPREAD_UNDER, SPREAD_SUB, SPREAD_OVER, RATE_SHIFT = range(7)
ERROR, BIAS, VARIANCE, ENERGY_SHIFT = range(7, 11)
TOTAL_ERROR, TOTAL_VARIANCE, TOTAL_SHIFT, GAINED_ERROR, GAINED_BIAS = range(11, 16)
SUMS = 16


@inlined
def add_even(
    start: int,
    end: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    per_scale: float,
    target: Target,
    edges: Any,
    first: float,
    second: float,
    row: Any,
) -> None:
    """Bins of the even part of the grid, taken as continuous. `first`, `second`: from where on magnitudes are not
    zero, and not subnormal; `per_scale`: 1 / scale."""
    if start < end and scratch[PER_WIDTH, start] == 0:
        add_each(start, start + 1, scratch, base, bits, finest, scale, target, edges, row)
        start += 1
    if start < end and scratch[PER_WIDTH, end - 1] == 0:
        add_each(end - 1, end, scratch, base, bits, finest, scale, target, edges, row)
        end -= 1
    if start >= end:
        return
    per_cell = scale * target.step
    to_cells = per_scale * one_over(target.step)
    _add_moments(row, _sums_of_cells(start, end, to_cells, per_cell, target.rounding, scratch), target.step)
    if target.rounding == STOCHASTIC:
        _add_ramp(start, end, to_cells, target.normal / target.step, scratch, row)
        return
    whole = start  # from here on bins are subnormal as a whole
    while whole < end and scratch[EDGE, whole] < first:
        whole += 1
    stop = whole
    if second > first:
        stop = min(max(place_of(second, base, end), whole), end)
        row[SUB] += scratch[BEFORE, stop] - scratch[BEFORE, whole]
    _add_cut(start, whole, scratch, first, second, row)
    _add_cut(max(stop, whole), min(stop + 1, end), scratch, first, second, row)


@summing
def _sums_of_cells(
    start: int, end: int, to_cells: float, per_cell: float, rounding: int, scratch: Any
) -> tuple[float, float, float, float]:
    """Sums over bins of the even grid of spacing 1, which is `per_cell` in the tensor's units: of δ², of v·δ, of the
    variance of δ², and of that where elements lie unevenly."""
    error, bias, spread, shift = 0.0, 0.0, 0.0, 0.0
    one, down = np.uint64(1), in_cells(scratch[EDGE, start] * to_cells, rounding)
    for i in range(np.uint64(start), np.uint64(end)):
        up = in_cells(scratch[EDGE, i + one] * to_cells, rounding)
        per = scratch[PER_WIDTH, i] * per_cell
        squared = (up[0] - down[0]) * per
        variance = (up[1] - down[1]) * per - squared * squared
        variance = variance if variance > 0 else 0.0
        error += scratch[COUNT, i] * squared
        bias += scratch[COUNT, i] * ((up[2] - down[2]) * per)
        spread += scratch[COUNT, i] * variance
        if rounding == STOCHASTIC:
            variance = min(variance, _by_place(1 / per, 1.0))
        shift += scratch[UNEVEN, i] * variance
        down = up
    return error, bias, spread, shift


@inlined
def _add_moments(row: Any, sums: tuple[float, float, float, float], unit: float) -> None:
    """Add such sums, errors in a unit that is given in units of the scale."""
    (error, bias, spread, shift), square = sums, unit * unit
    row[ERROR] += error * square
    row[BIAS] += bias * square
    row[VARIANCE] += spread * square * square
    row[ENERGY_SHIFT] += shift * square * square


@inlined
def _add_cut(start: int, end: int, scratch: Any, first: float, second: float, row: Any) -> None:
    """Rates of the few bins that a step of the grid cuts."""
    for i in range(start, end):
        if scratch[COUNT, i] == 0:
            continue
        per = scratch[PER_WIDTH, i]
        nonzero = min(max((scratch[EDGE, i + 1] - max(scratch[EDGE, i], first)) * per, 0.0), 1.0)
        normal = min(max((scratch[EDGE, i + 1] - max(scratch[EDGE, i], second)) * per, 0.0), 1.0)
        under, sub = 1 - nonzero, max(nonzero - normal, 0.0)
        _add_rates(row, scratch[COUNT, i], under, sub, 0.0)
        if 0 < under < 1 or 0 < sub < 1:
            row[RATE_SHIFT] += np.sqrt(scratch[UNEVEN, i])


@inlined
def _add_ramp(start: int, end: int, to_cells: float, normal_at: float, scratch: Any, row: Any) -> None:
    """Rates of stochastic rounding, which rise and fall in ramps up to the smallest normal value, given in cells."""
    under, sub, spread_under, spread_sub, shift = _sums_of_ramps(start, end, to_cells, normal_at, scratch)
    row[UNDER] += under
    row[SUB] += sub
    row[SPREAD_UNDER] += spread_under
    row[SPREAD_SUB] += spread_sub
    row[RATE_SHIFT] += shift


@summing
def _sums_of_ramps(
    start: int, end: int, to_cells: float, normal_at: float, scratch: Any
) -> tuple[float, float, float, float, float]:
    """Sums of counts times the two rates, of these times what is left to one, and of what uneven bins may move."""
    under, sub, spread_under, spread_sub, shift = 0.0, 0.0, 0.0, 0.0, 0.0
    one = np.uint64(1)
    for i in range(np.uint64(start), np.uint64(end)):
        w, v = scratch[EDGE, i] * to_cells, scratch[EDGE, i + one] * to_cells
        count = scratch[COUNT, i] if w < normal_at else 0.0
        nonzero = min((_ramp_up_to(v, 1.0) - _ramp_up_to(w, 1.0)) / (v - w), 1.0)
        normal = min((_ramp_up_to(v, normal_at) - _ramp_up_to(w, normal_at)) / (v - w), 1.0)
        rate, other = 1 - nonzero, max(nonzero - normal, 0.0)
        under += count * rate
        sub += count * other
        spread_under += count * (rate * (1 - rate))
        spread_sub += count * (other * max(1 - other, 0.0))
        cut = np.sqrt(scratch[UNEVEN, i]) * min(v - w, 1.0)
        shift += cut if count > 0 and ((rate > 0 and rate < 1) or (other > 0 and other < 1)) else 0.0
    return under, sub, spread_under, spread_sub, shift


@inlined
def _ramp_up_to(w: float, value: float) -> float:
    """`reached_up_to` in cells."""
    ramp = min(max(w - (value - 1), 0.0), 1.0)
    return ramp * ramp / 2 + max(w - value, 0.0)


@inlined
def add_octaves(
    start: int,
    end: int,
    n: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    per_scale: float,
    target: Target,
    edges: Any,
    row: Any,
) -> None:
    """Bins of whole octaves of the grid, from `start` to `end`: eight stand for all. None of their rates is other than
    zero."""
    if start >= end:
        return
    finer = FINER_TOWARD_ZERO if target.rounding == TOWARD_ZERO else LATTICE_FINER
    aligned = is_power_of_two(scale)
    if bits > LATTICE_BITS and aligned and two_to(-bits) >= target.mantissa_step:
        return  # on the grid
    last = min(start + OCTAVE, end)
    may_show = bits <= ALWAYS_BITS or (bits <= LATTICE_BITS and two_to(-bits) * finer > target.mantissa_step / 2)
    if not may_show and end >= n - 1:
        unit, m = octave_of(scratch[EDGE, start] * per_scale, target), target.mantissa_step
        width, to_units, cells = scale * unit, per_scale * one_over(unit), one_over(m)
        # A rounding that the compiler knows keeps the loop without branches.
        if target.rounding == NEAREST:
            sums = _sums_of_octaves(start, last, to_units, width, m, cells, NEAREST, scratch)
        elif target.rounding == STOCHASTIC:
            sums = _sums_of_octaves(start, last, to_units, width, m, cells, STOCHASTIC, scratch)
        else:
            sums = _sums_of_octaves(start, last, to_units, width, m, cells, TOWARD_ZERO, scratch)
        _add_moments(row, sums, unit)
        return
    for i in range(start, last):
        _add_eighth(i, end, n, scratch, base, bits, finest, scale, target, edges, float(finer), aligned, row)


@summing
def _sums_of_octaves(
    start: int, end: int, to_units: float, unit: float, m: float, cells: float, rounding: int, scratch: Any
) -> tuple[float, float, float, float]:
    """The same sums over normal values, in units of the octave of the first edge: the bins from `start` to `end`, at
    most eight, with those of all higher octaves. `m`: the spacing at 1. Reciprocals are given beside what they are of,
    lest a loop divide."""
    error, bias, spread, shift = 0.0, 0.0, 0.0, 0.0
    one, whole = np.uint64(1), of_octaves(m, rounding)
    down = _in_octaves(scratch[EDGE, start] * to_units, m, cells, rounding, whole)
    for i in range(np.uint64(start), np.uint64(end)):
        low, high = scratch[EDGE, i] * to_units, scratch[EDGE, i + one] * to_units
        up = _in_octaves(high, m, cells, rounding, whole)
        per = scratch[PER_WIDTH, i] * unit
        squared = (up[0] - down[0]) * per
        variance = (up[1] - down[1]) * per - squared * squared
        variance = variance if variance > 0 else 0.0
        error += scratch[ENERGY, i] * squared
        bias += scratch[ENERGY, i] * ((up[2] - down[2]) * per)
        spread += scratch[FOURTH, i] * variance
        if rounding == STOCHASTIC:
            wide = 1.0 if low < 2 else 2.0
            variance = min(variance, _by_place((high - low) * cells / wide, wide * m))
        shift += scratch[SHIFT, i] * variance
        down = up
    return error, bias, spread, shift


@inlined
def _in_octaves(
    u: float, m: float, cells: float, rounding: int, whole: tuple[float, float, float]
) -> tuple[float, float, float]:
    """`antiderivatives` of a magnitude from 1 to 8, all of it normal, without branches."""
    octave = 1.0 if u < 2 else 2.0 if u < 4 else 4.0
    per_octave = 1.0 if u < 2 else 0.5 if u < 4 else 0.25
    first, second, third = in_cells(u * per_octave * cells, rounding)
    square, spacing = octave * octave, octave * m
    cubes, volume = square * octave, spacing * spacing * spacing
    return (
        first * volume - whole[0] * cubes,
        second * volume * spacing * spacing - whole[1] * cubes * square,
        third * volume - whole[2] * cubes,
    )


@inlined
def _add_eighth(
    i: int,
    end: int,
    n: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    target: Target,
    edges: Any,
    finer: float,
    aligned: bool,
    row: Any,
) -> None:
    """One of the eight, with the same bins of all higher octaves."""
    low, high = edges[base + i], edges[base + i + 1]
    u, v = low / scale, high / scale
    spacing = octave_of(u, target) * target.mantissa_step
    lattice = lattice_of(low, bits, finest) / scale
    shows = lattice * finer > spacing if bits <= LATTICE_BITS else aligned and lattice >= spacing
    if shows or bits <= ALWAYS_BITS:
        _, _, _, squared, fourth, product = in_bin(low, high, low, high, bits, finest, scale, target)
    else:
        down, up = antiderivatives(u, target), antiderivatives(v, target)
        squared, fourth = (up[0] - down[0]) / (v - u), (up[1] - down[1]) / (v - u)
        product = (up[2] - down[2]) / (v - u)
    variance = max(fourth - squared * squared, 0.0)
    by_place = variance
    if target.rounding == STOCHASTIC:
        by_place = min(variance, _by_place((v - u) / spacing, spacing))
    energy, fourths, shift = scratch[ENERGY, i], scratch[FOURTH, i], scratch[SHIFT, i]
    if end < n - 1:  # what lies beyond the largest value is not meant
        energy = fourths = shift = 0.0
        square = 1.0
        for j in range(i, end, OCTAVE):
            energy += scratch[COUNT, j] * square
            fourths += scratch[COUNT, j] * square * square
            shift += scratch[UNEVEN, j] * square * square
            square *= 4.0
    row[ERROR] += energy * squared
    row[BIAS] += energy * product
    row[VARIANCE] += fourths * variance
    row[ENERGY_SHIFT] += shift * by_place


@inlined
def add_each(
    start: int,
    end: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    target: Target,
    edges: Any,
    row: Any,
) -> None:
    """Bin by bin. A call costs as much as several bins, and most ranges are empty."""
    if start < end:
        _add_each(start, end, scratch, base, bits, finest, scale, target, edges, row)


@inlined
def add_normal(
    start: int,
    end: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    per_scale: float,
    target: Target,
    edges: Any,
    row: Any,
) -> None:
    """Bins of normal values, none beyond the largest, taken as continuous."""
    m = target.mantissa_step
    cells, whole = one_over(m), of_octaves(m, target.rounding)
    for i in range(start, end):
        count, per_width = scratch[COUNT, i], scratch[PER_WIDTH, i]
        if per_width == 0:  # all elements are alike
            add_each(i, i + 1, scratch, base, bits, finest, scale, target, edges, row)
            continue
        unit = octave_of(scratch[EDGE, i] * per_scale, target)
        to_units, per = per_scale * one_over(unit), per_width * (scale * unit)
        low, high = scratch[EDGE, i] * to_units, min(scratch[EDGE, i + 1], target.largest * scale) * to_units
        down = _in_octaves(low, m, cells, target.rounding, whole)
        up = _in_octaves(high, m, cells, target.rounding, whole)
        squared = (up[0] - down[0]) * per
        variance, by_place = max((up[1] - down[1]) * per - squared * squared, 0.0), np.inf
        if target.rounding == STOCHASTIC:
            by_place = _by_place((high - low) * cells, m)
        shift = scratch[UNEVEN, i] * min(variance, by_place)
        _add_moments(row, (count * squared, count * ((up[2] - down[2]) * per), count * variance, shift), unit)


@inlined
def add_beyond(start: int, end: int, scratch: Any, per_scale: float, target: Target, row: Any) -> None:
    """Bins all of whose elements overflow and become the largest value."""
    if start >= end:
        return
    over, error, bias, spread, shift = _sums_beyond(start, end, per_scale, target.largest, scratch)
    row[OVER] += over
    _add_moments(row, (error, bias, spread, shift), 1.0)


@summing
def _sums_beyond(
    start: int, end: int, per_scale: float, largest: float, scratch: Any
) -> tuple[float, float, float, float, float]:
    """Sums over bins beyond the largest value: of elements, of δ², of v·δ, of the variance of δ², and of that where
    elements lie unevenly."""
    over, error, bias, spread, shift = 0.0, 0.0, 0.0, 0.0, 0.0
    one = np.uint64(1)
    for i in range(np.uint64(start), np.uint64(end)):
        low, high = scratch[EDGE, i] * per_scale - largest, scratch[EDGE, i + one] * per_scale - largest
        squared, fourth = powers(low, high)
        variance = fourth - squared * squared
        variance = variance if variance > 0 else 0.0
        over += scratch[COUNT, i]
        error += scratch[COUNT, i] * squared
        bias -= scratch[COUNT, i] * (squared + largest * (low + high) * 0.5)
        spread += scratch[COUNT, i] * variance
        shift += scratch[UNEVEN, i] * variance
    return over, error, bias, spread, shift


@not_inlined
def _add_each(
    start: int,
    end: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    target: Target,
    edges: Any,
    row: Any,
) -> None:
    for i in range(start, end):
        count, uneven = scratch[COUNT, i], scratch[UNEVEN, i]
        if count == 0:
            continue
        low, high = scratch[EDGE, i], scratch[EDGE, i + 1]
        found = in_bin(edges[base + i], edges[base + i + 1], low, high, bits, finest, scale, target)
        _add_rates(row, count, found[0], found[1], found[2])
        row[ERROR] += count * found[3]
        row[BIAS] += count * found[5]
        variance = variance_of_square(found[3], found[4])
        row[VARIANCE] += count * variance
        cut = 0.0
        if 0 < found[0] < 1 or 0 < found[1] < 1 or 0 < found[2] < 1:
            cut = np.sqrt(uneven)
        if target.rounding == STOCHASTIC:
            spacing = octave_of(low / scale, target) * target.mantissa_step
            cells = (high - low) / scale / spacing
            cut *= min(cells, 1.0)
            if found[2] <= 0:
                variance = min(variance, _by_place(cells, spacing))
        row[RATE_SHIFT] += cut
        row[ENERGY_SHIFT] += uneven * variance


@inlined
def _by_place(cells: float, spacing: float) -> float:
    """Under stochastic rounding, the variance of what of δ² depends on an element's place in its bin alone."""
    deviation = spacing * spacing * min(cells / 12**0.5, 1 / 180**0.5)
    return deviation * deviation


@inlined
def _add_rates(row: Any, count: float, under: float, sub: float, over: float) -> None:
    row[UNDER] += count * under
    row[SUB] += count * sub
    row[OVER] += count * over
    row[SPREAD_UNDER] += count * under * max(1 - under, 0.0)
    row[SPREAD_SUB] += count * sub * max(1 - sub, 0.0)
    row[SPREAD_OVER] += count * over * max(1 - over, 0.0)


@inlined
def variance_of_square(squared: float, fourth: float) -> float:
    """Variance of δ²; zero where it is infinite."""
    return max(fourth - squared * squared, 0.0) if np.isfinite(squared) else 0.0


@inlined
def place_of(magnitude: float, base: int, n: int) -> int:
    """Column of the bin that a magnitude lies in, from 0 to n."""
    return min(max(bin_of(magnitude) - base, 0), n)
