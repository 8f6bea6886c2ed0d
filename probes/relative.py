"""The relative sketch: a histogram of log₂|x/R|, R being what a scale rule makes of the largest magnitude of x's tile.

A rule by row or block turns each tile's largest finite magnitude a = m·2^e, 1 ≤ m < 2, into a scale, and the scale is
R times a number that depends on the element format alone:

    kind      R                        scale                                                    classes of tiles
    current   a                        R / largest                                              1
    e8m0      2^e                      e8m0: R / 2^emax. e8m0up and :pow2: R times a power of   8, by m
                                       two, and twice that where m is above the significand
                                       of the format's largest value
    nvfp4     q·A/448: A = amax of     R / largest                                              9, by q
              the tensor, q = 448·a/A
              rounded to e4m3fn

So one histogram a kind tells of every format and of all rules of that kind. Significands of largest values are all
ones, 2 - 2^-k, but for the formats that end in NaN, where they are 2 - 2^-k of a smaller k. Hence class c of e8m0 holds
the tiles with 2 - 2^-(c-1) < m ≤ 2 - 2^-c, c = 0 those with m = 1 and c = 7 all above 2 - 2^-6, and the classes that
are above any format of up to 7 significand bits are known exactly. Under nvfp4, q may lie half a step of e4m3fn below
the tile's share of A, and what then lies beyond the largest value saturates: class c holds the tiles whose q has the
mantissa 1 + c/8, and class 8 those with a subnormal q.

Errors are in units of the scale, so beside the number of elements each bin keeps their sum of R²: an error energy is
that sum times the mean of δ². The bins are those of the tensor-wide sketch (`layout.py`), eight an octave, over the 48
octaves below 2; what is smaller is in the lowest.

The largest elements of tiles, which current scaling writes exactly and which may carry most of the energy, are counted
in one more class, the last, in 256 bins an octave from 0.75 to 2: by |x|/R, and under current scaling, where that is 1,
by m. (A ratio below 0.75 or from 2 on, which a very small tile has under nvfp4, is an element like any other.)

A tile of zeros, or of nothing finite, counts nowhere; nor does NaN or Inf in any tile: the tensor-wide sketch has
them. A scale is limited to what its own format holds, which this sketch does not follow: elements of tiles below
2^-100 or above 2^126 are counted apart, as `extreme`.

All relative sketches of a device are one array of float64 numbers in which a slot's sketch is a piece, so they merge
over ranks by one SUM; there is nothing to take a MAX of. `add_reference` here is the slow and plain one, and what runs
on other devices than a CPU, without waiting for any; the CPU's kernel is in `relative_kernels.py`. Tests hold them
equal: counts in every bit, sums of squares to rounding.

What it costs: `tiles.DEFAULT`, `bytes_a_slot`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from probes import relative_kernels
from probes.casting import widened
from probes.formats import FORMATS
from probes.layout import BIN_SHIFT
from probes.relative_history import RelativeRow
from probes.relative_layout import (
    BINS,
    EXTREME,
    FINE_LOWEST,
    FINE_SHIFT,
    FOURTHS,
    LOWEST,
    NVFP4_STEPS,
    TAIL,
    TILES,
    VERY_LARGE,
    VERY_SMALL,
)
from probes.rounding import to_grid
from probes.scaling import E4M3, over_tiles, tile_amax
from probes.tiles import Tiling, tilings_of

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class _Arriving(Generic[Key]):
    """A step's sketches on their way to the host."""

    step: int
    places: Mapping[Key, tuple[int, int]]
    sums: Tensor
    arrived: torch.cuda.Event | None


class RelativeArray(Generic[Key]):
    """The relative sketches of one device: `sums`, float64, in which each key has a piece; see `size_of`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.sums = torch.zeros(0, dtype=torch.float64, device=self.device)
        self._places: dict[Key, tuple[int, int]] = {}  # offset, classes
        self._used = 0
        self._arriving: list[_Arriving[Key]] = []
        self._rows: dict[Key, list[RelativeRow]] = {}

    def add(self, key: Key, values: Tensor, tiling: Tiling, factor: float = 1.0) -> None:
        """Add a tensor to the sketch of a key, each value times `factor`; nothing of the tensor is kept or changed.

        Empty tensors add nothing. Raises UnsupportedTensor for a dtype other than float16, bfloat16, float32, float64.
        """
        values = widened(values.detach())
        if values.numel() == 0:
            return
        if key not in self._places:
            self._reserve(key, tiling.classes)
        start, classes = self._places[key]
        piece = self.sums[start : start + size_of(classes)]
        if factor != 1.0:
            values = values * factor
        with torch.no_grad():
            if self.device.type == "cpu":
                relative_kernels.add(piece, values, tiling)
            else:
                add_reference(piece, values, tiling)

    def end_step(self, step: int) -> None:
        """Close a step: its sketches go to the host, without waiting for them, and the array starts from nothing."""
        self._settle()
        arrived = None
        if self.device.type == "cuda":
            sums = torch.empty(self.sums.shape, dtype=self.sums.dtype, pin_memory=True)
            sums.copy_(self.sums, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))
        else:
            sums = self.sums.cpu().clone()
        self.sums.zero_()
        self._arriving.append(_Arriving(step, dict(self._places), sums, arrived))

    def rows(self) -> dict[Key, list[RelativeRow]]:
        """Every key's finished steps; those that nothing was added in are left out."""
        self._settle()
        return self._rows

    def _settle(self) -> None:
        for finished in self._arriving:
            if finished.arrived is not None:
                finished.arrived.synchronize()
            sums = finished.sums.numpy()
            for key, (start, classes) in finished.places.items():
                piece = sums[start : start + size_of(classes)]
                if piece[-TAIL:].any():
                    self._rows.setdefault(key, []).append(RelativeRow.of(finished.step, piece))
        self._arriving = []

    def _reserve(self, key: Key, classes: int) -> None:
        self._places[key] = self._used, classes
        self._used += size_of(classes)
        if self._used > len(self.sums):
            grown = self.sums.new_zeros(max(self._used, 2 * len(self.sums)))
            grown[: len(self.sums)] = self.sums
            self.sums = grown


