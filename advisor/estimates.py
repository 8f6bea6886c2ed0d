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
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from advisor.grid import Array

Mask = NDArray[np.bool_]

LITTLE, MOSTLY = (
    0.1,
    0.5,
)  # share of the shrinking part up to and from which a cast tells of the one and the other. Ours
FEW_FLUSHED = 0.02  # share of flushed elements up to which a gradient's noise is that of rounding. Ours
LEAST = (
    0.01  # of the error's energy: what flushing adds at least where it was measured, so that it has a logarithm. Ours
)
NEXT_TO_NONE = 1e-7  # a share from which on, or from one less which, more makes no difference
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
        """[P, K]: the cast whose measurement a value is (`measurement_of`)."""
        return measurement_of(self.measured, self.error, self.shrinking)

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


@dataclass(frozen=True, eq=False)
class NoiseEstimates:
    """Noise that casts put into gradients, relative to these gradients: P slots, K casts, float64 [P, K], NaN: unknown.

    A gradient's elements are written small beside its largest, and a cast does two things to them. Rounding of those
    that stay is random, and its energy passes on as it is. Those flushed to zero go one way: what a whole sample, token
    or channel with small gradients would have added is gone, and such losses add up in the sum over samples to ten or a
    hundred times their energy. Which part of the error is of this kind depends on how much is flushed, and on little
    else about the cast. So

        value    = rounding·E·(1 − S) + E·S + flushing(u)
        rounding = median of measured/E over the measured casts that flush next to nothing
        flushing = what a measured cast's noise has beyond the two other terms, as a function of u: between two of them
                   log(flushing) is linear in log(u/(1 − u)), but below the first that flushes more than FEW_FLUSHED it
                   falls as u does at least; below all of them it goes with u²

    with E the error's energy over the tensor's, S the share of E that shrinks the tensor as a whole (the gradients
    shrink with it: products are linear) and u the share of the elements that is flushed. The same tells what of the
    error is alike in all batches.

    measured   what the scored steps measured; a cast that makes the very error of a measured one has its value
    error      E; shrinking: S; flushed: u
    random     [K]: casts that round stochastically, and so flush without bias
    """

    measured: Array
    error: Array
    shrinking: Array
    flushed: Array
    random: Mask

    @cached_property
    def rounding(self) -> Array:
        """Noise over error energy of what is rounded, [P]; NaN where no cast was measured."""
        with np.errstate(invalid="ignore", divide="ignore"):
            known = (self.measured >= 0) & (self.error > 0)
            ratio = np.where(known, self.measured / self.error, np.nan)
            share = np.where(known & (self.shrinking < LITTLE), self.flushed, np.nan)
            least = np.where(np.isnan(share), np.inf, share).min(axis=1, initial=np.inf)[:, None]
            return row_medians(np.where(share <= np.maximum(least, FEW_FLUSHED), ratio, np.nan))

    @cached_property
    def values(self) -> Array:
        """The best that is known, [P, K]."""
        plain = self._plain
        excess = self._between(np.where(self._tells, np.maximum(self.measured - plain, LEAST * self.error), np.nan))
        told = plain + np.where(self.random, 0.0, excess)
        return np.where(self.is_measured, self.of_measured(self.measured), told)

    @property
    def is_measured(self) -> Mask:
        """[P, K]: the cast itself, or one that makes the same error."""
        return np.asarray(self._taken_from >= 0)

    @cached_property
    def _taken_from(self) -> NDArray[np.int64]:
        return measurement_of(self.measured, self.error, self.shrinking)

    def of_measured(self, values: Array) -> Array:
        """What goes with a measured value, [P, K], where it is taken over from another cast; else as it is."""
        return np.take_along_axis(values, np.maximum(self._taken_from, 0), axis=1) if values.size else values

    @property
    def _plain(self) -> Array:
        """Without the flushing."""
        rounding = np.where(np.isnan(self.rounding), 1.0, self.rounding)[:, None]
        with np.errstate(invalid="ignore"):
            return np.asarray(self.error * (rounding * (1 - self.shrinking) + self.shrinking))

    @property
    def _tells(self) -> Mask:
        with np.errstate(invalid="ignore"):
            return (self.measured >= 0) & (self.error > 0) & ~self.random

    def _between(self, known: Array) -> Array:
        """At every cast's share of flushed elements, from the casts where it is known, [P, K]; 0 where none is."""
        held = np.flatnonzero(~np.isnan(known).all(axis=0))
        if not len(held):
            return np.zeros(known.shape)
        place = _logit(self.flushed)
        with np.errstate(divide="ignore"):
            heights = np.log(known[:, held])
        points = np.where(np.isnan(heights), np.inf, place[:, held])
        order = np.argsort(points, axis=1, kind="stable")
        points, heights = np.take_along_axis(points, order, 1), np.take_along_axis(heights, order, 1)
        after = (points[:, None, :] <= place[:, :, None]).sum(axis=2)
        last = np.maximum(np.isfinite(points).sum(axis=1)[:, None] - 1, 0)
        left, right = np.clip(after - 1, 0, last), np.clip(after, 0, last)
        x0, x1 = np.take_along_axis(points, left, 1), np.take_along_axis(points, right, 1)
        y0, y1 = np.take_along_axis(heights, left, 1), np.take_along_axis(heights, right, 1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            inside = y0 + np.where(x1 > x0, (place - x0) / (x1 - x0), 0.0) * (y1 - y0)
            first = np.minimum(inside, y1 + np.log(self.flushed / _share(x1)))
            inside = np.where(_share(x0) < FEW_FLUSHED, first, inside)
            below = y0 + 2 * np.minimum(np.log(self.flushed / _share(x0)), 0.0)
            found = np.exp(np.where(after == 0, below, inside))
            # Beyond the last there is less and less that is not shrunk as a whole.
            found = np.where(after > last, found * (1 - self.shrinking), found)
        return np.where(np.isfinite(found), found, 0.0)


def measurement_of(measured: Array, error: Array, shrinking: Array) -> NDArray[np.int64]:
    """[P, K]: the cast whose measurement a cast has: its own, or another's that makes the same error; -1: none."""
    found = np.where(np.isnan(measured), -1, np.arange(measured.shape[1]))
    for j in np.flatnonzero(~np.isnan(measured).all(axis=0)).tolist():
        with np.errstate(invalid="ignore"):
            alike = np.abs(error - error[:, j : j + 1]) <= SAME * error[:, j : j + 1]
            alike &= np.abs(shrinking - shrinking[:, j : j + 1]) <= SAME
        alike &= ~np.isnan(measured[:, j : j + 1]) & (error > 0)
        found = np.where(alike & (found < 0), j, found)
    return np.asarray(found, dtype=np.int64)


def _logit(share: Array) -> Array:
    held = np.clip(np.where(np.isnan(share), 0.0, share), NEXT_TO_NONE, 1 - NEXT_TO_NONE)
    return np.asarray(np.log(held / (1 - held)))


def _share(logit: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logit)))


