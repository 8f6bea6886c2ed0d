"""The knapsack finds what enumeration finds, never exceeds a limit, and pruning loses nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from advisor import knapsack
from advisor.knapsack import Choice, Group, solve
from advisor.pruning import undominated, undominated_of

GROUPS = 6


def enumerated(groups: list[Group], limits: list[float]) -> tuple[float, ...] | None:
    """The slow reference: goals of the best choice, in strict order."""
    best = None
    rows = [list(zip(group.costs.tolist(), group.gains.tolist(), strict=True)) for group in groups]
    for items in itertools.product(*rows):
        if any(math.fsum(costs[k] for costs, _ in items) > limits[k] for k in range(2)):
            continue
        goals = tuple(math.fsum(gains[k] for _, gains in items) for k in range(groups[0].gains.shape[1]))
        best = goals if best is None else max(best, goals)
    return best


def instance(seed: int, items: int = 5, size: float = 1.0) -> tuple[list[Group], list[float]]:
    """Whole gains with many ties, then bytes, then minus the first cost; costs over seven decades of `size`."""
    draw = np.random.default_rng(seed)
    groups = []
    for _ in range(GROUPS):
        costs = size * 10.0 ** draw.uniform(-7, 0, (items, 2))
        costs[0] = 0.0
        whole = draw.integers(0, 4, (items, 2)) * np.array([64.0, 8.0])
        groups.append(Group(np.hstack([whole, -costs[:, :1]]), costs))
    return groups, [size * 10.0 ** draw.uniform(-4, 0.5) for _ in range(2)]


def measures(group: Group) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """What pruning compares, smaller is better: [goals and costs, items]."""
    return np.hstack([-group.gains, group.costs]).T


def keeps(choice: Choice, limits: list[float]) -> bool:
    return all(cost <= limit for cost, limit in zip(choice.costs, limits, strict=True))


@pytest.mark.parametrize("core", [1, 400])
@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e-1, 1e6])
@pytest.mark.parametrize("seed", range(8))
def test_equals_enumeration(seed: int, size: float, core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nearly everything is left out of the first core."""
    monkeypatch.setattr(knapsack, "CORE_SIZE", core)
    groups, limits = instance(seed, size=size)
    choice = solve(groups, limits)
    assert choice is not None
    assert keeps(choice, limits)
    assert choice.gains == pytest.approx(enumerated(groups, limits), rel=1e-7)
    assert all(choice.proven)


@pytest.mark.parametrize("seed", range(12))
def test_pruning_changes_nothing(seed: int) -> None:
    groups, limits = instance(seed, items=12)
    pruned, whole = solve(groups, limits), solve(groups, limits, prune=False)
    assert pruned is not None
    assert whole is not None
    assert pruned.gains == pytest.approx(whole.gains, rel=1e-7)
    left = [len(undominated(measures(group))) for group in groups]
    assert min(left) < 12, "an instance in which pruning has nothing to do"


@pytest.mark.parametrize("seed", range(12))
def test_undominated_is_what_the_definition_says(seed: int) -> None:
    """Also where measures are of very different sizes, and of items that are alike in most of them."""
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.integers(-9, 12, 4)
    gains, costs = sizes[:2] * draw.integers(0, 3, (60, 2)), sizes[2:] * draw.integers(0, 3 + seed, (60, 2))
    group = Group(gains, costs)
    table = np.hstack([-group.gains, group.costs])

    def dominated(item: int) -> bool:
        no_worse = (table <= table[item]).all(axis=1)
        alike = (table == table[item]).all(axis=1)
        return bool((no_worse & ~alike).any() or alike[:item].any())

    left = [item for item in range(60) if not dominated(item)]
    assert undominated(measures(group)).tolist() == left
    twice = np.hstack([measures(group), measures(group)])
    starts = np.array([0, 60, 60, 120])
    assert undominated_of(starts, twice).tolist() == [*left, *(60 + item for item in left)]


