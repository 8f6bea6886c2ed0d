"""One slot's sketches, step by step: sparse, because a tensor fills some hundred of the two thousand bins.

The packed form is what a database row holds: a fixed header, then the arrays one after another, deflated. A step of a
typical activation takes about half a kilobyte.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from probes.compacting import Compacted, Compactor
from probes.errors import MalformedWindow
from probes.layout import BIN_SHIFT
from probes.relative_history import RelativeHistory

_FIRST = struct.Struct("<4sIQ")  # magic, steps, occupied bins; the arrays follow
_HEADER = struct.Struct("<4sIQQI")  # magic, steps, occupied bins, bytes of the arrays, finer sketches
_FINER = struct.Struct("<HQ")  # bytes of the tiling's name, of its sketches; both follow
_MOST_FINER = 64
_MOST_ELEMENTS = 2**53  # what float64 counts exactly
_MOST_STEPS, _MOST_OCCUPIED = 1 << 20, 1 << 24  # what a hostile header may claim: some 200 MB inflated

LEAST_GAIN, LARGEST_GAIN = 2.0**-126, 2.0**127  # float32's normal powers of two: no loss scale is beyond them

STEP_ARRAYS = {
    "steps": np.int64,
    "zeros": np.int64,
    "nans": np.int64,
    "positive_infs": np.int64,
    "negative_infs": np.int64,
    "sum_of_squares": np.float64,
    "amax": np.float32,
    "amin": np.float32,
    "significant_bits": np.uint8,
    "distinct": np.int32,
    "gain": np.float64,
}
BIN_ARRAYS = {"bins": np.uint16, "counts": np.int64}


@dataclass(frozen=True, eq=False)
class SlotHistory:
    """One slot's sketches over S recorded steps; N occupied bins in all, in compressed sparse rows.

    offsets           int64 [S+1]: step s has bins[offsets[s]:offsets[s+1]] and the counts beside them
    bins, counts      uint16 [N], int64 [N]; bins rise within a step
    sum_of_squares    float64 [S], over the finite elements
    amax, amin        float32 [S]: largest and smallest non-zero finite magnitude; 0 where there is none
    significant_bits  uint8 [S]: the most mantissa bits that any element uses
    distinct          int32 [S]: estimated distinct magnitudes in a strided sample of at most 4,096 elements
    gain              float64 [S]: what the recorded values were multiplied by (a loss scale), from 2^-126 to 2^127;
                      scores take it out
    finer             tiling → sketches relative to the largest value of each tile, for scales by row or block
    """

    steps: NDArray[np.int64]
    offsets: NDArray[np.int64]
    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]
    zeros: NDArray[np.int64]
    nans: NDArray[np.int64]
    positive_infs: NDArray[np.int64]
    negative_infs: NDArray[np.int64]
    sum_of_squares: NDArray[np.float64]
    amax: NDArray[np.float32]
    amin: NDArray[np.float32]
    significant_bits: NDArray[np.uint8]
    distinct: NDArray[np.int32]
    gain: NDArray[np.float64]
    finer: Mapping[str, RelativeHistory] = field(default_factory=dict)

    @property
    def nonzero(self) -> NDArray[np.int64]:
        """Finite elements other than zero, int64 [S]."""
        running = np.append(0, np.cumsum(self.counts))
        return np.asarray(running[self.offsets[1:]] - running[self.offsets[:-1]], dtype=np.int64)

    @property
    def nonfinite(self) -> NDArray[np.int64]:
        """NaN, +Inf and -Inf elements, int64 [S]."""
        return self.nans + self.positive_infs + self.negative_infs

    @property
    def elements(self) -> NDArray[np.int64]:
        """All elements, int64 [S]."""
        return self.nonzero + self.zeros + self.nonfinite

    def rows(self) -> list[SparseRow]:
        """Its steps one by one, as `history_of` takes them."""
        tails = np.stack(
            [self.zeros, self.nans, self.positive_infs, self.negative_infs, self.sum_of_squares], axis=1
        ).astype(np.float64)
        minus_amin = np.where(self.amax > 0, -self.amin, -np.inf)
        extremes = np.stack([self.amax, minus_amin, self.significant_bits, self.distinct], axis=1).astype(np.float32)
        ends = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [
            SparseRow(
                int(self.steps[i]), self.bins[start:end], self.counts[start:end], tails[i], extremes[i], self.gain[i]
            )
            for i, (start, end) in enumerate(ends)
        ]

    def pack(self) -> bytes:
        """The history as bytes: what `unpack` reads."""
        arrays = [_little_endian(getattr(self, name), dtype) for name, dtype in STEP_ARRAYS.items()]
        arrays += [np.diff(self.offsets).astype("<i8").tobytes()]
        arrays += [_little_endian(getattr(self, name), dtype) for name, dtype in BIN_ARRAYS.items()]
        body = zlib.compress(b"".join(arrays), 6)
        header = _HEADER.pack(b"NAS2", len(self.steps), len(self.bins), len(body), len(self.finer))
        return header + body + pack_finer(self.finer)

    @classmethod
    def unpack(cls, data: bytes) -> SlotHistory:
        """Read a packed history, of this version or the one before. Raises MalformedWindow on anything else."""
        try:
            if data[:4] == b"NAS1":
                (_, steps, occupied), body, finer, rest = _FIRST.unpack_from(data), data[_FIRST.size :], 0, b""
            else:
                magic, steps, occupied, size, finer = _HEADER.unpack_from(data)
                if magic != b"NAS2":
                    raise MalformedWindow("these bytes are no packed history of a known version")
                body, rest = data[_HEADER.size : _HEADER.size + size], data[_HEADER.size + size :]
        except struct.error as error:
            raise MalformedWindow(f"a packed history starts with {_HEADER.size} bytes, got {len(data)}") from error
        if steps > _MOST_STEPS or occupied > _MOST_OCCUPIED:
            raise MalformedWindow("these bytes are no packed history of a known version")
        layout = [(name, dtype, steps) for name, dtype in STEP_ARRAYS.items() if data[:4] != b"NAS1" or name != "gain"]
        layout += [("lengths", np.int64, steps)]
        layout += [(name, dtype, occupied) for name, dtype in BIN_ARRAYS.items()]
        inflated = _inflate(body, sum(np.dtype(dtype).itemsize * length for _, dtype, length in layout))
        arrays, position = {"gain": np.ones(steps)}, 0
        for name, dtype, length in layout:
            stored = np.dtype(dtype).newbyteorder("<")
            arrays[name] = np.frombuffer(inflated, stored, length, position).astype(dtype)
            position += length * stored.itemsize
        offsets = np.append(0, np.cumsum(arrays.pop("lengths")))
        return cls(offsets=offsets, **arrays, finer=unpack_finer(rest, finer)).checked()

    def checked(self) -> SlotHistory:
        """Itself, or MalformedWindow if its arrays contradict each other or a loss scale is beyond float32's range."""
        if not (self._fits_together() and self._counts_are_possible() and self._magnitudes_agree()):
            raise MalformedWindow("a slot's history has arrays that contradict each other")
        if not ((self.gain >= LEAST_GAIN) & (self.gain <= LARGEST_GAIN)).all():
            raise MalformedWindow(
                f"a slot's values were multiplied by {self.gain.min():g} to {self.gain.max():g} (a loss scale), and a "
                "window holds such factors from 2^-126 to 2^127"
            )
        return self

    def _fits_together(self) -> bool:
        """Lengths and offsets agree; steps and, within a step, bins rise."""
        steps = len(self.steps)
        if any(len(getattr(self, name)) != steps for name in STEP_ARRAYS) or len(self.offsets) != steps + 1:
            return False
        if self.offsets[0] != 0 or not self.offsets[-1] == len(self.bins) == len(self.counts):
            return False
        starts = np.zeros(len(self.bins) + 1, dtype=bool)
        if (np.diff(self.offsets) < 0).any() or (np.diff(self.steps) <= 0).any() or (self.steps < 0).any():
            return False
        starts[self.offsets] = True
        rise = np.diff(self.bins.astype(np.int64)) > 0
        return bool((rise | starts[1:-1]).all())

    def _counts_are_possible(self) -> bool:
        """No count is negative, none so large that a sum of them would not be exact."""
        counts = (self.zeros, self.nans, self.positive_infs, self.negative_infs)
        return bool(
            all(((count >= 0) & (count <= _MOST_ELEMENTS)).all() for count in counts)
            and ((self.counts > 0) & (self.counts <= _MOST_ELEMENTS)).all()
            and self.counts.sum(dtype=np.float64) <= _MOST_ELEMENTS
        )

    def _magnitudes_agree(self) -> bool:
        """The largest and smallest magnitude lie in the outermost bins, and the sum of squares between their bounds."""
        held = np.diff(self.offsets) > 0
        squares = self.sum_of_squares
        if not (np.isfinite(squares).all() and np.isfinite(self.amax).all() and np.isfinite(self.amin).all()):
            return False
        if self.amax[~held].any() or self.amin[~held].any() or squares[~held].any():
            return False
        largest, smallest = self.bins[self.offsets[1:][held] - 1], self.bins[self.offsets[:-1][held]]
        top = self.amax[held].astype(np.float64) ** 2
        return bool(
            (_bin_of(self.amax[held]) == largest).all()
            and (_bin_of(self.amin[held]) == smallest).all()
            and (self.amin[held] <= self.amax[held]).all()
            and (squares[held] >= top * (1 - 1e-9)).all()
            and (squares[held] <= top * self.nonzero[held] * (1 + 1e-9)).all()
        )


