"""Choices close to a bound are listed in full: what is found is the best, ties and limits met exactly included."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest

from advisor import deviations, knapsack
from advisor.deviations import best_tied, listed
from advisor.knapsack import Group, solve
from advisor.least_regret import Goal, Row
from advisor.prices import priced


@cache
def goal(seed: int, rows: int, tenths: bool) -> Goal:
    """Five groups of four items. In tenths regrets tie, costs repeat, and the limits are met exactly by some choice."""
    draw = np.random.default_rng(seed)
    groups, items = 5, 4
    group_of, starts = np.repeat(np.arange(groups), items), np.arange(0, groups * items, items)
    if tenths:
        costs = 0.1 * draw.integers(0, 6, (groups * items, rows))
        regret = 0.1 * draw.integers(0, 8, groups * items)
        met = starts + draw.integers(0, items, groups)
        limits = [math.fsum(costs[met, row]) for row in range(rows)]
    else:
        costs = np.exp(draw.normal(0.0, 1.5, (groups * items, rows)))
        regret = draw.uniform(1.0, 2.0, groups * items) / (1.0 + costs.mean(axis=1))
        limits = list(costs.sum(axis=0) / items * draw.uniform(0.3, 1.2))
    regret = regret - np.minimum.reduceat(regret, starts)[group_of]
    lines = [Row(costs[:, row], group_of, float(limits[row])) for row in range(rows)]
    return Goal(regret, group_of, starts, lines, np.ones(len(regret), bool))


@cache
def permitted(seed: int, rows: int, tenths: bool) -> list[np.ndarray]:
    """The slow reference: every choice that keeps the rows of that goal."""
    of = goal(seed, rows, tenths)
    every = (of.starts + np.array(items) for items in itertools.product(range(4), repeat=len(of.starts)))
    return [picked for picked in every if of.is_kept_by(picked)]


@pytest.mark.parametrize("tenths", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("few", [1, 5, 1 << 14])
def test_what_is_listed_is_the_best(rows: int, few: int, tenths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the groups are dealt between the lists. A reach that holds the best is told from one that does not."""
    monkeypatch.setattr(deviations, "FEW_SETS", few)
    monkeypatch.setattr(deviations, "FIRST_ITEMS", 1)
    solved = 0
    for seed in range(40):
        of, kept = goal(seed, rows, tenths), permitted(seed, rows, tenths)
        at = priced(of)
        if not kept or not np.isfinite(np.minimum.reduceat(at.reduced, of.starts)).all():
            continue
        least = min(of.of(picked) for picked in kept)
        if len(at.table):
            short = listed(of, at, 0.9 * (least - at.bound))
            assert short.picked is None or least - at.bound <= at.slack
        found = listed(of, at, 1.5 * (least - at.bound) + 1e-6)
        assert found.picked is not None
        assert of.is_kept_by(found.picked)
        assert of.of(found.picked) == pytest.approx(least, rel=1e-12, abs=1e-15)
        solved += 1
    assert solved > 13


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_of_choices_that_tie_the_best_at_later_goals_is_found(rows: int) -> None:
    tied = 0
    for seed in range(100):
        of, kept = goal(seed, rows, True), permitted(seed, rows, True)
        at = priced(of)
        if not kept or not len(at.table):
            continue
        later = np.random.default_rng(seed).integers(0, 3, (len(of.regret), 2)).astype(float)
        least = min(of.of(picked) for picked in kept) * (1 + 1e-8) + 1e-12
        ties = [picked for picked in kept if of.of(picked) <= least]
        found = best_tied(of, at, least, later)
        assert found is not None
        assert of.is_kept_by(found)
        assert of.of(found) <= least
        assert tuple(later[found].sum(axis=0)) == min(tuple(later[picked].sum(axis=0)) for picked in ties)
        tied += len(ties) > 1
    assert tied > 20


def test_lists_that_are_too_long_prove_no_more_than_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deviations, "FEW_SETS", 2)
    monkeypatch.setattr(deviations, "MOST_SETS", 2)
    monkeypatch.setattr(deviations, "FIRST_ITEMS", 1)
    short = 0
    for seed in range(60):
        of, kept = goal(seed, 2, False), permitted(seed, 2, False)
        at = priced(of)
        if not kept:
            continue
        least = min(of.of(picked) for picked in kept)
        found = listed(of, at, 2 * (least - at.bound) + 1e-6)
        if found.picked is None:
            assert found.reach <= least - at.bound + at.slack
            short += 1
        else:
            assert of.of(found.picked) == pytest.approx(least, rel=1e-12)
    assert short > 5


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.slow) for part in range(2, 8))])
def test_thousands_of_small_knapsacks_equal_enumeration(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large knapsacks are solved. The first goal is no whole number, in half of them ties and exact limits."""
    monkeypatch.setattr(knapsack, "CORE_SIZE", 1)
    found = 0
    for seed in range(300 * part, 300 * (part + 1)):
        draw = np.random.default_rng(seed)
        groups = []
        for _ in range(4):
            first = 0.1 * draw.integers(0, 9, 4) if seed % 2 else draw.uniform(0.0, 1.0, 4)
            costs = 0.1 * draw.integers(0, 6, (4, 2)) if seed % 4 < 3 else draw.uniform(0.0, 1.0, (4, 2))
            groups.append(Group(np.stack([first, 8.0 * draw.integers(0, 4, 4), -costs[:, 0]], axis=1), costs))
        met = draw.integers(0, 4, 4)
        limits = [math.fsum(group.costs[item, k] for group, item in zip(groups, met, strict=True)) for k in range(2)]
        choice = solve(groups, limits)
        assert choice is not None
        assert all(cost <= limit for cost, limit in zip(choice.costs, limits, strict=True))
        best: tuple[float, ...] | None = None
        rows = [list(zip(group.costs.tolist(), group.gains.tolist(), strict=True)) for group in groups]
        for items in itertools.product(*rows):
            if all(math.fsum(costs[k] for costs, _ in items) <= limits[k] for k in range(2)):
                goals = tuple(math.fsum(gains[k] for _, gains in items) for k in range(3))
                best = goals if best is None else max(best, goals)
        assert best is not None
        # Of regrets that differ by less than a 1e-8th the later goals decide.
        assert choice.gains[0] == pytest.approx(best[0], rel=1e-7, abs=1e-9)
        if seed % 2 == 0:
            assert choice.gains == pytest.approx(best, rel=1e-6, abs=1e-9)
        found += all(choice.proven)
    assert found > 290
