"""The largest values of a tensor's rows and channels, read back from its relative sketches.

A relative sketch by row (`probes/relative.py`, kind `current`) counts the largest element of each tile apart, by its
mantissa, 256 bins an octave, with the sum of its squares. A bin that holds one tile tells its largest value exactly;
one that holds several tells their sum, of which the largest stands out if it is far above the others. So which share
of the channels is outlying, and by how much, is known, though not which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probes.relative_history import RelativeHistory
from probes.relative_layout import BINS, FINE_LOWEST, FINE_SHIFT, LOWEST
from probes.sketch import BIN_EDGES

Array = NDArray[np.float64]

_FINE_EDGES = (FINE_LOWEST + (np.arange(BINS + 1) << FINE_SHIFT)).astype(np.int32).view(np.float32).astype(np.float64)
_CHANCE = (
    24.0  # ours: of c tiles in a bin the sum of squares strays by some √c; six times that, four being their spread
)

_SLACK = 0.06  # ours, octaves: what the others in a bin are may be misjudged by some of their own size


@dataclass(frozen=True)
class Tiles:
    """One step's tiles of a tensor, cut by row or by channel.

    count      tiles that hold anything
    typical    largest value of the median tile
    outlying   how many tiles exceed `ratio` times that, and
    largest    the largest value of the largest of them; `typical` where there is none
    effective  energy of the largest tiles, as a number of elements at their largest value
    """

    count: int
    typical: float
    outlying: float
    largest: float
    effective: float

    @property
    def ratio(self) -> float:
        """Largest over typical."""
        return self.largest / self.typical if self.typical > 0 else math.nan


def tiles_at(history: RelativeHistory, step: int, ratio: float) -> Tiles | None:
    """The tiles of one step of a sketch of kind `current`; None where it holds nothing."""
    (found,) = np.flatnonzero(history.steps == step)[:1] if step in history.steps else (None,)
    if found is None:
        return None
    held = slice(history.offsets[found], history.offsets[found + 1])
    cells, counts = history.cells[held].astype(np.int64), history.counts[held].astype(np.float64)
    squares = history.squares[held]
    top = cells >= BINS
    if not top.any():
        return None
    mantissa, number, square = _FINE_EDGES[cells[top] - BINS], counts[top], squares[top]
    mean = np.sqrt(square / number)
    typical = weighted_median(mean, number)
    excess = np.maximum(square - (number - 1) * typical**2, 0.0)
    octave = np.floor(np.log2(np.sqrt(np.maximum(excess, np.finfo(np.float64).tiny)) / mantissa) + _SLACK)
    largest = np.where(number == 1, mean, mantissa * np.exp2(octave))
    far = (largest >= ratio * typical) & (excess >= _CHANCE * np.sqrt(number) * typical**2)
    several = np.where(number == 1, 1.0, np.clip(np.rint(excess / largest**2), 1.0, number))
    # Elements as large as their tile's largest count with it: the tiles themselves are known from the tail.
    tiles_a_top = history.tiles[found] / number.sum()
    middle = np.where(top, 1.0, (BIN_EDGES[LOWEST + cells % BINS] + BIN_EDGES[LOWEST + cells % BINS + 1]) / 2)
    elements = counts.sum() / max(float(history.tiles[found]), 1.0)
    energy = float((squares * np.minimum(middle, 1.0) ** 2).sum())
    return Tiles(
        count=int(history.tiles[found]),
        typical=typical,
        outlying=float(several[far].sum() * min(tiles_a_top, 1.0)),
        largest=float(largest[far].max()) if far.any() else typical,
        effective=float(elements * energy / squares.sum()),
    )


def ratios_at(history: RelativeHistory, step: int) -> tuple[Array, Array, Array] | None:
    """Magnitudes over their tile's largest value, how many there are, and the sum over them of its square: float64 [N]
    each, of one step."""
    (found,) = np.flatnonzero(history.steps == step)[:1] if step in history.steps else (None,)
    if found is None:
        return None
    held = slice(history.offsets[found], history.offsets[found + 1])
    cells, counts = history.cells[held].astype(np.int64), history.counts[held].astype(np.float64)
    place = LOWEST + cells % BINS
    middle = np.where(cells >= BINS, 1.0, (BIN_EDGES[place] + BIN_EDGES[place + 1]) / 2)
    return np.minimum(middle, 1.0), counts, history.squares[held]


def weighted_median(values: Array, weights: Array) -> float:
    """The value below which half of the weight lies."""
    order = np.argsort(values, kind="stable")
    running = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(running, running[-1] / 2)])
