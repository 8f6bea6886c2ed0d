"""Updates against weights: the joint sketch from which any master format's share of lost updates follows.

An update Δw is lost in a format if round(r + Δw) = r, where r = round(w) is the weight as the format holds it: if |Δw|
is at most half the distance to r's neighbour on that side. That distance depends on

- the octave of w, and below the format's smallest normal number on no more than that number: so a histogram of the
  ratio |Δw|/2^⌊log₂|w|⌋ alone is not enough, as fp16 and 8-bit formats have weights there;
- where in its octave w lies: just above a power of two r is that power, whose neighbour below is half as far away, and
  just under one it is the next, whose neighbour above is twice as far;
- there, on the sign of Δw against that of w.

So elements are counted jointly: by the octave of w and its place within it, in classes that are narrow towards the
ends and end where formats with 1, 2, 3, 4, 7 and 10 mantissa bits round up or down; by |Δw|, eight bins an octave; and
by whether the update makes the weight larger or smaller. Ends of classes and of octaves of |Δw| are the thresholds of
those formats themselves, so that without a scale, or with a power of two, the share is exact, but for an update that is
a power of two and meets a tie. (Ties go into the bin below, as lost, which is right at powers of two.) With any other
scale a class or a bin that a threshold cuts is split in proportion. `advisor/lost_updates.py` does this arithmetic and
says how well it was seen to agree.

Large parameters are sampled: at most 32,768 elements a step, evenly strided, so that the share of one step has a
standard deviation of at most 0.003.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from probes.apart import Apart
from probes.errors import MalformedWindow, UnsupportedTensor
from probes.strided import strided

SAMPLE = 32_768  # elements of a parameter that are looked at in a followed step

FRACTION_BITS = 23
LOWEST_OCTAVE, OCTAVES = -32, 48  # of |w|: [2^-32, 2^16); below it is nothing to any 16-bit format with few exponents
LOWEST_UPDATE, UPDATE_BINS_AN_OCTAVE, UPDATE_BINS = -48, 8, 512  # of |Δw|: (2^-48, 2^16]
UPDATE_SHIFT = FRACTION_BITS - 3

_ENDS = (11, 8, 5, 4, 3, 2)  # classes end at 2^-end from either end of the octave: where M + 1 = end rounds up
PLACES = np.array([0.0, *(2.0**-e for e in _ENDS), 0.5, *(1 - 2.0**-e for e in reversed(_ENDS)), 1.0])
"""float64 [15]: the 14 classes of (|w| - 2^octave)/2^octave. In the lower half a class holds its upper end, as a tie
goes to the power of two; in the upper half its lower end."""

CLASSES = len(PLACES) - 1
CELLS = 1 + (1 + OCTAVES * CLASSES) * UPDATE_BINS * 2  # the first stays empty: it stands for "not counted"
_MOST_CELLS_BYTES = CELLS * 16


@dataclass(frozen=True, eq=False)
class UpdateSketch:
    """How many elements of a parameter lie in which cell; N cells, those that are not empty.

    cells    int64 [N], rising: 1 + (weight·UPDATE_BINS + update)·2 + outward. `weight` is 0 below 2^-32, zero included,
             otherwise 1 + octave·CLASSES + class; `outward` is 1 where the update makes the weight's magnitude larger
    counts   int64 [N], positive

    Elements with Δw = 0 are not counted, as nothing can be lost of them, nor are NaN and Inf in either.
    """

    cells: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Elements counted."""
        return int(self.counts.sum())

    @property
    def weight(self) -> NDArray[np.int64]:
        """int64 [N]: class of the weight, 0 for weights below 2^-32."""
        return (self.cells - 1) // (2 * UPDATE_BINS)

    @property
    def update(self) -> NDArray[np.int64]:
        """int64 [N]: bin of the update."""
        return (self.cells - 1) // 2 % UPDATE_BINS

    @property
    def outward(self) -> NDArray[np.bool_]:
        """bool [N]: whether the update makes the weight's magnitude larger."""
        return np.asarray((self.cells - 1) % 2 == 1)

    @classmethod
    def of(cls, cells: NDArray[np.int32]) -> UpdateSketch:
        """From the cell of each element [E], 0 where it is not counted."""
        found, counts = np.unique(cells[cells > 0], return_counts=True)
        return cls(found.astype(np.int64), counts.astype(np.int64))

    @classmethod
    def joined(cls, parts: Sequence[UpdateSketch]) -> UpdateSketch:
        """Those of shards, steps or clients together."""
        cells = np.concatenate([np.zeros(0, np.int64), *(part.cells for part in parts)])
        counts = np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)])
        found, place = np.unique(cells, return_inverse=True)
        return cls(found, np.bincount(place, weights=counts, minlength=len(found)).astype(np.int64))

    def pack(self) -> str:
        """As text, which `unpack` reads."""
        gaps = np.diff(self.cells, prepend=0).astype("<u4")
        body = gaps.tobytes() + self.counts.astype("<u8").tobytes()
        return base64.b64encode(struct.pack("<I", len(self.cells)) + zlib.compress(body, 6)).decode()

    @classmethod
    def unpack(cls, packed: str) -> UpdateSketch:
        """Read what `pack` wrote. Raises MalformedWindow on anything else."""
        try:
            data = base64.b64decode(packed, validate=True)
            (count,) = struct.unpack_from("<I", data)
            inflater = zlib.decompressobj()
            body = inflater.decompress(data[4:], _MOST_CELLS_BYTES)
        except (binascii.Error, ValueError, struct.error, zlib.error) as error:
            raise MalformedWindow(f"a packed sketch of updates cannot be read: {error}") from error
        if len(body) != 12 * count or not inflater.eof:
            raise MalformedWindow(f"a packed sketch of updates holds {len(body)} bytes, not those of {count} cells")
        cells = np.cumsum(np.frombuffer(body, "<u4", count).astype(np.int64))
        counts = np.frombuffer(body, "<u8", count, 4 * count).astype(np.int64)
        rising = bool((np.diff(cells, prepend=0) > 0).all()) and (count == 0 or cells[-1] < CELLS)
        if not (rising and ((counts > 0) & (counts < 2**53)).all() and counts.sum(dtype=np.float64) < 2**53):
            raise MalformedWindow("a packed sketch of updates has cells or counts that are not possible")
        return cls(cells, counts)


