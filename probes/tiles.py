"""Which scales finer than a tensor's a slot is sketched for: by row, by column, by block, along which axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """One way of cutting a tensor into tiles that have a scale each."""

    key: str


def tilings_of(names: Sequence[str], op: str, roles: Sequence[str], role: str, dimensions: int) -> Sequence[Tiling]:
    """The tilings of one slot. None is known yet."""
    return ()
