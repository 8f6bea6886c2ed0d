"""The choice itself: a combination of casts for every site, best for the task and within its limits; and the front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advisor.candidates import Candidate
from advisor.errors import InvalidPlan
from advisor.knapsack import Choice, Group, Knapsack, solve
from advisor.menu import Limits, Menu, lost_share
from advisor.objectives import Task
from advisor.plan import FrontPoint
from advisor.uniform_roles import uniform_choice

# The front's points are the best plans at these multiples of the tolerance. Ours.
FRONT_FACTORS = (0.0, 0.01, 0.1, 0.3, 1.0, 2.0, 3.0, 10.0, 100.0)
# Of many sites they are best within this share of the goal's range.
FRONT_APART = 1e-4
FRONT_EXACT = 100


@dataclass(frozen=True)
class Frame:
    """What no cast changes, and budgets and shares are counted with.

    total_flops  a step, with what the probe did not see
    fixed_bytes  that no cast decides: weights, gradients, optimizer state
    """

    total_flops: float
    fixed_bytes: float = 0.0


@dataclass(frozen=True)
class Selection:
    """A candidate for every slot, and the exact sums that the limits were held to.

    `proven`: no casts within the limits are better at the task's first goal; where it is not, `gap` is by how much
    they may be at most, as a share of all matrix FLOPs, seconds, bytes or damage, whichever the goal is.
    """

    chosen: dict[tuple[str, str], Candidate]
    damage: float
    noise_ratio: float
    proven: bool
    gap: float | None = None


def select(options: Sequence[Menu], limits: Limits, frame: Frame, *, uniform_roles: bool = False) -> Selection:
    """The best casts within the limits; the same for the same menus. Raises InvalidPlan where a budget is too small.

    `uniform_roles`: one cast a role at all sites that are cast, of menus that are whole.
    """
    room = limits_of(options, limits, frame)
    picked: tuple[dict[str, Candidate], ...] = ()
    if uniform_roles:
        found = uniform_choice(options, room)
        choice, picked = (None, ()) if found is None else (found.choice, found.picked)
    else:
        choice = solve([menu.group for menu in options], room)
        if choice is not None:
            picked = tuple(menu.picked(item) for menu, item in zip(options, choice.items, strict=True))
    if choice is None:
        raise InvalidPlan(_unreachable(options, limits, frame))
    chosen = {
        (menu.site.name, role): option
        for menu, casts in zip(options, picked, strict=True)
        for role, option in casts.items()
    }
    task = options[0].task if options else Task()
    whole = {"flops_8bit": frame.total_flops, "time_s": 1.0, "bytes": 1.0, "damage": 1.0}[task.goals[0]]
    gap = choice.gap / whole if whole else 0.0
    return Selection(chosen, choice.costs[0], choice.costs[1], proven=all(choice.proven[:1]), gap=gap)


def limits_of(options: Sequence[Menu], limits: Limits, frame: Frame) -> list[float]:
    """The limits of a group's costs: damage, noise, then each budget's. Raises InvalidPlan for a negative one."""
    found = [limits.tolerance, limits.noise]
    for name, value in options[0].task.budget.given if options else ():
        if name == "share_8bit":
            most = math.fsum(menu.most_flops_8bit for menu in options)
            # FLOPs add up exactly as a rule; a share that is asked for as a plan gave it must not fail by rounding.
            room = most - value * frame.total_flops + 1e-9 * frame.total_flops
        elif name == "memory_bytes":
            room = value - frame.fixed_bytes
        else:
            room = value
        if room < 0:
            raise InvalidPlan(_unreachable(options, limits, frame))
        found.append(room)
    return found


def front(options: Sequence[Menu], limits: Limits, unit: float, frame: Frame) -> list[FrontPoint]:
    """Points of the Pareto front of damage against what the plan is best at, at the same limit on lost batch.

    For a plan of least damage, against its 8-bit share. One for each of FRONT_FACTORS times `unit` (the tolerance, or
    what stands for it where that is 0), leaving out those that repeat the one before, and any that the solver could not
    prove to be on it, of more than FRONT_EXACT sites within FRONT_APART of the range. Between two of them others may
    lie. Budgets are left aside.
    """
    if not options:
        return []
    goal = next(name for name in options[0].task.goals if name != "damage")
    knapsack = Knapsack([_front_group(menu, goal) for menu in options])
    apart = FRONT_APART if len(options) > FRONT_EXACT else 0.0
    points: list[FrontPoint] = []
    choice: Choice | None = None
    last = -math.inf
    for tolerance in sorted({factor * unit for factor in FRONT_FACTORS if math.isfinite(factor * unit)}):
        choice = knapsack.solve((tolerance, limits.noise), apart=apart, known=choice)
        assert choice is not None, "every role can stay as it is"
        if choice.proven[0] and choice.gains[0] > last:
            last = choice.gains[0]
            sums = {
                name: math.fsum(menu.measures[name][item] for menu, item in zip(options, choice.items, strict=True))
                for name in ("flops_8bit", "time_s", "bytes")
            }
            points.append(
                FrontPoint(
                    tolerance=tolerance,
                    damage=choice.costs[0],
                    lost_batch_share=lost_share(choice.costs[1]),
                    share_8bit=sums["flops_8bit"] / frame.total_flops if frame.total_flops else 0.0,
                    time_s=sums["time_s"] if goal == "time_s" else None,
                    memory_bytes=round(sums["bytes"] + frame.fixed_bytes) if goal == "bytes" else None,
                )
            )
    return points


def _front_group(menu: Menu, goal: str) -> Group:
    found = menu.measures
    gain = found[goal] if goal == "flops_8bit" else -found[goal]
    return Group(
        gains=np.stack([gain, -found["damage"]], axis=1),
        costs=np.stack([found["damage"], found["noise"]], axis=1),
    )


def _unreachable(options: Sequence[Menu], limits: Limits, frame: Frame) -> str:
    """How close to its budgets a plan can come within the limits on damage and lost batch."""
    task = options[0].task
    said = []
    for name, _ in task.budget.given:
        measure = {"share_8bit": "flops_8bit", "memory_bytes": "bytes"}.get(name, name)
        choice = solve([_front_group(menu, measure) for menu in options], (limits.tolerance, limits.noise))
        assert choice is not None, "every role can stay as it is"
        best = choice.gains[0]
        if name == "share_8bit":
            said.append(f"share_8bit can be at most {best / frame.total_flops if frame.total_flops else 0.0:.4g}")
        elif name == "memory_bytes":
            said.append(f"memory_bytes can be at least {frame.fixed_bytes - best:.6g}")
        else:
            said.append(f"time_s can be at least {-best:.4g}")
    return (
        f"no plan within the limits keeps the budget ({task.budget}): each by itself, {', '.join(said)}. Ask for less, "
        "or give a larger tolerance or max_lost_batch, more candidates, or fewer restrictions"
    )
