"""From scores to a plan: a knapsack whose group is a site and whose item gives every role its cast.

A group is a site and not a tensor, because time is saved by products: a product runs in 8 bits only if both
its operands do, in a pair that the hardware multiplies. Goals, in strict order: most FLOPs in 8 bits, then
most in at most 16 bits, then fewest bytes, then least damage.

Limits, both sums over all slots:
- damage, the predicted rise of the loss, at most `tolerance`;
- noise, the energy of the rounding errors in the gradients over that of the minibatch's own noise, at most
  m/(1-m) for m = `max_lost_batch`, because noise ratio r loses the share 1 - 1/(1 + r) of the batch. A
  gradient on its way to the first layer passes through every site, so the sum over all of them bounds what
  the first layer loses; later layers lose less. Forward roles take part: the input enters the weight
  gradient, the weight the input gradient.

Every role may stay as it is (`fp32/none/nearest`) at no damage and no noise, so there is always a plan. A
cast whose damage or noise is unknown, NaN or infinite is never chosen; the plan's notes count the slots
concerned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from advisor.assemble import Draft, assemble
from advisor.castnames import KEEP, parse_cast
from advisor.hardware import Hardware
from advisor.holding_back import Spent, plan_sentences
from advisor.knapsack import Choice, Group, solve
from advisor.menu import Candidate, Limits, Menu, Row, by_slot, candidate, lost_share, menus
from advisor.plan import FrontPoint, Plan
from advisor.reasons import Case, reason
from probes.records import Site

# The front's points are the best plans at these multiples of the tolerance. Ours.
FRONT_FACTORS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)

# Default tolerance, and the front's unit where the tolerance is 0: share of the window's mean loss (design,
# contract).
DEFAULT_TOLERANCE_SHARE = 0.001


def plan_from_rows(
    sites: Sequence[Site],
    rows: Iterable[Row],
    *,
    hardware: Hardware,
    tolerance: float,
    max_lost_batch: float,
    total_flops: float,
    mean_loss: float,
    model_name: str = "",
    notes: Sequence[str] = (),
) -> Plan:
    """The best plan for these sites and scores.

    `rows`: what `Scores.rows` holds; a row's `rms` is used for the reasons where it is there. `tolerance`:
    loss units, 0 or more. `total_flops`: a step, with what the probe did not see. The order of `rows` does
    not matter. Raises InvalidPlan for limits that are not possible and for rows of unknown slots.
    """
    limits = Limits(tolerance, max_lost_batch)
    rows = list(rows)
    table = by_slot(sites, rows)
    options = menus(sites, rows, hardware)
    selection = select(options, limits)
    total = max(total_flops, math.fsum(site.flops for site in sites))
    reasons = {}
    for menu in options:
        name = menu.site.name
        picked = {role: selection.chosen[name, role] for role in menu.site.roles}
        for role in menu.site.roles:
            reasons[name, role] = reason(Case(menu, role, picked, table[name, role], limits))
    points = front(options, limits, tolerance or _front_unit(mean_loss), total)
    spent = Spent(selection.damage, selection.noise_ratio)
    return assemble(
        Draft(
            kind="planned",
            sites=sites,
            hardware=hardware,
            casts={slot: option.cast for slot, option in selection.chosen.items()},
            rows={slot: option.row for slot, option in selection.chosen.items()},
            reasons=reasons,
            total_flops=total,
            model_name=model_name,
            mean_loss=mean_loss,
            tolerance=tolerance,
            max_lost_batch=max_lost_batch,
            damage=selection.damage,
            noise_ratio=selection.noise_ratio,
            optimal=selection.proven,
            front=tuple(points),
            summary=plan_sentences(options, selection.chosen, limits, spent, points, total),
            notes=[*notes, *_unknown(options, table)],
        )
    )


@dataclass(frozen=True)
class Selection:
    """A candidate for every slot, and the exact sums that the limits were held to.

    `proven`: no casts within the limits have more FLOPs in 8 bits.
    """

    chosen: dict[tuple[str, str], Candidate]
    damage: float
    noise_ratio: float
    proven: bool


def select(options: Sequence[Menu], limits: Limits) -> Selection:
    """The best casts within the limits; exact, and the same for the same menus."""
    choice = _solved([menu.group for menu in options], limits)
    chosen = {
        (menu.site.name, role): option
        for menu, item in zip(options, choice.items, strict=True)
        for role, option in menu.picked(item).items()
    }
    return Selection(chosen, choice.costs[0], choice.costs[1], proven=all(choice.proven[:1]))


def front(options: Sequence[Menu], limits: Limits, unit: float, total_flops: float) -> list[FrontPoint]:
    """Points of the exact Pareto front of damage against 8-bit share, at the same limit on lost batch.

    One for each of FRONT_FACTORS times `unit` (the tolerance, or what stands for it where that is 0), leaving
    out those that repeat the one before, and any that the solver could not prove. Between two of them others may lie.
    """
    groups = [Group(menu.group.gains[:, [0, 3]], menu.group.costs) for menu in options]
    points: list[FrontPoint] = []
    for tolerance in sorted({factor * unit for factor in FRONT_FACTORS if math.isfinite(factor * unit)}):
        choice = _solved(groups, Limits(tolerance, limits.max_lost_batch))
        share = choice.gains[0] / total_flops if groups and total_flops else 0.0
        if all(choice.proven) and (not points or share > points[-1].share_8bit):
            points.append(
                FrontPoint(
                    tolerance=tolerance,
                    damage=choice.costs[0],
                    lost_batch_share=lost_share(choice.costs[1]),
                    share_8bit=share,
                )
            )
    return points


def _solved(groups: Sequence[Group], limits: Limits) -> Choice:
    choice = solve(groups, (limits.tolerance, limits.noise))
    assert choice is not None, "every role can stay as it is"
    return choice


def _front_unit(mean_loss: float) -> float:
    unit = DEFAULT_TOLERANCE_SHARE * abs(mean_loss)
    return unit if math.isfinite(unit) else 0.0


def _unknown(options: Sequence[Menu], table: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    """A note on the slots that stay as they are because no cast's effect could be predicted."""
    slots = [
        f"{menu.site.name} {role}"
        for menu in options
        for role in menu.site.roles
        if not any(
            candidate(menu.site, role, parse_cast(text), row) is not None
            for text, row in table[menu.site.name, role].items()
            if text != KEEP
        )
    ]
    if not slots:
        return []
    count = sum(len(menu.site.roles) for menu in options)
    named = ", ".join(slots[:4]) + (", …" if len(slots) > 4 else "")
    return [
        (
            f"{len(slots)} of {count} slots stay as they are because no cast's damage or noise could be "
            f"predicted for them ({named}). That takes a loss of a known kind, curvature_steps of 1 or more, and a "
            "gradient at two steps or more"
        )
    ]
