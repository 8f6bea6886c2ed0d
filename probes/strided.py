"""A fixed strided sample of a tensor's elements: the same at every step, spread over all rows and columns."""

from __future__ import annotations

import math

from torch import Tensor

from probes.kernels import in_memory_order


def stride_for(values: Tensor, most: int) -> int:
    """The smallest stride that leaves at most `most` elements and does not keep to some columns of a matrix."""
    stride = max(1, -(-values.numel() // most))
    if stride == 1:
        return 1
    sizes = [size for size in values.shape if size > 1]
    while any(math.gcd(stride, size) > 1 for size in sizes[-1:]):
        stride += 1
    return stride


def strided(values: Tensor, most: int) -> Tensor:
    """At most `most` elements, 1-D, in the order in which they lie in memory; a view of a tensor that is dense."""
    return in_memory_order(values)[:: stride_for(values, most)]