def test_a_limit_that_is_met_exactly_is_kept() -> None:
    """Ten costs of 0.1 add up to 1 exactly; nine and one that is a millionth of a millionth larger do not."""
    fits = [Group(np.array([[0.0], [1.0]]), np.array([[0.0], [0.1]])) for _ in range(10)]
    over = [*fits[:9], Group(np.array([[0.0], [1.0]]), np.array([[0.0], [0.1 + 1e-13]]))]
    full, short = solve(fits, [1.0]), solve(over, [1.0])
    assert full is not None
    assert short is not None
    assert full.gains == (10.0,)
    assert short.gains == (9.0,)


def test_sums_of_decimals_that_meet_their_limit_are_found() -> None:
    """Tenths round; which choices meet a limit of tenths exactly is settled by their exact sums."""
    draw = np.random.default_rng(0)
    met = 0
    for _ in range(300):
        groups = [Group(0.1 * draw.integers(-4, 1, (4, 1)), 0.1 * draw.integers(1, 6, (4, 2))) for _ in range(4)]
        limits = [math.fsum(group.costs[draw.integers(4), k] for group in groups) for k in range(2)]
        choice = solve(groups, limits)
        assert (None if choice is None else choice.gains) == enumerated(groups, limits)
        met += choice is not None and any(cost == limit for cost, limit in zip(choice.costs, limits, strict=True))
    assert met > 50


def test_many_near_misses_never_exceed_the_limit() -> None:
    """Costs a billionth above a tenth of the limit: ten of them break it by less than the solver's own tolerance."""
    draw = np.random.default_rng(1)
    groups = [
        Group(np.array([[0.0], [1.0]]), np.array([[0.0], [0.1 * (1 + 1e-9 * draw.uniform(0.5, 1))]])) for _ in range(40)
    ]
    choice = solve(groups, [1.0])
    assert choice is not None
    assert choice.costs[0] <= 1.0
    assert choice.gains == (9.0,)


def test_a_limit_of_zero_admits_what_costs_nothing() -> None:
    group = Group(np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [0.0], [1e-300]]))
    choice = solve([group, group], [0.0])
    assert choice is not None
    assert choice.items == (1, 1)


def test_no_choice_within_the_limits_is_none() -> None:
    assert solve([Group(np.array([[1.0]]), np.array([[2.0]]))], [1.0]) is None
    pair = Group(np.array([[1.0], [2.0]]), np.array([[0.6], [0.7]]))
    assert solve([pair, pair], [1.0]) is None


def test_no_groups_is_an_empty_choice() -> None:
    assert solve([], [1.0, 2.0]) == Choice((), (), (0.0, 0.0), ())


def test_hundreds_of_groups_that_are_alike() -> None:
    """Layers of a deep model are alike: the same gains, costs of the same size. The bound shows that it is the best."""
    draw = np.random.default_rng(3)
    groups = [
        Group(
            np.array([[0.0, 0.0], [1.0, 0.0], [3.0, -cost], [0.0, 0.0]]),
            np.array([[0.0, 0.0], [cost / 3, cost / 9], [cost, cost / 2], [cost, cost]]),
        )
        for cost in 10.0 ** draw.uniform(-7, -3, 400)
    ]
    total = math.fsum(float(group.costs[2, 0]) for group in groups)
    limits = [total / 10, total]
    choice = solve(groups, limits)
    assert choice is not None
    assert choice.proven[0]
    assert keeps(choice, limits)
    # By weight: the cheapest groups in full, and one more step where the next group's third fits.
    costs = sorted(float(group.costs[2, 0]) for group in groups)
    greedy = max(n for n in range(401) if math.fsum(costs[:n]) <= limits[0])
    assert 3 * greedy <= choice.gains[0] <= 3 * (greedy + 1) + 400
    assert solve(groups, limits) == choice
