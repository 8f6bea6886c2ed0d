"""Flags: why the metrics of a cast may be less exact than they look. `metrics.py` says what each means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from advisor.bins import BIN_BITS, Bins
from advisor.grid import Array, Expected, Grid
from probes.casts import Cast
from probes.history import SlotHistory

FLAGS = ("few_values", "few_elements", "no_signs", "other_scales")


@dataclass(frozen=True)
class Thresholds:
    """From where on a flag is raised. Ours: SQNR is promised within 0.5 dB and rates within 0.005, which is to be three
    standard deviations."""

    error_spread: float = 10 ** (0.5 / 3 / 10) - 1
    """Relative standard deviation of the error energy."""
    rate_spread: float = 0.005 / 3
    """Standard deviation of a rate."""
    rate_shift: float = 0.005
    """What uneven bins may move a rate by at most."""
    distinct: float = 525
    """Distinct magnitudes in the sample. Each is one draw of δ², whose standard deviation is 0.89 times its mean where
    δ is spread evenly: with 525 draws, 0.039, which is `error_spread`."""
    lattice_share: float = 0.05
    """Share of the error energy that is made where a 16-bit tensor's lattice is coarse."""
    mantissas: float = 16
    """Mantissas of scales, effectively, that blur such a lattice."""
    subnormal_share: float = 0.1
    """Share of an fp16 tensor's elements that are so few steps above zero that their lattice decides rates."""


THRESHOLDS = Thresholds()


class Errors(Protocol):
    """What flags are told by: counts and energies of all steps together, as in `metrics.Measured`."""

    @property
    def nonzero(self) -> float: ...
    @property
    def overflows(self) -> float: ...
    @property
    def error_energy(self) -> float: ...
    @property
    def error_spread(self) -> float: ...


def flags_of(
    few_distinct: bool, bins: Bins, expected: Expected, scale: Array, pooled: Errors, cast: Cast
) -> tuple[str, ...]:
    if not pooled.nonzero:
        return ()
    rates = (expected.underflow, expected.subnormal, expected.overflow)
    uneven = bins.unevenness()
    few_values = (
        (few_distinct and pooled.error_energy != 0)
        or _rate_shift(rates, bins, uneven, scale, cast) > THRESHOLDS.rate_shift * pooled.nonzero
        or _energy_shift(expected, bins, uneven, scale, cast) > THRESHOLDS.error_spread * pooled.error_energy
    )
    rate_spread = max(float(np.sqrt((bins.count * rate * np.maximum(1 - rate, 0)).sum())) for rate in rates)
    few_elements = (
        pooled.error_spread > THRESHOLDS.error_spread * pooled.error_energy
        or rate_spread > THRESHOLDS.rate_spread * pooled.nonzero
    )
    no_signs = not cast.format.symmetric and pooled.overflows > 0
    return ("few_values",) * few_values + ("few_elements",) * few_elements + ("no_signs",) * no_signs


def _rate_shift(rates: tuple[Array, ...], bins: Bins, uneven: Array, scale: Array, cast: Cast) -> float:
    """How many elements' outcomes change if the uneven ones sit at one end of their bins."""
    cut = np.any([(rate > 0) & (rate < 1) for rate in rates], axis=0).astype(np.float64)
    if cast.rounding == "stochastic":  # no step there but a ramp, of which a bin sees its width
        cut *= np.minimum(_cells(bins, scale, cast), 1.0)
    return float((cut * uneven).sum())


def _energy_shift(expected: Expected, bins: Bins, uneven: Array, scale: Array, cast: Cast) -> float:
    """Standard deviation of the error energy if the uneven elements of a bin err alike, in every step the same way."""
    deviation = np.sqrt(variance_of(expected))
    if cast.rounding == "stochastic":  # of that only what depends on the place: f·(1 − f) over a cell, or part of one
        spacing = Grid(cast).spacing(bins.low / scale)
        by_place = spacing**2 * np.minimum(_cells(bins, scale, cast) / 12**0.5, 1 / 180**0.5)
        deviation = np.where(expected.overflow > 0, deviation, np.minimum(deviation, by_place))
    each_bin = (uneven * deviation * scale**2 * bins.square / bins.count) ** 2
    return float(np.sqrt(np.bincount(bins.step, weights=each_bin)).sum())


def _cells(bins: Bins, scale: Array, cast: Cast) -> Array:
    """Width of each bin in spacings of the grid."""
    return (bins.high - bins.low) / scale / Grid(cast).spacing(bins.low / scale)


def rounds_few_values(history: SlotHistory, at: Any = slice(None)) -> bool:
    """Whether any error is made on too few distinct magnitudes, by the median step of those where they are uncertain.

    They are certain where all magnitudes are one, and where a bin has a single lattice point. `at`: which steps.
    """
    uncertain = uncertain_of(history.amin, history.amax, history.significant_bits)[at]
    return bool(uncertain.any() and np.median(history.distinct[at][uncertain]) < THRESHOLDS.distinct)


def uncertain_of(amin: NDArray[Any], amax: NDArray[Any], significant_bits: NDArray[Any]) -> NDArray[np.bool_]:
    """At which steps [S] it is uncertain where in their bins the elements lie."""
    return np.asarray((amin < amax) & (significant_bits > BIN_BITS))


def variance_of(expected: Expected) -> Array:
    """Variance of δ²; zero where it is infinite."""
    finite = np.isfinite(expected.squared)
    mean, mean_square = (np.where(finite, moment, 0.0) for moment in (expected.squared, expected.fourth))
    return np.maximum(mean_square - mean**2, 0.0)
