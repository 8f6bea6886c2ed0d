"""What a cast does to one slot: counts and energies, and the rates that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from advisor.grid import Array

Number = TypeVar("Number", float, Array)


@dataclass(frozen=True, eq=False)
class Measured(Generic[Number]):
    """What a cast does to one slot: arrays [S] step by step, or floats for all steps together. Counts are expected.

    nonzero, elements      finite non-zero elements; all elements
    nonfinite              NaN, +Inf and -Inf
    underflows, subnormals, overflows   elements that round to zero; to a non-zero subnormal; beyond the largest value
    signal_energy          Σx² over finite elements
    error_energy           Σδ², δ the rounding error; inf where a cast that does not saturate may overflow
    bias_energy            Σx·δ, which is -Σx² if all is flushed to zero
    error_spread           standard deviation of error_energy, as elements may be anywhere in their bins
    amax, amin             largest and smallest non-zero finite magnitude; 0 where there is none
    flags                  for all steps together: "few_values", "few_elements", "no_signs", "other_scales"
    """

    nonzero: Number
    elements: Number
    nonfinite: Number
    underflows: Number
    subnormals: Number
    overflows: Number
    signal_energy: Number
    error_energy: Number
    bias_energy: Number
    error_spread: Number
    amax: Number
    amin: Number
    flags: tuple[str, ...]

    @property
    def underflow(self) -> Number:
        """Share of the non-zero elements that round to zero; NaN where there are none."""
        return _ratio(self.underflows, self.nonzero)

    @property
    def subnormal(self) -> Number:
        """Share of the non-zero elements that round to a non-zero subnormal."""
        return _ratio(self.subnormals, self.nonzero)

    @property
    def overflow(self) -> Number:
        """Share of the non-zero elements that round beyond the format's largest value."""
        return _ratio(self.overflows, self.nonzero)

    @property
    def sqnr_db(self) -> Number:
        """Signal over error energy, dB; +inf without error, -inf for an infinite one, NaN without signal."""
        with np.errstate(divide="ignore"):
            return _as_given(10 * np.log10(_ratio(self.signal_energy, self.error_energy)))

    @property
    def dynamic_range_bits(self) -> Number:
        """log2 of the largest over the smallest non-zero magnitude; NaN where there is none."""
        return _as_given(np.log2(_ratio(self.amax, self.amin)))

    @property
    def exponent_bits(self) -> Number:
        """Exponent bits that hold every non-zero element with full precision; NaN where there is none.

        One code for each octave from the smallest to the largest magnitude and one for zero, in whole bits. (A format
        that keeps its top code for Inf and NaN has one octave less to give.)
        """
        octaves = _octave(self.amax) - _octave(self.amin) + 1
        return _as_given(np.where(np.greater(self.amax, 0), np.ceil(np.log2(octaves + 1)), np.nan))


class PooledMetrics(Measured[float]):
    """All steps of a slot as one."""


class Metrics(Measured[Array]):
    """A slot step by step: arrays [S], float64."""

    def divided(self, gain: Array) -> Metrics:
        """Those of the same elements, each step's divided by its gain [S]."""
        of_first, of_second = ("amax", "amin"), ("signal_energy", "error_energy", "bias_energy", "error_spread")
        changed = {name: getattr(self, name) / gain for name in of_first}
        changed |= {name: getattr(self, name) / gain**2 for name in of_second}
        return replace(self, **changed)

    def pooled(self) -> PooledMetrics:
        """Counts and energies add; spreads add as variances; amax is the largest, amin the smallest non-zero."""
        added = {name: float(getattr(self, name).sum()) for name in _ADDED}
        amin = self.amin[self.amin > 0]
        return PooledMetrics(
            **added,
            error_spread=float(np.sqrt((self.error_spread**2).sum())),
            amax=float(self.amax.max(initial=0.0)),
            amin=float(amin.min()) if len(amin) else 0.0,
            flags=self.flags,
        )


_ADDED = (
    "nonzero",
    "elements",
    "nonfinite",
    "underflows",
    "subnormals",
    "overflows",
    "signal_energy",
    "error_energy",
    "bias_energy",
)


def _ratio(part: Any, whole: Any) -> Any:
    """part / whole, and what its limit is where the whole is zero: inf, or NaN for 0/0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _as_given(np.divide(part, whole))


def _as_given(result: Any) -> Any:
    """Arrays for arrays, Python's own floats for floats."""
    return result if np.ndim(result) else float(result)


def _octave(magnitude: Any) -> Any:
    """floor(log2(magnitude)), exact; 0 counts as 1."""
    return np.frexp(np.where(np.equal(magnitude, 0), 1.0, magnitude))[1] - 1
