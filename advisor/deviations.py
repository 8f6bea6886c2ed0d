"""The best of all choices close to a bound, by listing them: what proves a large knapsack's answer.

Prices say by how much each item is worse than the best of its group, and what the rows have left costs at these prices.
A choice's regret is the bound, plus both. So a choice within some reach of the bound deviates from the groups' best
only by items that together are no worse than the reach, and leaves of each row no more than the reach over its price.
Of plans for time of 1,700 sites the best are a few millionths of the range above the bound, and 50 to 300 items of
60,000 are not worse than that.

The groups that have such items are put in order of how much they change. Sets of items are listed from either end: of
those that change little, as far as they are few; and of all others, where a set is given up once it is too bad by the
bound at any of some dozen prices, which the groups that remain, smaller and smaller, can less and less put right. Then
each of the second list is held against those of the first that leave next to nothing of the dearest row. What is found
is the best of all; where nothing is, every choice is beyond the reach, which grows until one of the two is known or the
lists are too long. The same lists hold all choices that tie at a goal, so that later goals are settled by them too.

For five seeds of two kinds of models (`benchmarks/plan_speed.py`) all goals of a plan for time are proven in 0.02 to
1.5 s. HiGHS took 0.5 to 10, and did not come to an end on some.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from advisor.least_regret import Goal, Indices
from advisor.prices import Priced

Array = NDArray[np.float64]

# All ours. Items in the first reach, and by how much their number grows until many sets are tried and from then on.
FIRST_ITEMS = 24
GROWTH = 1.3
MANY_TRIED = 100_000
LATER_GROWTH = 1.1
# The most sets of the groups that change little, and of the others; items that a set of either can be of; sets that are
# tried in one list, at an effort of 1; pairs of sets that are looked at. Lists are looked through at every third group.
FEW_SETS = 1 << 14
MOST_SETS = 1 << 21
MOST_ITEMS = 320
MOST_TRIED = 40_000_000
MOST_PAIRS = 200_000_000
LOOKED_THROUGH = 3
# The most pairs that are kept: where all are asked for, or so close to a row's limit, as a share of it, that only exact
# sums tell on which side of it they are.
MOST_FOUND = 1 << 14
AT_LIMIT = 1e-11
# What prices are multiplied by for further bounds; rounding of these, as a share of the range; what is divided by
# instead of 0.
MOVES = (1.0, 0.6, 0.85, 0.95, 1.05, 1.17, 1.6)
ROUNDING = 1e-13
SMALLEST = 1e-300


@dataclass(frozen=True)
class Listed:
    """`picked`: the choice of least regret, None where none was found; `reach`: every other choice's regret is at
    least so much above the bound, or no less than the picked one's."""

    picked: Indices | None
    reach: float


def listed(goal: Goal, at: Priced, most: float) -> Listed:
    """The best of all choices that keep the rows, of a regret up to `most` above the bound, as far as lists go.

    The same for the same goal and prices.
    """
    base = goal.cheapest(at.reduced)
    if not len(at.table):
        return Listed(base if goal.is_kept_by(base) else None, 0.0)
    order = np.sort(at.reduced[_deviating(at, base, most)])
    done, count = 0.0, float(FIRST_ITEMS)
    while True:
        reach = float(order[int(count)]) if count < len(order) else most
        if reach > done or reach >= most:
            lists = _lists(goal, at, base, reach)
            pairs = None if lists is None else lists.pairs(every=False)
            if lists is None or pairs is None:
                return Listed(None, done)
            found = _best_of(goal, lists, pairs)
            if found is not None or reach >= most:
                return Listed(found, reach)
            done = reach
            count *= GROWTH if lists.tried < MANY_TRIED else LATER_GROWTH
        else:
            count *= GROWTH


