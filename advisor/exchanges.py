"""A choice close to the bound of a large knapsack: what a search by branch and bound starts from, or need not look for.

Prices tell by how much each item is worse than the best of its group; a choice's regret is the bound, plus that of its
items, plus what the rows have left at their prices. With prices a little higher there is a choice that keeps all rows.
From it, groups exchange their items a window at a time. A window holds some twenty groups, part of them those that
have an item next to no worse, part of them next in that order. Its groups are dealt into two halves, all combinations
of each half are listed, and of all pairs of them, 16 million, the best that keeps the two dearest rows is found by a
sweep along one row and a tree of least regrets over the other; so what limits leave is used up to a few millionths. Of
plans for time of 1,700 sites that takes a tenth of a second, and ends within 2e-5 of the range above the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from advisor.least_regret import Goal, Indices
from advisor.prices import Priced

Array = NDArray[np.float64]
# The items that some groups may exchange among: (group, its items, the one it has first).
Half = list[tuple[int, list[int]]]

# All ours. Combinations of half a window; how many of its items are next to no worse, the next number when no window
# with the one before betters the choice; all of its items; windows that are looked at in all, and once the choice is as
# good as any that matters; room that is kept for rounding, as a share of a row's; raises of the prices, and how close
# the last two are.
COMBINATIONS = 4096
NEXT_TO_NO_WORSE = (12, 18, 6)
ITEMS = 24
MOST_WINDOWS = 200
FEW_WINDOWS = 40
MARGIN = 1e-12
MOST_RAISES = 40
RAISES_APART = 1e-9


def near_best(goal: Goal, at: Priced, enough: float, known: Indices | None = None) -> Indices | None:
    """A choice that keeps the rows, or None where none is found; the same for the same goal, prices and known one.

    enough  what its regret may be above the bound for the search to end
    known   a choice that keeps the rows, to start from where prices show none
    """
    picked = _start(goal, at)
    if picked is None or (known is not None and goal.of(known) < goal.of(picked)):
        picked = known
    if picked is None:
        return None
    above = goal.of(picked) - at.bound
    order = np.argsort(at.reduced, kind="stable")
    order = order[: int(np.isfinite(at.reduced).sum())]
    table = at.table[np.argsort(-at.prices, kind="stable")]
    others = _others(order, at.reduced, picked, above)
    apart, left_to_try = goal.apart * goal.span, MOST_WINDOWS
    mix, place = 0, NEXT_TO_NO_WORSE[0]
    while left_to_try > 0 and above > enough:
        near = NEXT_TO_NO_WORSE[mix]
        window = [*others[:near], *others[place : place + ITEMS - near]]
        found = _exchanged(goal, table, picked, window) if window else None
        left_to_try = min(left_to_try, MOST_WINDOWS if above > apart else FEW_WINDOWS) - 1
        place += ITEMS - near
        left = above if found is None else goal.of(found) - at.bound
        if found is not None and left < above - at.slack and goal.is_kept_by(found):
            picked, above, mix = found, left, 0
            others = _others(order, at.reduced, picked, above)
            place = NEXT_TO_NO_WORSE[mix]
        elif place >= len(others):
            mix += 1
            if mix == len(NEXT_TO_NO_WORSE):
                break
            place = NEXT_TO_NO_WORSE[mix]
    return picked


def _start(goal: Goal, at: Priced) -> Indices | None:
    """The choice at the lowest raise of all prices that keeps the rows."""
    picked = goal.cheapest(at.reduced)
    if _keeps(at.table, picked):
        return picked if goal.is_kept_by(picked) else None
    raised = np.where(at.prices > 0, at.prices, at.prices.max(initial=0.0)) @ at.table
    best, low, high, more = None, 0.0, np.inf, 1e-6
    for _ in range(MOST_RAISES):
        picked = goal.cheapest(at.reduced + more * raised)
        if _keeps(at.table, picked) and goal.is_kept_by(picked):
            best, high = picked, more
        else:
            low = more
        if high - low < RAISES_APART:
            break
        more = (low + high) / 2 if np.isfinite(high) else 4 * more
    return best


def _keeps(table: Array, picked: Indices) -> bool:
    return bool((table[:, picked].sum(axis=1) <= 1.0 - MARGIN).all())


def _others(order: Indices, reduced: Array, picked: Indices, above: float) -> Indices:
    """The items that are not chosen, and by themselves not too bad to be in a better choice, the least bad first."""
    known = order[: int(np.searchsorted(reduced[order], above))]
    return np.asarray(known[~np.isin(known, picked)])


def _exchanged(goal: Goal, table: Array, picked: Indices, window: Sequence[np.intp]) -> Indices | None:
    """The best choice by exchanges among the window's items, or None where none keeps the rows."""
    halves = _dealt(goal.group_of, picked, window)
    (one_used, one), (other_used, other) = (_combinations(goal.regret, table, half) for half in halves)
    left = 1.0 - MARGIN - table[:, picked].sum(axis=1)
    falling, rising = np.argsort(-one_used[:, 0], kind="stable"), np.argsort(other_used[:, 0], kind="stable")
    left = np.pad(left, (0, one_used.shape[1] - len(left)))
    first, second = _best_pair(one_used[falling], one[falling], other_used[rising], other[rising], left)
    if first < 0:
        return None
    found = picked.copy()
    for half, number in zip(halves, (falling[first], rising[second]), strict=True):
        for group, items in half:
            number, item = divmod(int(number), len(items))
            found[group] = items[item]
    return found


