"""Rounding outcomes on a format's grid in closed form: at a point, or on average over an interval.

The grid is even within an octave. With w = u / spacing, an integral over the rounding error δ is therefore a number
of whole cells and a polynomial in what is left over. A whole cell, in units of the spacing, holds

                ∫ δ²     ∫ δ⁴     ∫ w·δ between grid points
    nearest     1/12     1/80     1/24
    stochastic  1/6      1/15     0            (expected over the draws as well)

and since octaves double, those below any u add up to a geometric series. So an antiderivative needs the octave of u
alone, and the average over an interval is a difference of two, whatever lies in between: no loop over code points.
Beyond the largest value the error is the distance to it.

The probability of rounding to at least some grid value goes from 0 to 1 over the spacing below it: in a step at its
middle for nearest, in a ramp for stochastic. Underflow, subnormal results and overflow are made of such steps.

Magnitudes here are in units of the cast's scale: u = |x| / scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from probes.casts import Cast

Array = NDArray[np.float64]

_EXPONENT_FIELD = np.int64(0x7FF << 52)


class Expected(NamedTuple):
    """Expected outcomes, arrays of one shape; errors in units of the scale.

    underflow, subnormal, overflow   probability of rounding to zero, to a non-zero subnormal, beyond the largest value
    squared, fourth                  E[δ²] and E[δ⁴]; infinite where overflow is possible and does not saturate
    product                          E[u·δ]: negative where magnitudes shrink
    """

    underflow: Array
    subnormal: Array
    overflow: Array
    squared: Array
    fourth: Array
    product: Array


@dataclass(frozen=True)
class Grid:
    """The grid that a cast rounds to, and how it does."""

    cast: Cast

    def at(self, u: Array) -> Expected:
        """Outcomes of elements of these magnitudes, u ≥ 0."""
        within = np.minimum(u, self.cast.format.largest)
        beyond = u - within
        spacing = self.spacing(within)
        w = within / spacing
        if self._is_random:
            f = w - np.floor(w)
            both_ways = f * (1 - f)
            squared = both_ways * spacing**2
            fourth = squared * (1 - 3 * both_ways) * spacing**2
            product = np.zeros_like(w)
        else:
            error = (np.rint(w) - w) * spacing
            squared = error**2
            fourth, product = squared**2, within * error
        rates = self._rates(lambda value, below: self._reached(u, value, below))
        return self._outcome(rates, squared + beyond**2, fourth + (beyond**2) ** 2, product - u * beyond)

    def over(self, low: Array, high: Array) -> Expected:
        """Mean outcomes of elements spread evenly over [low, high), 0 ≤ low < high."""
        width = high - low
        moments = (
            (above - below) / width
            for above, below in zip(self._antiderivatives(high), self._antiderivatives(low), strict=True)
        )
        rates = self._rates(
            lambda value, below: (
                (self._reached_up_to(high, value, below) - self._reached_up_to(low, value, below)) / width
            )
        )
        return self._outcome(rates, *moments)

    def spacing(self, u: Array) -> Array:
        """Distance between neighbours of the grid at each magnitude."""
        return self._octave(u) * 2.0**-self.cast.format.mantissa_bits

    def is_cut(self, low: Array, high: Array) -> NDArray[np.bool_]:
        """Whether the outcome of nearest rounding changes in [low, high]: to zero, to a normal value, to overflow."""
        if self._is_random:
            return np.zeros(low.shape, dtype=np.bool_)
        steps = ((value - below / 2) for value, below in self._outcome_values)
        return np.any([(low <= step) & (step <= high) for step in steps], axis=0)

    @property
    def _outcome_values(self) -> tuple[tuple[float, float], ...]:
        """The smallest non-zero value, the smallest normal one, and what overflows; each with the spacing below it."""
        target = self.cast.format
        step, top = target.smallest_subnormal, target.largest_spacing
        return (step, step), (target.smallest_normal, step), (target.largest + top, top)

    @property
    def _is_random(self) -> bool:
        return self.cast.rounding == "stochastic"

    def _octave(self, u: Array) -> Array:
        """2^max(floor(log2 u), emin), from the bits."""
        power = (np.asarray(u, dtype=np.float64).view(np.int64) & _EXPONENT_FIELD).view(np.float64)
        return np.maximum(power, 2.0**self.cast.format.emin)

    def _antiderivatives(self, u: Array) -> tuple[Array, Array, Array]:
        """∫ δ², ∫ δ⁴ and ∫ v·δ for v from 0 to u."""
        target = self.cast.format
        within = np.minimum(u, target.largest)
        beyond = u - within
        octave = self._octave(within)
        spacing = octave * 2.0**-target.mantissa_bits
        w = within / spacing
        if self._is_random:
            a_cell = (1 / 6, 1 / 15, 0.0)
            n = np.floor(w)
            t = w - n
            in_cells = (
                n / 6 + t * t * (1 / 2 - t / 3),
                n / 15 + t * t * (1 / 2 - t * (4 / 3 - t * (3 / 2 - t * 3 / 5))),
                np.zeros_like(w),
            )
        else:
            a_cell = (1 / 12, 1 / 80, 1 / 24)
            n = np.rint(w)
            t = w - n
            cube = t * t * t
            in_cells = (n / 12 + cube / 3, n / 80 + cube * t * t / 5, n / 24 - n * t * t / 2 - cube / 3)
        # What `in_cells` counts too much below the octave, where cells are smaller: 1 − 1/7 of the octaves' cubes for
        # what grows as spacing²·u, 1 − 1/31 of their fifth powers for spacing⁴·u.
        octave_cube, spacing_cube, beyond_cube = (v * v * v for v in (octave, spacing, beyond))
        cubes = 4.0**-target.mantissa_bits * 6 / 7 * (octave_cube - 2.0 ** (3 * target.emin))
        fifths = 16.0**-target.mantissa_bits * 30 / 31 * (octave_cube * octave * octave - 2.0 ** (5 * target.emin))
        return (
            in_cells[0] * spacing_cube - a_cell[0] * cubes + beyond_cube / 3,
            in_cells[1] * spacing_cube * spacing * spacing - a_cell[1] * fifths + beyond_cube * beyond * beyond / 5,
            in_cells[2] * spacing_cube - a_cell[2] * cubes - beyond * beyond * (target.largest / 2 + beyond / 3),
        )

    def _rates(self, reached: Callable[[float, float], Array]) -> tuple[Array, Array, Array]:
        """Underflow, subnormal and overflow from the probability to reach a grid value with a spacing below it."""
        nonzero, normal, beyond = (reached(value, below) for value, below in self._outcome_values)
        return 1 - nonzero, nonzero - normal, beyond

    def _reached(self, u: Array, value: float, below: float) -> Array:
        """Probability that u rounds to `value` or more, `below` being the spacing under it."""
        if self._is_random:
            return np.clip((u - (value - below)) / below, 0.0, 1.0)
        tie = value - below / 2
        even = value / below % 2 == 0
        return np.asarray(u >= tie if even else u > tie, dtype=np.float64)

    def _reached_up_to(self, u: Array, value: float, below: float) -> Array:
        """The antiderivative of `_reached`."""
        if self._is_random:
            ramp = np.clip(u - (value - below), 0.0, below)
            return ramp**2 / (2 * below) + np.maximum(u - value, 0.0)
        return np.maximum(u - (value - below / 2), 0.0)

    def _outcome(self, rates: tuple[Array, Array, Array], squared: Array, fourth: Array, product: Array) -> Expected:
        if not self.cast.saturate:
            squared, fourth, product = (np.where(rates[2] > 0, np.inf, moment) for moment in (squared, fourth, product))
        return Expected(*rates, squared, fourth, product)
