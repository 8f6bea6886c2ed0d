"""The multiple-choice knapsack, exact: one item from every group, goals in strict order, sums under limits.

Of every group one item is taken. The first goal's sum is made as large as the limits allow; among the choices that
reach it, the second goal's sum; and so on. A goal that is reached becomes a limit for the next ones: no more regret
(distance to the group's best item) than the choice that reached it. Each goal is a mixed-integer program (HiGHS
through scipy, zero gap). Three things make that fast and true.

A core. Prices on the limits give each item a least regret that any choice with it must have (Lagrange's bound,
computed here and not taken from the solver). HiGHS is given the items that look best by these prices; whatever it
leaves out is shown to be in no better choice, or comes into the next, larger core. 1,600 groups of about 15 items: 3
s; without the core HiGHS had not finished after 9 minutes.

Whole steps. FLOPs and bytes are multiples of some number. In units of it the objective is whole, HiGHS rounds its
bounds up, and does not search through the many layers that are alike.

Exact checks. HiGHS holds a row to an absolute 1e-6 and stops at an absolute gap of 1e-6, and scipy 1.17 exposes
neither; damages run from 1e-9 to 1e-1. So each row is scaled to what the limit leaves, each objective to its range,
and the sums of every answer are checked exactly (`math.fsum`, rounded once). An answer that breaks a limit is cut off
by a cover inequality, which no permitted choice breaks, and the program is solved again; after several such answers
the limits are tightened by 4e-6, so that a choice closer to a limit than that may be missed. A limit is never
exceeded.

What is left: choices whose regret differs by less than 1e-8 of it count as equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from advisor.errors import AdvisorError
from advisor.pruning import undominated

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

# All ours. A row reads "sum ≤ ROW_SCALE", so HiGHS's absolute 1e-6 is 1e-9 of the limit; an objective spans
# OBJECTIVE_SCALE, so its absolute gap of 1e-6 is 1e-12 of the range. With larger ones its arithmetic suffers.
ROW_SCALE = 1024.0
OBJECTIVE_SCALE = 1e6
# Answers that may be cut off one by one; after them the limits are tightened to this share, which is more than HiGHS
# errs by (a variable may be 1e-6 from whole).
MOST_CUTS = 8
TIGHTENED = 1.0 - 4e-6
# Part of a goal's regret by which two choices count as equal when the next goal is served.
TIE = 1e-8
# Items beyond one a group in the first core and in the largest that is tried; nodes of one search, and nodes times
# items, of which goals after the first get a part; how near to the best is near enough for these and for goals that are
# no whole numbers, as a share of their range; rounding of the bound, as a share of the range.
CORE_SIZE = 400
LARGEST_CORE = 3_200
MOST_NODES = 200_000
FEWEST_NODES = 20
MOST_WORK = 2_000_000
LATER_EFFORT = 0.1
NEAR = 1e-6
BOUND_SLACK = 1e-12
# Rounding of a sum, as a share of its limit.
ROUNDING = 1e-13
# The search for prices: its longest, where it ends, and the highest price (regret's range over a row's limit).
MOST_PLANES = 40
PRICE_GAP = 1e-8
HIGHEST_PRICE = 1e4


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

    `proven`, goal by goal: no choice that leaves 4e-6 of every limit free is better (see the module), where there are
    many items by more than NEAR of the range of goals after the first and of those that are not whole. `gap`: by how
    much the first goal may be better at most, 0 where that is proven.
    """

    items: tuple[int, ...]
    gains: tuple[float, ...]
    costs: tuple[float, ...]
    proven: tuple[bool, ...]
    gap: float = 0.0


