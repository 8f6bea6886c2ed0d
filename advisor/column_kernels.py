"""Metrics of every slot, cast and step of a window in one compiled pass, mostly in closed form.

What `bins.py` does bin by bin is summed here by regions, because a bin's outcome repeats:

    flushed   magnitudes that round to zero lose all they have: δ = -u, so prefix sums of u² serve every cast
    even      the subnormals, and all of an integer format: spacing is constant, so a bin costs one polynomial an edge
    normal    octaves double, and so does all that happens in them: the eight bins of one octave stand for all octaves,
              with sums over octaves of count·4^octave (and 16^octave, for fourth powers) that serve every cast
    others    beyond the largest value, a step's last bin, and where a tensor's own lattice shows: bin by bin
              (`outcome_kernels.py`)

Sums over octaves are taken from the top down, so that no small number is what is left of two large ones. Against the
plain path counts and energies agree to a relative 1e-9 (`tests/test_columns.py`), and so flags do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # type: ignore[attr-defined]

from advisor.bins import ALWAYS_BITS, BIN_BITS, FINER_TOWARD_ZERO, LATTICE_BITS, LATTICE_FINER, SMALLEST
from advisor.outcome_kernels import (
    NEAREST,
    STOCHASTIC,
    TOWARD_ZERO,
    Target,
    antiderivatives,
    at_point,
    bin_of,
    in_bin,
    in_cells,
    in_units,
    inlined,
    is_power_of_two,
    lattice_of,
    octave_of,
)
from probes.layout import BINS

OCTAVE = 1 << BIN_BITS
_PLACES = BINS + 2 * OCTAVE

# What is summed up for a slot and cast. Energies are in recorded units; `GAINED_*` are without the loss scale.
UNDER, SUB, OVER, ERROR, BIAS, VARIANCE = range(6)
SPREAD_UNDER, SPREAD_SUB, SPREAD_OVER, RATE_SHIFT, ENERGY_SHIFT = range(6, 11)
GAINED_ERROR, GAINED_BIAS, GAINED_VARIANCE = range(11, 14)
SUMS = 14

# Rows of a step's scratch, one column a bin from the lowest occupied one on.
_EDGE, _COUNT, _UNEVEN, _BEFORE, _FLUSHED, _FLUSHED_VARIANCE, _FLUSHED_SHIFT, _ENERGY, _FOURTH, _SHIFT = range(10)
_ROWS = 10


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def measure_step(
    bins: Any,
    counts: Any,
    amax: float,
    amin: float,
    bits: int,
    finest: float,
    gain: float,
    scales: Any,
    targets: Any,
    wanted: Any,
    edges: Any,
    scratch: Any,
    sums: Any,
    errors: Any,
) -> None:
    """Add one step of one slot to `sums` [casts, SUMS], and put its error energies into `errors` [casts].

    bins, counts  the step's occupied bins
    gain          what the recorded values were multiplied by
    scales        float64 [casts], for the recorded values; targets: a `Target` a cast, as float64; wanted: bool [casts]
    """
    n = 0
    if len(bins):
        n = _lay_out(bins, counts, amax, amin, bits, finest, edges, scratch)
    base = int(bins[0]) if len(bins) else 0
    step = np.zeros(SUMS)
    for k in range(len(scales)):
        if not wanted[k]:
            continue
        scale, p = scales[k], targets[k]
        target = Target(p[0], p[1], p[2], p[3], p[4], p[5], int(p[6]), p[7] > 0, p[8] > 0)
        step[:] = 0.0
        if n:
            _add_bins(scratch, n, base, bits, finest, scale, target, edges, step)
        square = scale * scale
        top = at_point(in_units(amax, scale, target), target) if amax > 0 else (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        step[UNDER] += top[0]
        step[SUB] += top[1]
        step[OVER] += top[2]
        step[ERROR] = (step[ERROR] + top[3]) * square
        step[BIAS] = (step[BIAS] + top[5]) * square
        step[VARIANCE] = (step[VARIANCE] + _variance(top[3], top[4])) * square * square
        step[ENERGY_SHIFT] = np.sqrt(step[ENERGY_SHIFT]) * square
        step[GAINED_ERROR] = step[ERROR] / gain**2
        step[GAINED_BIAS] = step[BIAS] / gain**2
        step[GAINED_VARIANCE] = step[VARIANCE] / gain**4
        errors[k] = step[GAINED_ERROR]
        for i in range(SUMS):
            sums[k, i] += step[i]


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def measure_slots(
    starts: Any,
    offsets: Any,
    bins: Any,
    counts: Any,
    amax: Any,
    amin: Any,
    bits: Any,
    finest: Any,
    gain: Any,
    scales: Any,
    targets: Any,
    wanted: Any,
    edges: Any,
    sums: Any,
    errors: Any,
) -> None:
    """`measure_step` over slots: slot p has the steps from starts[p] on, step t the bins from offsets[t] on.

    scales and errors [steps, casts]; wanted [slots, casts]; sums [slots, casts, SUMS]
    """
    scratch = np.empty((_ROWS, _PLACES))
    for p in range(len(starts) - 1):
        for t in range(starts[p], starts[p + 1]):
            here = slice(offsets[t], offsets[t + 1])
            measure_step(
                bins[here],
                counts[here],
                amax[t],
                amin[t],
                bits[t],
                finest[p],
                gain[t],
                scales[t],
                targets,
                wanted[p],
                edges,
                scratch,
                sums[p],
                errors[t],
            )


@inlined
def _variance(squared: float, fourth: float) -> float:
    """Variance of δ²; zero where it is infinite."""
    return max(fourth - squared * squared, 0.0) if np.isfinite(squared) else 0.0


@inlined
def _lay_out(
    bins: Any, counts: Any, amax: float, amin: float, bits: int, finest: float, edges: Any, scratch: Any
) -> int:
    """A step's bins without its largest element, side by side with those that are empty; gives how many there are."""
    base, n = int(bins[0]), int(bins[-1]) - int(bins[0]) + 1
    edge, count, uneven = scratch[_EDGE], scratch[_COUNT], scratch[_UNEVEN]
    count[: n + OCTAVE] = 0.0
    uneven[: n + OCTAVE] = 0.0
    for i in range(n + 1):
        edge[i] = edges[base + i]
    for i in range(len(bins)):
        count[int(bins[i]) - base] = counts[i]
    edge[0] = max(edge[0], amin)
    if edge[n] > amax:
        count[n - 1] -= 1
        edge[n] = amax
    while n and count[n - 1] == 0:
        n -= 1
    _spread_unevenly(n, edge, count, uneven)
    _add_up(base, n, bits, finest, edges, scratch)
    return n