def best_tied(goal: Goal, at: Priced, most: float, later: Array) -> Indices | None:
    """Of all choices that keep the rows with a regret up to `most`, the best at later goals; None if too many to list.

    `later` [items, goals]: regrets of these, in order.
    """
    base = goal.cheapest(at.reduced)
    lists = _lists(goal, at, base, most - at.bound) if len(at.table) else None
    pairs = None if lists is None else lists.pairs(every=True)
    if lists is None or pairs is None:
        return None
    used = lists.items_of(pairs)
    sums = used @ (later[lists.items] - later[base[goal.group_of[lists.items]]])
    for number in np.lexsort(sums.T[::-1]):
        choice = lists.choice(goal, used[number])
        if goal.of(choice) <= most and goal.is_kept_by(choice):
            return choice
    return None


@dataclass(frozen=True)
class _Lists:
    """The sets of items that a choice within a reach can have: of groups that change little, and of the others.

    items   those of the others, then those of the few; a choice has the items of a set of each, and else `base`'s
    few     what the sets are worse by, what they use of the rows, their regret, and their items as bits
    left    of each row, beside the base; the dearest row is the first
    most    regret above the base's
    tried   sets, until these were known
    """

    base: Indices
    items: Indices
    cut: int
    few: list[Any]
    others: list[Any]
    left: Array
    prices: Array
    reach: float
    most: float
    tried: int

    def pairs(self, *, every: bool) -> NDArray[np.int64] | None:
        """Pairs of sets, of the others and of the few, whose choice is within the reach; None where they are too many.

        `every`: all of them; otherwise those alone of which one is the best.
        """
        if not len(self.few[0]) or not len(self.others[0]):
            return np.zeros((0, 2), dtype=np.int64)
        share = self.few[1][:, 0]
        width = max(self.reach / max(self.prices[0], SMALLEST), np.ptp(share) / len(share), SMALLEST)
        cell = np.floor((share - share.min()) / width)
        order = np.lexsort((self.few[0], cell))
        begins = np.searchsorted(cell[order], np.arange(cell.max() + 2))
        few = [values[order] for values in self.few[:3]]
        within = begins, width, self.left, self.prices, self.reach, self.most
        arguments: tuple[Any, ...] = (*self.others[:3], *few, *within, every)
        found, is_whole = _pairs(*arguments)
        found[:, 1] = order[found[:, 1]]
        return found if is_whole else None

    def items_of(self, pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which items each pair has, [pairs, items]."""
        sides = [
            np.unpackbits(side[3][pairs[:, column]].view(np.uint8), axis=1, bitorder="little")
            for column, side in enumerate((self.others, self.few))
        ]
        few = sides[1][:, : len(self.items) - self.cut]
        return np.hstack([sides[0][:, : self.cut], few[:, ::-1]]).astype(bool)

    def choice(self, goal: Goal, used: NDArray[np.bool_]) -> Indices:
        """The choice that has these items."""
        found = self.base.copy()
        chosen = self.items[used]
        found[goal.group_of[chosen]] = chosen
        return found


def _best_of(goal: Goal, lists: _Lists, pairs: NDArray[np.int64]) -> Indices | None:
    """The pairs' choice of least regret that keeps the rows, the first of several."""
    best: Indices | None = None
    for used in lists.items_of(pairs):
        choice = lists.choice(goal, used)
        if (best is None or goal.of(choice) < goal.of(best)) and goal.is_kept_by(choice):
            best = choice
    return best


def _deviating(at: Priced, base: Indices, reach: float) -> Indices:
    """The items that a choice within the reach can have beside the base's."""
    found = at.reduced <= reach
    found[base] = False
    return np.flatnonzero(found)


def _lists(goal: Goal, at: Priced, base: Indices, reach: float) -> _Lists | None:
    """The sets of items for choices within the reach of the bound, or None where they are too many."""
    reach += at.slack + AT_LIMIT * float(at.prices.sum())
    by_price = np.argsort(-at.prices, kind="stable")
    prices, table = at.prices[by_price], at.table[by_price]
    items = _deviating(at, base, reach)
    changes = np.abs(table[prices > 0][:, items] - table[prices > 0][:, base[goal.group_of[items]]])
    items = _by_size(
        goal.group_of, items, (changes / np.maximum(changes.sum(axis=1, keepdims=True), SMALLEST)).sum(axis=0)
    )
    group_of = goal.group_of[items]
    firsts = base[group_of]
    used = np.ascontiguousarray((table[:, items] - table[:, firsts]).T)
    regret, worse = goal.regret[items] - goal.regret[firsts], at.reduced[items]
    left, most = 1.0 - table[:, base].sum(axis=1), at.bound + reach - goal.of(base)
    # At moved prices: the least that the items of each group can add to a bound, and what all may add.
    moves = itertools.product(*[MOVES] * min(2, len(prices)), *[(1.0,)] * (len(prices) - 2))
    moved = prices * np.array(list(moves))
    place = np.cumsum(np.diff(group_of, prepend=-1) != 0) - 1
    least = np.zeros((len(np.unique(place)), len(moved)))
    np.minimum.at(least, place, regret[:, None] + used @ moved.T)
    allowed = most + moved @ (left + AT_LIMIT) + ROUNDING * goal.span
    bounds = reach, np.ascontiguousarray(moved.T), least, allowed, least.sum(axis=0)
    effort = int(MOST_TRIED * goal.effort)
    # From the end those that change little, as far as the sets are few; from the beginning the others.
    of, loss, use, cost = (np.ascontiguousarray(part[::-1]) for part in (place, worse, used, regret))
    *few, seen, tried, _ = _sets(of, loss, use, cost, *bounds, FEW_SETS, effort)
    cut = len(items) - seen
    if cut > MOST_ITEMS:
        return None
    *others, _, more, is_whole = _sets(place[:cut], worse[:cut], used[:cut], regret[:cut], *bounds, MOST_SETS, effort)
    if not is_whole:
        return None
    return _Lists(base, items, cut, few, others, left, prices, reach, most, tried + more)


def _by_size(group_of: Indices, items: Indices, sizes: Array) -> Indices:
    """The items group by group, those first that can change most.

    By the share of a row's changes, for a row that is cheap and changes much must be decided as early as a dear one:
    with sizes by price 20 times as many sets were tried.
    """
    groups, place = np.unique(group_of[items], return_inverse=True)
    largest = np.zeros(len(groups))
    np.maximum.at(largest, place, sizes)
    return items[np.lexsort((items, groups[place], -largest[place]))]


@njit(cache=True, nogil=True)
def _sets(group_of, worse, used, regret, reach, moved, least, allowed, rest, most, effort):  # type: ignore[no-untyped-def]
    """The sets of items, one a group at most, that can be part of a choice within the reach.

    What each is worse by, what it uses of the rows [sets, rows], its regret, and its items as bits; how many of the
    items were looked at before there were more than `most` sets, or more than `effort` tried; how many were tried; and
    whether those are all. Items of a group stand together. `rest`: what all groups, of both lists, can add to each
    bound at least.
    """
    rows, values = used.shape[1], np.empty(moved.shape[1])
    rest = rest - allowed
    sum_worse, sum_used, sum_regret = np.empty(most), np.empty((most, rows)), np.empty(most)
    bits = np.empty((most, MOST_ITEMS // 64), dtype=np.uint64)
    sum_worse[0], sum_used[0], sum_regret[0], bits[0] = 0.0, 0.0, 0.0, 0
    have, start, number, tried = 1, 0, 0, 0
    while start < len(group_of):
        end = start + 1
        while end < len(group_of) and group_of[end] == group_of[start]:
            end += 1
        if end > MOST_ITEMS:
            return sum_worse[:have], sum_used[:have], sum_regret[:have], bits[:have], start, tried, False
        left = rest - least[group_of[start]]
        known = have
        for new in range(start, end):
            for place in range(known):
                if sum_worse[place] + worse[new] > reach:
                    continue
                tried += 1
                if have == most or tried > effort:
                    return sum_worse[:known], sum_used[:known], sum_regret[:known], bits[:known], start, tried, False
                for row in range(rows):
                    sum_used[have, row] = sum_used[place, row] + used[new, row]
                sum_regret[have] = sum_regret[place] + regret[new]
                if _is_over(sum_regret[have], sum_used[have], moved, left, values):
                    continue
                sum_worse[have] = sum_worse[place] + worse[new]
                for word in range(bits.shape[1]):
                    bits[have, word] = bits[place, word]
                bits[have, new // 64] |= np.uint64(1) << np.uint64(new % 64)
                have += 1
        rest = left
        start, number = end, number + 1
        if number % LOOKED_THROUGH and start < len(group_of):
            continue
        # Without items of the last groups some sets can no longer be made good.
        kept = 0
        for place in range(have):
            tried += 1
            if _is_over(sum_regret[place], sum_used[place], moved, rest, values):
                continue
            if kept < place:
                sum_worse[kept], sum_regret[kept] = sum_worse[place], sum_regret[place]
                for row in range(rows):
                    sum_used[kept, row] = sum_used[place, row]
                for word in range(bits.shape[1]):
                    bits[kept, word] = bits[place, word]
            kept += 1
        have = kept
    return sum_worse[:have], sum_used[:have], sum_regret[:have], bits[:have], len(group_of), tried, True


@njit(cache=True, nogil=True)
def _is_over(regret, used, moved, taken, values):  # type: ignore[no-untyped-def]
    """Whether a set breaks a bound. `taken` is what is left of each, `values` scratch; loops that processors widen."""
    for bound in range(len(values)):
        values[bound] = regret + taken[bound]
    for row in range(len(used)):
        for bound in range(len(values)):
            values[bound] += moved[row, bound] * used[row]
    over = 0
    for bound in range(len(values)):
        over += values[bound] > 0.0
    return over > 0


@njit(cache=True, nogil=True)
def _pairs(  # type: ignore[no-untyped-def]
    one_worse, one_used, one, other_worse, other_used, other, begins, width, left, prices, reach, most, every
):
    """Pairs of sets within the rows, the reach and the most regret [pairs, 2]; and whether all were looked at.

    Not `every`: the one of least regret, of equals the first, and those no worse that are so close to a row's limit
    that only exact sums tell. `other` stands in cells of row 0, `width` wide; of a cell the least bad come first, and
    `begins` says where it does.
    """
    found, regrets, have = np.empty((MOST_FOUND, 2), dtype=np.int64), np.empty(MOST_FOUND), 0
    lowest = np.inf
    for place in range(len(other)):
        lowest = min(lowest, other_used[place, 0])
    first, second, looked = -1, -1, 0
    for a in range(len(one)):
        spare = reach - one_worse[a]
        top = left[0] - one_used[a, 0] + AT_LIMIT
        low = top - 2 * AT_LIMIT - spare / prices[0] if prices[0] > 0 else -np.inf
        high_cell = min(np.floor((top - lowest) / width) + 1, len(begins) - 2.0)
        low_cell = max(np.floor((low - lowest) / width) - 1, 0.0)
        if high_cell < low_cell:
            continue
        for cell in range(int(low_cell), int(high_cell) + 1):
            for b in range(begins[cell], begins[cell + 1]):
                if other_worse[b] > spare:
                    break
                looked += 1
                if one[a] + other[b] > most or (not every and first >= 0 and one[a] + other[b] >= most):
                    continue
                fits, is_close = True, every
                for row in range(len(left)):
                    over = one_used[a, row] + other_used[b, row] - left[row]
                    fits = fits and over <= AT_LIMIT
                    is_close = is_close or over > -AT_LIMIT
                if not fits:
                    continue
                if not is_close:
                    most, first, second = one[a] + other[b], a, b
                elif have == MOST_FOUND:
                    return found[:0], False
                else:
                    found[have, 0], found[have, 1], regrets[have] = a, b, one[a] + other[b]
                    have += 1
        if looked > MOST_PAIRS:
            return found[:0], False
    kept = 0
    for place in range(have):
        if regrets[place] <= most:
            found[kept, 0], found[kept, 1] = found[place, 0], found[place, 1]
            kept += 1
    if first >= 0 and kept < MOST_FOUND:
        found[kept, 0], found[kept, 1] = first, second
        kept += 1
    return found[:kept], first < 0 or kept > 0