def _dealt(group_of: Indices, picked: Indices, window: Sequence[np.intp]) -> tuple[Half, Half]:
    """The window's groups in two halves with about as many combinations, of at most COMBINATIONS each."""
    halves: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    counts = [1, 1]
    for item in window:
        group = int(group_of[item])
        side = next((side for side in (0, 1) if group in halves[side]), int(counts[0] > counts[1]))
        items = halves[side].get(group, [int(picked[group])])
        if counts[side] // len(items) * (len(items) + 1) > COMBINATIONS:
            break
        counts[side] = counts[side] // len(items) * (len(items) + 1)
        halves[side][group] = [*items, int(item)]
    return list(halves[0].items()), list(halves[1].items())


def _combinations(regret: Array, table: Array, half: Half) -> tuple[Array, Array]:
    """What every combination of a half changes: shares of the rows [combinations, at least 2], and regret.

    The first group's item changes fastest.
    """
    items = np.array([item for _, items in half for item in items], dtype=np.intp)
    sizes = np.array([len(items) for _, items in half], dtype=np.intp)
    first = np.repeat(np.array([items[0] for _, items in half], dtype=np.intp), sizes)
    changes = np.zeros((len(items), max(len(table), 2)))
    changes[:, : len(table)] = (table[:, items] - table[:, first]).T
    return _added_up(changes, regret[items] - regret[first], sizes)


@njit(cache=True, nogil=True)
def _added_up(changes, regrets, sizes):  # type: ignore[no-untyped-def]
    count = 1
    for size in sizes:
        count *= size
    used, regret = np.zeros((count, changes.shape[1])), np.zeros(count)
    have, at = 1, 0
    for size in sizes:
        for option in range(size - 1, -1, -1):
            for place in range(have):
                for row in range(changes.shape[1]):
                    used[option * have + place, row] = used[place, row] + changes[at + option, row]
                regret[option * have + place] = regret[place] + regrets[at + option]
        have *= size
        at += size
    return used, regret


@njit(cache=True, nogil=True)
def _best_pair(one_used, one, other_used, other, left):  # type: ignore[no-untyped-def]
    """Places of the pair of least regret that uses no more than is left, or -1; `one` falls in row 0, `other` rises.

    As `one` falls, more and more of `other` fit beside it in row 0. These stand in a tree over their order in row 1,
    which tells the best of all that fit there (Fenwick). Of further rows only the pair itself is looked at.
    """
    count = len(other)
    by_row = np.argsort(other_used[:, 1])
    keys = other_used[by_row, 1]
    place = np.empty(count, dtype=np.intp)
    for rank in range(count):
        place[by_row[rank]] = rank + 1
    tree = np.full(count + 1, -1, dtype=np.intp)
    least, first, second, have = np.inf, -1, -1, 0
    for number in range(len(one)):
        while have < count and other_used[have, 0] <= left[0] - one_used[number, 0]:
            at = place[have]
            while at <= count:
                if tree[at] < 0 or other[have] < other[tree[at]]:
                    tree[at] = have
                at += at & -at
            have += 1
        at = np.searchsorted(keys, left[1] - one_used[number, 1], side="right")
        while at > 0:
            known = tree[at]
            if known >= 0 and one[number] + other[known] < least:
                fits = True
                for row in range(2, len(left)):
                    fits = fits and one_used[number, row] + other_used[known, row] <= left[row]
                if fits:
                    least, first, second = one[number] + other[known], number, known
            at -= at & -at
    return first, second
