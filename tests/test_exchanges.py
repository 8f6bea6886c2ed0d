"""Prices bound what a knapsack can reach, and exchanges come close to it without breaking a limit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from advisor.exchanges import _best_pair, near_best
from advisor.least_regret import Goal, Row
from advisor.prices import priced


def goal(seed: int, groups: int, items: int, rows: int = 2) -> Goal:
    """Regrets that fall as costs rise, costs over three decades, limits that about half of the items fit in."""
    draw = np.random.default_rng(seed)
    costs = np.exp(
        draw.normal(0.0, 1.2, (groups * items, rows)) + np.repeat(draw.normal(0.0, 1.8, groups), items)[:, None]
    )
    costs[::items] = 0.0
    regret = np.repeat(draw.uniform(1.0, 2.0, groups), items) / (1.0 + costs.mean(axis=1))
    group_of = np.repeat(np.arange(groups), items)
    limits = costs.sum(axis=0) / items / 4
    lines = [Row(costs[:, row], group_of, float(limits[row])) for row in range(rows)]
    starts = np.arange(0, groups * items, items)
    return Goal(
        regret - np.minimum.reduceat(regret, starts)[group_of], group_of, starts, lines, np.ones(len(regret), bool)
    )


def enumerated(of: Goal) -> np.ndarray:
    """The slow reference: the choice of least regret that keeps the rows."""
    count = len(of.regret) // len(of.starts)
    kept = (of.starts + np.array(items) for items in itertools.product(range(count), repeat=len(of.starts)))
    return min((picked for picked in kept if of.is_kept_by(picked)), key=of.of)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_below_the_best_and_leaves_out_none_of_its_items(seed: int, rows: int) -> None:
    small = goal(seed, groups=6, items=4, rows=rows)
    best, at = enumerated(small), priced(small)
    assert at.bound <= small.of(best) + at.slack
    assert at.within(small.of(best))[best].all()


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_a_window_that_holds_everything_finds_the_best(seed: int, rows: int) -> None:
    """With few items all of them are in one window, and two halves of it are all there is."""
    small = goal(seed, groups=6, items=3, rows=rows)
    found = near_best(small, priced(small), enough=0.0)
    if rows < 3:
        assert found is not None
        assert small.of(found) == pytest.approx(small.of(enumerated(small)), rel=1e-9)
    else:
        assert found is None or small.is_kept_by(found)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_of_many_groups_it_comes_close_and_keeps_the_rows(seed: int, rows: int) -> None:
    large = goal(seed, groups=400, items=10, rows=rows)
    at = priced(large)
    found = near_best(large, at, enough=0.0)
    assert found is not None
    assert large.is_kept_by(found)
    assert (large.group_of[found] == np.arange(400)).all()
    assert at.bound - at.slack <= large.of(found) <= at.bound + 1e-3 * large.span
    assert (near_best(large, at, enough=0.0) == found).all()


def test_where_no_choice_keeps_the_rows_none_is_found() -> None:
    of = goal(0, groups=5, items=3)
    costs = of.rows[0].costs + 1.0
    over = Goal(of.regret, of.group_of, of.starts, [Row(costs, of.group_of, 4.0)], of.open)
    assert near_best(over, priced(over), enough=0.0) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_best_pair_is_the_best_of_all_pairs(seed: int) -> None:
    draw = np.random.default_rng(seed)
    one_used, other_used = draw.normal(size=(30, 2)), draw.normal(size=(40, 2))
    one, other, left = draw.normal(size=30), draw.normal(size=40), draw.normal(size=2)
    falling, rising = np.argsort(-one_used[:, 0]), np.argsort(other_used[:, 0])
    first, second = _best_pair(one_used[falling], one[falling], other_used[rising], other[rising], left)
    fits = (one_used[falling][:, None] + other_used[rising][None] <= left).all(axis=2)
    sums = np.where(fits, one[falling][:, None] + other[rising], np.inf)
    assert fits.any() == (first >= 0)
    if first >= 0:
        assert sums[first, second] == sums.min()


def test_the_best_pair_keeps_further_rows() -> None:
    draw = np.random.default_rng(7)
    one_used, other_used = draw.normal(size=(50, 4)), draw.normal(size=(50, 4))
    one, other, left = draw.normal(size=50), draw.normal(size=50), np.zeros(4)
    falling, rising = np.argsort(-one_used[:, 0]), np.argsort(other_used[:, 0])
    first, second = _best_pair(one_used[falling], one[falling], other_used[rising], other[rising], left)
    assert first >= 0
    assert (one_used[falling][first] + other_used[rising][second] <= left).all()