@inlined
def _spread_unevenly(n: int, edge: Any, count: Any, uneven: Any) -> None:
    """`Bins.unevenness`."""
    before, width = 0.0, edge[1] - edge[0]
    here = count[0] / width if n and width > 0 else 0.0
    for i in range(n):
        next_width = edge[i + 2] - edge[i + 1] if i + 1 < n else 0.0
        after = count[i + 1] / next_width if next_width > 0 else 0.0
        if count[i] > 0 and width > 0:
            unexplained = count[i] - max(before, after) * width - 3 * np.sqrt(count[i])
            uneven[i] = max(unexplained, 0.0) + abs(after - before) * width / 16
        before, here, width = here, after, next_width


@inlined
def _add_up(base: int, n: int, bits: int, finest: float, edges: Any, scratch: Any) -> None:
    """Sums over bins from the lowest up, in the tensor's own units, and over octaves from the highest bin down, in
    those of each bin's octave; the last bin is in none of the latter."""
    edge, count, uneven = scratch[_EDGE], scratch[_COUNT], scratch[_UNEVEN]
    before, flushed, variance, shift = 0.0, 0.0, 0.0, 0.0
    for i in range(n + 1):
        scratch[_BEFORE, i], scratch[_FLUSHED, i] = before, flushed
        scratch[_FLUSHED_VARIANCE, i], scratch[_FLUSHED_SHIFT, i] = variance, shift
        if i < n and count[i] > 0:
            low, high = edge[i], edge[i + 1]
            second, fourth = _powers(base + i, low, high, bits, finest, edges)
            of_square = max(fourth - second * second, 0.0)
            before += count[i]
            flushed += count[i] * second
            variance += count[i] * of_square
            shift += uneven[i] * uneven[i] * of_square
    for i in range(n - 1, n + OCTAVE):
        scratch[_ENERGY, i] = scratch[_FOURTH, i] = scratch[_SHIFT, i] = 0.0
    for i in range(n - 2, -1, -1):
        scratch[_ENERGY, i] = count[i] + 4 * scratch[_ENERGY, i + OCTAVE]
        scratch[_FOURTH, i] = count[i] + 16 * scratch[_FOURTH, i + OCTAVE]
        scratch[_SHIFT, i] = uneven[i] * uneven[i] + 16 * scratch[_SHIFT, i + OCTAVE]


