"""Sketches relative to the largest value of each tile of a tensor, for scales by row or block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.errors import MalformedWindow
from probes.records import Slot
from probes.tiles import Tiling


@dataclass(frozen=True)
class RelativeRow:
    """One slot's relative sketch of one step."""

    step: int


@dataclass(frozen=True)
class RelativeHistory:
    """One slot's relative sketches, step by step."""

    @classmethod
    def of(cls, rows: Sequence[RelativeRow]) -> RelativeHistory:
        """A history from its steps' rows."""
        return cls()

    def pack(self) -> bytes:
        """The history as bytes."""
        return b""

    @classmethod
    def unpack(cls, data: bytes) -> RelativeHistory:
        """Read a packed history. Raises MalformedWindow."""
        if data:
            raise MalformedWindow("these bytes are no packed relative history")
        return cls()


class RelativeArray:
    """The relative sketches of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def add(self, key: tuple[Slot, str], values: Tensor, tiling: Tiling) -> None:
        """Add a tensor's sketch relative to its tiles."""

    def drain(self, step: int) -> dict[tuple[Slot, str], RelativeRow]:
        """Hand over the contents, and start again from nothing."""
        return {}
