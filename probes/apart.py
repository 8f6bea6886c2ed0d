"""Memory for what a window keeps, apart from that which the training takes and gives back at each step.

A training's large tensors come and go from step to step, and malloc gives each the place that it had before. What a
window keeps of a step, however little, would settle among these places: some tensors no longer fit where they were, the
heap grows, and the system has to clear new pages, at each step again. (A window of 24 steps on a small Llama kept 10 MB
and made the heap grow from 330 MB to between 550 and 640; like this, to between 400 and 420.) So such things are put
into a block that malloc asks the system for by itself. Of that only what is used counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.in_memory import is_dense

_BLOCK = 33 << 20  # bytes: glibc's malloc takes what is larger than 32 MiB from no heap
_LINE = 64  # bytes


class Apart:
    """Hands out memory for good: a block is given back when nothing in it is referred to any more."""

    def __init__(self) -> None:
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """A tensor on the host, 1-D, with memory that is not initialized."""
        return torch.from_numpy(self._taken(size * dtype.itemsize)).view(dtype)

    def copy_of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The same array once more."""
        copy = self._taken(values.nbytes).view(values.dtype).reshape(values.shape)
        copy[...] = values
        return copy

    def _taken(self, size: int) -> NDArray[np.uint8]:
        if self._used + size > len(self._block):
            self._block, self._used = np.empty(max(_BLOCK, size), np.uint8), 0
        start, self._used = self._used, self._used + whole_lines(size)
        return self._block[start : start + size]


class Copies:
    """Copies of tensors for the time of a step, in memory that the next step uses again."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Give the memory back."""
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def begin(self, most: int) -> None:
        """The copies that there are have been done with; those that come take so many bytes on the host, or less."""
        if most > len(self._block):
            self._block = torch.empty(most, dtype=torch.uint8)
        self._used = 0

    def of(self, values: Tensor) -> Tensor:
        """A copy, in the same order in memory; of memory of its own where there is no room for it here."""
        end = self._used + values.nbytes
        if not values.is_cpu or end > len(self._block) or not is_dense(values.shape, values.stride()):
            return values.clone()
        held = self._block[self._used : end].view(values.dtype).as_strided(values.shape, values.stride())
        self._used = whole_lines(end)
        return held.copy_(values)


def whole_lines(size: int) -> int:
    """What so many bytes take."""
    return -(-size // _LINE) * _LINE
