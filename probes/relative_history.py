"""One slot's relative sketches, step by step: sparse, as `history.py` has the tensor-wide ones."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from probes.errors import MalformedWindow
from probes.relative_layout import BINS, EXTREME, FOURTHS, MOST_CLASSES, TAIL, TILES

_HEADER = struct.Struct("<4sIQ")  # magic, steps, occupied cells; the arrays follow, deflated
_MAGIC = b"NAR1"
_MOST_STEPS, _MOST_OCCUPIED = 1 << 20, 1 << 24
_MOST_ELEMENTS = 2**53
_LARGEST_SQUARE = (2.0**128) ** 2  # of one element's R

_STEP_ARRAYS: dict[str, Any] = {
    "steps": np.int64,
    "fourths": np.float64,
    "tiles": np.int64,
    "extreme": np.int64,
    "lengths": np.int64,
}
_CELL_ARRAYS: dict[str, Any] = {"cells": np.uint16, "counts": np.int64, "squares": np.float64}


class RelativeRow(NamedTuple):
    """One slot's relative sketch of one step: float64 `sums` as `relative_layout.py` has them, without empty cells."""

    step: int
    cells: NDArray[np.uint16]
    counts: NDArray[np.float64]
    squares: NDArray[np.float64]
    tail: NDArray[np.float64]

    @classmethod
    def of(cls, step: int, sums: NDArray[np.float64]) -> RelativeRow:
        """A sketch's dense numbers, compacted."""
        half = (len(sums) - TAIL) // 2
        counts, squares = sums[:half], sums[half : 2 * half]
        (cells,) = np.nonzero(counts)
        return cls(step, cells.astype(np.uint16), counts[cells], squares[cells], sums[-TAIL:].copy())

    def dense(self) -> NDArray[np.float64]:
        """The numbers again, as if all kinds had MOST_CLASSES: of one length on all ranks, which add them up."""
        half = MOST_CLASSES * BINS
        sums = np.zeros(2 * half + TAIL)
        sums[self.cells], sums[half + self.cells.astype(np.int64)] = self.counts, self.squares
        sums[-TAIL:] = self.tail
        return sums


