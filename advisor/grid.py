"""Rounding outcomes on a format's grid in closed form: at a point, or on average over an interval.

The grid is even within an octave. With w = u / spacing, an integral over the rounding error δ is therefore a number
of whole cells and a polynomial in what is left over. A whole cell, in units of the spacing, holds

                  ∫ δ²     ∫ δ⁴     ∫ w·δ from grid point n to n + 1
    nearest       1/12     1/80     1/24
    stochastic    1/6      1/15     0            (expected over the draws as well)
    toward zero   1/3      1/5      -(n/2 + 1/3)

and since octaves double, those below any u add up to a geometric series. So an antiderivative needs the octave of u
alone, and the average over an interval is a difference of two, whatever lies in between: no loop over code points.
Beyond the largest value the error is the distance to it.

The probability of rounding to at least some grid value goes from 0 to 1 over the spacing below it: in a step at its
middle for nearest, at its end toward zero, in a ramp for stochastic. Underflow, subnormal results and overflow are made
of such steps.

Magnitudes here are in units of the cast's scale: u = |x| / scale. Without a sign int4's lowest value, -8, cannot be
told from what overflows its largest, 7, and counts as that.
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
    squared, fourth                  E[δ²] and E[δ⁴]; infinite where overflow is possible and becomes Inf or NaN
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
            error = ((np.floor(w) if self._is_toward_zero else np.rint(w)) - w) * spacing
            squared = error**2
            fourth, product = squared**2, within * error
        rates = self._rates(lambda value, below: self._reached(u, value, below))
        return self._outcome(rates, squared + beyond**2, fourth + (beyond**2) ** 2, product - u * beyond)

    def over(self, low: Array, high: Array) -> Expected:
        """Mean outcomes of elements spread evenly over [low, high), 0 ≤ low < high."""
        width, largest = high - low, self.cast.format.largest
        above, below = (self._antiderivatives(np.minimum(end, largest)) for end in (high, low))
        over_by = np.maximum(low - largest, 0.0), np.maximum(high - largest, 0.0)
        share = (over_by[1] - over_by[0]) / width
        moments = (
            (up - down) / width + share * mean
            for up, down, mean in zip(above, below, self._means_beyond(*over_by), strict=True)
        )
        rates = self._rates(lambda value, below: self._reached_within(low, high, value, below))
        return self._outcome(rates, *moments)

    def spacing(self, u: Array) -> Array:
        """Distance between neighbours of the grid at each magnitude."""
        return self._octave(u) * 2.0**-self.cast.format.mantissa_bits

    def is_cut(self, low: Array, high: Array) -> NDArray[np.bool_]:
        """Whether the outcome changes in a step in [low, high]: to non-zero, to a normal value, to overflow."""
        if self._is_random:
            return np.zeros(low.shape, dtype=np.bool_)
        steps = (self._step(value, below) for value, below in self._outcome_values)
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

    @property
    def _is_toward_zero(self) -> bool:
        return self.cast.rounding == "zero"

    def _step(self, value: float, below: float) -> float:
        """From where on magnitudes round to `value` or more, `below` being the spacing under it."""
        return value if self._is_toward_zero else value - below / 2

    def _octave(self, u: Array) -> Array:
        """2^max(floor(log2 u), emin), from the bits."""
        power = (np.asarray(u, dtype=np.float64).view(np.int64) & _EXPONENT_FIELD).view(np.float64)
        return np.maximum(power, 2.0**self.cast.format.emin)

    def _antiderivatives(self, u: Array) -> tuple[Array, Array, Array]:
        """∫ δ², ∫ δ⁴ and ∫ v·δ for v from 0 to u, which is at most the largest value."""
        target = self.cast.format
        octave = self._octave(u)
        spacing = octave * 2.0**-target.mantissa_bits
        w = u / spacing
        n = np.rint(w) if self.cast.rounding == "nearest" else np.floor(w)
        t = w - n
        if self._is_random:
            a_cell = (1 / 6, 1 / 15)
            in_cells = (
                n / 6 + t * t * (1 / 2 - t / 3),
                n / 15 + t * t * (1 / 2 - t * (4 / 3 - t * (3 / 2 - t * 3 / 5))),
                np.zeros_like(w),
            )
        else:
            cube = t * t * t
            a_cell = (1 / 3, 1 / 5) if self._is_toward_zero else (1 / 12, 1 / 80)
            along = n * (1 - n) / 4 - n / 3 if self._is_toward_zero else n / 24
            in_cells = (
                n * a_cell[0] + cube / 3,
                n * a_cell[1] + cube * t * t / 5,
                along - n * t * t / 2 - cube / 3,
            )
        # What `in_cells` counts too much below the octave, where cells are smaller: 1 − 1/7 of the octaves' cubes for
        # what grows as spacing²·u, 1 − 1/31 of their fifth powers for spacing⁴·u.
        octave_cube, spacing_cube = octave * octave * octave, spacing * spacing * spacing
        cubes = octave_cube - 2.0 ** (3 * target.emin)
        fifths = octave_cube * octave * octave - 2.0 ** (5 * target.emin)
        squared_too_much = a_cell[0] * 4.0**-target.mantissa_bits * 6 / 7 * cubes
        fourth_too_much = a_cell[1] * 16.0**-target.mantissa_bits * 30 / 31 * fifths
        return (
            in_cells[0] * spacing_cube - squared_too_much,
            in_cells[1] * spacing_cube * spacing * spacing - fourth_too_much,
            in_cells[2] * spacing_cube - self._product_too_much * cubes,
        )

    @property
    def _product_too_much(self) -> float:
        """The same of ∫ v·δ, over the octaves' cubes.

        Toward zero the first n cells hold -(n²/4 + n/12). An octave's lower end o is N = 2^mantissa_bits cells of its
        own and 2N of half the size; these hold o³·(1/(8N) + 1/(16N²)) more, and 8/7 of that with all octaves below.
        """
        smallest_step = 2.0**-self.cast.format.mantissa_bits
        if self._is_random:
            return 0.0
        if self._is_toward_zero:
            return -(smallest_step / 8 + smallest_step**2 / 16) * 8 / 7
        return smallest_step**2 / 24 * 6 / 7

    def _means_beyond(self, low: Array, high: Array) -> tuple[Array, Array, Array]:
        """Means of δ², δ⁴ and v·δ from `low` to `high` beyond the largest value. No fifth power, which may overflow."""
        product, ends = low * high, low * low + high * high
        squares = ends + product
        fourths = ends * squares - product * product
        return squares / 3, fourths / 5, -self.cast.format.largest * (low + high) / 2 - squares / 3

    def _rates(self, reached: Callable[[float, float], Array]) -> tuple[Array, Array, Array]:
        """Underflow, subnormal and overflow from the probability to reach a grid value with a spacing below it."""
        nonzero, normal, beyond = (reached(value, below) for value, below in self._outcome_values)
        return 1 - nonzero, np.maximum(nonzero - normal, 0.0), beyond

    def _reached(self, u: Array, value: float, below: float) -> Array:
        """Probability that u rounds to `value` or more, `below` being the spacing under it."""
        if self._is_random:
            return np.clip(u - (value - below), 0.0, below) / below
        step = self._step(value, below)
        step_is_enough = self._is_toward_zero or value / below % 2 == 0  # a tie goes to the even value
        return np.asarray(u >= step if step_is_enough else u > step, dtype=np.float64)

    def _reached_within(self, low: Array, high: Array, value: float, below: float) -> Array:
        """The mean of `_reached` over [low, high)."""
        reached = self._reached_up_to(high, value, below) - self._reached_up_to(low, value, below)
        return np.clip(reached / (high - low), 0.0, 1.0)

    def _reached_up_to(self, u: Array, value: float, below: float) -> Array:
        """The antiderivative of `_reached`."""
        if self._is_random:
            ramp = np.clip(u - (value - below), 0.0, below)
            return ramp**2 / (2 * below) + np.maximum(u - value, 0.0)
        return np.maximum(u - self._step(value, below), 0.0)

    def _outcome(self, rates: tuple[Array, Array, Array], squared: Array, fourth: Array, product: Array) -> Expected:
        if not (self.cast.saturate or self._is_toward_zero):  # toward zero lies the largest value
            squared, fourth, product = (np.where(rates[2] > 0, np.inf, moment) for moment in (squared, fourth, product))
        return Expected(*rates, squared, fourth, product)
