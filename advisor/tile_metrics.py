"""Metrics of casts with scales by row, column or block, from the sketch relative to these tiles (`relative.py`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from advisor.bins import LATTICE_FINER, Bins
from advisor.errors import CastNotScored
from advisor.flags import THRESHOLDS, flags_of, rounds_few_values, variance_of
from advisor.grid import Array, Expected, Grid
from advisor.measured import Metrics
from advisor.relative import kind_of, references_alike, relative_bins, toward_zero
from probes.casts import Cast
from probes.history import SlotHistory
from probes.relative_history import RelativeHistory
from probes.sketch import BIN_EDGES
from probes.tiles import Tiling, tiling_name

_COARSE_IN_FP16 = 2.0**-19  # 32 of its smallest steps


def measure_tiles(history: SlotHistory, cast: Cast, dtype: str | None, tiling: Tiling | None) -> Metrics:
    """Metrics over the steps at which the window has the sketch. Raises CastNotScored where it has none."""
    relative = sketch_for(history, cast, tiling)
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
            bins.energy_variance(variance_of(expected), scale, steps) + _variance_of_amax(cast, history.amax[at])
        ),
        amax=history.amax[at].astype(np.float64),
        amin=history.amin[at].astype(np.float64),
        flags=(),
    )
    pooled, gain = metrics.pooled(), history.gain[at]
    few = (
        (rounds_few_values(history, at) and pooled.error_energy != 0)
        or _keeps_a_lattice(relative, bins, expected, scale, bits, cast)
        or (dtype == "float16" and _share_below(history, _COARSE_IN_FP16) > THRESHOLDS.subnormal_share)
    )
    flags = flags_of(few, bins, expected, scale, pooled, cast)
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


def sketch_for(history: SlotHistory, cast: Cast, tiling: Tiling | None) -> RelativeHistory:
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
