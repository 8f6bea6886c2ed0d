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
from numba import njit

from advisor import bins, layout_kernels, outcome_kernels, region_kernels
from advisor.bins import ALWAYS_BITS, BIN_BITS, FINER_TOWARD_ZERO, LATTICE_BITS, LATTICE_FINER
from advisor.layout_kernels import (
    BEFORE,
    EDGE,
    FLUSHED,
    FLUSHED_SHIFT,
    FLUSHED_VARIANCE,
    OCTAVE,
    PLACES,
    ROWS,
    lay_out,
)
from advisor.outcome_kernels import (
    NEAREST,
    STOCHASTIC,
    TOWARD_ZERO,
    Target,
    at_point,
    bin_of,
    in_units,
    inlined,
    is_power_of_two,
    target_from,
    two_to,
)
from advisor.region_kernels import (
    BIAS,
    ENERGY_SHIFT,
    ERROR,
    GAINED_BIAS,
    GAINED_ERROR,
    OVER,
    SUB,
    TOTAL_ERROR,
    TOTAL_SHIFT,
    TOTAL_VARIANCE,
    UNDER,
    VARIANCE,
    add_beyond,
    add_each,
    add_even,
    add_normal,
    add_octaves,
    place_of,
    variance_of_square,
)
from probes import formats, layout
from probes.kernel_cache import keep_to_sources


@inlined
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
        n = lay_out(bins, counts, amax, amin, bits, finest, edges, scratch)
    base = int(bins[0]) if len(bins) else 0
    per_gain = 1 / gain**2
    for k in range(len(scales)):
        if not wanted[k]:
            continue
        scale, target, row = scales[k], target_from(targets[k]), sums[k]
        row[ERROR] = row[BIAS] = row[VARIANCE] = row[ENERGY_SHIFT] = 0.0
        if n:
            _add_bins(scratch, n, base, bits, finest, scale, target, edges, row)
        u = in_units(amax, scale, target)
        top = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        if amax > 0 and u != target.largest:  # which is written without error
            top = at_point(u, target)
        row[UNDER] += top[0]
        row[SUB] += top[1]
        row[OVER] += top[2]
        square = scale * scale
        error, bias = (row[ERROR] + top[3]) * square, (row[BIAS] + top[5]) * square
        row[TOTAL_ERROR] += error
        row[TOTAL_VARIANCE] += (row[VARIANCE] + variance_of_square(top[3], top[4])) * square * square
        row[TOTAL_SHIFT] += np.sqrt(row[ENERGY_SHIFT]) * square
        row[GAINED_ERROR] += error * per_gain
        row[GAINED_BIAS] += bias * per_gain
        errors[k] = error * per_gain


@njit(cache=True, nogil=True, error_model="numpy")
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

    scales [casts, steps]; errors [steps, casts]; wanted [slots, casts]; sums [slots, casts, SUMS]
    """
    scratch = np.empty((ROWS, PLACES))
    longest = 0
    for p in range(len(starts) - 1):
        longest = max(longest, starts[p + 1] - starts[p])
    by_step = np.empty((longest, len(scales)))  # a slot's scales, those of a step in neighbouring places of memory
    for p in range(len(starts) - 1):
        for k in range(len(scales)):
            for t in range(starts[p], starts[p + 1]):
                by_step[t - starts[p], k] = scales[k, t]
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
                by_step[t - starts[p]],
                targets,
                wanted[p],
                edges,
                scratch,
                sums[p],
                errors[t],
            )


@njit(cache=True, nogil=True, error_model="numpy")
def count_steps(offsets: Any, counts: Any, nonzero: Any) -> None:
    """Put the sum of the counts of each step's bins into `nonzero` [steps]."""
    for t in range(len(nonzero)):
        found = 0
        for i in range(np.uint64(offsets[t]), np.uint64(offsets[t + 1])):
            found += counts[i]
        nonzero[t] = found


