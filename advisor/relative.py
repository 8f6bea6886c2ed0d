"""What a cast with a scale by row, column or block does, from a sketch relative to tiles.

`probes/relative.py` says what such a sketch holds: for every kind of scale rule, |x|/R in bins, R being what the rule
reads off a tile's largest magnitude. The scale is R times a number that depends on the format and the tile's class
alone, so a bin's outcomes are those of any other sketch's bin (`bins.py`), and an error energy is the sum of R² times
the mean of δ². A slot that met several tensors in a step is scored as they were: each had tiles of its own.

What is exact and what is not:

- The largest elements of tiles are known exactly, or within 1/256 of an octave. (Under current scaling they are written
  without error. Toward zero they may lose a step of the grid, as x divided by its scale in float32 can end just below
  the largest value: in which share of all cases, is worked out over the magnitudes that the bin allows.)
- Power-of-two scales leave the tensor's own lattice in place, so what a bf16 tensor loses in them is known as well as
  without a scale. Ratios to other scales are taken as spread evenly within their bins: the lattice is another one in
  every tile. Where tiles are too few for that, or their largest magnitudes too much alike, the result is flagged.
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
from probes.layout import BIN_SHIFT
from probes.relative_history import RelativeHistory
from probes.relative_layout import BINS, FINE_LOWEST, FINE_SHIFT, LOWEST, MOST_CLASSES
from probes.sketch import BIN_EDGES
from probes.tiles import CLASSES, tiling_name

_PLACES = np.arange(64) * (5**0.5 - 1) / 2 % 1  # of a fine bin: evenly spread, with all mantissa bits in use

_CONTINUOUS = 23  # mantissa bits: of a ratio there is no lattice to speak of
_FINE_EDGES = ((FINE_LOWEST + (np.arange(BINS + 1) << FINE_SHIFT)).astype(np.int32)).view(np.float32).astype(np.float64)
_POINT_BITS = 8  # mantissa bits up to which a fine bin holds a single lattice point, its lower edge


def relative_bins(history: RelativeHistory, cast: Cast, bits: NDArray[np.int64]) -> tuple[Bins, Array]:
    """The bins of a relative sketch, and the cast's scale in each, in units of R.

    bits  int64 [S]: mantissa bits that the tensor uses at the history's steps
    """
    kind = kind_of(cast)
    steps, step = len(history.steps), np.repeat(np.arange(len(history.steps)), np.diff(history.offsets))
    tile_class, place = history.cells.astype(np.int64) // BINS, history.cells.astype(np.int64) % BINS
    is_top = tile_class == CLASSES[kind] - 1
    step_bits = bits[step]
    low = np.where(is_top, _FINE_EDGES[place], BIN_EDGES[LOWEST + place])
    high = np.where(is_top, _FINE_EDGES[place + 1], np.minimum(BIN_EDGES[LOWEST + place + 1], _top(kind, tile_class)))
    if kind == "e8m0":
        above = np.where(is_top, low, 2 - 2.0 ** -np.maximum(tile_class - 0.5, -1.0))
        scale = scale_over_octave(cast, above)
        high = np.where(is_top, np.where(step_bits <= _POINT_BITS, low, np.nextafter(high, 0)), high)
    else:
        scale = np.full(len(low), 1 / cast.format.largest)
        if kind == "current":
            low, high = np.where(is_top, 1.0, low), np.where(is_top, 1.0, high)
    if not _may_saturate(cast):
        high = np.minimum(high, cast.format.largest * scale)
    low = np.minimum(low, high)
    counts = history.counts.astype(np.float64)
    total, squares = (np.bincount(step, weights=part, minlength=steps) for part in (counts, history.squares))
    peaked = np.divide(history.fourths * total, squares**2, out=np.ones(steps), where=squares > 0)[step]
    bins = Bins(
        step=step,
        line=step * MOST_CLASSES + tile_class,
        place=place,
        bin=_bins_of(low),
        low=low,
        high=high,
        count=counts,
        square=history.squares,
        fourth=np.maximum(peaked, 1.0) * history.squares**2 / counts,
        bits=step_bits if kind == "e8m0" else np.full(len(step), _CONTINUOUS),
    )
    return bins, scale


def scale_over_octave(cast: Cast, mantissa: Array) -> Array:
    """A power-of-two scale over 2^e, for tiles whose largest magnitude is m·2^e, float64 of m's shape."""
    assert cast.scale is not None
    if cast.scale.rule == "e8m0":
        return np.full(mantissa.shape, 2.0**-cast.format.emax)
    largest, exponent = math.frexp(cast.format.largest)
    return np.ldexp(1.0, 1 - exponent + (mantissa > 2 * largest).astype(np.int64))


def toward_zero(history: RelativeHistory, cast: Cast, bits: NDArray[np.int64]) -> tuple[NDArray[np.bool_], Expected]:
    """Under current scaling, which bins [N] hold largest elements of tiles, and their outcomes toward zero [those].

    Some lose a step of the grid, depending on the magnitude: each bin's share is that of the magnitudes in it that the
    tensor's mantissa bits allow.
    """
    assert cast.scale is not None
    is_top = history.cells >= BINS
    step = np.repeat(bits, np.diff(history.offsets))[is_top]
    low = _FINE_EDGES[history.cells[is_top] - BINS][:, None]
    lattice = 2.0 ** -np.minimum(step, 23.0)[:, None]
    mantissas = low + np.floor(_PLACES / 256 / lattice) * lattice
    scales = scaling.scale_of(torch.from_numpy(mantissas), cast.scale, cast.format).numpy()
    return is_top, Expected(*(outcome.mean(axis=1) for outcome in at_largest(mantissas, cast, scales)))


def kind_of(cast: Cast) -> str:
    """The kind of sketch that tells of a cast with scales by row, column or block."""
    return tiling_name(cast).split("/")[1]


def references_alike(history: RelativeHistory, kind: str) -> float:
    """How many different mantissas R has, effectively: one over the sum of squared shares of energy. The smallest of
    the steps."""
    if kind == "e8m0" or not len(history.cells):
        return math.inf
    step = np.repeat(np.arange(len(history.steps)), np.diff(history.offsets))
    last = history.cells >= (CLASSES[kind] - 1) * BINS
    group = history.cells.astype(np.int64) if kind == "current" else history.cells.astype(np.int64) // BINS
    of_interest = last if kind == "current" else ~last
    shares = np.zeros((len(history.steps), CLASSES[kind] * BINS))
    np.add.at(shares, (step[of_interest], group[of_interest]), history.squares[of_interest])
    total, squares = shares.sum(axis=1), (shares**2).sum(axis=1)
    found = np.divide(total**2, squares, out=np.full(len(total), math.inf), where=squares > 0)
    return float(found.min())


def _bins_of(magnitudes: Array) -> NDArray[np.int64]:
    return magnitudes.astype(np.float32).view(np.int32).astype(np.int64) >> BIN_SHIFT


def _top(kind: str, tile_class: NDArray[np.int64]) -> Array:
    """The largest ratio of other elements in tiles of these classes."""
    if kind == "current":
        return np.ones(tile_class.shape)
    if kind == "e8m0":
        return np.where(tile_class >= 7, 2.0, 2 - 0.5 ** tile_class.astype(np.float64))
    return np.where(tile_class >= 8, 3 / 2, 1 + 1 / (16.0 + 2 * tile_class))  # q is within half a step of e4m3fn


def _may_saturate(cast: Cast) -> bool:
    assert cast.scale is not None
    return cast.scale.rule in ("e8m0", "nvfp4")