def _bin_of(magnitudes: NDArray[np.float32]) -> NDArray[np.int64]:
    bits = np.ascontiguousarray(magnitudes, dtype=np.float32).view(np.int32)
    return np.asarray(bits.astype(np.int64) >> BIN_SHIFT, dtype=np.int64)


class SparseRow(NamedTuple):
    """One slot's sketch of one step, without its empty bins."""

    step: int
    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]
    tail: NDArray[np.float64]  # zeros, NaNs, +Infs, -Infs, sum of squares
    extremes: NDArray[np.float32]
    gain: float = 1.0


def sparse_row(step: int, sums: NDArray[np.float64], extremes: NDArray[np.float32]) -> SparseRow:
    """A row of the sketch arrays, `sums` [SUMS] and `extremes` [EXTREMES] (see `sketch.py`), compacted."""
    return sparse_rows(step, Compactor().of(sums[None], extremes[None], [0]))[0]


def sparse_rows(step: int, found: Compacted, gains: Sequence[float] | None = None) -> list[SparseRow]:
    """What was compacted, row by row; with what each row's values had been multiplied by."""
    firsts = [0, *found.ends.tolist()]
    return [
        SparseRow(step, found.bins[first:last], found.counts[first:last], tail, extremes, gain)
        for (first, last), tail, extremes, gain in zip(
            pairwise(firsts), found.tails, found.extremes, gains or [1.0] * len(found.ends), strict=True
        )
    ]