@inlined
def _powers(place: int, low: float, high: float, bits: int, finest: float, edges: Any) -> tuple[float, float]:
    """Means of x² and x⁴ over a bin's elements."""
    if bits > ALWAYS_BITS:
        product, ends = low * high, low * low + high * high
        squares = ends + product
        return squares / 3, (ends * squares - product * product) / 5
    points = 1 << max(bits - BIN_BITS, 0)
    found, second, fourth = 0, 0.0, 0.0
    for j in range(points):
        value = edges[place] + (edges[place + 1] - edges[place]) / points * j
        if low <= value <= high and (finest <= SMALLEST or value % finest == 0):
            found += 1
            second += value**2
            fourth += value**4
    if found == 0:
        return low**2, low**4
    return second / found, fourth / found


@inlined
def _add_bins(
    scratch: Any, n: int, base: int, bits: int, finest: float, scale: float, target: Target, edges: Any, step: Any
) -> None:
    """Add what a cast does to all bins, errors in units of the scale."""
    end = _place(target.largest * scale, base, n)
    if (
        end >= n
        and is_power_of_two(scale)
        and target.mantissa_step <= 2.0 ** -float(bits)
        and target.step * scale <= finest
    ):  # all is on the grid, and nothing happens
        for i in range(n):
            if scratch[_EDGE, i] < target.normal * scale:
                step[SUB] += scratch[_COUNT, i]
        return
    finer = FINER_TOWARD_ZERO if target.rounding == TOWARD_ZERO else LATTICE_FINER
    if finest * finer > target.step * scale:  # the smallest float of all shows
        _add_each(0, n, scratch, base, bits, finest, scale, target, edges, step)
        return
    half = 0.5 if target.rounding == NEAREST else 0.0
    first, second = (target.step - half * target.step) * scale, (target.normal - half * target.step) * scale
    flushed = 0 if target.rounding == STOCHASTIC else _place(first, base, n)
    at_second = _place(second, base, n)
    end = max(min(end, n - 1), flushed)
    even = min(max(bin_of(target.bottom * scale) + 1 - base, flushed), end)
    if 0 < flushed < n and ALWAYS_BITS < bits <= LATTICE_BITS and scratch[_EDGE, flushed] == first:
        flushed -= 1  # the bin below ends at the step, perhaps on a lattice point

    inverse = 1 / (scale * scale)
    step[UNDER] += scratch[_BEFORE, flushed]
    step[ERROR] += scratch[_FLUSHED, flushed] * inverse
    step[BIAS] -= scratch[_FLUSHED, flushed] * inverse
    step[VARIANCE] += scratch[_FLUSHED_VARIANCE, flushed] * inverse * inverse
    step[ENERGY_SHIFT] += scratch[_FLUSHED_SHIFT, flushed] * inverse * inverse

    coarse = max(min(_first_coarse(base, n, bits, scale, target, float(finer)), even), flushed)
    if target.rounding == STOCHASTIC:
        _add_ramp(flushed, coarse, scratch, base, bits, finest, scale, target, edges, step)
    elif ALWAYS_BITS < bits <= LATTICE_BITS:
        at = flushed
        for cut, here in ((_place(first, base, n), first), (at_second, second)):
            begin = cut - 1 if 0 < cut <= n and scratch[_EDGE, min(cut, n)] == here else cut
            begin, stop = min(max(begin, at), coarse), min(max(cut + 1, at), coarse)
            _add_even(at, begin, scratch, base, bits, finest, scale, target, edges, first, second, step)
            _add_each(begin, stop, scratch, base, bits, finest, scale, target, edges, step)
            at = stop
        _add_even(at, coarse, scratch, base, bits, finest, scale, target, edges, first, second, step)
    else:
        _add_even(flushed, coarse, scratch, base, bits, finest, scale, target, edges, first, second, step)
    _add_each(coarse, even, scratch, base, bits, finest, scale, target, edges, step)
    octaves = min(max(even, 1), end)  # the first bin may be cut off
    _add_each(even, octaves, scratch, base, bits, finest, scale, target, edges, step)
    _add_octaves(octaves, end, n, scratch, base, bits, finest, scale, target, edges, step)
    _add_each(end, n, scratch, base, bits, finest, scale, target, edges, step)


@inlined
def _place(magnitude: float, base: int, n: int) -> int:
    """Column of the bin that a magnitude lies in, from 0 to n."""
    return min(max(bin_of(magnitude) - base, 0), n)


