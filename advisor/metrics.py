"""Metrics of a cast from sketches alone: underflow, subnormal results, overflow, SQNR, dynamic range.

Each occupied bin contributes its count times what the cast does, on average, to an element in it (`bins.py`); every
step is scored with its own scale. Outcomes are expected counts and energies, so steps add. Against casting the
tensors themselves (`tests/test_metrics.py`) rates are within 0.005 and SQNR within 0.5 dB, unless a flag says why not:

    few_values    so few distinct magnitudes, or so many more elements in one bin than in its neighbours, that they
                  cannot be taken as spread evenly and it matters
    few_elements  so few elements carry the error, or decide a rate, that chance within their bins is noticeable
    no_signs      the format's lowest value lies further out than its largest (int4's -8 and 7), and elements go there:
                  a sketch has no signs, so they all count as beyond the largest value
    other_scales  of a cast by row or block: scales may be others than the sketch takes them to be, because tiles are so
                  small or large that limits of scales apply, or because a power-of-two scale was sketched under a loss
                  scale that is no power of two

What is counted: rates are shares of the finite non-zero elements; overflow means rounding beyond the largest value,
whether that saturates or not. NaN and Inf are in `nonfinite` and nowhere else. int8 has no subnormal results. Without
elements to speak of (an empty slot, zeros only) rates and SQNR are NaN; without any error SQNR is +inf. Stochastic
rounding is expected over its draws.

A slot that met several tensors in a step is scored as if they had been one, with one scale. A delayed scale follows
the recorded steps, whatever lay between them.

A cast with scales by row, column or block is scored from the sketch relative to these tiles (`relative.py`), over the
steps at which the window has one. Without such a sketch it is refused, as is e8m0, in which no tensor is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from advisor.bins import BIN_BITS, LATTICE_FINER, Bins, at_largest
from advisor.errors import CastNotScored
from advisor.grid import Array, Expected, Grid
from advisor.relative import kind_of, references_alike, relative_bins, toward_zero
from probes import scaling
from probes.casts import Cast
from probes.history import SlotHistory
from probes.measurable import why_not_sketched
from probes.relative_history import RelativeHistory
from probes.sketch import BIN_EDGES
from probes.tiles import Tiling, tiling_name


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

_COARSE_IN_FP16 = 2.0**-19  # 32 of its smallest steps

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


def measure(history: SlotHistory, cast: Cast, dtype: str | None = None, tiling: Tiling | None = None) -> Metrics:
    """Metrics of a cast on one slot, for every step that was sketched; arithmetic on the sketches, no tensor needed.

    dtype   the tensor's own ("float16", "bfloat16", "float32"), where known: fp16's subnormals are a coarse lattice
            that the sketch does not tell of
    tiling  for scales by row, column or block: which axis they run along; otherwise the first that was sketched

    Gradients that were recorded with a loss scale (the history's `gain`) are scored without it: a scale of s on x is
    one of s·gain on the x·gain that was recorded.

    Raises CastNotScored.
    """
    require_scored(cast)
    if has_tiles(cast):
        return _measure_tiles(history, cast, dtype, tiling)
    steps, amax, gain = len(history.steps), history.amax.astype(np.float64), history.gain
    step_scale = scales(amax / gain, cast) * gain
    bins = Bins.of(history)
    scale = step_scale[bins.step]
    expected = bins.outcomes(cast, scale, dtype)
    largest = at_largest(amax, cast, step_scale)

    metrics = Metrics(
        nonzero=history.nonzero.astype(np.float64),
        elements=history.elements.astype(np.float64),
        nonfinite=history.nonfinite.astype(np.float64),
        underflows=bins.total(expected.underflow, steps) + largest.underflow,
        subnormals=bins.total(expected.subnormal, steps) + largest.subnormal,
        overflows=bins.total(expected.overflow, steps) + largest.overflow,
        signal_energy=history.sum_of_squares.astype(np.float64),
        error_energy=bins.energy(expected.squared, scale, steps) + largest.squared * step_scale**2,
        bias_energy=bins.energy(expected.product, scale, steps) + largest.product * step_scale**2,
        error_spread=np.sqrt(
            bins.energy_variance(_variance(expected), scale, steps) + _variance(largest) * (step_scale**2) ** 2
        ),
        amax=amax,
        amin=history.amin.astype(np.float64),
        flags=(),
    )
    few = _rounds_few_values(history, metrics.pooled())
    flagged = replace(metrics, flags=_flags(few, bins, expected, scale, metrics.pooled(), cast))
    return flagged.divided(gain)


def _measure_tiles(history: SlotHistory, cast: Cast, dtype: str | None, tiling: Tiling | None) -> Metrics:
    """The same from a sketch relative to tiles, over its own steps."""
    relative = _sketch_for(history, cast, tiling)
    at = np.searchsorted(history.steps, relative.steps)
    steps, bits = len(relative.steps), history.significant_bits.astype(np.int64)[at]
    bins, scale = relative_bins(relative, cast, bits)
    expected = bins.outcomes(cast, scale, dtype=None)
    if cast.rounding == "zero" and kind_of(cast) == "current":
        is_top, outcomes = toward_zero(relative, cast, bits)
        for part, of_top in zip(expected, outcomes, strict=True):
            part[is_top] = of_top
    nonzero = bins.total(np.ones_like(bins.count), steps)
    mean_square = (bins.low**2 + bins.low * bins.high + bins.high**2) / 3
    whole = nonzero == history.nonzero[at]  # a sample of the tensor may have been all that the other sketch saw
    metrics = Metrics(
        nonzero=nonzero,
        elements=history.elements[at].astype(np.float64),
        nonfinite=history.nonfinite[at].astype(np.float64),
        underflows=bins.total(expected.underflow, steps),
        subnormals=bins.total(expected.subnormal, steps),
        overflows=bins.total(expected.overflow, steps),
        signal_energy=np.where(whole, history.sum_of_squares[at], bins.energy(mean_square, np.ones_like(scale), steps)),
        error_energy=bins.energy(expected.squared, scale, steps),
        bias_energy=bins.energy(expected.product, scale, steps),
        error_spread=np.sqrt(
            bins.energy_variance(_variance(expected), scale, steps) + _variance_of_amax(cast, history.amax[at])
        ),
        amax=history.amax[at].astype(np.float64),
        amin=history.amin[at].astype(np.float64),
        flags=(),
    )
    pooled, gain = metrics.pooled(), history.gain[at]
    few = (
        _rounds_few_values(history, pooled, at)
        or _keeps_a_lattice(relative, bins, expected, scale, bits, cast)
        or (dtype == "float16" and _share_below(history, _COARSE_IN_FP16) > THRESHOLDS.subnormal_share)
    )
    flags = _flags(few, bins, expected, scale, pooled, cast)
    if _has_other_scales(relative, cast, gain):
        flags += ("other_scales",)
    return replace(metrics, flags=flags).divided(gain)


def _variance_of_amax(cast: Cast, amax: NDArray[np.float32]) -> Array:
    """Under nvfp4 a step's largest element falls on the format's largest value, or just below: toward zero, that is a
    whole step of the grid. The variance of its error energy, [S]."""
    if cast.rounding != "zero" or kind_of(cast) != "nvfp4":
        return np.zeros(len(amax))
    step = cast.format.largest_spacing * amax.astype(np.float64) / cast.format.largest
    return (step**2 / 2) ** 2


def _sketch_for(history: SlotHistory, cast: Cast, tiling: Tiling | None) -> RelativeHistory:
    """The relative sketch that tells of a cast. Raises CastNotScored where there is none."""
    name = tiling_name(cast)
    if tiling is not None:
        key = tiling.key
    elif cast.granularity == "column":
        raise CastNotScored(f"{cast}: the columns of a tensor are the rows of another axis; say which tiling is meant")
    else:
        key = next((key for key in history.finer if key.split(" ")[0] == name), name)
    if key not in history.finer or not np.isin(history.finer[key].steps, history.steps).all():
        there, asked = ", ".join(history.finer) or "none", f"{cast.granularity}/{kind_of(cast)}"
        raise CastNotScored(
            f"{cast} has a scale for every {cast.granularity}, and the window has no sketch {key!r} (it has {there}). "
            f"Open it with advisor.probe(..., finer=[{asked!r}]), with other names beside it as needed"
        )
    return history.finer[key]


def _keeps_a_lattice(
    relative: RelativeHistory, bins: Bins, expected: Expected, scale: Array, bits: NDArray[np.int64], cast: Cast
) -> bool:
    """Whether a 16-bit tensor's own lattice shows: much of the error is made where it is not fine beside the grid, and
    the scales are too much alike to blur it."""
    octave = np.ldexp(1.0, np.frexp(bins.low)[1] - 1)
    lattice = octave * 2.0 ** -bits[bins.step].astype(np.float64)
    finer = LATTICE_FINER if cast.rounding == "zero" else 2  # half a step is nearly as good as none, but toward zero
    coarse = lattice * finer > Grid(cast).spacing(bins.low / scale) * scale
    error = np.where(np.isfinite(expected.squared), bins.square * expected.squared * scale**2, 0.0)
    shows = error[coarse].sum() > THRESHOLDS.lattice_share * error.sum()
    return bool(shows) and references_alike(relative, kind_of(cast)) < THRESHOLDS.mantissas


def _share_below(history: SlotHistory, magnitude: float) -> float:
    """Share of the non-zero elements, over all steps, in bins below a magnitude."""
    below = history.counts[BIN_EDGES[history.bins] < magnitude].sum()
    return float(below / max(history.counts.sum(), 1))


def _has_other_scales(relative: RelativeHistory, cast: Cast, gain: Array) -> bool:
    """Whether tiles enough to matter may be scaled otherwise than the sketch has it."""
    if relative.extreme.sum() > THRESHOLDS.rate_shift * relative.counts.sum():
        return True
    return kind_of(cast) == "e8m0" and bool((np.frexp(gain)[0] != 0.5).any())


def has_tiles(cast: Cast) -> bool:
    """Whether a cast has scales by row, column or block."""
    return not (cast.has_one_scale or cast.needs_no_scale)


def scored_steps(history: SlotHistory, cast: Cast, tiling: Tiling | None = None) -> NDArray[np.int64]:
    """The steps that `measure` has metrics of, int64 [S]: those at which that cast's sketch was taken."""
    return _sketch_for(history, cast, tiling).steps if has_tiles(cast) else history.steps


def require_scored(*casts: Cast) -> None:
    """Raises CastNotScored, which says why, for the first of these casts that sketches do not tell enough of."""
    for cast in casts:
        if reason := why_not_sketched(cast):
            raise CastNotScored(reason)


def scales(amax: Array, cast: Cast) -> Array:
    """The scale of each of some steps [S], given their largest magnitudes: `Cast.scale_for`, for all of them at once.

    The history of a delayed scale is the steps before. With a scale for more than one value a tensor there is none.
    """
    if cast.scale is None or cast.format.largest >= scaling.FLOAT32_LARGEST:
        return np.ones_like(amax)
    taken = amax
    if cast.scale.rule == "delayed":
        before = _largest_before(amax, cast.scale.length)
        taken = np.where(before > 0, before, amax) * 2.0**cast.scale.margin
        taken = np.minimum(taken, scaling.FLOAT32_LARGEST)
    return scaling.scale_of(torch.from_numpy(taken), cast.scale, cast.format).numpy()


def _largest_before(amax: Array, length: int) -> Array:
    """The largest of the `length` values before each, [S]; 0 before the first."""
    largest, reach = amax.copy(), 1
    while reach < min(length, len(amax)):
        step = min(reach, length - reach)
        largest[step:] = np.maximum(largest[step:], largest[:-step])
        reach += step
    return np.append(0.0, largest)[:-1]


def _flags(
    rounds_few_values: bool, bins: Bins, expected: Expected, scale: Array, pooled: PooledMetrics, cast: Cast
) -> tuple[str, ...]:
    if not pooled.nonzero:
        return ()
    rates = (expected.underflow, expected.subnormal, expected.overflow)
    uneven = bins.unevenness()
    few_values = (
        rounds_few_values
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
    deviation = np.sqrt(_variance(expected))
    if cast.rounding == "stochastic":  # of that only what depends on the place: f·(1 − f) over a cell, or part of one
        spacing = Grid(cast).spacing(bins.low / scale)
        by_place = spacing**2 * np.minimum(_cells(bins, scale, cast) / 12**0.5, 1 / 180**0.5)
        deviation = np.where(expected.overflow > 0, deviation, np.minimum(deviation, by_place))
    each_bin = (uneven * deviation * scale**2 * bins.square / bins.count) ** 2
    return float(np.sqrt(np.bincount(bins.step, weights=each_bin)).sum())


def _cells(bins: Bins, scale: Array, cast: Cast) -> Array:
    """Width of each bin in spacings of the grid."""
    return (bins.high - bins.low) / scale / Grid(cast).spacing(bins.low / scale)


def _rounds_few_values(history: SlotHistory, pooled: PooledMetrics, at: Any = slice(None)) -> bool:
    """Whether error is made on too few distinct magnitudes, by the median step of those where they are uncertain.

    They are certain where all magnitudes are one, and where a bin has a single lattice point. `at`: which steps.
    """
    uncertain = ((history.amin < history.amax) & (history.significant_bits > BIN_BITS))[at]
    if not uncertain.any() or pooled.error_energy == 0:
        return False
    return bool(np.median(history.distinct[at][uncertain]) < THRESHOLDS.distinct)


def _variance(expected: Expected) -> Array:
    """Variance of δ²; zero where it is infinite."""
    finite = np.isfinite(expected.squared)
    mean, mean_square = (np.where(finite, moment, 0.0) for moment in (expected.squared, expected.fourth))
    return np.maximum(mean_square - mean**2, 0.0)


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
