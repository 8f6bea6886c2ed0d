"""Checkpoints of a job: the training's state by phase and step, so that a later attempt goes on from there.

A checkpoint is two files: what the trainer saves, and notes in JSON that belong to the same step. The notes
are written first, so a trainer's file that is there has its notes. Older checkpoints of a phase go when a
newer one is whole.
"""

import json
import re
import time
from pathlib import Path
from typing import Any

from advisor.training import Trainer


class Checkpoints:
    """The folder of one job. `every_s`: seconds between checkpoints that `due` allows."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self.folder = folder
        self.every_s = every_s
        self._last = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def save_if_due(self, trainer: Trainer, phase: str, step: int, notes: Any = None) -> None:
        """Save, if enough time has passed since the last one. `notes` may be a function that gives them."""
        if time.monotonic() - self._last >= self.every_s:
            self.save(trainer, phase, step, notes() if callable(notes) else notes)

    def save(self, trainer: Trainer, phase: str, step: int, notes: Any = None) -> None:
        """Save the state after that step of the phase."""
        older = self._steps(phase)
        self._notes(phase, step).write_text(json.dumps(notes))
        trainer.save(self._state(phase, step))
        for old in older:
            if old != step:
                self._remove(phase, old)
        self._last = time.monotonic()

    def resume(self, trainer: Trainer, phase: str) -> tuple[int, Any]:
        """Load the newest checkpoint of the phase. Its step and notes; (0, None) if there is none."""
        steps = self._steps(phase)
        if not steps:
            return 0, None
        trainer.load(self._state(phase, steps[-1]))
        return steps[-1], json.loads(self._notes(phase, steps[-1]).read_text())

    def _steps(self, phase: str) -> list[int]:
        names = (re.fullmatch(rf"{phase}-(\d+)\.pt", path.name) for path in self.folder.iterdir())
        return sorted(int(name.group(1)) for name in names if name is not None)

    def _remove(self, phase: str, step: int) -> None:
        self._state(phase, step).unlink(missing_ok=True)
        self._notes(phase, step).unlink(missing_ok=True)

    def _state(self, phase: str, step: int) -> Path:
        return self.folder / f"{phase}-{step}.pt"

    def _notes(self, phase: str, step: int) -> Path:
        return self.folder / f"{phase}-{step}.json"
