"""A step's bins laid side by side, with the sums that serve every cast.

Rows of the scratch, one column a bin from the lowest occupied one on, empty bins included:

    EDGE, COUNT, UNEVEN, PER_WIDTH   where it begins (the next column: where it ends), how many elements without the
                                     step's largest, `Bins.unevenness` squared, one over its width
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

EDGE, COUNT, UNEVEN, PER_WIDTH, BEFORE, FLUSHED, FLUSHED_VARIANCE, FLUSHED_SHIFT, ENERGY, FOURTH, SHIFT = range(11)
ROWS = 11


@inlined
def lay_out(
    bins: Any, counts: Any, amax: float, amin: float, bits: int, finest: float, edges: Any, scratch: Any
) -> int:
    """A step's bins without its largest element, side by side with those that are empty; gives how many there are."""
    base, n = int(bins[0]), int(bins[-1]) - int(bins[0]) + 1
    for i in range(n + OCTAVE):
        scratch[COUNT, i] = scratch[UNEVEN, i] = 0.0
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
    """`Bins.unevenness`, squared."""
    for i in range(n):
        width = scratch[EDGE, i + 1] - scratch[EDGE, i]
        scratch[PER_WIDTH, i] = 1 / width if width > 0 else 0.0
    scratch[PER_WIDTH, n] = 0.0
    before = 0.0
    for i in range(n):
        here, width = scratch[COUNT, i], scratch[EDGE, i + 1] - scratch[EDGE, i]
        after = scratch[COUNT, i + 1] * scratch[PER_WIDTH, i + 1]
        if here > 0 and width > 0:
            unexplained = max(here - max(before, after) * width - 3 * np.sqrt(here), 0.0)
            found = unexplained + abs(after - before) * width / 16
            scratch[UNEVEN, i] = found * found
        before = here * scratch[PER_WIDTH, i]


@inlined
def _add_up(base: int, n: int, bits: int, finest: float, edges: Any, scratch: Any) -> None:
    """Sums over bins from the lowest up, in the tensor's own units, and over octaves from the highest bin down, in
    those of each bin's octave; the last bin is in none of the latter."""
    before, flushed, variance, shift = 0.0, 0.0, 0.0, 0.0
    for i in range(n + 1):
        scratch[BEFORE, i], scratch[FLUSHED, i] = before, flushed
        scratch[FLUSHED_VARIANCE, i], scratch[FLUSHED_SHIFT, i] = variance, shift
        if i < n and scratch[COUNT, i] > 0:
            low, high = scratch[EDGE, i], scratch[EDGE, i + 1]
            second, fourth = _powers(base + i, low, high, bits, finest, edges)
            of_square = max(fourth - second * second, 0.0)
            before += scratch[COUNT, i]
            flushed += scratch[COUNT, i] * second
            variance += scratch[COUNT, i] * of_square
            shift += scratch[UNEVEN, i] * of_square
    for i in range(n - 1, n + OCTAVE):
        scratch[ENERGY, i] = scratch[FOURTH, i] = scratch[SHIFT, i] = 0.0
    for i in range(n - 2, -1, -1):
        scratch[ENERGY, i] = scratch[COUNT, i] + 4 * scratch[ENERGY, i + OCTAVE]
        scratch[FOURTH, i] = scratch[COUNT, i] + 16 * scratch[FOURTH, i + OCTAVE]
        scratch[SHIFT, i] = scratch[UNEVEN, i] + 16 * scratch[SHIFT, i + OCTAVE]


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
