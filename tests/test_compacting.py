"""Rows of sketches without their empty bins, and what is left of the rows."""

from __future__ import annotations

import numpy as np
import torch

from probes.compacting import TAIL, Compactor
from probes.layout import BINS
from probes.sketch import SketchArray


def filled(slots: int) -> SketchArray:
    """Slots of tensors of different sizes; the last of each three is left empty."""
    array = SketchArray(slots)
    draw = torch.Generator().manual_seed(0)
    for slot in range(slots):
        if slot % 3 != 2:
            array.add(slot, torch.randn(100 + 50 * slot, generator=draw) * 2.0 ** (slot - 4))
    array.add(0, torch.tensor([float("inf"), float("nan"), -float("inf"), 0.0, 3e38, 1e-45]))
    return array


def test_what_is_kept_is_all_that_was_there() -> None:
    array = filled(8)
    sums, extremes = array.sums.numpy().copy(), array.extremes.numpy().copy()
    rows = [5, 0, 2, 7]
    found = Compactor().of(sums, extremes, rows)
    first = 0
    for place, row in enumerate(rows):
        last = int(found.ends[place])
        occupied = np.flatnonzero(sums[row, :BINS])
        assert found.bins[first:last].tolist() == occupied.tolist()
        assert found.counts[first:last].tolist() == sums[row, occupied].tolist()
        assert found.tails[place].tolist() == sums[row, BINS : BINS + TAIL].tolist()
        assert found.extremes[place].tolist() == extremes[row].tolist()
        first = last
    assert last == len(found.bins) == len(found.counts)
    assert np.array_equal(sums, array.sums.numpy()), "nothing was asked to be emptied"


def test_taken_rows_are_as_new_and_the_others_as_they_were() -> None:
    array, same = filled(8), filled(8)
    array.taken([1, 3, 0])
    for slot in range(8):
        other = SketchArray(1) if slot in (0, 1, 3) else same
        place = slot if other is same else 0
        assert torch.equal(array.sums[slot], other.sums[place])
        assert torch.equal(array.extremes[slot], other.extremes[place])


def test_one_compactor_takes_more_and_fewer_rows() -> None:
    compactor, array = Compactor(), filled(8)
    arrays = array.sums.numpy(), array.extremes.numpy()
    few = compactor.of(*arrays, [1])
    many = compactor.of(*arrays, list(range(8)))
    again = compactor.of(*arrays, [1])
    assert few.counts.tolist() == again.counts.tolist(), "what was given is not written over"
    assert many.ends[1] - many.ends[0] == few.ends[0]
    assert compactor.of(*arrays, []).ends.size == 0