def solve(groups: Sequence[Group], limits: Sequence[float], *, prune: bool = True, apart: float = 0.0) -> Choice | None:
    """The best choice, or None where no choice keeps the limits.

    `limits`: one number a cost, 0 or more. Goals are served in the order of the columns of `gains`. The same
    groups and limits give the same choice. `apart`: goals that differ by less than this share of their range count as
    equal, where there are many items. `prune=False` keeps dominated items, for the test that they change nothing.
    """
    if not groups:
        return Choice((), (), tuple(0.0 for _ in limits), ())
    kept = [undominated(group.gains, group.costs) if prune else np.arange(len(group.gains)) for group in groups]
    gains = np.concatenate([group.gains[index] for group, index in zip(groups, kept, strict=True)])
    costs = np.concatenate([group.costs[index] for group, index in zip(groups, kept, strict=True)])
    starts = np.cumsum([0] + [len(index) for index in kept[:-1]])
    group_of = np.repeat(np.arange(len(kept)), [len(index) for index in kept])
    rows = [_Row(costs[:, column], group_of, float(limit)) for column, limit in enumerate(limits)]
    picked = _frugal(rows, starts)
    proven: list[bool] = []
    gap = 0.0
    for goal in range(gains.shape[1]):
        regret = np.maximum.reduceat(gains[:, goal], starts)[group_of] - gains[:, goal]
        exact = goal == 0 and _step(regret) > 0
        effort, near = 1.0 if goal == 0 else LATER_EFFORT, apart if exact else max(apart, NEAR)
        task = _Task(regret, group_of, starts, rows, effort, near)
        picked, finished = _least(task, picked)
        if picked is None:
            return None
        if goal == 0 and not finished:
            gap = max(0.0, math.fsum(regret[picked]) - _priced(task)[0])
        proven.append(finished and all(proven))
        rows.append(_Row(regret, group_of, math.fsum(regret[picked]), slack=TIE))
    assert picked is not None
    return Choice(
        items=tuple(int(index[item]) for index, item in zip(kept, picked - starts, strict=True)),
        gains=tuple(math.fsum(column) for column in gains[picked].T),
        costs=tuple(math.fsum(column) for column in costs[picked].T),
        proven=tuple(proven),
        gap=gap,
    )


def _frugal(rows: list[_Row], starts: Indices) -> Indices | None:
    """Every group's item of least part of the limits, if these keep them: a choice to fall back upon."""
    if not rows:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = sum(np.nan_to_num(row.costs / row.limit, nan=0.0, posinf=np.inf) for row in rows)
    task = _Task(np.asarray(parts, dtype=np.float64), rows[0].group_of, starts, rows)
    picked = task.cheapest(task.regret)
    return None if any(row.broken_by(picked) for row in rows) else picked


# Below, all groups' items stand in one array, group after group; a choice is the index of one item of every group.


@dataclass(frozen=True)
class _Row:
    """The chosen `costs` add up to `limit` at most; of a cut's items, no permitted choice takes more than it says."""

    costs: Array
    group_of: Indices
    limit: float
    slack: float = 0.0
    cuts: list[tuple[NDArray[np.bool_], int]] = field(default_factory=list)

    def broken_by(self, picked: Indices) -> bool:
        return math.fsum(self.costs[picked]) > self.limit * (1.0 + self.slack)

    def cut_off(self, picked: Indices) -> None:
        """Adds the cover inequality of a choice that breaks the row: few of its items that break it alone.

        Large items come first; then every set of as many items, each as costly as the one it stands for or
        more costly than all of them, breaks the row too, and goes with it.
        """
        costs = self.costs[picked]
        cover: list[int] = []
        for group in np.argsort(-costs, kind="stable"):
            cover.append(int(group))
            if math.fsum(costs[cover]) > self.limit * (1.0 + self.slack):
                break
        floor = np.full(len(picked), costs[cover].max())
        floor[cover] = costs[cover]
        self.cuts.append((self.costs >= floor[self.group_of], len(cover) - 1))
        # Items that are nearly alike: any so many of them, each above its even part of the limit, break it.
        above = self.costs * len(cover) > self.limit * (1.0 + self.slack)
        if above[picked].sum() >= len(cover):
            self.cuts.append((above, len(cover) - 1))


@dataclass(frozen=True)
class _Task:
    """Least `regret` within the rows."""

    regret: Array
    group_of: Indices
    starts: Indices
    rows: list[_Row]
    effort: float = 1.0
    near: float = 0.0

    @property
    def is_large(self) -> bool:
        """Whether there are more items than the first core has: in smaller ones everything is exact."""
        return len(self.regret) > len(self.starts) + CORE_SIZE

    @property
    def good_enough(self) -> float:
        """Regret that is no matter."""
        return self.near * self.span if self.is_large else 0.0

    @property
    def span(self) -> float:
        """The largest regret that a choice can have."""
        return float(np.maximum.reduceat(self.regret, self.starts).sum())

    def cheapest(self, values: Array) -> Indices:
        """The item of least value of every group, the first of several."""
        least = np.flatnonzero(values <= np.minimum.reduceat(values, self.starts)[self.group_of])
        return least[np.unique(self.group_of[least], return_index=True)[1]]

    def open_items(self, core: NDArray[np.bool_], tightened: float = 1.0) -> tuple[NDArray[np.bool_], list[_Excess]]:
        """The items of the core that can be in a choice at all, and what each row leaves to them.

        A group's cheapest item is spent in any case; an item whose excess over it is more than the rest of the
        limit is in no choice. What stays is small beside the rest, however little the rest is of the limit.
        """
        use = core.copy()
        while True:
            excesses = []
            before = int(use.sum())
            for row in self.rows:
                least = np.minimum.reduceat(np.where(use, row.costs, np.inf), self.starts)
                if not np.isfinite(least).all():
                    return np.zeros_like(use), []
                limit = row.limit * (1.0 + row.slack if row.slack else tightened)
                room = math.fsum([limit, *(-least)])
                excess = np.where(use, row.costs - least[self.group_of], np.inf)
                use &= excess <= max(room, 0.0)
                if room < -limit * ROUNDING:
                    return np.zeros_like(use), []
                excesses.append(_Excess(excess, room))
            if int(use.sum()) == before:
                return use, [one for one in excesses if self._binds(one, use)]

    def _binds(self, row: _Excess, use: NDArray[np.bool_]) -> bool:
        """Whether a choice can break the row; one without room has left nothing but items without excess."""
        most = np.maximum.reduceat(np.where(use, row.excess, 0.0), self.starts)
        return row.room > 0 and math.fsum(most) > row.room


