"""The occupied bins of a slot's sketches, and what a cast does to the elements in them.

Within a bin elements are taken to be spread evenly, the highest bin ending at the largest magnitude seen and the
lowest beginning at the smallest. Two things are known better, and used:

- The largest element of a step is taken out of its bin and scored by itself: current scaling writes it without
  error, and a single outlier may carry most of a tensor's energy. (Toward zero it may cost a whole step of the grid:
  x divided by its scale in float32 can end just below the largest value.)
- The tensor's own precision. Elements of a bf16 tensor are multiples of 2^-7 of their octave. Where that lattice is
  not much finer than the target's grid (bf16 values to fp16, e4m3fn values to e5m2), or an outcome changes, perhaps
  right on a lattice point, each of a bin's lattice points is scored. Where it is no finer and the scale is a power of
  two, there is no error at all.

The bins of a sketch relative to tiles (`relative.py`) are the same but for their unit, which is R in place of 1: a
scale is then a multiple of R, and energies are sums over R².
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from advisor.grid import Array, Expected, Grid
from probes.casts import Cast
from probes.formats import FORMATS
from probes.history import SlotHistory
from probes.sketch import BIN_EDGES

BIN_BITS = 3  # eight bins an octave: a lattice of up to three mantissa bits has one point a bin, its lower edge
ALWAYS_BITS = 5  # up to here (4 points a bin) lattice points are scored one by one
LATTICE_BITS = 10  # up to here (fp16, 128 points a bin) they are where the lattice shows
LATTICE_FINER = 8  # times as fine a lattice is as good as continuous: δ² is 1 + 2/8² times as large, 0.13 dB
FINER_TOWARD_ZERO = 64  # there it is 1 - 3/(2·64) times that: 0.10 dB
_CHUNK = 2048  # bins whose points are held in memory at once
SAME = 2.0**-23  # so near to the format's largest value does current scaling bring the largest element

SMALLEST = FORMATS["fp32"].smallest_subnormal  # a sketch holds float32
SMALLEST_OF_DTYPE = {"float16": FORMATS["fp16"].smallest_subnormal}  # bfloat16's is out of sight


@dataclass(frozen=True, eq=False)
class Bins:
    """N occupied bins, steps one after another; of a whole tensor without each step's largest element.

    step       int64 [N]: index of the step
    line       int64 [N]: what bins must share to be neighbours: the step, or a step's class of tiles
    place      int64 [N]: rising within a line; of neighbours, by 1
    bin        int64 [N]: of `BIN_EDGES`, in which the bin's elements lie
    low, high  float64 [N]: where the bin's elements lie, low ≤ high, in units of R
    count      float64 [N], positive
    square     float64 [N]: the sum of R² over the bin's elements
    fourth     float64 [N]: that of R⁴
    bits       int64 [N]: mantissa bits that the tensor uses at that step
    """

    step: NDArray[np.int64]
    line: NDArray[np.int64]
    place: NDArray[np.int64]
    bin: NDArray[np.int64]
    low: Array
    high: Array
    count: Array
    square: Array
    fourth: Array
    bits: NDArray[np.int64]

    @classmethod
    def of(cls, history: SlotHistory) -> Bins:
        """The bins of a history: R is 1."""
        step = np.repeat(np.arange(len(history.steps)), np.diff(history.offsets))
        bins = history.bins.astype(np.int64)
        amax, amin = history.amax.astype(np.float64)[step], history.amin.astype(np.float64)[step]
        low, high = BIN_EDGES[bins], BIN_EDGES[bins + 1]
        count = history.counts - (high > amax)  # of a step's bins, the highest alone ends beyond its largest element
        kept = count > 0
        counted = count[kept].astype(np.float64)
        return cls(
            step=step[kept],
            line=step[kept],
            place=bins[kept],
            bin=bins[kept],
            low=np.maximum(low, amin)[kept],
            high=np.minimum(high, amax)[kept],
            count=counted,
            square=counted,
            fourth=counted,
            bits=history.significant_bits.astype(np.int64)[step][kept],
        )

    def outcomes(self, cast: Cast, scale: Array, dtype: str | None) -> Expected:
        """Mean outcomes of each bin's elements, [N]; errors in units of the scale.

        scale  float64 [N], in units of R
        dtype  the tensor's own, where known: fp16's subnormals are a lattice that `bits` does not tell of
        """
        finest = SMALLEST_OF_DTYPE.get(dtype or "", SMALLEST)
        low, high = self.low / scale, self.high / scale
        spacing = Grid(cast).spacing(low)
        lattice = self._lattice(finest) / scale
        on_grid = (np.frexp(scale)[0] == 0.5) & (lattice >= spacing) & (high <= cast.format.largest)
        finer = FINER_TOWARD_ZERO if cast.rounding == "zero" else LATTICE_FINER
        coarse = (self.bits <= ALWAYS_BITS) | (lattice * finer > spacing) | Grid(cast).is_cut(low, high)
        one_by_one = ~on_grid & (coarse & (self.bits <= LATTICE_BITS) | (self.high <= self.low))
        found = Expected(*(np.zeros(len(self.low)) for _ in Expected._fields))
        found.subnormal[on_grid] = self.low[on_grid] < cast.format.smallest_normal * scale[on_grid]
        (points,), (intervals,) = np.nonzero(one_by_one), np.nonzero(~on_grid & ~one_by_one)
        for start in range(0, len(points), _CHUNK):
            chosen = points[start : start + _CHUNK]
            self._put(found, chosen, self._only(chosen)._of_lattice_points(cast, scale[chosen], finest))
        self._put(found, intervals, self._only(intervals)._of_intervals(cast, scale[intervals]))
        return found

    def total(self, quantity: Array, steps: int) -> Array:
        """Sum over the elements of each step, float64 [steps], of a quantity that is given per bin and element."""
        return np.bincount(self.step, weights=self.count * quantity, minlength=steps).astype(np.float64)

    def energy(self, moment: Array, scale: Array, steps: int) -> Array:
        """The same of a second moment in units of the scale: an energy in the tensor's own units."""
        return np.bincount(self.step, weights=self.square * moment * scale**2, minlength=steps).astype(np.float64)

    def energy_variance(self, variance: Array, scale: Array, steps: int) -> Array:
        """Variance of that energy, from the variance of each element's part, float64 [steps]."""
        each_bin = self.fourth * variance * (scale**2) ** 2
        return np.bincount(self.step, weights=each_bin, minlength=steps).astype(np.float64)

    def unevenness(self) -> Array:
        """How many of each bin's elements may well lie elsewhere in it than an even spread has them, [N].

        An even spread is believed as far as the density of a neighbour supports it and chance (three standard
        deviations of the count) explains; what is more may all sit in one place. And under a density that changes
        evenly from one neighbour's to the other's, a sixteenth of the difference is in the other half.
        """
        width = self.high - self.low
        density = np.divide(self.count, width, out=np.zeros_like(width), where=width > 0)
        adjoining = (np.diff(self.place) == 1) & (np.diff(self.line) == 0)
        before, after = np.zeros_like(width), np.zeros_like(width)
        before[1:] = np.where(adjoining, density[:-1], 0.0)
        after[:-1] = np.where(adjoining, density[1:], 0.0)
        unexplained = self.count - np.maximum(before, after) * width - 3 * np.sqrt(self.count)
        return np.where(width > 0, np.maximum(unexplained, 0.0) + np.abs(after - before) * width / 16, 0.0)

    def _lattice(self, finest: float) -> Array:
        """What each bin's elements are multiples of, or of a multiple of it, [N]."""
        octave = np.ldexp(1.0, ((self.bin >> BIN_BITS) - 127).astype(np.int32))
        return np.maximum(octave * np.ldexp(1.0, -self.bits.astype(np.int32)), finest)

    def _only(self, chosen: NDArray[np.intp]) -> Bins:
        return Bins(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def _put(found: Expected, chosen: NDArray[np.intp], outcomes: Expected) -> None:
        for whole, piece in zip(found, outcomes, strict=True):
            whole[chosen] = piece

    def _of_intervals(self, cast: Cast, scale: Array) -> Expected:
        return Grid(cast).over(self.low / scale, self.high / scale)

    def _of_lattice_points(self, cast: Cast, scale: Array, finest: float) -> Expected:
        points = 2 ** (np.clip(self.bits, BIN_BITS, LATTICE_BITS) - BIN_BITS)[:, None]
        j = np.arange(points.max())
        edge, end = BIN_EDGES[self.bin][:, None], BIN_EDGES[self.bin + 1][:, None]
        values = edge + (end - edge) / points * j
        possible = (j < points) & (values >= self.low[:, None]) & (values <= self.high[:, None])
        if finest > SMALLEST:
            possible &= values % finest == 0
        weight = possible.astype(np.float64)
        none = weight.sum(axis=1) == 0
        values[none, 0], weight[none, 0] = self.low[none], 1.0
        weight /= weight.sum(axis=1, keepdims=True)
        outcomes = Grid(cast).at(_in_units(values, cast, scale[:, None]))
        return Expected(*((weight * np.where(weight > 0, outcome, 0.0)).sum(axis=1) for outcome in outcomes))


def at_largest(amax: Array, cast: Cast, scale: Array) -> Expected:
    """Outcomes of each step's largest element, [S]; zeros where a step has none. Errors in units of the scale."""
    some = amax > 0
    outcomes = Grid(cast).at(_in_units(amax, cast, scale))
    return Expected(*(np.where(some, outcome, 0.0) for outcome in outcomes))


def _in_units(values: Array, cast: Cast, scale: Array) -> Array:
    """Magnitudes over the scale, as the float32 division that precedes rounding has them where it matters."""
    u, largest = values / scale, cast.format.largest
    if cast.scale is None:
        return u
    if cast.rounding == "zero":
        with np.errstate(over="ignore"):
            divided = u.astype(np.float32).astype(np.float64)
        return np.where(np.isinf(divided), u, divided)
    return np.where(np.abs(u - largest) <= SAME * largest, largest, u)