@dataclass(frozen=True, eq=False)
class RelativeHistory:
    """One slot's relative sketches of one tiling, over S steps; N occupied cells in all, in compressed sparse rows.

    offsets    int64 [S+1]: step s has cells[offsets[s]:offsets[s+1]], and what is beside them
    cells      uint16 [N]: class of the tile times BINS, plus the bin; rising within a step
    counts     int64 [N]: elements
    squares    float64 [N]: the sum of R² over them
    fourths    float64 [S]: the sum of R⁴ over a step's elements
    tiles      int64 [S]: tiles that hold a finite number other than zero
    extreme    int64 [S]: elements of tiles so small or large that limits of scales may be met
    """

    steps: NDArray[np.int64]
    offsets: NDArray[np.int64]
    cells: NDArray[np.uint16]
    counts: NDArray[np.int64]
    squares: NDArray[np.float64]
    fourths: NDArray[np.float64]
    tiles: NDArray[np.int64]
    extreme: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[RelativeRow]) -> RelativeHistory:
        """A history from rows; those of one step, as two devices may leave them, are added."""
        by_step: dict[int, RelativeRow] = {}
        for row in sorted(rows, key=lambda row: row.step):
            before = by_step.get(row.step)
            by_step[row.step] = row if before is None else RelativeRow.of(row.step, before.dense() + row.dense())
        found = list(by_step.values())
        tail = np.array([row.tail for row in found], dtype=np.float64).reshape(-1, TAIL)
        return cls(
            steps=np.array([row.step for row in found], dtype=np.int64),
            offsets=np.cumsum([0, *(len(row.cells) for row in found)], dtype=np.int64),
            cells=np.concatenate([np.zeros(0, np.uint16), *(row.cells for row in found)]),
            counts=np.concatenate([np.zeros(0), *(row.counts for row in found)]).astype(np.int64),
            squares=np.concatenate([np.zeros(0), *(row.squares for row in found)]),
            fourths=tail[:, FOURTHS],
            tiles=tail[:, TILES].astype(np.int64),
            extreme=tail[:, EXTREME].astype(np.int64),
        )

    def rows(self) -> list[RelativeRow]:
        """One row a step, as they were given; their `dense` numbers add up over ranks, `RelativeRow.of` reads a sum."""
        tail = np.zeros((len(self.steps), TAIL))
        tail[:, FOURTHS], tail[:, TILES], tail[:, EXTREME] = self.fourths, self.tiles, self.extreme
        found = []
        for i, step in enumerate(self.steps):
            held = slice(self.offsets[i], self.offsets[i + 1])
            counts = self.counts[held].astype(np.float64)
            found.append(RelativeRow(int(step), self.cells[held], counts, self.squares[held], tail[i]))
        return found

    def pack(self) -> bytes:
        """The history as bytes: what `unpack` reads."""
        held = {**vars(self), "lengths": np.diff(self.offsets)}
        arrays = [
            held[name].astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            for name, dtype in (_STEP_ARRAYS | _CELL_ARRAYS).items()
        ]
        return _HEADER.pack(_MAGIC, len(self.steps), len(self.cells)) + zlib.compress(b"".join(arrays), 6)

    @classmethod
    def unpack(cls, data: bytes) -> RelativeHistory:
        """Read a packed history. Raises MalformedWindow on anything else."""
        if len(data) < _HEADER.size:
            raise MalformedWindow(f"a packed relative history starts with {_HEADER.size} bytes, got {len(data)}")
        magic, steps, occupied = _HEADER.unpack_from(data)
        if magic != _MAGIC or steps > _MOST_STEPS or occupied > _MOST_OCCUPIED:
            raise MalformedWindow("these bytes are no packed relative history of a known version")
        layout = [(name, np.dtype(dtype), steps) for name, dtype in _STEP_ARRAYS.items()]
        layout += [(name, np.dtype(dtype), occupied) for name, dtype in _CELL_ARRAYS.items()]
        size = sum(dtype.itemsize * length for _, dtype, length in layout)
        inflater = zlib.decompressobj()
        try:
            body = inflater.decompress(data[_HEADER.size :], size + 1)
        except zlib.error as error:
            raise MalformedWindow(f"a packed relative history does not inflate: {error}") from error
        if len(body) != size or not inflater.eof or inflater.unused_data:
            raise MalformedWindow(f"a packed relative history has {len(body)} bytes where its header says {size}")
        arrays: dict[str, Any] = {}
        position = 0
        for name, dtype, length in layout:
            arrays[name] = np.frombuffer(body, dtype.newbyteorder("<"), length, position).astype(dtype)
            position += length * dtype.itemsize
        lengths = arrays.pop("lengths")
        if (lengths < 0).any() or (lengths > occupied).any() or lengths.sum() != occupied:
            raise MalformedWindow("a packed relative history has steps of impossible lengths")
        return cls(offsets=np.append(0, np.cumsum(lengths)), **arrays).checked()

    def checked(self) -> RelativeHistory:
        """Itself, or MalformedWindow if its arrays contradict each other."""
        if not (self._fits_together() and self._sums_are_possible()):
            raise MalformedWindow("a slot's relative history has arrays that contradict each other")
        return self

    def _fits_together(self) -> bool:
        """Steps rise, and cells within a step; all cells exist."""
        if (self.steps < 0).any() or (np.diff(self.steps) <= 0).any() or (self.cells >= MOST_CLASSES * BINS).any():
            return False
        starts = np.zeros(len(self.cells) + 1, dtype=bool)
        starts[self.offsets] = True
        return bool(((np.diff(self.cells.astype(np.int64)) > 0) | starts[1:-1]).all())

    def _sums_are_possible(self) -> bool:
        """Counts are exact and positive, sums of powers finite and no larger than float32 elements make them."""
        total = self.counts.sum(dtype=np.float64)
        if (self.counts <= 0).any() or total > _MOST_ELEMENTS:
            return False
        for part in (self.tiles, self.extreme):
            if (part < 0).any() or (part > _MOST_ELEMENTS).any():
                return False
        most = self.counts * _LARGEST_SQUARE
        return bool(
            (np.isfinite(self.squares) & (self.squares > 0) & (self.squares <= most)).all()
            and (np.isfinite(self.fourths) & (self.fourths >= 0)).all()
            and self.fourths.max(initial=0.0) <= max(total, 1.0) * _LARGEST_SQUARE**2
        )
