"""Which items of a group no other equals or beats in everything: what a knapsack need not look at again."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float64]


def undominated(measures: Array) -> NDArray[np.intp]:
    """Indices of the items that no other equals or beats in every measure, ascending.

    `measures` [measures, items], smaller is better, all finite. Of items alike in everything, the first stays. Leaving
    the others out cannot lower what a choice reaches, because exchanging an item for the one that dominates it makes
    no measure larger.
    """
    return undominated_of(np.array([0, measures.shape[1]], dtype=np.intp), measures)


def undominated_of(starts: NDArray[np.intp], measures: Array) -> NDArray[np.intp]:
    """The same for many groups at once: those that no other item of their own group equals or beats.

    `starts` [groups + 1]: where each group's items begin, and where the last one's end.
    """
    kept: NDArray[np.bool_] = _kept(np.asarray(starts, dtype=np.intp), np.ascontiguousarray(measures))
    return np.flatnonzero(kept)


@njit(cache=True, nogil=True)
def _kept(starts, measures):  # type: ignore[no-untyped-def]
    """Which items are undominated."""
    columns, count = measures.shape
    is_kept = np.zeros(count, dtype=np.bool_)
    step_of, order = np.empty(count, dtype=np.intp), np.empty(count, dtype=np.intp)
    kept = np.empty(count, dtype=np.intp)
    sums, rows = np.empty(count), np.empty((count, columns))
    for group in range(len(starts) - 1):
        of_group = measures[:, starts[group] : starts[group + 1]]
        _by_steps(of_group, sums, step_of, order)
        for number in range(_sweep(of_group, step_of, order, rows, kept)):
            is_kept[starts[group] + kept[number]] = True
    return is_kept


@njit(cache=True, nogil=True)
def _by_steps(measures, sums, step_of, order):  # type: ignore[no-untyped-def]
    """Put a group's items in order, into `order`, and say which step each is in.

    They go by the rising sum of what they are above the group's least, measure by measure, in so many steps that a step
    has few items. All that is done to get there rounds monotonically, so one that dominates another is in no later
    step.
    """
    columns, size = measures.shape
    sums[:size] = 0.0
    for column in range(columns if size else 0):
        least = most = measures[column, 0]
        for item in range(size):
            least, most = min(least, measures[column, item]), max(most, measures[column, item])
        if most > least:
            for item in range(size):
                sums[item] += (measures[column, item] - least) / (most - least)
    largest = 0.0
    for item in range(size):
        largest = max(largest, sums[item])
    begins = np.zeros(size + 1, dtype=np.intp)
    for item in range(size):
        step_of[item] = 0 if largest == 0.0 else int(sums[item] / largest * (size - 1))
        begins[step_of[item] + 1] += 1
    for step in range(size):
        begins[step + 1] += begins[step]
    for item in range(size):
        order[begins[step_of[item]]] = item
        begins[step_of[item]] += 1


@njit(cache=True, nogil=True)
def _sweep(measures, step_of, order, rows, kept):  # type: ignore[no-untyped-def]
    """Write a group's undominated items into `kept`, their measures into `rows`, and return how many there are."""
    columns, size = measures.shape
    have = 0
    for number in range(size):
        item = order[number]
        for column in range(columns):
            rows[have, column] = measures[column, item]
        beaten = False
        for other in range(have):
            if _equals_or_beats(rows, other, have):
                beaten = True
                break
        if beaten:
            continue
        # One of the same step may be dominated by one that comes later in it.
        same = have
        while same > 0 and step_of[kept[same - 1]] == step_of[item]:
            same -= 1
        left = same
        for other in range(same, have):
            if not _equals_or_beats(rows, have, other):
                _put(rows, left, other)
                kept[left] = kept[other]
                left += 1
        _put(rows, left, have)
        kept[left] = item
        have = left + 1
    return have


@njit(cache=True, nogil=True)
def _put(rows, to, row):  # type: ignore[no-untyped-def]
    """Copy a row. Numba 0.68 compiles `rows[to] = rows[row]` for seconds, for what it would say if sizes differed."""
    for column in range(rows.shape[1]):
        rows[to, column] = rows[row, column]


@njit(cache=True, nogil=True)
def _equals_or_beats(rows, one, other):  # type: ignore[no-untyped-def]
    for column in range(rows.shape[1]):  # noqa: SIM110 - numba compiles no all() of a generator
        if rows[one, column] > rows[other, column]:
            return False
    return True
