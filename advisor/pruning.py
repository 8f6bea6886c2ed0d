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
    order = np.lexsort((*reversed(table.T), group_of))
    return np.sort(order[_kept(table[order], group_of[order])])


@njit(cache=True, nogil=True)
def _kept(table, group_of):  # type: ignore[no-untyped-def]
    """Places of the undominated rows of a table in rising lexicographic order: only earlier ones can dominate one."""
    count, columns = table.shape
    kept = np.empty(count, dtype=np.intp)
    found, first = 0, 0
    for row in range(count):
        if row and group_of[row] != group_of[row - 1]:
            first = found
        beaten = False
        for place in range(first, found):
            other = kept[place]
            beaten = True
            for column in range(columns):
                if table[other, column] > table[row, column]:
                    beaten = False
                    break
            if beaten:
                break
        if not beaten:
            kept[found] = row
            found += 1
    return kept[:found]
