"""The share of updates that a master format loses: round(r + Δw) = r, r = round(w), Δw ≠ 0.

Arithmetic on the joint sketch of `probes/lost_updates.py`, for any cast with one scale or none and rounding to nearest.
In each class of weights some magnitudes are taken, evenly spread; r and its neighbours follow exactly, and an update is
lost if it is at most half the way to the neighbour on its side. Within a bin updates are taken to be spread evenly.

Against casting the tensors themselves (`tests/test_lost_updates.py`; weights and updates of small trainings with Adam
and SGD): without a scale, or with a power of two, within 0.0003 for bf16, fp16, tf32 and six formats of 8 bits and
less. With a current fp32 scale e4m3fn, e5m2, e3m4, int8 and e2m1 are within 0.005 for parameters of a thousand elements
and more; for shorter ones, whose updates are all but alike in Adam's first steps, we saw up to 0.11.

Under stochastic rounding an update is never lost in the mean, and toward zero the rule is another one: both are None,
as are formats without a sign. What overflows and is saturated stays what it is for any update outward, so that is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import inf

import numpy as np
from numpy.typing import NDArray

from advisor.lost_kernels import POINTS, lost_elements
from advisor.outcome_kernels import Target
from advisor.tensor_scales import scales
from probes.casts import Cast
from probes.formats import Format
from probes.lost_updates import UPDATE_BINS, UpdateSketch, update_edges, weight_edges
from probes.measurable import why_not_measurable
from probes.parameter_records import MASTER, UPDATE, ParameterRecord
from probes.records import Slot
from probes.window import Window

Array = NDArray[np.float64]

_WEIGHT_EDGES, _UPDATE_EDGES = weight_edges(), update_edges()


def lost_updates(
    updates: UpdateSketch, cast: Cast, amax: float = inf, update_range: tuple[float, float] = (0.0, inf)
) -> float | None:
    """Share of one step's non-zero updates that the weights, held in this cast's format, would not take; 0 to 1.

    amax          the weights' largest magnitude, which a current or delayed scale is made for
    update_range  smallest and largest magnitude of the updates, where known: sharpens what a scale's threshold cuts

    None where there is no non-zero update, or the cast does not round to nearest with one scale or none.
    """
    if not _is_told(cast) or not len(updates.cells):
        return None
    (scale,) = scales(np.array([amax]), cast)
    return _share(updates, cast, float(scale), amax, update_range)


def lost_by_step(window: Window, parameter: str, casts: Sequence[Cast]) -> dict[str, dict[int, tuple[float, int]]]:
    """The same of one of a window's parameters: cast → followed step → share, and updates that it is of.

    Casts are named by their canonical strings. Those and steps of which nothing can be said are left out.
    """
    record = window.parameter_record(parameter)
    found: dict[str, dict[int, tuple[float, int]]] = {str(cast): {} for cast in casts}
    if record is None or not {Slot(parameter, role) for role in (MASTER, UPDATE)} <= set(window.slots):
        return found
    master, update = window.history(parameter, MASTER), window.history(parameter, UPDATE)
    largest = dict(zip(master.steps.tolist(), master.amax.tolist(), strict=True))
    ranges = zip(update.amin.tolist(), update.amax.tolist(), strict=True)
    known = dict(zip(update.steps.tolist(), ranges, strict=True))
    sketches = {step: one for step, one in record.updates.items() if step in largest and step in known}
    sketches = {step: one for step, one in sketches.items() if len(one.cells)}
    amax = np.array([largest[step] for step in sketches], dtype=np.float64)
    for cast in filter(_is_told, casts):
        of_steps = zip(sketches.items(), amax.tolist(), scales(amax, cast).tolist(), strict=True)
        for (step, updates), at_most, scale in of_steps:
            share = _share(updates, cast, scale, at_most, known[step])
            found[str(cast)][step] = share, updates.total
    return found


def lost_of(window: Window, parameter: str, casts: Sequence[Cast]) -> dict[str, float]:
    """Share of the lost updates of all followed steps together, by cast; casts of which nothing can be said are left
    out."""
    by_step = lost_by_step(window, parameter, casts)
    return {
        cast: sum(share * count for share, count in steps.values()) / sum(count for _, count in steps.values())
        for cast, steps in by_step.items()
        if steps
    }


def lost_by_size(window: Window, name: str, cast: Cast, role: str = MASTER) -> float | None:
    """Of a parameter's or buffer's moves over all followed steps: the share of Σ|Δw| that a cast does not take.

    A large share of small moves may be lost at no cost; by size, one half is half the way. `role`: MASTER, or `buffer`.
    None where nothing can be said, as in `lost_updates`.
    """
    record = window.parameter_record(name)
    if record is None or not {Slot(name, kind) for kind in (role, UPDATE)} <= set(window.slots):
        return None
    held, update = window.history(name, role), window.history(name, UPDATE)
    largest = dict(zip(held.steps.tolist(), held.amax.tolist(), strict=True))
    ranges = dict(zip(update.steps.tolist(), zip(update.amin.tolist(), update.amax.tolist(), strict=True), strict=True))
    lost = moved = 0.0
    for step, updates in record.updates.items():
        if step in largest and step in ranges and len(updates.cells):
            sizes = updates.counts * (_UPDATE_EDGES[updates.update] + _UPDATE_EDGES[updates.update + 1]) / 2
            # In whole units, which the kernel counts in: 2^40 of them make up the largest cell.
            units = np.rint(sizes * (2.0**40 / sizes.max())).astype(np.int64)
            share = lost_updates(replace(updates, counts=units), cast, largest[step], ranges[step])
            if share is not None:
                lost, moved = lost + share * float(sizes.sum()), moved + float(sizes.sum())
    return lost / moved if moved else None


def epsilon_vanishes(record: ParameterRecord, target: Format) -> bool | None:
    """Whether the optimizer's epsilon is zero in a format, as Adam's 1e-8 is in fp16; None where it has none."""
    if record.epsilon is None:
        return None
    return record.epsilon <= target.smallest_subnormal / 2


def _is_told(cast: Cast) -> bool:
    return cast.rounding == "nearest" and why_not_measurable(cast) is None


def _share(updates: UpdateSketch, cast: Cast, scale: float, amax: float, update_range: tuple[float, float]) -> float:
    edges = _WEIGHT_EDGES, _UPDATE_EDGES
    lost = lost_elements(updates.cells, updates.counts, UPDATE_BINS, *edges, _figures(cast), scale, amax, *update_range)
    return float(lost / updates.total)


@cache
def _figures(cast: Cast) -> Array:
    return np.array(Target.of(cast), dtype=np.float64)


def plain_lost_share(
    updates: UpdateSketch, cast: Cast, scale: float, amax: float, update_range: tuple[float, float]
) -> float:
    """The same once more, in arrays: what the compiled kernel is held to."""
    classes, place = np.unique(updates.weight, return_inverse=True)
    down, up = _room(_points(classes, amax) / scale, cast)
    edges = update_edges()
    low, high = edges[updates.update], edges[updates.update + 1]
    low = np.maximum(np.where(updates.update == 0, 0.0, low), min(update_range[0], edges[-1]))
    high = np.maximum(np.minimum(high, update_range[1]), low)
    low, width = np.nextafter(low, 0.0) / scale, (high - low) / scale
    room = np.where(updates.outward[:, None], up[place], down[place])
    beyond = np.maximum(room - low[:, None], 0.0)
    within = np.divide(beyond, width[:, None], out=np.sign(beyond), where=width[:, None] > 0)
    return float((np.minimum(within, 1.0).mean(axis=1) * updates.counts).sum() / updates.total)


def _points(classes: NDArray[np.int64], amax: float) -> Array:
    """Magnitudes in each class of weights, [classes, POINTS], none above the largest weight."""
    low, high = weight_edges()[classes].T
    high = np.maximum(np.minimum(high, amax), low)
    return low[:, None] + (high - low)[:, None] * (np.arange(POINTS) + 0.5) / POINTS


def _room(magnitude: Array, cast: Cast) -> tuple[Array, Array]:
    """Half the distance from the value to which each magnitude rounds to its neighbours below and above, in units of
    the scale. Zero has its neighbours on either side at the same distance."""
    target = cast.format
    held = np.rint(magnitude / _spacing(magnitude, target)) * _spacing(magnitude, target)
    held = np.minimum(held, target.largest)
    above = _spacing(held, target)
    mantissa, _ = np.frexp(held)
    at_power = (mantissa == 0.5) & (held > 2.0**target.emin) & (not target.is_integer)
    below = np.where(at_power, above / 2, above)
    return below / 2, np.where((held >= target.largest) & cast.saturate, np.inf, above / 2)


def _spacing(magnitude: Array, target: Format) -> Array:
    """Distance to the next larger value of the grid."""
    _, exponent = np.frexp(np.maximum(magnitude, 2.0**target.emin))
    return np.exp2(np.asarray(exponent - 1 - target.mantissa_bits, dtype=np.float64))
