"""What a cast with a scale by row, column or block does, from a sketch relative to tiles.

`probes/relative.py` says what such a sketch holds: for every kind of scale rule, |x|/R in bins, R being what the rule
reads off a tile's largest magnitude. The scale is R times a number that depends on the format and the tile's class
alone, so a bin's outcomes are those of any other sketch's bin (`bins.py`), and an error energy is the sum of R² times
the mean of δ². A slot that met several tensors in a step is scored as they were: each had tiles of its own.

What is exact and what is not:

- Under current scaling the ratio 1 has its own bin: the largest element of each tile is written without error.
  (Toward zero it may lose a step of the grid, as x divided by its scale in float32 can end just below the largest
  value: in which share of all cases, is worked out over the magnitudes that the tensor's mantissa bits allow.)
- Power-of-two scales leave the tensor's own lattice in place, so what a bf16 tensor loses in them is known as well as
  without a scale. Ratios to other scales have no lattice: they are taken as spread evenly within their bins.
- The spread of R⁴ over bins, which only the flag `few_elements` depends on, is taken as independent of the bin.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from advisor.bins import Bins, at_largest
from advisor.grid import Array, Expected
from probes import scaling
from probes.casts import Cast
from probes.relative_history import RelativeHistory
from probes.relative_layout import BINS, LOWEST, MOST_CLASSES
from probes.sketch import BIN_EDGES
from probes.tiles import tiling_name

_ONE = 127 << 3  # the bin of 1


def relative_bins(history: RelativeHistory, cast: Cast, bits: NDArray[np.int64]) -> tuple[Bins, Array]:
    """The bins of a relative sketch, and the cast's scale in each, in units of R.

    bits  int64 [S]: mantissa bits that the tensor uses at the history's steps
    """
    kind = tiling_name(cast).split("/")[1]
    step = np.repeat(np.arange(len(history.steps)), np.diff(history.offsets))
    tile_class, place = history.cells.astype(np.int64) // BINS, history.cells.astype(np.int64) % BINS
    bins = LOWEST + place
    scale = scale_over_reference(cast, tile_class)
    low, high = BIN_EDGES[bins], np.minimum(BIN_EDGES[bins + 1], _top(kind, tile_class))
    if not _may_saturate(cast):
        high = np.minimum(high, cast.format.largest * scale)
    low = np.minimum(low, high)
    counts = history.counts.astype(np.float64)
    steps = len(history.steps)
    total, squares = (np.bincount(step, weights=part, minlength=steps) for part in (counts, history.squares))
    peaked = np.divide(history.fourths * total, squares**2, out=np.ones(steps), where=squares > 0)[step]
    return (
        Bins(
            step=step,
            line=step * MOST_CLASSES + tile_class,
            bin=bins,
            low=low,
            high=high,
            count=counts,
            square=history.squares,
            fourth=np.maximum(peaked, 1.0) * history.squares**2 / counts,
            bits=bits[step] if kind == "e8m0" else np.full(len(step), 23),
        ),
        scale,
    )


def scale_over_reference(cast: Cast, tile_class: NDArray[np.int64]) -> Array:
    """The cast's scale over R for tiles of these classes, float64 of their shape."""
    assert cast.scale is not None
    target = cast.format
    if cast.scale.rule == "e8m0":
        return np.full(tile_class.shape, 2.0**-target.emax)
    if cast.scale.rule == "e8m0up" or cast.scale.power_of_two:
        mantissa, exponent = math.frexp(target.largest)
        above = tile_class > -math.log2(2 - 2 * mantissa) + 0.5  # a largest value's significand is 2 - 2^-k
        return np.ldexp(1.0, 1 - exponent + above.astype(np.int64))
    return np.full(tile_class.shape, 1 / target.largest)


def of_largest_toward_zero(cast: Cast, bits: NDArray[np.int64]) -> list[Expected]:
    """For each step, mean outcomes of the tiles' largest elements under current scaling, [1]: toward zero some of them
    lose a step of the grid."""
    found = {}
    for used in set(bits.tolist()):
        few = min(used, _SAMPLE_BITS)
        mantissas = 1 + np.arange(2**few) / 2**few + (2.0**-23 * 5 if used > few else 0.0)
        scales = scaling.scale_of(torch.from_numpy(mantissas), cast.scale, cast.format).numpy()  # type: ignore[arg-type]
        outcomes = at_largest(mantissas, cast, scales)
        found[used] = Expected(*(outcome.mean(keepdims=True) for outcome in outcomes))
    return [found[used] for used in bits.tolist()]


def holds_largest(bins: Bins) -> NDArray[np.bool_]:
    """Which bins of a sketch relative to the tiles' own largest values hold those values."""
    return bins.bin == _ONE


def _top(kind: str, tile_class: NDArray[np.int64]) -> Array:
    """The largest ratio in tiles of these classes."""
    if kind == "current":
        return np.ones(tile_class.shape)
    if kind == "e8m0":
        return np.where(tile_class == 7, 2.0, 2 - 0.5 ** tile_class.astype(np.float64))
    return np.where(tile_class == 8, 3 / 2, 1 + 1 / (16.0 + 2 * tile_class))  # q is within half a step of e4m3fn


def _may_saturate(cast: Cast) -> bool:
    assert cast.scale is not None
    return cast.scale.rule in ("e8m0", "nvfp4")
