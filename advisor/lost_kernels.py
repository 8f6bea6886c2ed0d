"""The share of lost updates, compiled: `lost_updates.plain_lost_share` cell by cell, and tests hold them equal."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from advisor import bins, outcome_kernels
from advisor.outcome_kernels import Target, inlined, octave_of, target_from
from probes import formats
from probes.kernel_cache import keep_to_sources

POINTS = 16  # magnitudes taken in a class of weights


@njit(cache=True, nogil=True, error_model="numpy")
def lost_elements(
    cells: Any,
    counts: Any,
    update_bins: int,
    weight_edges: Any,
    update_edges: Any,
    figures: Any,
    scale: float,
    amax: float,
    least: float,
    most: float,
) -> float:
    """How many of a sketch's updates are lost, expected.

    cells, counts  of an `UpdateSketch`; figures: a `Target` as float64, rounding to nearest
    least, most    smallest and largest magnitude of the updates
    """
    target = target_from(figures)
    down, up = np.empty(POINTS), np.empty(POINTS)
    known, lost = -1, 0.0
    for i in range(len(cells)):
        cell = cells[i] - 1
        weight, update, outward = cell // (2 * update_bins), cell // 2 % update_bins, cell % 2 == 1
        if weight != known:
            known = weight
            low, high = weight_edges[weight, 0], weight_edges[weight, 1]
            high = max(min(high, amax), low)
            for j in range(POINTS):
                down[j], up[j] = _room((low + (high - low) * (j + 0.5) / POINTS) / scale, target)
        low = max(0.0 if update == 0 else update_edges[update], min(least, update_edges[-1]))
        high = max(min(update_edges[update + 1], most), low)
        width, low = (high - low) / scale, np.nextafter(low, 0.0) / scale
        share = 0.0
        for j in range(POINTS):
            beyond = (up[j] if outward else down[j]) - low
            if beyond >= width:
                share += 1.0 if beyond > 0 else 0.0
            elif beyond > 0:
                share += beyond / width
        lost += share / POINTS * counts[i]
    return lost


@inlined
def _room(magnitude: float, target: Target) -> tuple[float, float]:
    """`lost_updates._room` of one magnitude."""
    spacing = octave_of(magnitude, target) * target.mantissa_step
    held = min(np.rint(magnitude / spacing) * spacing, target.largest)
    octave = octave_of(held, target)
    above = octave * target.mantissa_step
    below = above / 2 if held == octave and held > target.bottom else above
    return below / 2, np.inf if held >= target.largest and target.saturates else above / 2


keep_to_sources(lost_elements, outcome_kernels, bins, formats)