@dataclass(frozen=True)
class _Excess:
    """The chosen items' costs above their groups' least add up to `room` at most."""

    excess: Array
    room: float


def _least(task: _Task, fallback: Indices | None) -> tuple[Indices | None, bool]:
    """The choice of least regret, and whether that is proven; None where no choice keeps the rows.

    `fallback`: a choice known to keep the rows. The program is solved over a core of items that look good at the
    prices of the linear relaxation. By those prices every choice with another item has at least a certain regret
    (Lagrange's bound, computed here and not taken from the solver); where the core's best is below it, that is
    the best of all, and otherwise a core with every item that could be better is solved.
    """
    if fallback is not None and math.fsum(task.regret[fallback]) == 0.0:
        return fallback, True
    if not task.is_large:
        return _within(task, np.ones(len(task.regret), dtype=bool), fallback)
    bound, reduced = _priced(task)
    if not np.isfinite(np.minimum.reduceat(reduced, task.starts)).all():
        return None, True
    finite = np.sort(reduced[np.isfinite(reduced)])
    # A better choice is better by a whole step, so an item that adds more than the rest is in none.
    step = _step(task.regret)
    slack = BOUND_SLACK * task.span

    def room(choice: Indices) -> float:
        return math.fsum(task.regret[choice]) - step - bound + slack

    extra = CORE_SIZE
    while True:
        size = min(len(task.starts) + extra, len(finite))
        reach = float(finite[size - 1]) if fallback is None else min(float(finite[size - 1]), room(fallback))
        if reach < 0 or (fallback is not None and math.fsum(task.regret[fallback]) <= bound + task.good_enough):
            return fallback, True
        picked, proven = _within(task, reduced <= reach, fallback)
        if picked is None and reach >= finite[-1]:
            return None, proven
        if picked is not None and math.fsum(task.regret[picked]) <= bound + task.good_enough:
            return picked, True
        if picked is not None and (room(picked) <= reach or reach >= finite[-1]):
            return picked, proven
        if extra >= LARGEST_CORE * min(task.effort, 1.0):
            return picked, False
        fallback = picked
        extra = min(4 * extra, LARGEST_CORE)


def _priced(task: _Task) -> tuple[float, Array]:
    """A lower bound of the regret, and what each item adds to it (0 for the best of its group, inf for no use).

    With a price on each row, the least regret plus prices falls apart into the groups' own least: a bound that
    holds at any prices. The highest is sought by cutting planes (Kelley), in as many dimensions as there are rows.
    """
    use, rows = task.open_items(np.ones(len(task.regret), dtype=bool))
    table = np.array([np.where(use, row.excess / row.room, 0.0) for row in rows]).reshape(len(rows), len(use))
    span = task.span or 1.0
    regret = np.where(use, task.regret / span, np.inf)
    prices = np.zeros(len(rows))
    best_bound, best_prices = -math.inf, prices
    planes: list[Array] = []
    heights: list[float] = []
    for _ in range(MOST_PLANES):
        priced = regret + prices @ table
        least = np.minimum.reduceat(priced, task.starts)
        if not np.isfinite(least).all():
            break
        bound = float(least.sum() - prices.sum())
        if bound > best_bound:
            best_bound, best_prices = bound, prices
        if not rows:
            break
        picked = task.cheapest(priced)
        slope = table[:, picked].sum(axis=1) - 1.0
        planes.append(np.append(-slope, 1.0))
        heights.append(bound - float(slope @ prices))
        # Variables: the prices, then the bound that the planes found so far allow at them.
        relaxed = linprog(
            np.append(np.zeros(len(rows)), -1.0),
            A_ub=np.array(planes),
            b_ub=np.array(heights),
            bounds=[(0.0, HIGHEST_PRICE)] * len(rows) + [(None, None)],
        )
        if relaxed.status != 0 or -relaxed.fun <= best_bound + PRICE_GAP:
            break
        prices = np.maximum(0.0, relaxed.x[:-1])
    priced = regret + best_prices @ table
    least = np.minimum.reduceat(priced, task.starts)
    total = (math.fsum(least) - math.fsum(best_prices)) * span
    return total, (priced - np.where(np.isfinite(least), least, 0.0)[task.group_of]) * span