def weight_edges() -> NDArray[np.float64]:
    """float64 [1 + OCTAVES·CLASSES, 2]: the magnitudes between which a class of weights lies."""
    octave = np.exp2(LOWEST_OCTAVE + np.arange(OCTAVES, dtype=np.float64))[:, None]
    edges = np.stack([octave * (1 + PLACES[:-1]), octave * (1 + PLACES[1:])], axis=-1).reshape(-1, 2)
    return np.concatenate([[[0.0, 0.0]], edges])


def update_edges() -> NDArray[np.float64]:
    """float64 [UPDATE_BINS + 1]: bin b holds updates in (edges[b], edges[b + 1]]; the first those below, too."""
    octave = np.exp2(LOWEST_UPDATE + np.arange(UPDATE_BINS // UPDATE_BINS_AN_OCTAVE + 1, dtype=np.float64))[:, None]
    return (octave * (1 + np.arange(UPDATE_BINS_AN_OCTAVE) / UPDATE_BINS_AN_OCTAVE)).ravel()[: UPDATE_BINS + 1]


def cells_of(weight: Tensor, update: Tensor) -> Tensor:
    """int32 [at most SAMPLE]: the cell of each sampled element, on the tensors' device, nothing read from it.

    Two tensors of one shape and one order in memory, of any floating dtype; taken in float32.
    """
    sampled = [strided(values.detach(), SAMPLE).float() for values in (weight, update)]
    return _cells(sampled[0], sampled[1], Apart())


def update_over(before: Tensor, after: Tensor, memory: Apart) -> tuple[Tensor, Tensor]:
    """after - before, which takes the place of `before` in memory, and its `cells_of`, in this one.

    A difference with memory of its own would be cleared by the system first, which costs more than to subtract. Raises
    UnsupportedTensor where the shape or dtype has changed.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        what = f"{list(before.shape)} {before.dtype} and {list(after.shape)} {after.dtype}"
        raise UnsupportedTensor(f"no update can be told of values that have become others: {what}")
    weight = strided(before, SAMPLE).to(torch.float32, copy=True)
    update = torch.sub(after, before, out=before)
    return update, _cells(weight, strided(update, SAMPLE).float(), memory)


def _cells(weight: Tensor, change: Tensor, memory: Apart) -> Tensor:
    """Of samples, 1-D and float32."""
    if weight.device.type == "cpu":
        cells = memory.empty(len(weight), torch.int32)
        w_bits, change_bits = (part.resolve_neg().numpy().view(np.int32) for part in (weight, change))
        _fill_cells(w_bits, change_bits, cells.numpy())
        return cells
    return _cells_of_bits(weight.contiguous().view(torch.int32), change.contiguous().view(torch.int32))


def _cells_of_bits(weight: Tensor, change: Tensor) -> Tensor:
    """What `_fill_cells` does, in torch's operations, for other devices."""
    w_bits, change_bits = weight & 0x7FFFFFFF, change & 0x7FFFFFFF
    octave = (w_bits >> FRACTION_BITS) - (127 + LOWEST_OCTAVE)
    inside = octave.clamp(max=OCTAVES - 1) * CLASSES + _class_in_octave(w_bits & 0x7FFFFF) + 1
    weight_class = torch.where(octave >= 0, inside, 0)
    lowest = (127 + LOWEST_UPDATE) * UPDATE_BINS_AN_OCTAVE
    update_bin = (((change_bits - 1) >> UPDATE_SHIFT) - lowest).clamp(0, UPDATE_BINS - 1)
    outward = ((weight ^ change) >= 0).int()
    cells = 1 + (weight_class * UPDATE_BINS + update_bin) * 2 + outward
    counted = (change_bits > 0) & (change_bits < 0x7F800000) & (w_bits < 0x7F800000)
    return torch.where(counted, cells, 0)


_BOUNDS = (
    *((1 << FRACTION_BITS - end) + 1 for end in (*_ENDS, 1)),
    *((1 << FRACTION_BITS) - (1 << FRACTION_BITS - end) for end in reversed(_ENDS)),
)
"""Fraction bits where the next class begins."""


def _class_in_octave(fraction: Tensor) -> Tensor:
    """0 to CLASSES - 1, int32. One comparison after another: a table would have to be copied to the device first."""
    place = torch.zeros_like(fraction)
    for bound in _BOUNDS:
        place += fraction >= bound
    return place


_BOUNDS_ARRAY = np.array(_BOUNDS, dtype=np.int32)
_MAGNITUDE, _INF, _FRACTION = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x7FFFFF)
_FIRST_OCTAVE = np.int32(127 + LOWEST_OCTAVE)
_FIRST_UPDATE = np.int32((127 + LOWEST_UPDATE) * UPDATE_BINS_AN_OCTAVE)


@njit(cache=True, nogil=True)
def _fill_cells(weight, change, cells):  # type: ignore[no-untyped-def]
    """Of the bits of two float32 arrays: int32 [E] each, and the cells, int32 [E], to be written.

    Without a branch, and in int32 throughout, so that it becomes vector code.
    """
    for i in range(cells.size):
        w, bits = np.int32(weight[i] & _MAGNITUDE), np.int32(change[i] & _MAGNITUDE)
        place = np.int32(1)
        for bound in _BOUNDS_ARRAY:
            place = np.int32(place + np.int32(np.int32(w & _FRACTION) >= bound))
        octave = np.int32(np.int32(w >> np.int32(FRACTION_BITS)) - _FIRST_OCTAVE)
        inside = np.int32(np.int32(min(octave, np.int32(OCTAVES - 1)) * np.int32(CLASSES)) + place)
        weight_class = inside if octave >= np.int32(0) else np.int32(0)
        update_bin = np.int32(np.int32(np.int32(bits - np.int32(1)) >> np.int32(UPDATE_SHIFT)) - _FIRST_UPDATE)
        update_bin = min(max(update_bin, np.int32(0)), np.int32(UPDATE_BINS - 1))
        outward = np.int32(np.int32(weight[i] ^ change[i]) >= np.int32(0))
        cell = np.int32(np.int32(weight_class * np.int32(UPDATE_BINS)) + update_bin)
        counted = (bits != np.int32(0)) & (bits < _INF) & (w < _INF)
        cells[i] = np.int32(np.int32(1) + np.int32(cell * np.int32(2)) + outward) if counted else np.int32(0)
