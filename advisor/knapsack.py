"""The multiple-choice knapsack, exact: one item from every group, goals in strict order, sums under limits.

Of every group one item is taken. The first goal's sum is made as large as the limits allow; among the choices that
reach it, the second goal's sum; and so on. A goal that is reached becomes a limit for the next ones: no more regret
(distance to the group's best item) than the choice that reached it. Each goal is a mixed-integer program (HiGHS
through scipy, zero gap). Four things make that fast and true.

A bound. Prices on the limits give each item a least regret that any choice with it must have (`prices.py`, computed
there and not taken from the solver). What it shows to be in no better choice than one that is known is left out; for
the next goals too, which accept no choice that is worse at this one.

A choice to begin with, a few millionths from that bound (`exchanges.py`). Where that is near enough HiGHS has nothing
to do; else the bound leaves it a core of some hundred items of 60,000. Where more are left it is given those that look
best by the prices, and then, while one of the others could be better, a larger core.

Whole steps. FLOPs and bytes are multiples of some number. In units of it the objective is whole, HiGHS rounds its
bounds up, and does not search through the many layers that are alike.

Exact checks of every answer (`branch_and_bound.py`): a limit is never exceeded.

What is left: choices whose regret differs by less than 1e-8 of it count as equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from advisor.branch_and_bound import least_within
from advisor.deviations import best_tied, listed
from advisor.exchanges import near_best
from advisor.least_regret import Goal, Indices, Row
from advisor.prices import Priced, priced
from advisor.pruning import undominated_of

Array = NDArray[np.float64]

# All ours. Part of a goal's regret by which two choices count as equal when the next goal is served.
TIE = 1e-8
# Items beyond one a group in the first core and the largest that is tried. What part of a search's nodes a knapsack
# with more items gets, and goals after the first, of the cores too. How near to the best is near enough there: for
# later goals a share of their range, for a first goal that is no whole number a share of its regret.
CORE_SIZE = 400
LARGEST_CORE = 3_200
LARGE_EFFORT = 0.5
LATER_EFFORT = 0.1
NEAR = 1e-6


@dataclass(frozen=True)
class Group:
    """The items of a group: `gains` [items, goals], larger is better; `costs` [items, limits], 0 or more."""

    gains: Array
    costs: Array

    def __post_init__(self) -> None:
        assert len(self.gains) == len(self.costs) > 0
        assert np.isfinite(self.gains).all()
        assert np.isfinite(self.costs).all()
        assert (self.costs >= 0).all()


@dataclass(frozen=True)
class Choice:
    """One item index for every group, and its exact sums.

    `proven`, goal by goal: no choice that leaves 4e-6 of every limit free is better (see `branch_and_bound.py`), where
    there are many items by more than NEAR of its regret where the first goal is not whole, and of their range for goals
    after it.
    `gap`: by how much the first goal may be better at most, 0 where that is proven.
    """

    items: tuple[int, ...]
    gains: tuple[float, ...]
    costs: tuple[float, ...]
    proven: tuple[bool, ...]
    gap: float = 0.0


def solve(groups: Sequence[Group], limits: Sequence[float], *, prune: bool = True) -> Choice | None:
    """The best choice, or None where no choice keeps the limits.

    `limits`: one number a cost, 0 or more. Goals are served in the order of the columns of `gains`. The same
    groups and limits give the same choice. `prune=False` keeps dominated items, for the test that they change nothing.
    """
    return Knapsack(groups, prune=prune).solve(limits)


class Knapsack:
    """Groups to be solved, perhaps for several limits. All groups' items stand in one array, group after group."""

    def __init__(self, groups: Sequence[Group], *, prune: bool = True) -> None:
        """`prune=False` keeps dominated items."""
        sizes = np.array([len(group.gains) for group in groups], dtype=np.intp)
        self._offsets = np.cumsum(sizes) - sizes
        if not groups:
            return
        gains = np.concatenate([group.gains for group in groups])
        costs = np.concatenate([group.costs for group in groups])
        group_of = np.repeat(np.arange(len(groups)), sizes)
        self._kept = np.arange(len(gains))
        if prune:
            self._kept = undominated_of(np.append(self._offsets, len(gains)), np.hstack([-gains, costs]).T)
        self._gains, self._costs, self._group_of = gains[self._kept], costs[self._kept], group_of[self._kept]
        self._starts = np.searchsorted(self._group_of, np.arange(len(groups)))

    def solve(self, limits: Sequence[float], *, apart: float = 0.0, known: Choice | None = None) -> Choice | None:
        """The best choice, or None where no choice keeps the limits.

        apart  goals that differ by less than this share of their range count as equal, where there are many items
        known  a choice of this knapsack under other limits, taken where it keeps these and is as good as any
        """
        if not len(self._offsets):
            return Choice((), (), tuple(0.0 for _ in limits), ())
        starts, group_of = self._starts, self._group_of
        rows = [Row(self._costs[:, column], group_of, float(limit)) for column, limit in enumerate(limits)]
        is_large = len(group_of) > len(starts) + CORE_SIZE
        open_items = self._everything
        picked = self._first(rows, known)
        proven: list[bool] = []
        gap = 0.0
        for column in range(self._gains.shape[1]):
            gains = self._gains[:, column]
            regret = np.maximum.reduceat(gains, starts)[group_of] - gains
            goal = Goal(regret, group_of, starts, rows, open_items, effort=LATER_EFFORT if column else 1.0)
            if is_large and column:
                goal = replace(goal, near=NEAR, apart=max(apart, NEAR))
            elif is_large:
                goal = replace(goal, effort=LARGE_EFFORT, near=0.0 if goal.step else NEAR, apart=apart)
            found = _least(goal, picked, is_large)
            picked = found.picked
            if picked is None:
                return None
            reached = goal.of(picked)
            if column == 0 and not found.is_proven:
                gap = max(0.0, reached - (found.at or priced(goal)).bound - found.reach)
            proven.append(found.is_proven and all(proven))
            rows.append(Row(regret, group_of, reached, slack=TIE))
            if found.at is None:
                continue
            open_items = open_items & found.at.within(reached * (1.0 + TIE))
            if column == 0 and not goal.step and not goal.apart:
                later = np.maximum.reduceat(self._gains[:, 1:], starts)[group_of] - self._gains[:, 1:]
                tied = best_tied(goal, found.at, reached * (1.0 + TIE), later)
                if tied is not None:
                    picked, proven = tied, proven * self._gains.shape[1]
                    break
        assert picked is not None
        return Choice(
            items=tuple((self._kept[picked] - self._offsets).tolist()),
            gains=tuple(math.fsum(column) for column in self._gains[picked].T),
            costs=tuple(math.fsum(column) for column in self._costs[picked].T),
            proven=tuple(proven),
            gap=gap,
        )

    def _first(self, rows: list[Row], known: Choice | None) -> Indices | None:
        """A choice that keeps the limits, to fall back upon: the known one, or every group's of least part of them."""
        if known is not None:
            picked = np.searchsorted(self._kept, self._offsets + np.array(known.items, dtype=np.intp))
            if not any(row.broken_by(picked) for row in rows):
                return picked
        if not rows:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = sum(np.nan_to_num(row.costs / row.limit, nan=0.0, posinf=np.inf) for row in rows)
        goal = Goal(np.asarray(parts, dtype=np.float64), self._group_of, self._starts, rows, self._everything)
        picked = goal.cheapest(goal.regret)
        return picked if goal.is_kept_by(picked) else None

    @property
    def _everything(self) -> NDArray[np.bool_]:
        return np.ones(len(self._group_of), dtype=bool)


