"""Measured where it was measured, otherwise from the sketches, brought to scale by those casts that have both.

An error has two parts, δ = β·x + rest with β = Σx·δ/Σx²: the one shrinks the tensor (flushing to zero, clipping,
rounding toward zero), the other is as good as random. What the loss makes of the two may differ by orders of magnitude:
a weight before a BatchNorm can shrink for nothing, elsewhere all rounding errors of one sign add up. So the sketch's
value S is split, B = S·(Σx·δ)²/(Σx²·Σδ²) of it being the shrinking part, and each part has its own coherence:

    value      = coherence·(S − B) + shrink_coherence·B
    coherence  = median of measured/S over the casts that shrink little (B < 10% of S)
    shrink_coherence = median of (measured − coherence·(S − B))/B over those that do little else (B > 50% of S); where
                 none of these was measured, it is taken to be `coherence`

A cast that was not measured and makes the very error of one that was (e5m2fnuz beside e5m2, both scaled) has its value.

Measured on held-out casts by `benchmarks/rescoring.py`; `docs/how-it-works.md` has the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from advisor.grid import Array

Mask = NDArray[np.bool_]

LITTLE, MOSTLY = (
    0.1,
    0.5,
)  # share of the shrinking part up to and from which a cast tells of the one and the other. Ours
SAME = 1e-9  # relative: errors so alike in energy and in what they shrink are one


@dataclass(frozen=True, eq=False)
class Estimates:
    """Values for P slots and K casts, float64 [P, K], NaN where unknown.

    measured   what the scored steps measured
    sketched   the same from sketches alone
    shrinking  share of the error energy in the part that shrinks the tensor, 0 to 1
    error      error energy
    """

    measured: Array
    sketched: Array
    shrinking: Array
    error: Array

    @cached_property
    def coherence(self) -> Array:
        """Of the part that does not shrink, [P]; NaN where no cast is both measured and sketched, and not zero."""
        found = self._ratio(self.shrinking < LITTLE)
        return np.where(np.isnan(found), self._ratio(self.shrinking >= 0), found)

    @cached_property
    def shrink_coherence(self) -> Array:
        """Of the part that shrinks, [P]; NaN where no cast that does mostly that was measured."""
        coherence = np.where(np.isnan(self.coherence), 1.0, self.coherence)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            known = (self.shrinking > MOSTLY) & np.isfinite(self.sketched) & (self.sketched > 0)
            rest = self.measured - coherence * self.sketched * (1 - self.shrinking)
            return row_medians(np.where(known, np.maximum(rest, 0.0) / (self.sketched * self.shrinking), np.nan))

    @cached_property
    def taken_from(self) -> NDArray[np.int64]:
        """[P, K]: the cast whose measurement a value is: its own, or another's that makes the same error; -1: none."""
        found = np.where(np.isnan(self.measured), -1, np.arange(self.measured.shape[1]))
        for j in np.flatnonzero(~np.isnan(self.measured).all(axis=0)).tolist():
            with np.errstate(invalid="ignore"):
                alike = np.abs(self.error - self.error[:, j : j + 1]) <= SAME * self.error[:, j : j + 1]
                alike &= np.abs(self.shrinking - self.shrinking[:, j : j + 1]) <= SAME
            alike &= ~np.isnan(self.measured[:, j : j + 1]) & (self.error > 0)
            found = np.where(alike & (found < 0), j, found)
        return np.asarray(found, dtype=np.int64)

    @property
    def is_measured(self) -> Mask:
        """[P, K]"""
        return np.asarray(self.taken_from >= 0)

    @property
    def is_told(self) -> Mask:
        """[P, K]: whether some measured cast tells what this one's error does, or it was measured itself."""
        return self.is_measured | (self.shrinking < LITTLE) | ~np.isnan(self.shrink_coherence)[:, None]

    @cached_property
    def values(self) -> Array:
        """The best that is known, [P, K]."""
        coherence = np.where(np.isnan(self.coherence), 1.0, self.coherence)[:, None]
        shrink = np.where(np.isnan(self.shrink_coherence)[:, None], coherence, self.shrink_coherence[:, None])
        share = np.where(np.isnan(self.shrinking), 0.0, self.shrinking)
        with np.errstate(invalid="ignore"):
            scaled = self.sketched * (coherence * (1 - share) + shrink * share)
        return np.where(self.is_measured, self.of_measured(self.measured), scaled)

    def of_measured(self, values: Array) -> Array:
        """What goes with a measured value, [P, K], where it is taken over from another cast; else as it is."""
        return np.take_along_axis(values, np.maximum(self.taken_from, 0), axis=1) if values.size else values

    def _ratio(self, chosen: Mask) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            both = (self.measured > 0) & (np.abs(self.sketched) > 0) & (chosen | np.isnan(self.shrinking))
            return row_medians(np.where(both, self.measured / self.sketched, np.nan))


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
