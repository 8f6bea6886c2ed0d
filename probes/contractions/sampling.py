"""A few rows and columns of a product, whole.

An error relative to the product's magnitudes shrinks as the inner dimension grows, so that dimension is never cut:
where it is long, fewer rows and columns are taken.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from probes.contractions.contraction import Contraction

ENTRIES = 4  # of a batch of products: how many are looked at
ELEMENTS = 256  # of each entry's result: 16 rows by 16 columns where there are as many
NUMBERS = 1 << 17  # of each operand at most, but for FEWEST rows
FEWEST = 4  # rows and columns, however long they are


def sampled(contraction: Contraction, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """[entries, rows, inner] and [entries, columns, inner], float32: some rows and columns of some batch entries."""
    left, right = contraction.factors
    (batch, rows, inner), columns = left.sizes, right.sizes[1]
    entries = min(batch, ENTRIES, max(1, NUMBERS // (inner * math.isqrt(ELEMENTS))))
    most = max(FEWEST, NUMBERS // (entries * inner))
    few_columns = min(columns, math.isqrt(ELEMENTS), most)
    few_rows = min(rows, ELEMENTS // few_columns, most)
    few_columns = min(columns, ELEMENTS // few_rows, most)
    chosen = some(batch, entries, generator)
    return (
        left.gathered(chosen, some(rows, few_rows, generator)),
        right.gathered(chosen, some(columns, few_columns, generator)),
    )


def some(size: int, count: int, generator: np.random.Generator) -> list[int]:
    """Different indices below `size`, in order; all of them where there are no more.

    At random, because a fixed stride would often meet the same place of every sequence.
    """
    if count >= size:
        return list(range(size))
    return sorted(generator.choice(size, count, replace=False, shuffle=False).tolist())
