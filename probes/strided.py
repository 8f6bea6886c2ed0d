"""A fixed strided sample of a tensor's elements: the same at every step, spread over all rows and columns."""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from probes.in_memory import in_memory_order, is_dense


def strided(values: Tensor, most: int) -> Tensor:
    """At most `most` elements, 1-D, in the order in which they lie in memory; a view of a tensor that is dense."""
    shape, strides = tuple(values.shape), values.stride()
    step = _step(shape, most)
    if is_dense(shape, strides) and not values.is_neg():
        return values.as_strided((-(-values.numel() // step),), (step,))
    return in_memory_order(values)[::step]


@lru_cache(maxsize=1 << 14)
def _step(shape: tuple[int, ...], most: int) -> int:
    """The smallest stride that leaves at most `most` elements and does not keep to some columns of a matrix."""
    step = max(1, -(-math.prod(shape) // most))
    if step == 1:
        return 1
    sizes = [size for size in shape if size > 1]
    while any(math.gcd(step, size) > 1 for size in sizes[-1:]):
        step += 1
    return step
