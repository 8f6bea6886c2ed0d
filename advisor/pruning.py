"""Which items of a group no other equals or beats in everything: what a knapsack need not look at again."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float64]


def undominated(gains: Array, costs: Array) -> NDArray[np.intp]:
    """Indices of the items that no other equals or beats in every gain and every cost, ascending.

    `gains` [items, goals], larger is better; `costs` [items, limits], smaller is; all finite. Of items alike in
    everything, the first stays. Leaving the others out cannot lower what a choice reaches, because exchanging an item
    for the one that dominates it raises no cost and lowers no gain.
    """
    return undominated_of(np.zeros(len(gains), dtype=np.intp), gains, costs)


def undominated_of(group_of: NDArray[np.intp], gains: Array, costs: Array) -> NDArray[np.intp]:
    """The same for many groups at once: those that no other item of their own group equals or beats.

    `group_of` [items], ascending.
    """
    table = np.ascontiguousarray(np.hstack([-gains, costs]), dtype=np.float64)
    if not len(table):
        return np.zeros(0, dtype=np.intp)
    least = table.min(axis=0)
    span = table.max(axis=0) - least
    # An item that dominates another has no larger sum: subtraction, division and addition round monotonically.
    sums = ((table - least) / np.where(span > 0, span, 1.0)).sum(axis=1)
    order = np.lexsort((sums, group_of)) if group_of[0] < group_of[-1] else np.argsort(sums, kind="stable")
    return np.sort(order[_kept(table[order], sums[order], group_of[order])])


@njit(cache=True, nogil=True)
def _kept(table, sums, group_of):  # type: ignore[no-untyped-def]
    """Places of the undominated rows of a table whose groups follow each other, each by rising sums.

    A row is dominated by one before it, or by one after it of the same sum.
    """
    kept = np.empty(len(table), dtype=np.intp)
    found, first = 0, 0
    for row in range(len(table)):
        if row and group_of[row] != group_of[row - 1]:
            first = found
        beaten = False
        for place in range(first, found):
            if _equals_or_beats(table, kept[place], row):
                beaten = True
                break
        if beaten:
            continue
        tied = found
        while tied > first and sums[kept[tied - 1]] == sums[row]:
            tied -= 1
        last, found = found, tied
        for place in range(tied, last):
            if not _equals_or_beats(table, row, kept[place]):
                kept[found] = kept[place]
                found += 1
        kept[found] = row
        found += 1
    return kept[:found]


@njit(cache=True, nogil=True)
def _equals_or_beats(table, one, other):  # type: ignore[no-untyped-def]
    for column in range(table.shape[1]):
        if table[one, column] > table[other, column]:
            return False
    return True
