"""Causes: why a uniform recipe would fail on a training, named from its window alone.

    for finding in advisor.diagnose(window):
        print(finding)

What is looked at, from the sketches of one window; `findings.py` has the causes and every threshold:

    channel_outliers   how far the bulk of a tensor is from its largest value, and whether tiles by channel explain that
    heavy_tails        the same, where single elements or rows hold the large values
    small_gradients    underflow of gradients in fp16 and e5m2 without a scale
    growing_amax       largest values step by step, and what delayed scaling makes of them
    epsilon_vanishes   Adam's epsilon in fp16, with second moments that are zero there
    lost_updates       updates against the spacing of bf16 master weights
    narrow_buffer      BatchNorm's running statistics, and other buffers that move, in fp16 and bf16
    tied_parameter     a product's weight whose rows are also looked up, or that two products share

Each is arithmetic on what was recorded: no training, no tensors. Where the window has no sketches by row (opened with
`finer=()`, or without a scored step), outliers by channel are told as heavy tails, with a word on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from advisor.diagnosis.findings import CAUSES, THRESHOLDS, Finding, Remedy, by_cause
from advisor.diagnosis.gradients import small_gradients
from advisor.diagnosis.growth import growing_amax
from advisor.diagnosis.outliers import outliers
from advisor.diagnosis.recipes import Recipes
from advisor.diagnosis.stored import epsilon_vanishes, lost_updates, narrow_buffers
from advisor.diagnosis.ties import tied_parameters
from probes.casts import Cast
from probes.window import Window

__all__ = ["CAUSES", "THRESHOLDS", "Finding", "Remedy", "diagnose"]


def diagnose(window: Window, casts: Sequence[str | Cast] | None = None) -> tuple[Finding, ...]:
    """Why casts would fail on this training, where they would: severe findings first, each cause's largest first.

    `casts`: those to look at, in place of the usual recipes (int8, e4m3fn and e5m2 with one scale a tensor; fp16 and
    e5m2 gradients without one; delayed e4m3fn and e5m2; bf16 and fp16 storage). One without a scale is looked at for
    gradients and stored tensors, one with a delayed scale for growth, any other for outliers and tails.

    Empty where nothing was found. Raises UnknownFormat or InvalidCast for a cast that is none, CastNotScored for one
    with scales by row, column or block, and WindowError for an open window.
    """
    recipes = Recipes.of(casts)
    found = [
        *outliers(window, recipes),
        *small_gradients(window, recipes),
        *growing_amax(window, recipes),
        *epsilon_vanishes(window, recipes),
        *lost_updates(window, recipes),
        *narrow_buffers(window, recipes),
        *tied_parameters(window, recipes),
    ]
    return tuple(sorted(found, key=by_cause))