@inlined
def _first_coarse(base: int, n: int, bits: int, scale: float, target: Target, finer: float) -> int:
    """Column of the first subnormal bin in which the tensor's lattice is coarse beside the grid, or on it."""
    if bits <= ALWAYS_BITS:
        return 0
    lattice = target.step * scale * 2.0 ** float(bits)  # of which octave the lattice is as wide as the grid
    if bits <= LATTICE_BITS:
        place = bin_of(lattice / finer)
    elif is_power_of_two(scale):
        place = bin_of(lattice / 2)
    else:
        return n
    return min(max((place >> BIN_BITS) * OCTAVE + OCTAVE - base, 0), n)


@inlined
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
    step: Any,
) -> None:
    """Bin by bin."""
    for i in range(start, end):
        count, uneven = scratch[_COUNT, i], scratch[_UNEVEN, i]
        if count == 0:
            continue
        low, high = scratch[_EDGE, i], scratch[_EDGE, i + 1]
        found = in_bin(base + i, low, high, bits, finest, scale, target, edges)
        _add_rates(step, count, found[0], found[1], found[2])
        step[ERROR] += count * found[3]
        step[BIAS] += count * found[5]
        variance = _variance(found[3], found[4])
        step[VARIANCE] += count * variance
        cut = 0.0
        if 0 < found[0] < 1 or 0 < found[1] < 1 or 0 < found[2] < 1:
            cut = uneven
        if target.rounding == STOCHASTIC:
            spacing = octave_of(low / scale, target) * target.mantissa_step
            cells = (high - low) / scale / spacing
            cut *= min(cells, 1.0)
            if found[2] <= 0:
                variance = min(variance, _by_place(cells, spacing))
        step[RATE_SHIFT] += cut
        step[ENERGY_SHIFT] += uneven * uneven * variance


@inlined
def _by_place(cells: float, spacing: float) -> float:
    """Under stochastic rounding, the variance of what of δ² depends on an element's place in its bin alone."""
    deviation = spacing * spacing * min(cells / 12**0.5, 1 / 180**0.5)
    return deviation * deviation


@inlined
def _add_rates(step: Any, count: float, under: float, sub: float, over: float) -> None:
    step[UNDER] += count * under
    step[SUB] += count * sub
    step[OVER] += count * over
    step[SPREAD_UNDER] += count * under * max(1 - under, 0.0)
    step[SPREAD_SUB] += count * sub * max(1 - sub, 0.0)
    step[SPREAD_OVER] += count * over * max(1 - over, 0.0)


@inlined
def _add_even(
    start: int,
    end: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    target: Target,
    edges: Any,
    first: float,
    second: float,
    step: Any,
) -> None:
    """Bins of the even part of the grid, taken as continuous. `first`, `second`: from where on magnitudes are not
    zero, and not subnormal."""
    if start >= end:
        return
    if start == 0 and scratch[_EDGE, 1] <= scratch[_EDGE, 0]:
        _add_each(0, 1, scratch, base, bits, finest, scale, target, edges, step)
        start = 1
    to_cells = 1 / (scale * target.step)
    edge, count, uneven = scratch[_EDGE], scratch[_COUNT], scratch[_UNEVEN]
    w = edge[start] * to_cells
    down = in_cells(w, target.rounding)
    error, bias, spread, shift = 0.0, 0.0, 0.0, 0.0
    for i in range(start, end):
        v = edge[i + 1] * to_cells
        up = in_cells(v, target.rounding)
        a_cell = 1 / (v - w)
        squared = (up[0] - down[0]) * a_cell
        variance = max((up[1] - down[1]) * a_cell - squared * squared, 0.0)
        error += count[i] * squared
        bias += count[i] * (up[2] - down[2]) * a_cell
        spread += count[i] * variance
        shift += uneven[i] * uneven[i] * variance
        w, down = v, up
    square = target.step * target.step
    step[ERROR] += error * square
    step[BIAS] += bias * square
    step[VARIANCE] += spread * square * square
    step[ENERGY_SHIFT] += shift * square * square
    for i in range(start, end):  # at most the few bins around the two steps
        if edge[i] >= second:
            break
        if edge[i] >= first and edge[i + 1] <= second:
            step[SUB] += count[i]
            continue
        if count[i] == 0:
            continue
        width = edge[i + 1] - edge[i]
        nonzero = min(max((edge[i + 1] - max(edge[i], first)) / width, 0.0), 1.0)
        normal = min(max((edge[i + 1] - max(edge[i], second)) / width, 0.0), 1.0)
        under, sub = 1 - nonzero, max(nonzero - normal, 0.0)
        _add_rates(step, count[i], under, sub, 0.0)
        if 0 < under < 1 or 0 < sub < 1:
            step[RATE_SHIFT] += uneven[i]


