"""Measured where it was measured, otherwise from the sketches, brought to scale by those casts that have both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advisor.grid import Array

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Estimates:
    """Values for P slots and K casts, float64 [P, K], NaN where unknown.

    measured   what the scored steps measured
    sketched   the same from sketches alone
    coherence  float64 [P]: median ratio of the two, NaN where no cast has both
    """

    measured: Array
    sketched: Array

    @property
    def coherence(self) -> Array:
        """Median of measured over sketched, [P], of the casts where both are positive; NaN where there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            both = (self.measured > 0) & (np.abs(self.sketched) > 0)
            return row_medians(np.where(both, self.measured / self.sketched, np.nan))

    @property
    def is_measured(self) -> Mask:
        """[P, K]"""
        return ~np.isnan(self.measured)

    @property
    def values(self) -> Array:
        """The best that is known, [P, K]."""
        coherence = self.coherence[:, None]
        scaled = self.sketched * np.where(np.isnan(coherence), 1.0, coherence)
        return np.where(self.is_measured, self.measured, scaled)


def table_of(values: Sequence[Mapping[str, float]], places: Mapping[str, int]) -> Array:
    """[slots, casts] from each slot's cast → value; NaN where there is none, and casts without a place left out."""
    found = np.full((len(values), len(places)), np.nan)
    for p, by_cast in enumerate(values):
        for cast, value in by_cast.items():
            if cast in places:
                found[p, places[cast]] = value
    return found


def row_medians(values: Array) -> Array:
    """Median of each row [P], NaNs left out; NaN where nothing is left."""
    if not values.shape[1]:
        return np.full(len(values), np.nan)
    ordered, rows = np.sort(values, axis=1), np.arange(len(values))  # NaNs come last
    count = (~np.isnan(values)).sum(axis=1)
    median = (ordered[rows, np.maximum(count - 1, 0) // 2] + ordered[rows, count // 2]) / 2
    return np.asarray(np.where(count > 0, median, np.nan))
