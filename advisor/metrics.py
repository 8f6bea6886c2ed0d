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

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from advisor.bins import Bins, at_largest
from advisor.errors import CastNotScored
from advisor.flags import flags_of, rounds_few_values, variance_of
from advisor.measured import Metrics, PooledMetrics
from advisor.tensor_scales import scales
from advisor.tile_metrics import measure_tiles, sketch_for
from probes.casts import Cast
from probes.history import SlotHistory
from probes.measurable import why_not_sketched
from probes.tiles import Tiling

__all__ = ["Metrics", "PooledMetrics", "has_tiles", "measure", "require_scored", "scored_steps"]


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
        return measure_tiles(history, cast, dtype, tiling)
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
            bins.energy_variance(variance_of(expected), scale, steps) + variance_of(largest) * (step_scale**2) ** 2
        ),
        amax=amax,
        amin=history.amin.astype(np.float64),
        flags=(),
    )
    few = rounds_few_values(history)
    flagged = replace(metrics, flags=flags_of(few, bins, expected, scale, metrics.pooled(), cast))
    return flagged.divided(gain)


def has_tiles(cast: Cast) -> bool:
    """Whether a cast has scales by row, column or block."""
    return not (cast.has_one_scale or cast.needs_no_scale)


def scored_steps(history: SlotHistory, cast: Cast, tiling: Tiling | None = None) -> NDArray[np.int64]:
    """The steps that `measure` has metrics of, int64 [S]: those at which that cast's sketch was taken."""
    return sketch_for(history, cast, tiling).steps if has_tiles(cast) else history.steps


def require_scored(*casts: Cast) -> None:
    """Raises CastNotScored, which says why, for the first of these casts that sketches do not tell enough of."""
    for cast in casts:
        if reason := why_not_sketched(cast):
            raise CastNotScored(reason)
