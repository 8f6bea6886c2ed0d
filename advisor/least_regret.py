"""One goal of the knapsack: of every group one item, such that the chosen `regret` is least and no row is broken.

All groups' items stand in one array, group after group; a choice is the index of one item of every group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

# Rounding of a sum, as a share of its limit.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Row:
    """The chosen `costs` add up to `limit` at most; of a cut's items, no permitted choice takes more than it says."""

    costs: Array
    group_of: Indices
    limit: float
    slack: float = 0.0
    cuts: list[tuple[NDArray[np.bool_], int]] = field(default_factory=list)

    def broken_by(self, picked: Indices) -> bool:
        """By the exact sum, rounded once."""
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
class Excess:
    """The chosen items' costs above their groups' least add up to `room` at most."""

    excess: Array
    room: float


@dataclass(frozen=True)
class Goal:
    """Least `regret` within the rows.

    open    the items that can be in an answer at all
    effort  of the search: 1 for as much as there is
    near    regret that is no matter, as a share of the whole
    apart   the same, as a share of `span`
    """

    regret: Array
    group_of: Indices
    starts: Indices
    rows: list[Row]
    open: NDArray[np.bool_]
    effort: float = 1.0
    near: float = 0.0
    apart: float = 0.0

    def no_matter(self, regret: float) -> float:
        """How much less than this regret is no matter."""
        return max(self.near * regret, self.apart * self.span)

    @cached_property
    def span(self) -> float:
        """The largest regret that a choice can have."""
        return float(np.maximum.reduceat(self.regret, self.starts).sum())

    @cached_property
    def step(self) -> float:
        """The least by which two sums of regret differ, as far as is known: the number that all are multiples of.

        FLOPs and bytes have one. 0 for regrets that are not whole or too large.
        """
        if not ((self.regret == np.floor(self.regret)).all() and self.regret.max() < 2.0**53):
            return 0.0
        return float(math.gcd(*(int(value) for value in np.unique(self.regret))))

    def of(self, picked: Indices) -> float:
        """A choice's regret, rounded once."""
        return math.fsum(self.regret[picked])

    def is_kept_by(self, picked: Indices) -> bool:
        """Whether a choice breaks no row."""
        return not any(row.broken_by(picked) for row in self.rows)

    def cheapest(self, values: Array) -> Indices:
        """The item of least value of every group, the first of several."""
        least = np.flatnonzero(values <= np.minimum.reduceat(values, self.starts)[self.group_of])
        return least[np.unique(self.group_of[least], return_index=True)[1]]

    def open_items(self, core: NDArray[np.bool_], tightened: float = 1.0) -> tuple[NDArray[np.bool_], list[Excess]]:
        """The items of the core that can be in a choice at all, and what each row leaves to them.

        A group's cheapest item is spent in any case; an item whose excess over it is more than the rest of the
        limit is in no choice. What stays is small beside the rest, however little the rest is of the limit.
        """
        use = core & self.open
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
                use &= excess <= max(room, 0.0) + limit * ROUNDING  # both are rounded; answers are checked exactly
                if room < -limit * ROUNDING:
                    return np.zeros_like(use), []
                excesses.append(Excess(excess, room))
            if int(use.sum()) == before:
                return use, [one for one in excesses if self._binds(one, use)]

    def _binds(self, row: Excess, use: NDArray[np.bool_]) -> bool:
        """Whether a choice can break the row; one without room has left nothing but items without excess."""
        most = np.maximum.reduceat(np.where(use, row.excess, 0.0), self.starts)
        return row.room > 0 and math.fsum(most) > row.room
