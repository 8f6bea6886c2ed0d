"""A step's bins laid side by side, with the sums that serve every cast.

Rows of the scratch, one column a bin from the lowest occupied one on, empty bins included:

    EDGE, COUNT, UNEVEN, PER_WIDTH   where it begins (the next column: where it ends), how many elements without the
                                     step's largest, `Bins.unevenness` squared, one over its width
    DENSITY, SECOND, SPREAD          elements a width; means of x² and, of its square, what is beyond the mean's square
    BEFORE, FLUSHED, FLUSHED_VARIANCE, FLUSHED_SHIFT   sums over the bins below: count, Σx², and of the variance of x²
                                     within bins, counted once by count and once by unevenness squared
    ENERGY, FOURTH, SHIFT            sums over every eighth bin from this one up, without the last: count·4^octave,
                                     count·16^octave and unevenness²·16^octave, in units of this bin's octave
"""

from __future__ import annotations

from typing import Any

import numpy as np

from advisor.bins import ALWAYS_BITS, BIN_BITS, SMALLEST
from advisor.outcome_kernels import inlined
from probes.layout import BINS

OCTAVE = 1 << BIN_BITS
PLACES = BINS + 2 * OCTAVE

EDGE, COUNT, UNEVEN, PER_WIDTH, DENSITY, SECOND, SPREAD = range(7)
BEFORE, FLUSHED, FLUSHED_VARIANCE, FLUSHED_SHIFT, ENERGY, FOURTH, SHIFT = range(7, 14)
ROWS = 14


@inlined
def lay_out(
    bins: Any, counts: Any, amax: float, amin: float, bits: int, finest: float, edges: Any, scratch: Any
) -> int:
    """A step's bins without its largest element, side by side with those that are empty; gives how many there are."""
    base, n = int(bins[0]), int(bins[-1]) - int(bins[0]) + 1
    scratch[COUNT, : n + OCTAVE] = 0.0
    for i in range(n + 1):
        scratch[EDGE, i] = edges[base + i]
    for i in range(len(bins)):
        scratch[COUNT, int(bins[i]) - base] = counts[i]
    scratch[EDGE, 0] = max(scratch[EDGE, 0], amin)
    if scratch[EDGE, n] > amax:
        scratch[COUNT, n - 1] -= 1
        scratch[EDGE, n] = amax
    while n and scratch[COUNT, n - 1] == 0:
        n -= 1
    _spread_unevenly(n, scratch)
    _add_up(base, n, bits, finest, edges, scratch)
    return n


@inlined
def _spread_unevenly(n: int, scratch: Any) -> None:
    """`Bins.unevenness`, squared. Loops over unsigned places become vector instructions."""
    one, end = np.uint64(1), np.uint64(n)
    for i in range(np.uint64(0), end):
        width = scratch[EDGE, i + one] - scratch[EDGE, i]
        per = 1 / width if width > 0 else 0.0
        scratch[PER_WIDTH, i], scratch[DENSITY, i] = per, scratch[COUNT, i] * per
    scratch[PER_WIDTH, n] = scratch[DENSITY, n] = 0.0
    scratch[UNEVEN, : n + OCTAVE] = 0.0
    if n:
        width = scratch[EDGE, 1] - scratch[EDGE, 0]
        scratch[UNEVEN, 0] = _uneven_of(0.0, scratch[COUNT, 0], scratch[DENSITY, 1], width)
    for i in range(one, end):
        width = scratch[EDGE, i + one] - scratch[EDGE, i]
        scratch[UNEVEN, i] = _uneven_of(scratch[DENSITY, i - one], scratch[COUNT, i], scratch[DENSITY, i + one], width)


@inlined
def _uneven_of(before: float, count: float, after: float, width: float) -> float:
    """Of one bin, from the densities of its neighbours."""
    unexplained = count - max(before, after) * width - 3 * np.sqrt(count)
    unexplained = unexplained if unexplained > 0 else 0.0
    found = unexplained + abs(after - before) * width / 16
    return found * found if count > 0 and width > 0 else 0.0


@inlined
def _add_up(base: int, n: int, bits: int, finest: float, edges: Any, scratch: Any) -> None:
    """Sums over bins from the lowest up, in the tensor's own units, and over octaves from the highest bin down, in
    those of each bin's octave; the last bin is in none of the latter."""
    one, end = np.uint64(1), np.uint64(n)
    if bits > ALWAYS_BITS:
        for i in range(np.uint64(0), end):
            second, fourth = powers(scratch[EDGE, i], scratch[EDGE, i + one])
            spread = fourth - second * second
            scratch[SECOND, i], scratch[SPREAD, i] = second, spread if spread > 0 else 0.0
    else:
        for i in range(n):
            second, fourth = 0.0, 0.0
            if scratch[COUNT, i] > 0:
                low, high = scratch[EDGE, i], scratch[EDGE, i + 1]
                second, fourth = _powers_of_points(base + i, low, high, bits, finest, edges)
            scratch[SECOND, i], scratch[SPREAD, i] = second, max(fourth - second * second, 0.0)
    before, flushed, variance, shift = 0.0, 0.0, 0.0, 0.0
    for i in range(np.uint64(0), end):
        scratch[BEFORE, i], scratch[FLUSHED, i] = before, flushed
        scratch[FLUSHED_VARIANCE, i], scratch[FLUSHED_SHIFT, i] = variance, shift
        before += scratch[COUNT, i]
        flushed += scratch[COUNT, i] * scratch[SECOND, i]
        variance += scratch[COUNT, i] * scratch[SPREAD, i]
        shift += scratch[UNEVEN, i] * scratch[SPREAD, i]
    scratch[BEFORE, n], scratch[FLUSHED, n] = before, flushed
    scratch[FLUSHED_VARIANCE, n], scratch[FLUSHED_SHIFT, n] = variance, shift
    top = max(n - 1, 0)
    for row in (ENERGY, FOURTH, SHIFT):
        scratch[row, top : n + OCTAVE] = 0.0
    for begin in range(top - OCTAVE, -OCTAVE, -OCTAVE):
        for i in range(np.uint64(max(begin, 0)), np.uint64(begin + OCTAVE)):
            above = i + np.uint64(OCTAVE)
            scratch[ENERGY, i] = scratch[COUNT, i] + 4 * scratch[ENERGY, above]
            scratch[FOURTH, i] = scratch[COUNT, i] + 16 * scratch[FOURTH, above]
            scratch[SHIFT, i] = scratch[UNEVEN, i] + 16 * scratch[SHIFT, above]


@inlined
def powers(low: float, high: float) -> tuple[float, float]:
    """Means of x² and x⁴ over an interval."""
    product, ends = low * high, low * low + high * high
    squares = ends + product
    return squares * (1 / 3), (ends * squares - product * product) * (1 / 5)


@inlined
def _powers_of_points(place: int, low: float, high: float, bits: int, finest: float, edges: Any) -> tuple[float, float]:
    """The same over the few lattice points of a bin."""
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
