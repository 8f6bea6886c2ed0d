"""How a tensor's elements lie in memory, for all that reads them there."""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter

import torch
from torch import Tensor

from probes.errors import UnsupportedTensor


def in_memory_order(values: Tensor) -> Tensor:
    """Every element in one contiguous row; a dense tensor is not copied, however its dimensions are permuted."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    dense = values.permute(order)
    return dense.view(-1) if dense.is_contiguous() else dense.reshape(-1)


def without_repeats(values: Tensor) -> tuple[Tensor, int]:
    """The tensor with each expanded dimension (stride 0) left out, and how many times that holds every element."""
    times = 1
    for dimension in range(values.dim() - 1, -1, -1):
        size = values.shape[dimension]
        if values.stride(dimension) == 0 and size > 1:
            values, times = values.select(dimension, 0), times * size
    return values, times


def plain(values: Tensor) -> Tensor:
    """The same elements as a tensor of the plain kind, which has them where `data_ptr` says."""
    if values.layout is not torch.strided or not values.is_cpu:
        place = f"{values.layout} on {values.device}"
        raise UnsupportedTensor(f"a sketch on the CPU reads strided tensors there; this one is {place}")
    return values.detach().as_subclass(Tensor).resolve_neg()


def as_matrix(held: Tensor) -> tuple[int, int, int, int]:
    """Elements, columns, and the strides of rows and of columns, in elements, as they lie in memory.

    0 columns: more than two strides would be needed.
    """
    dimensions: list[tuple[int, int]] = []  # size and stride, the widest stride first
    for stride, size in sorted(zip(held.stride(), held.shape, strict=True), key=itemgetter(0), reverse=True):
        if dimensions and dimensions[-1][1] == stride * size:
            dimensions[-1] = (dimensions[-1][0] * size, stride)
        elif size != 1:
            dimensions.append((size, stride))
    if len(dimensions) > 2:
        return held.numel(), 0, 0, 0
    (rows, pitch), (columns, step) = [(1, 0), (1, 1), *dimensions][-2:]
    return rows * columns, columns, pitch, step


@lru_cache(maxsize=1 << 14)
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after another, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