@inlined
def _add_ramp(
    start: int,
    end: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    target: Target,
    edges: Any,
    step: Any,
) -> None:
    """The same of stochastic rounding, whose rates rise and fall in ramps."""
    if start >= end:
        return
    if start == 0 and scratch[_EDGE, 1] <= scratch[_EDGE, 0]:
        _add_each(0, 1, scratch, base, bits, finest, scale, target, edges, step)
        start = 1
    to_cells = 1 / (scale * target.step)
    edge, count, uneven = scratch[_EDGE], scratch[_COUNT], scratch[_UNEVEN]
    w = edge[start] * to_cells
    down = in_cells(w, STOCHASTIC)
    normal_at = target.normal / target.step
    error, spread, shift = 0.0, 0.0, 0.0
    for i in range(start, end):
        v = edge[i + 1] * to_cells
        up = in_cells(v, STOCHASTIC)
        a_cell = 1 / (v - w)
        squared = (up[0] - down[0]) * a_cell
        variance = max((up[1] - down[1]) * a_cell - squared * squared, 0.0)
        error += count[i] * squared
        spread += count[i] * variance
        shift += uneven[i] * uneven[i] * min(variance, _by_place(v - w, 1.0))
        if w < normal_at and count[i] > 0:
            nonzero = min((_ramp_up_to(v, 1.0) - _ramp_up_to(w, 1.0)) * a_cell, 1.0)
            normal = min((_ramp_up_to(v, normal_at) - _ramp_up_to(w, normal_at)) * a_cell, 1.0)
            under, sub = 1 - nonzero, max(nonzero - normal, 0.0)
            _add_rates(step, count[i], under, sub, 0.0)
            if 0 < under < 1 or 0 < sub < 1:
                step[RATE_SHIFT] += uneven[i] * min(v - w, 1.0)
        w, down = v, up
    square = target.step * target.step
    step[ERROR] += error * square
    step[VARIANCE] += spread * square * square
    step[ENERGY_SHIFT] += shift * square * square


@inlined
def _ramp_up_to(w: float, value: float) -> float:
    """`reached_up_to` in cells."""
    ramp = min(max(w - (value - 1), 0.0), 1.0)
    return ramp * ramp / 2 + max(w - value, 0.0)


@inlined
def _add_octaves(
    start: int,
    end: int,
    n: int,
    scratch: Any,
    base: int,
    bits: int,
    finest: float,
    scale: float,
    target: Target,
    edges: Any,
    step: Any,
) -> None:
    """Bins of whole octaves of the grid, from `start` to `end`: eight stand for all. None of their rates is other than
    zero."""
    if start >= end:
        return
    finer = FINER_TOWARD_ZERO if target.rounding == TOWARD_ZERO else LATTICE_FINER
    aligned = is_power_of_two(scale)
    inverse = 1 / scale
    known = -1  # the bin whose lower edge `down` is of
    down = (0.0, 0.0, 0.0)
    u = edges[base + start] * inverse
    for i in range(start, min(start + OCTAVE, end)):
        place = base + i
        v = edges[place + 1] * inverse
        spacing = octave_of(u, target) * target.mantissa_step
        lattice = lattice_of(place, bits, finest) * inverse
        shows = lattice * finer > spacing if bits <= LATTICE_BITS else aligned and lattice >= spacing
        if shows or bits <= ALWAYS_BITS:
            _, _, _, squared, fourth, product = in_bin(
                place, edges[place], edges[place + 1], bits, finest, scale, target, edges
            )
        else:
            if known != i:
                down = antiderivatives(u, target)
            up, known = antiderivatives(v, target), i + 1
            width = 1 / (v - u)
            squared, fourth = (up[0] - down[0]) * width, (up[1] - down[1]) * width
            product = (up[2] - down[2]) * width
            down = up
        variance = max(fourth - squared * squared, 0.0)
        by_place = variance
        if target.rounding == STOCHASTIC:
            by_place = min(variance, _by_place((v - u) / spacing, spacing))
        u = v
        energy, fourths, shift = scratch[_ENERGY, i], scratch[_FOURTH, i], scratch[_SHIFT, i]
        if end < n - 1:  # what lies beyond the largest value is not meant
            energy = fourths = shift = 0.0
            square = 1.0
            for j in range(i, end, OCTAVE):
                uneven = scratch[_UNEVEN, j]
                energy += scratch[_COUNT, j] * square
                fourths += scratch[_COUNT, j] * square * square
                shift += uneven * uneven * square * square
                square *= 4.0
        step[ERROR] += energy * squared
        step[BIAS] += energy * product
        step[VARIANCE] += fourths * variance
        step[ENERGY_SHIFT] += shift * by_place