def _step(values: Array) -> float:
    """The least by which two sums of these values differ, as far as is known: the number that all are multiples of.

    FLOPs and bytes have one. 0 for values that are not whole or too large.
    """
    if not ((values == np.floor(values)).all() and values.max() < 2.0**53):
        return 0.0
    return float(math.gcd(*(int(value) for value in np.unique(values))))


def _within(task: _Task, core: NDArray[np.bool_], fallback: Indices | None) -> tuple[Indices | None, bool]:
    """The least regret with items of the core, each answer checked exactly and cut off while it breaks a row."""
    for attempt in range(MOST_CUTS + 1):
        picked, finished = _program(task, core, TIGHTENED if attempt == MOST_CUTS else 1.0)
        if picked is None:
            return fallback, finished and attempt < MOST_CUTS
        broken = [row for row in task.rows if row.broken_by(picked)]
        if not broken:
            if fallback is not None and math.fsum(task.regret[fallback]) <= math.fsum(task.regret[picked]):
                return fallback, finished
            return picked, finished
        for row in broken:
            row.cut_off(picked)
    return fallback, False


def _program(task: _Task, core: NDArray[np.bool_], tightened: float) -> tuple[Indices | None, bool]:
    """One run of HiGHS over the core: a choice, or None where it finds none, and whether it came to its end."""
    groups = len(task.starts)
    core, rows = task.open_items(core, tightened)
    if not core.any():
        return None, True
    index = np.flatnonzero(core)
    count = np.bincount(task.group_of[index], minlength=groups)
    lone = index[count[task.group_of[index]] == 1]
    free = index[count[task.group_of[index]] > 1]
    picked = np.zeros(groups, dtype=np.intp)
    picked[task.group_of[lone]] = lone
    cuts = [cut for row in task.rows for cut in row.cuts]
    bounds = [ROW_SCALE] * len(rows) + [most - float(mask[lone].sum()) for mask, most in cuts]
    if any(bound < 0 for bound in bounds):
        return None, True
    if not bounds:
        return task.cheapest(np.where(core, task.regret, np.inf)), True
    if len(free) == 0:
        return picked, True
    table = [row.excess[free] * (ROW_SCALE / row.room) for row in rows]
    table += [mask[free].astype(np.float64) for mask, _ in cuts]
    constraints = [LinearConstraint(_one_a_group(task.group_of[free]), 1.0, 1.0)]
    if table:
        constraints.append(LinearConstraint(np.array(table), -np.inf, np.array(bounds)))
    span, step = task.span, _step(task.regret)
    # In whole steps HiGHS sees that the objective is whole and rounds its bounds: else likeness of sites costs hours.
    scale = 1.0 / step if 0 < span <= step * OBJECTIVE_SCALE else OBJECTIVE_SCALE / (span or 1.0)
    result = milp(
        task.regret[free] * scale,
        integrality=np.ones(len(free)),
        bounds=Bounds(0.0, 1.0),
        constraints=constraints,
        options={"mip_rel_gap": task.near if task.is_large else 0.0, "node_limit": _nodes(len(free), task.effort)},
    )
    if result.x is None:
        # scipy 1.17 calls HiGHS's "solution limit reached", its word for the limit on nodes, unrecognized.
        if result.status in (1, 2) or "limit reached" in str(result.message):
            return None, result.status == 2
        raise AdvisorError(f"the solver stopped without an answer: {result.message}")
    order = np.lexsort((-result.x, task.group_of[free]))
    first = np.unique(task.group_of[free][order], return_index=True)[1]
    taken = free[order][first]
    picked[task.group_of[taken]] = taken
    return picked, result.status == 0


def _nodes(items: int, effort: float) -> int:
    """How many nodes a search may have: the more items, the fewer."""
    return int(min(MOST_NODES, max(FEWEST_NODES, effort * MOST_WORK / items)))


def _one_a_group(group_of: Indices) -> csr_array:
    """The rows "one item of every group", [groups, items]."""
    rows = np.unique(group_of, return_inverse=True)[1]
    return csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(int(rows.max()) + 1, len(rows)))