def table_of(values: Sequence[Mapping[str, float]], places: Mapping[str, int]) -> Array:
    """[slots, casts] from each slot's cast → value; NaN where there is none, and casts without a place left out."""
    found = np.full((len(values), len(places)), np.nan)
    alike: dict[tuple[str, ...], list[int]] = {}  # slots that have the same casts, which most have
    for p, by_cast in enumerate(values):
        if by_cast:
            alike.setdefault(tuple(by_cast), []).append(p)
    for casts, slots in alike.items():
        kept = [i for i, cast in enumerate(casts) if cast in places]
        if kept:
            held = chain.from_iterable(values[p].values() for p in slots)
            table = np.fromiter(held, np.float64, len(slots) * len(casts)).reshape(len(slots), -1)
            found[np.ix_(slots, [places[casts[i]] for i in kept])] = table[:, kept]
    return found


def row_medians(values: Array) -> Array:
    """Median of each row [P], NaNs left out; NaN where nothing is left."""
    if not values.shape[1]:
        return np.full(len(values), np.nan)
    ordered, rows = np.sort(values, axis=1), np.arange(len(values))  # NaNs come last
    count = (~np.isnan(values)).sum(axis=1)
    median = (ordered[rows, np.maximum(count - 1, 0) // 2] + ordered[rows, count // 2]) / 2
    return np.asarray(np.where(count > 0, median, np.nan))