def size_of(classes: int) -> int:
    """Numbers in a sketch: counts [classes, BINS], sums of R² [classes, BINS], and the tail."""
    return 2 * classes * BINS + TAIL


def bytes_of(tiling: Tiling) -> int:
    """What a slot's sketch takes on the device while the window is open."""
    return 8 * size_of(tiling.classes)


def bytes_a_slot(names: Sequence[str]) -> int:
    """What these tilings (`tiles.tilings_of`) take on the device for one slot: of a tensor with two axes, the most that
    there are. Known before a window opens, and independent of its number of steps. Raises WindowError."""
    return sum(bytes_of(tiling) for tiling in tilings_of(names, "bmm", ("lhs", "rhs"), "lhs", 3))


def add_reference(sums: Tensor, values: Tensor, tiling: Tiling) -> None:
    """The relative sketch of a tensor, added to one piece `sums` [size_of(classes)]: slow and plain, on any device."""
    matrix = tiling.matrix(values).to(torch.float32)
    amax = tile_amax(matrix, tiling.tile)
    reference, tile_class = references(amax, tiling.kind)

    def at_elements(of_tiles: Tensor) -> Tensor:
        return over_tiles(of_tiles, matrix, tiling.tile).expand_as(matrix)

    counted = (matrix != 0) & torch.isfinite(matrix)
    ratio = (matrix / at_elements(reference)).abs().view(torch.int32)
    bins = ((ratio >> BIN_SHIFT) - LOWEST).clamp(0, BINS - 1)
    top = (amax / reference).view(torch.int32) if tiling.kind != "current" else mantissas(amax).view(torch.int32)
    fine = (top - FINE_LOWEST) >> FINE_SHIFT
    is_top = (matrix.abs() == at_elements(amax)) & at_elements((fine >= 0) & (fine < BINS))
    last = (tiling.classes - 1) * BINS
    cells = torch.where(is_top, last + at_elements(fine), at_elements(tile_class) * BINS + bins)
    cells = cells.masked_fill(~counted, 0).flatten()
    squares = at_elements(reference).double().square() * counted
    classes = tiling.classes * BINS
    sums[:classes].index_add_(0, cells, counted.double().flatten())
    sums[classes : 2 * classes].index_add_(0, cells, squares.flatten())
    extreme = at_elements((amax < VERY_SMALL) | (amax > VERY_LARGE)) & counted
    tail = sums[2 * classes :]
    tail[FOURTHS] += squares.square().sum()
    tail[TILES] += (amax > 0).sum()
    tail[EXTREME] += extreme.sum()


def mantissas(amax: Tensor) -> Tensor:
    """m of m·2^e, from 1 to below 2, for normal and subnormal magnitudes; 1 for zero."""
    return 2 * torch.frexp(amax.masked_fill(amax == 0, 0.5)).mantissa


def references(amax: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """R, float32, and the class of each tile, int64, from its largest magnitude; R is 1 where that is zero."""
    nothing = amax == 0
    if kind == "current":
        return amax.masked_fill(nothing, 1.0), torch.zeros_like(amax, dtype=torch.int64)
    if kind == "e8m0":
        mantissa, exponent = torch.frexp(amax.masked_fill(nothing, 1.0))
        bounds = 2 - 0.5 ** torch.arange(7, device=amax.device, dtype=torch.float32)
        tile_class = ((2 * mantissa).unsqueeze(-1) > bounds).sum(dim=-1)
        return torch.ldexp(torch.ones_like(amax), exponent - 1), tile_class
    assert kind == "nvfp4"
    over_all = amax.amax()
    share = amax / over_all.masked_fill(over_all == 0, 1.0) * NVFP4_STEPS
    scale = to_grid(share, E4M3, "nearest", saturate=True).clamp(min=E4M3.smallest_subnormal)
    reference = scale * (over_all / torch.full_like(over_all, NVFP4_STEPS))
    mantissa = (torch.frexp(scale).mantissa * 16).long() - 8
    tile_class = torch.where(scale < E4M3.smallest_normal, 8, mantissa).masked_fill(nothing, 0)
    return reference.masked_fill(nothing | (reference == 0), 1.0), tile_class


assert FORMATS["e4m3fn"].largest == NVFP4_STEPS
