"""A matrix product as two tensors whose dimensions have letters.

Give each dimension a letter, one of size 1 that is broadcast none at all, and every letter falls into one of four
groups: in both operands and the result (batch), in the left one and the result (rows), in the right one and the result
(columns), in both operands alone (inner). Then the product L·R has the gradients G·Rᵀ and Lᵀ·G over the same letters
with the groups exchanged, and one rule serves `linear`, `matmul` with any broadcasting, `addmm`, an einsum of two, and
by a view of their patches the convolutions too. `bilinear.py`, `convolution.py` and `attention.py` find the letters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor

from probes.errors import WindowError


@dataclass(frozen=True)
class Extent:
    """Of a whole tensor's finite elements: the largest magnitude (0 where there are none) and the root mean square."""

    largest: float
    rms: float

    @classmethod
    def of(cls, values: Tensor) -> Extent:
        """Two passes over the tensor; NaN and Inf do not count."""
        if not values.numel():
            return cls(0.0, math.nan)
        low, high = (float(extreme) for extreme in torch.aminmax(values))
        count, largest = values.numel(), max(-low, high)
        if not math.isfinite(low) or not math.isfinite(high):  # aminmax gives NaN where there is one
            finite = values.isfinite()
            values, count = values.where(finite, 0.0), int(finite.sum())
            largest = float(values.abs().amax())
        squares_fit = 1e-12 < largest < 1e12  # in float32, which takes a quarter of the time
        wide = torch.float32 if squares_fit and values.dtype != torch.float64 else torch.float64
        norm = float(torch.linalg.vector_norm(values, dtype=wide))
        return cls(largest, norm / math.sqrt(count) if count else math.nan)


@dataclass(frozen=True)
class Lettered:
    """A tensor whose dimensions have names; `extent` may be of a larger tensor that this is a view or a part of."""

    values: Tensor
    letters: tuple[str, ...]
    extent: Extent

    @classmethod
    def of(cls, values: Tensor, letters: Sequence[str]) -> Lettered:
        """With its own extent."""
        return cls(values, tuple(letters), Extent.of(values))

    def seen_as(self, values: Tensor, letters: Sequence[str]) -> Lettered:
        """A view or a part of it, scaled as the whole."""
        return Lettered(values, tuple(letters), self.extent)


@dataclass(frozen=True)
class Factor:
    """One operand of a product: a view with dimensions [batch.., rows.., inner..]; columns stand as rows.

    groups  how many dimensions each of the three has; the size of an empty group is 1
    """

    view: Tensor
    groups: tuple[int, int, int]
    extent: Extent

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of batch entries, of rows, and of terms of the inner sum."""
        ends = (0, self.groups[0], self.groups[0] + self.groups[1], self.view.dim())
        batch, rows, inner = (prod(self.view.shape[start:end]) for start, end in pairwise(ends))
        return batch, rows, inner

    def gathered(self, entries: Sequence[int], rows: Sequence[int]) -> Tensor:
        """[entries, rows, inner], float32: a copy, of those rows of those batch entries, flat indices of their group.

        Float64 values that float32 cannot hold become Inf.
        """
        outer = self.view.shape[: self.groups[0] + self.groups[1]]
        batch = _unravelled(entries, outer[: self.groups[0]], self.view.device)
        within = _unravelled(rows, outer[self.groups[0] :], self.view.device)
        picked = self.view[(*(index[:, None] for index in batch), *(index[None, :] for index in within))]
        spread = picked.expand(len(entries), len(rows), *self.view.shape[len(outer) :])
        return spread.reshape(len(entries), len(rows), self.sizes[2]).float()


@dataclass(frozen=True)
class Contraction:
    """The product of two lettered tensors, by the name that `Product` has for it; `out` are the result's letters.

    A letter in both operands has the same size in both. Raises WindowError where a letter of one operand alone is not
    in the result: a sum over it is no part of a product.
    """

    name: str
    left: Lettered
    right: Lettered
    out: tuple[str, ...]

    def __post_init__(self) -> None:
        for one, other in ((self.left, self.right), (self.right, self.left)):
            if any(letter not in other.letters and letter not in self.out for letter in one.letters):
                shape = list(one.values.shape)
                raise WindowError(f"a dimension of an operand of shape {shape} is summed over without a partner")

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """The left operand's rows and the right one's columns, batch and inner dimensions in the same order."""
        shared = [letter for letter in self.left.letters if letter in self.right.letters]
        batch = [letter for letter in shared if letter in self.out]
        inner = [letter for letter in shared if letter not in self.out]

        def factor(one: Lettered, other: Lettered) -> Factor:
            own = [letter for letter in one.letters if letter not in other.letters]
            order = [one.letters.index(letter) for letter in (*batch, *own, *inner)]
            return Factor(one.values.permute(order), (len(batch), len(own), len(inner)), one.extent)

        return factor(self.left, self.right), factor(self.right, self.left)


def _unravelled(indices: Sequence[int], shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """An index tensor for each dimension of the shape; none for no dimension, whose one index is 0."""
    if not shape:
        return []
    return [torch.as_tensor(index, device=device) for index in np.unravel_index(np.asarray(indices), tuple(shape))]
