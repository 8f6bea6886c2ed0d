"""The scale of each step, for casts with one scale a tensor or none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from advisor.grid import Array
from probes import scaling
from probes.casts import Cast
from probes.formats import Format
from probes.scaling import Scale


def scales(amax: Array, cast: Cast, place: NDArray[np.int64] | None = None) -> Array:
    """The scale of each of some steps [S], given their largest magnitudes: `Cast.scale_for`, for all of them at once.

    place  int64 [S], where the steps of several slots follow one another: each one's place among its slot's

    The history of a delayed scale is the steps before. With a scale for more than one value a tensor there is none.
    """
    return scales_of(amax, [cast], np.arange(len(amax)) if place is None else place)[0]


def scales_of(amax: Array, casts: Sequence[Cast], place: NDArray[np.int64]) -> Array:
    """`scales` under each of some casts, [K, S]."""
    found, taken = np.ones((len(casts), len(amax))), dict[tuple[int, int] | None, torch.Tensor]()
    alike = dict[tuple[Scale, Format], Array]()  # casts that differ in their rounding alone
    for row, cast in zip(found, casts, strict=True):
        if cast.scale is None or cast.format.largest >= scaling.FLOAT32_LARGEST:
            continue
        key = cast.scale, cast.format
        if key in alike:
            row[:] = alike[key]
            continue
        window = (cast.scale.length, cast.scale.margin) if cast.scale.rule == "delayed" else None
        if window not in taken:
            taken[window] = torch.from_numpy(amax if window is None else _delayed(amax, *window, place))
        row[:] = scaling.scale_of(taken[window], cast.scale, cast.format).numpy()
        alike[key] = row
    return found


def _delayed(amax: Array, length: int, margin: int, place: NDArray[np.int64]) -> Array:
    """What delayed scaling takes for the largest magnitude of each step, [S]."""
    before = _largest_before(amax, length, place)
    return np.minimum(np.where(before > 0, before, amax) * 2.0**margin, scaling.FLOAT32_LARGEST)


def _largest_before(amax: Array, length: int, place: NDArray[np.int64]) -> Array:
    """The largest of the `length` values before each of the same slot, [S]; 0 before the first."""
    largest, reach = amax.copy(), 1
    while reach < min(length, len(amax)):
        step = min(reach, length - reach)
        same = place[step:] >= step
        largest[step:] = np.where(same, np.maximum(largest[step:], largest[:-step]), largest[step:])
        reach += step
    return np.where(place > 0, np.append(0.0, largest)[:-1], 0.0)
