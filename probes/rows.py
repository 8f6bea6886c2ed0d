"""The sketches of a window that is being recorded: which row of which device's array belongs to which slot.

A tensor is sketched into its slot's row where it lies. At the end of a recorded step the rows that it used are
compacted and emptied. An accelerator's array is handed to the host first: the copy runs beside the next step's work and
is read when that has ended, so that no step waits for it. Rows of single slots are made when the window is closed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from probes.apart import Apart
from probes.compacting import Compacted, Compactor
from probes.errors import UnsupportedTensor
from probes.history import SlotHistory, SparseRow, history_of, sparse_rows
from probes.records import Slot
from probes.relative import RelativeArray
from probes.relative_history import RelativeHistory, RelativeRow
from probes.sketch import SketchArray
from probes.tiles import Tiling

Gain = Callable[[Slot], float]

_WORTH_REPEATING = 8192  # elements, from which on adding a row of sums is quicker than reading. Ours


@dataclass(frozen=True)
class _Arriving:
    """One device's sketches of one step, perhaps still on their way to the host."""

    step: int
    slots: dict[Slot, int]
    sums: Tensor
    extremes: Tensor
    gain: Gain
    arrived: torch.cuda.Event | None


@dataclass(frozen=True)
class _Finished:
    """Sketches of one step, a row for each of the slots."""

    step: int
    slots: list[Slot]
    found: Compacted
    gain: Gain

    def rows(self) -> Iterator[tuple[Slot, SparseRow]]:
        gains = list(map(self.gain, self.slots))
        for slot, row in zip(self.slots, sparse_rows(self.step, self.found, gains), strict=True):
            if row.bins.size or row.tail.any():
                yield slot, row


class _Read(NamedTuple):
    """A tensor that has been read, in which state, and the slot that it is in."""

    source: ReferenceType[Tensor]
    state: tuple[object, ...]
    slot: Slot


class SlotRows:
    """Rows of sketches by slot, and what finished steps left of them."""

    def __init__(self) -> None:
        self._finished: list[_Finished] = []
        self._arrays: dict[torch.device, SketchArray] = {}
        self._slots: dict[torch.device, dict[Slot, int]] = defaultdict(dict)
        self._relative: dict[torch.device, RelativeArray[tuple[Slot, str]]] = {}
        self._arriving: list[_Arriving] = []
        self._compactor = Compactor(Apart())
        self._tensors: Counter[Slot] = Counter()  # of the step under way
        self._latest: _Read | None = None

    def add(self, slot: Slot, values: Tensor, source: Tensor | None = None) -> None:
        """Sketch a tensor into its slot's row. Raises UnsupportedTensor.

        `source` is the tensor that these are the values of, None where it may not be the same again. If the latest one
        is, in the same version, it is not read twice: the projections to query, key and value have one input. What
        changes values without a new version has to be told by `expect_changes`.
        """
        if values.is_meta:
            raise UnsupportedTensor("a tensor on the meta device has no values")
        array, row = self._row(slot, values.device)
        if source is None or values.numel() < _WORTH_REPEATING:
            array.add(row, values)
            if source is not None:
                self._latest = None
        else:
            state = source._version, source.data_ptr(), source.shape, source.stride(), values.dtype
            latest = self._latest
            again = latest is not None and latest.source() is source and latest.state == state
            if latest is not None and again and self._tensors[latest.slot] == 1:
                array.repeat(row, self._slots[values.device][latest.slot])
            else:
                array.add(row, values)
            self._latest = _Read(ref(source), state, slot)
        self._tensors[slot] += 1

    def expect_changes(self) -> None:
        """Something has the address of a tensor's memory: the same version need not be the same values."""
        self._latest = None

    def add_sketch(self, slot: Slot, sums: Tensor, extremes: Tensor) -> None:
        """Add a sketch that was made elsewhere."""
        array, row = self._row(slot, sums.device)
        array.sums[row] += sums
        torch.maximum(array.extremes[row], extremes, out=array.extremes[row])
        self._tensors[slot] += 1

    def _row(self, slot: Slot, device: torch.device) -> tuple[SketchArray, int]:
        array = self._arrays.get(device)
        if array is None:
            array = self._arrays[device] = SketchArray(device=device)
        rows = self._slots[device]
        row = rows.get(slot)
        if row is None:
            row = rows[slot] = len(rows)
            array.reserve(row + 1)
        return array, row

    def add_tiles(self, slot: Slot, values: Tensor, tiling: Tiling) -> None:
        """Sketch a tensor relative to the largest value of each tile."""
        array = self._relative.get(values.device)
        if array is None:
            array = self._relative[values.device] = RelativeArray(device=values.device)
        array.add((slot, tiling.key), values, tiling)

    def end_step(self, step: int, gain: Gain) -> None:
        """Close a recorded step. `gain`: what a slot's values had been multiplied by; asked when they are read."""
        self._settle()
        for device, array in self._arrays.items():
            slots = self._slots[device]
            if device.type == "cpu":
                met = [slot for slot in slots if slot in self._tensors]
                self._finished.append(_Finished(step, met, array.taken([slots[slot] for slot in met]), gain))
                continue
            sums, extremes = array.drain()
            arrived = None
            if device.type == "cuda":
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(device))
            self._arriving.append(_Arriving(step, dict(slots), sums, extremes, gain, arrived))
        for relative in self._relative.values():
            relative.end_step(step)
        self._tensors.clear()
        self._latest = None

    def _settle(self) -> None:
        """Compact what has been handed over; waits for copies that are still under way."""
        for one in self._arriving:
            if one.arrived is not None:
                one.arrived.synchronize()
            found = self._compactor.of(one.sums.numpy(), one.extremes.numpy(), list(one.slots.values()))
            self._finished.append(_Finished(one.step, list(one.slots), found, one.gain))
        self._arriving = []

    def histories(self) -> dict[Slot, SlotHistory]:
        """Every slot's finished steps, in the order in which slots were first met."""
        self._settle()
        finished: dict[Slot, list[SparseRow]] = defaultdict(list)
        for one in self._finished:
            for slot, row in one.rows():
                finished[slot].append(row)
        finer: dict[Slot, dict[str, RelativeHistory]] = defaultdict(dict)
        met: dict[tuple[Slot, str], list[RelativeRow]] = defaultdict(list)
        for relative in self._relative.values():
            for key, found in relative.rows().items():
                met[key] += found
        for (slot, tiling), found in met.items():
            finer[slot][tiling] = RelativeHistory.of(found)
        return {slot: history_of(rows, finer.get(slot)) for slot, rows in finished.items()}
