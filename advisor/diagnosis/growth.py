"""Largest values that keep growing: a delayed scale is made for earlier steps, and clips each new one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from advisor.castnames import parse_cast, short_cast
from advisor.diagnosis.costs import cost_of
from advisor.diagnosis.findings import THRESHOLDS, Finding, Remedy, percent, times
from advisor.diagnosis.recipes import Recipes
from advisor.metrics import measure
from probes.casts import Cast
from probes.records import GRADIENT, Slot
from probes.window import Window


def growing_amax(window: Window, recipes: Recipes) -> Iterator[Finding]:
    """Of each slot whose largest value grows through the window, where delayed scaling pays for it."""
    for slot in window.product_slots:
        for cast in recipes.delayed_gradient if slot.role == GRADIENT else recipes.delayed_forward:
            found = _finding(window, slot, cast, recipes)
            if found is not None:
                yield found


def _finding(window: Window, slot: Slot, cast: Cast, recipes: Recipes) -> Finding | None:
    history = window.history(*slot)
    amax = history.amax.astype(np.float64) / history.gain
    steps = history.steps[amax > 0].astype(np.float64)
    amax = amax[amax > 0]
    if len(amax) < THRESHOLDS.steps:
        return None
    quarter = len(amax) // 4
    grown = float(amax[-quarter:].max() / amax[:quarter].max())
    before = np.maximum.accumulate(amax)[:-1]
    beyond = amax[1:] / before
    records = float((beyond > 1).mean())
    if grown < THRESHOLDS.growth or records < THRESHOLDS.records:
        return None
    current = parse_cast(f"{cast.format.name}/tensor/current/{cast.rounding}")
    late, at_once = (measure(history, one, window.dtype(slot)) for one in (cast, current))
    error = float(late.error_energy[1:].sum() / max(at_once.error_energy[1:].sum(), np.finfo(np.float64).tiny))
    if error < THRESHOLDS.delayed_error:
        return None
    slope, start = (float(part) for part in np.polyfit(steps, np.log2(amax), 1))
    line = slope * steps + start
    steady = 1 - float(((np.log2(amax) - line) ** 2).sum() / ((np.log2(amax) - np.log2(amax).mean()) ** 2).sum())
    if steady < THRESHOLDS.steady:
        return None
    cost, harmless = cost_of(window, slot, cast)
    doubling = 1 / slope if slope > 0 else math.inf
    most = float(beyond.max())
    says = f"{short_cast(current)} has the step's own scale"
    if most < 2:
        says += ", or give the delayed one margin=1"
    return Finding(
        cause="growing_amax",
        site=slot.site,
        role=slot.role,
        cast=str(cast),
        severe=recipes.asked or not harmless,
        numbers={
            "grown": grown,
            "doubling_steps": doubling,
            "records": records,
            "beyond": most,
            "error": error,
            "steady": steady,
            **cost,
        },
        sentence=(
            f"{slot.site} {slot.role}: the largest value grew {times(grown)} within the window, doubling about every "
            f"{doubling:.1f} steps, and exceeded all earlier ones at {percent(records)} of the steps, by up to "
            f"{times(most)}, so delayed scaling clips it: {times(error)} the error of the step's own scale"
        ),
        remedy=Remedy("cast", says, (str(current),)),
        size=grown,
    )