def history_of(rows: Sequence[SparseRow], finer: Mapping[str, RelativeHistory] | None = None) -> SlotHistory:
    """A history from its steps' rows, in their order."""
    tail = np.array([row.tail for row in rows], dtype=np.float64).reshape(-1, 5)
    extremes = np.array([row.extremes for row in rows], dtype=np.float32).reshape(-1, 4)
    return SlotHistory(
        steps=np.array([row.step for row in rows], dtype=np.int64),
        offsets=np.cumsum([0, *(len(row.bins) for row in rows)], dtype=np.int64),
        bins=np.concatenate([np.zeros(0, np.uint16), *(row.bins for row in rows)]),
        counts=np.concatenate([np.zeros(0, np.int64), *(row.counts for row in rows)]),
        zeros=tail[:, 0].astype(np.int64),
        nans=tail[:, 1].astype(np.int64),
        positive_infs=tail[:, 2].astype(np.int64),
        negative_infs=tail[:, 3].astype(np.int64),
        sum_of_squares=tail[:, 4],
        amax=extremes[:, 0],
        amin=np.where(extremes[:, 0] > 0, -extremes[:, 1], 0).astype(np.float32),
        significant_bits=extremes[:, 2].astype(np.uint8),
        distinct=extremes[:, 3].astype(np.int32),
        gain=np.array([row.gain for row in rows], dtype=np.float64),
        finer=dict(finer or {}),
    )


def pack_finer(finer: Mapping[str, RelativeHistory]) -> bytes:
    """Sketches by tiling as bytes, each with its name and length before it."""
    pieces = []
    for tiling, history in finer.items():
        name, payload = tiling.encode(), history.pack()
        pieces += [_FINER.pack(len(name), len(payload)), name, payload]
    return b"".join(pieces)


def unpack_finer(data: bytes, count: int) -> dict[str, RelativeHistory]:
    """What `pack_finer` wrote. Raises MalformedWindow on anything else."""
    if count > _MOST_FINER:
        raise MalformedWindow(f"a packed history claims {count} finer sketches; {_MOST_FINER} are possible")
    found: dict[str, RelativeHistory] = {}
    position = 0
    try:
        for _ in range(count):
            name_bytes, payload_bytes = _FINER.unpack_from(data, position)
            start = position + _FINER.size
            position = start + name_bytes + payload_bytes
            name = data[start : start + name_bytes].decode()
            found[name] = RelativeHistory.unpack(data[start + name_bytes : position])
    except (struct.error, UnicodeDecodeError) as error:
        raise MalformedWindow(f"a packed history's finer sketches cannot be read: {error}") from error
    if position != len(data) or len(found) != count:
        raise MalformedWindow("a packed history's finer sketches do not end where they should")
    return found


def _little_endian(array: NDArray[Any], dtype: Any) -> bytes:
    return array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def _inflate(data: bytes, size: int) -> bytes:
    """Exactly `size` inflated bytes; never more memory than that, whatever the data claims."""
    inflater = zlib.decompressobj()
    try:
        body = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise MalformedWindow(f"a packed history does not inflate: {error}") from error
    if len(body) != size or not inflater.eof:
        raise MalformedWindow(f"a packed history holds {len(body)} bytes where its header says {size}")
    return body
