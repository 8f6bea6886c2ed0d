"""What a training's own buffers do: BatchNorm's running statistics, and whatever else a forward updates in place.

At a few recorded steps, which they take turns at as parameters do, each floating buffer is read as the step left it
(role `buffer`), and how far the step has moved it (role `update`), jointly with its value before (`lost_updates.py`):
whether a narrower format would overflow, or would not take the moves. They are told in a ParameterRecord each, under
the buffer's dotted name, without gradient, state or epsilon.

A buffer that never moves is no statistic but a table (a mask, positions, frequencies): what was read of it is dropped
when the window closes, as masks hold -Inf and the like on purpose. Not so a running variance that stands still beside a
running mean that moves: its format holds it back. A step's move is that of all its forwards together;
with accumulation each forward's is smaller. Nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from probes.apart import Apart
from probes.history import SlotHistory
from probes.lost_updates import UpdateSketch, update_over
from probes.names import written_parameter
from probes.optimizer_states import is_floating, local
from probes.pace import Rota
from probes.parameter_records import BUFFER, UPDATE, ParameterRecord
from probes.records import Slot
from probes.rows import SlotRows

RUNNING = ("running_mean", "running_var")
"""What torch's normalisations call the statistics that they move together, at every step."""


@dataclass
class _Seen:
    shape: tuple[int, ...]
    dtype: str
    elements: int
    cells: dict[int, Tensor] = field(default_factory=dict)  # step → cell of each sampled element


class BufferWatch:
    """Follows the floating buffers of a model through a few steps."""

    def __init__(self, model: nn.Module, rota: Rota, rows: SlotRows, note: Callable[[str], None]) -> None:
        self._model, self._rota, self._rows, self._note = model, rota, rows, note
        self._before: dict[str, Tensor] = {}
        self._kept = Apart()
        self._seen: dict[str, _Seen] = {}

    def at_start(self, step: int, recorded: bool) -> None:
        """A step begins: keep the buffers whose turn it is as they are before its forward."""
        self._before = {}
        if recorded:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                values = dict(self._buffers())
                due = self._rota.due(step, {name: each.numel() for name, each in values.items()})
                self._before = {name: values[name].clone() for name in due}

    def at_end(self, step: int) -> None:
        """The step has ended: read the buffers that `at_start` kept."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for name, values in self._buffers() if self._before else ():
                before = self._before.get(name)
                if before is None or before.shape != values.shape or before.device != values.device:
                    continue
                self._rota.had(name)
                try:
                    self._read(name, step, before, values)
                except Exception as error:  # a kind of tensor nobody thought of: the window says so
                    self._note(f"buffer {name} could not be followed: {type(error).__name__}: {error}")
        self._before = {}

    def forget(self) -> None:
        """Let go of every tensor of the training."""
        self._before = {}

    def still(self, histories: Mapping[Slot, SlotHistory]) -> set[Slot]:
        """Slots of the buffers that were never to move."""
        names = [name for name in self._seen if not self._moves(name, histories)]
        return {Slot(name, role) for name in names for role in (BUFFER, UPDATE)}

    def records(self, histories: Mapping[Slot, SlotHistory]) -> tuple[ParameterRecord, ...]:
        """One of each buffer that moves; waits for the device."""
        return tuple(
            ParameterRecord(
                name=name,
                dtype=seen.dtype,
                roles=(BUFFER, UPDATE),
                shape=seen.shape,
                elements=seen.elements,
                packed_updates={
                    step: UpdateSketch.of(cells.cpu().numpy()).pack() for step, cells in seen.cells.items()
                },
            )
            for name, seen in self._seen.items()
            if self._moves(name, histories)
        )

    def _moves(self, name: str, histories: Mapping[Slot, SlotHistory]) -> bool:
        """Whether it moved, or a statistic that moves with it did."""
        module, dot, own = name.rpartition(".")
        together = [f"{module}{dot}{other}" for other in RUNNING] if own in RUNNING else [name]
        return any(self._moved(each, histories) for each in together)

    def _moved(self, name: str, histories: Mapping[Slot, SlotHistory]) -> bool:
        """NaN alone is no move: -Inf less -Inf gives one. A statistic that has overflowed stays +Inf or NaN."""
        updates, values = histories.get(Slot(name, UPDATE)), histories.get(Slot(name, BUFFER))
        if updates is None or values is None:
            return False
        moved = updates.nonzero + updates.nonfinite - updates.nans > 0
        return bool(moved.any() or values.positive_infs.any() or values.nans.any())

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in self._model.named_buffers():
            if buffer is not None and is_floating(buffer) and not buffer.is_meta and buffer.numel():
                yield written_parameter(name), local(buffer)

    def _read(self, name: str, step: int, before: Tensor, after: Tensor) -> None:
        update, cells = update_over(before, after, self._kept)
        self._rows.add(Slot(name, BUFFER), after)
        self._rows.add(Slot(name, UPDATE), update)
        if name not in self._seen:
            dtype = str(after.dtype).removeprefix("torch.")
            self._seen[name] = _Seen(tuple(after.shape), dtype, after.numel())
        self._seen[name].cells[step] = cells
