"""Prices on the limits of a knapsack, and the bound that follows from them (Lagrange's).

With a price on each row, the least regret plus prices falls apart into the groups' own least: a bound that holds at any
prices. The highest is sought by cutting planes (Kelley), in as many dimensions as there are rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from advisor.least_regret import Goal

Array = NDArray[np.float64]

# All ours. The search for prices: its longest, where it ends, and the highest price (regret's range over a row's
# limit); rounding of the bound, as a share of the range.
MOST_PLANES = 40
PRICE_GAP = 1e-8
HIGHEST_PRICE = 1e4
BOUND_SLACK = 1e-12


@dataclass(frozen=True)
class Priced:
    """A lower bound of the regret of every choice within the rows, and what it is made of.

    reduced  what each item adds to the bound: 0 for the best of its group, infinite for no use
    prices   of each row that can bind, regret for all of what it leaves
    table    [rows that can bind, items]: share of what the row leaves
    slack    what rounding may have added to the bound
    """

    bound: float
    reduced: Array
    prices: Array
    table: Array
    slack: float

    def within(self, regret: float) -> NDArray[np.bool_]:
        """The items that can be in a choice of at most this regret."""
        return np.asarray(self.reduced <= regret - self.bound + self.slack)


def priced(goal: Goal) -> Priced:
    """At the prices whose bound is highest, as far as the search comes."""
    use, rows = goal.open_items(goal.open)
    table = np.array([np.where(use, row.excess / row.room, 0.0) for row in rows]).reshape(len(rows), len(use))
    span = goal.span or 1.0
    regret = np.where(use, goal.regret / span, np.inf)
    prices = np.zeros(len(rows))
    best_bound, best_prices = -math.inf, prices
    planes: list[Array] = []
    heights: list[float] = []
    for _ in range(MOST_PLANES):
        values = regret + prices @ table
        least = np.minimum.reduceat(values, goal.starts)
        if not np.isfinite(least).all():
            break
        bound = float(least.sum() - prices.sum())
        if bound > best_bound:
            best_bound, best_prices = bound, prices
        if not rows:
            break
        picked = goal.cheapest(values)
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
    values = regret + best_prices @ table
    least = np.minimum.reduceat(values, goal.starts)
    bound = (math.fsum(least) - math.fsum(best_prices)) * span
    reduced = (values - np.where(np.isfinite(least), least, 0.0)[goal.group_of]) * span
    return Priced(bound, reduced, best_prices * span, table, BOUND_SLACK * span)
