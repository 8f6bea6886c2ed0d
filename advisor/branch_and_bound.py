"""HiGHS on one goal of the knapsack: the least regret with some of the items, checked exactly.

HiGHS holds a row to an absolute 1e-6 and stops at an absolute gap of 1e-6, and scipy 1.17 exposes neither; damages run
from 1e-9 to 1e-1. So each row is scaled to what the limit leaves, each objective to its range, and the sums of every
answer are checked exactly (`math.fsum`, rounded once). An answer that breaks a limit is cut off by a cover inequality,
which no permitted choice breaks, and the program is solved again; after several such answers the limits are tightened
by 4e-6, so that a choice closer to a limit than that may be missed. A limit is never exceeded.

HiGHS 1.12, which scipy 1.17 has, prints a line now and then whatever its options are (ERGO-Code/HiGHS issue 2783). To
keep it from stdout would mean to turn the descriptor away from everyone else in the process for as long: it is let be
here, and our command line keeps its own results apart from the start (`cli/output.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from advisor.errors import AdvisorError
from advisor.least_regret import Goal, Indices

# All ours. A row reads "sum ≤ ROW_SCALE", so HiGHS's absolute 1e-6 is 1e-9 of the limit; an objective spans
# OBJECTIVE_SCALE, so its absolute gap of 1e-6 is 1e-12 of the range. With larger ones its arithmetic suffers.
ROW_SCALE = 1024.0
OBJECTIVE_SCALE = 1e6
# Answers that may be cut off one by one; after them the limits are tightened to this share, which is more than HiGHS
# errs by (a variable may be 1e-6 from whole).
MOST_CUTS = 8
TIGHTENED = 1.0 - 4e-6
# Nodes of one search, and nodes times items.
MOST_NODES = 200_000
FEWEST_NODES = 20
MOST_WORK = 2_000_000


def least_within(goal: Goal, core: NDArray[np.bool_], fallback: Indices | None) -> tuple[Indices | None, bool]:
    """The least regret with items of the core, each answer checked exactly and cut off while it breaks a row.

    And whether it is proven to be that. `fallback`: a choice known to keep the rows.
    """
    for attempt in range(MOST_CUTS + 1):
        picked, finished = _program(goal, core, TIGHTENED if attempt == MOST_CUTS else 1.0)
        if picked is None:
            return fallback, finished and attempt < MOST_CUTS
        broken = [row for row in goal.rows if row.broken_by(picked)]
        if not broken:
            if fallback is not None and goal.of(fallback) <= goal.of(picked):
                return fallback, finished
            return picked, finished
        for row in broken:
            row.cut_off(picked)
    return fallback, False


def _program(goal: Goal, core: NDArray[np.bool_], tightened: float) -> tuple[Indices | None, bool]:
    """One run of HiGHS over the core: a choice, or None where it finds none, and whether it came to its end."""
    groups = len(goal.starts)
    core, rows = goal.open_items(core, tightened)
    if not core.any():
        return None, True
    index = np.flatnonzero(core)
    count = np.bincount(goal.group_of[index], minlength=groups)
    lone = index[count[goal.group_of[index]] == 1]
    free = index[count[goal.group_of[index]] > 1]
    picked = np.zeros(groups, dtype=np.intp)
    picked[goal.group_of[lone]] = lone
    cuts = [cut for row in goal.rows for cut in row.cuts]
    bounds = [ROW_SCALE] * len(rows) + [most - float(mask[lone].sum()) for mask, most in cuts]
    if any(bound < 0 for bound in bounds):
        return None, True
    if not bounds:
        return goal.cheapest(np.where(core, goal.regret, np.inf)), True
    if len(free) == 0:
        return picked, True
    table = [row.excess[free] * (ROW_SCALE / row.room) for row in rows]
    table += [mask[free].astype(np.float64) for mask, _ in cuts]
    constraints = [LinearConstraint(_one_a_group(goal.group_of[free]), 1.0, 1.0)]
    if table:
        constraints.append(LinearConstraint(np.array(table), -np.inf, np.array(bounds)))
    span, step = goal.span, goal.step
    # In whole steps HiGHS sees that the objective is whole and rounds its bounds: else likeness of sites costs hours.
    scale = 1.0 / step if 0 < span <= step * OBJECTIVE_SCALE else OBJECTIVE_SCALE / (span or 1.0)
    result = milp(
        goal.regret[free] * scale,
        integrality=np.ones(len(free)),
        bounds=Bounds(0.0, 1.0),
        constraints=constraints,
        options={"mip_rel_gap": max(goal.near, goal.apart), "node_limit": _nodes(len(free), goal.effort)},
    )
    if result.x is None:
        # scipy 1.17 calls HiGHS's "solution limit reached", its word for the limit on nodes, unrecognized.
        if result.status in (1, 2) or "limit reached" in str(result.message):
            return None, result.status == 2
        raise AdvisorError(f"the solver stopped without an answer: {result.message}")
    order = np.lexsort((-result.x, goal.group_of[free]))
    first = np.unique(goal.group_of[free][order], return_index=True)[1]
    taken = free[order][first]
    picked[goal.group_of[taken]] = taken
    return picked, result.status == 0


def _nodes(items: int, effort: float) -> int:
    """How many nodes a search may have: the more items, the fewer."""
    return int(min(MOST_NODES, max(FEWEST_NODES, effort * MOST_WORK / items)))


def _one_a_group(group_of: Indices) -> csr_array:
    """The rows "one item of every group", [groups, items]."""
    rows = np.unique(group_of, return_inverse=True)[1]
    return csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(int(rows.max()) + 1, len(rows)))