@dataclass(frozen=True)
class _Found:
    """`picked`: None where no choice keeps the rows; `at`: the prices, if there are any; `reach`: no choice is better
    than the picked one and closer than this to their bound."""

    picked: Indices | None
    is_proven: bool
    at: Priced | None = None
    reach: float = 0.0


def _least(goal: Goal, fallback: Indices | None, is_large: bool) -> _Found:
    """The choice of least regret.

    `fallback`: a choice known to keep the rows. By the prices of the linear relaxation every choice with a certain item
    has at least a certain regret (Lagrange's bound). Where the choices close to the bound are too many to be listed,
    the program is solved over a core of items that look good; where the core's best is below what another item must
    cost, that is the best of all, and otherwise a core with every item that could be better is solved.
    """
    if fallback is not None and goal.of(fallback) == 0.0:
        return _Found(fallback, True)
    if not is_large:
        return _Found(*least_within(goal, goal.open, fallback))
    at = priced(goal)
    if not np.isfinite(np.minimum.reduceat(at.reduced, goal.starts)).all():
        return _Found(None, True, at)

    def rest(choice: Indices) -> float:
        """What an item may add to the bound and be in a choice that is better by a step, and by what matters."""
        regret = goal.of(choice)
        return regret - max(goal.step, goal.no_matter(regret)) - at.bound + at.slack

    reached = 0.0
    if fallback is None or rest(fallback) >= 0:
        found = near_best(goal, at, max(NEAR * at.bound, goal.step - 2 * at.slack), fallback)
        fallback = fallback if found is None else found
    # Listed, a goal that is no whole number is known exactly, and not only within what is near enough.
    is_exact = not goal.step and not goal.apart
    if fallback is not None and (is_exact or rest(fallback) >= 0):
        list_of = listed(goal, at, goal.of(fallback) - at.bound if is_exact else rest(fallback))
        if list_of.picked is not None or list_of.reach >= rest(fallback):
            return _Found(fallback if list_of.picked is None else list_of.picked, True, at)
        reached = list_of.reach
    finite = np.sort(at.reduced[np.isfinite(at.reduced)])
    extra = CORE_SIZE
    while fallback is None or rest(fallback) >= 0:
        reach = float(finite[min(len(goal.starts) + extra, len(finite)) - 1])
        if fallback is not None:
            reach = min(reach, rest(fallback))
        fallback, proven = least_within(goal, at.reduced <= reach, fallback)
        if reach >= finite[-1] or (fallback is not None and rest(fallback) <= reach):
            return _Found(fallback, proven or (fallback is not None and rest(fallback) < 0), at, reached)
        if extra >= LARGEST_CORE * min(1.0, goal.effort / LARGE_EFFORT):
            return _Found(fallback, False, at, reached)
        extra = min(4 * extra, LARGEST_CORE)
    return _Found(fallback, True, at)