@inlined
def _add_bins(
    scratch: Any, n: int, base: int, bits: int, finest: float, scale: float, target: Target, edges: Any, row: Any
) -> None:
    """Add what a cast does to all bins, errors in units of the scale."""
    largest = target.largest * scale
    if (
        scratch[EDGE, n] <= largest
        and is_power_of_two(scale)
        and target.mantissa_step <= two_to(-bits)
        and target.step * scale <= finest
    ):  # all is on the grid, and nothing happens
        place = place_of(target.normal * scale, base, n)
        if place < n and scratch[EDGE, place] < target.normal * scale:
            place += 1
        row[SUB] += scratch[BEFORE, place]
        return
    finer = FINER_TOWARD_ZERO if target.rounding == TOWARD_ZERO else LATTICE_FINER
    if finest * finer > target.step * scale or target.mantissa_step < 2.0**-45:
        # The smallest float of all shows, or float64's own precision does.
        add_each(0, n, scratch, base, bits, finest, scale, target, edges, row)
        return
    half = 0.5 if target.rounding == NEAREST else 0.0
    first, second = (target.step - half * target.step) * scale, (target.normal - half * target.step) * scale
    flushed = 0 if target.rounding == STOCHASTIC else place_of(first, base, n)
    if flushed < min(OCTAVE - base, n):  # bins of float32's subnormals are no eighths of octaves
        add_each(0, n, scratch, base, bits, finest, scale, target, edges, row)
        return
    closed = scratch[EDGE, n] <= largest * (1 + 2.0**-40)
    end = n if closed else max(min(place_of(largest, base, n), n - 1), flushed)
    even = min(max(bin_of(target.bottom * scale) + 1 - base, flushed), end)
    if 0 < flushed < n and ALWAYS_BITS < bits <= LATTICE_BITS and scratch[EDGE, flushed] == first:
        flushed -= 1  # the bin below ends at the step, perhaps on a lattice point

    per_scale = 1 / scale
    inverse = per_scale * per_scale
    row[UNDER] += scratch[BEFORE, flushed]
    row[ERROR] += scratch[FLUSHED, flushed] * inverse
    row[BIAS] -= scratch[FLUSHED, flushed] * inverse
    row[VARIANCE] += scratch[FLUSHED_VARIANCE, flushed] * inverse * inverse
    row[ENERGY_SHIFT] += scratch[FLUSHED_SHIFT, flushed] * inverse * inverse

    coarse = max(min(_first_coarse(base, n, bits, scale, target, float(finer)), even), flushed)
    # Where the tensor's lattice shows, the bins in which zero and the subnormals end are taken by themselves.
    pieces = 3 if ALWAYS_BITS < bits <= LATTICE_BITS and target.rounding != STOCHASTIC else 1
    at = flushed
    for piece in range(pieces):
        begin = stop = coarse
        if piece < pieces - 1:
            here = first if piece == 0 else second
            cut = place_of(here, base, n)
            begin = cut - 1 if cut > 0 and scratch[EDGE, cut] == here else cut
            begin, stop = min(max(begin, at), coarse), min(max(cut + 1, at), coarse)
        add_even(at, begin, scratch, base, bits, finest, scale, per_scale, target, edges, first, second, row)
        add_each(begin, stop, scratch, base, bits, finest, scale, target, edges, row)
        at = stop
    add_each(coarse, even, scratch, base, bits, finest, scale, target, edges, row)
    # The first bin may be cut off, and so may the last.
    octaves = min(max(even, 1), end)
    last = max(min(end, n - 1), octaves)
    add_octaves(octaves, last, n, scratch, base, bits, finest, scale, per_scale, target, edges, row)
    if bits <= LATTICE_BITS:
        add_each(even, octaves, scratch, base, bits, finest, scale, target, edges, row)
        add_each(last, n, scratch, base, bits, finest, scale, target, edges, row)
        return
    if not is_power_of_two(scale) or two_to(-bits) < target.mantissa_step:  # else they are on the grid
        add_normal(even, octaves, scratch, base, bits, finest, scale, per_scale, target, edges, row)
        add_normal(last, end, scratch, base, bits, finest, scale, per_scale, target, edges, row)
    beyond = n
    if target.saturates:
        beyond = min(max(place_of(largest + target.top * scale, base, n) + 1, end), n)
        add_beyond(beyond, n, scratch, per_scale, target, row)
    add_each(end, beyond, scratch, base, bits, finest, scale, target, edges, row)


@inlined
def _first_coarse(base: int, n: int, bits: int, scale: float, target: Target, finer: float) -> int:
    """Column of the first subnormal bin in which the tensor's lattice is coarse beside the grid, or on it."""
    if bits <= ALWAYS_BITS:
        return 0
    lattice = target.step * scale * two_to(bits)  # of which octave the lattice is as wide as the grid
    if bits <= LATTICE_BITS:
        lattice /= finer
    elif is_power_of_two(scale):
        lattice /= 2
    else:
        return n
    if lattice < 2.0**-127:  # float32's subnormals count as that octave
        return 0
    place = bin_of(lattice)
    return min(max((place >> BIN_BITS) * OCTAVE + OCTAVE - base, 0), n)


keep_to_sources(measure_slots, bins, layout_kernels, outcome_kernels, region_kernels, layout, formats)
