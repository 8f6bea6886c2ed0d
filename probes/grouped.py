"""Grouped products: rows of one tensor that are split among several matrices, as experts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from probes.operation import Operation, argument


@dataclass(frozen=True)
class Grouped(Operation):
    """`grouped_mm`: the groups run along the rows of the left operand, the columns of the right, or the inner sum."""

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        """By one product a group: the grouped kernel has no float32 on every device."""
        first, second = operands
        ends = argument(args, kwargs, 2, "offs")
        if ends is None:
            return torch.matmul(first, second)
        starts = [0, *(int(end) for end in ends)]
        spans = list(pairwise(starts))
        if first.dim() == 2 and second.dim() == 3:
            parts = [first[start:end] @ second[group] for group, (start, end) in enumerate(spans)]
            parts.append(first.new_zeros(first.shape[0] - starts[-1], second.shape[2]))
            return torch.cat(parts)
        if first.dim() == 3:
            parts = [first[group] @ second[:, start:end] for group, (start, end) in enumerate(spans)]
            parts.append(second.new_zeros(first.shape[1], second.shape[1] - starts[-1]))
            return torch.cat(parts, dim=1)
        return torch.stack([first[:, start:end] @ second[start:end] for start, end in spans])

    def flops(self, operands: Sequence[Tensor], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Every row meets one matrix. Rows behind the last offset count too: to know it would wait for the GPU."""
        first, second = operands
        if first.dim() == 2 and second.dim() == 2:  # the groups share the inner sum
            return 2.0 * first.shape[0] * first.shape[1] * second.shape[1]
        return 2.0 * result.numel() * first.shape[-1]


@dataclass(frozen=True)
class Scaled(Grouped):
    """A product of operands that are narrow already, with scales beside them: `_scaled_mm` and its grouped form.

    It can be recorded but not calculated again: what its operands were before they were cast is not known here.
    """

    replayable: ClassVar[bool] = False


@dataclass(frozen=True)
class Distances(Operation):
    """`cdist` where torch makes Euclidean distances of a matrix product: |a|² - 2·a·bᵀ + |b|² (above 25 rows)."""

    multilinear: ClassVar[bool] = False

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        found = super().read(args, kwargs)
        if found is None or argument(args, kwargs, 2, "p", 2.0) != 2:
            return None
        mode = argument(args, kwargs, 3, "compute_mode", "use_mm_for_euclid_dist_if_necessary")
        many = max(operand.shape[-2] for operand in found) > _ROWS
        by_product = mode == "use_mm_for_euclid_dist" or (mode == "use_mm_for_euclid_dist_if_necessary" and many)
        return found if by_product else None

    def flops(self, operands: Sequence[Tensor], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        return 2.0 * result.numel() * operands[0].shape[-1]


_ROWS = 25
