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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from advisor.assemble import Draft, assemble
from advisor.candidates import Row, SlotScores
from advisor.castnames import KEEP, parse_cast
from advisor.collecting import nothing_collected
from advisor.cost import memory, own_operand, role_bytes
from advisor.errors import InvalidPlan
from advisor.hardware import Hardware
from advisor.holding_back import Spent, plan_sentences
from advisor.loss_scale_choice import LossScale
from advisor.menu import SHARE_8BIT, Limits, Menu, may_err_alike, menus
from advisor.objectives import Task
from advisor.plan import FrontPoint, Plan
from advisor.reasons import reasons
from advisor.restrictions import Restrictions
from advisor.selection import Frame, Selection, front, select
from advisor.shut_out import shut_out
from advisor.storing import KEPT_AS_IT_IS, Storage
from advisor.uniform_roles import tried_casts
from probes.casts import Cast
from probes.parameter_records import ParameterRecord
from probes.records import Site

# Default tolerance, and the front's unit where the tolerance is 0: share of the window's mean loss (design,
# contract).
DEFAULT_TOLERANCE_SHARE = 0.001

UNRESTRICTED = Restrictions()


@dataclass(frozen=True)
class Extras:
    """What is decided before the casts are, or known beside the sites.

    loss_scale  that the scores of gradients without a scale were made for
    storage     the tensors that are kept in another format
    records     of the parameters, whose gradients and state take memory
    shared      slots that hold the same tensor (`memory.py`)
    """

    loss_scale: LossScale | None = None
    storage: Storage = KEPT_AS_IT_IS
    records: Sequence[ParameterRecord] = ()
    shared: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def memory_bytes(self, sites: Sequence[Site], casts: Mapping[tuple[str, str], Cast]) -> int:
        """Bytes under the casts."""
        return memory(sites, casts, self.records, self.storage.casts, self.shared).total_bytes


NO_EXTRAS = Extras()


@nothing_collected()
def plan_from_rows(
    sites: Sequence[Site],
    rows: Iterable[Row],
    *,
    hardware: Hardware,
    tolerance: float | None,
    max_lost_batch: float,
    total_flops: float,
    mean_loss: float,
    model_name: str = "",
    notes: Sequence[str] = (),
    task: Task = SHARE_8BIT,
    restrictions: Restrictions = UNRESTRICTED,
    extras: Extras = NO_EXTRAS,
) -> Plan:
    """The best plan for these sites and scores.

    `rows`: what `Scores.rows` holds; a row's `rms` is used for the reasons where it is there. `tolerance`:
    loss units, 0 or more; None for the objective "damage" alone: no limit. `total_flops`: a step, with what the probe
    did not see. The order of `rows` does not matter. Raises InvalidPlan for limits that are not possible, for rows of
    unknown slots, and for budgets that no plan within the limits keeps.
    """
    limits = Limits.of(tolerance, max_lost_batch)
    _require_rates(task, hardware)
    kept = restrictions.kept(sites)
    scores = SlotScores(sites, rows)
    uniform, native_only = restrictions.uniform_roles, restrictions.native_only
    within = ~(scores.systematic_ratio > limits.systematic)
    if uniform:
        within &= scores.is_any_of(tried_casts(scores, limits))
    options = menus(scores, hardware, task, within=within, kept=kept, native_only=native_only, whole=uniform)
    alike = shut_out(options, scores, limits, hardware, task, kept=kept, native_only=native_only)
    total = max(total_flops, math.fsum(site.flops for site in sites))
    frame = _frame(sites, total, extras)
    selection = _selected(options, limits, frame, sites, extras, uniform)
    # Without a tolerance the reasons compare with what the whole plan costs.
    told = limits if tolerance is not None else Limits(selection.damage, max_lost_batch)
    sentences = reasons([menu for menu in options if menu.site.name not in kept], selection.chosen, scores, told)
    for menu in options:
        if menu.site.name in kept:
            for role in menu.site.roles:
                own = own_operand(menu.site, role).format
                sentences[menu.site.name, role] = f"stays {own}: {kept[menu.site.name]}."
    points: list[FrontPoint] = []
    if not uniform:
        points = front(options, told, tolerance or selection.damage or _front_unit(mean_loss), frame)
    spent = Spent(selection.damage, selection.noise_ratio)
    return assemble(
        Draft(
            kind="planned",
            sites=sites,
            hardware=hardware,
            casts={slot: option.cast for slot, option in selection.chosen.items()},
            rows={slot: option.row for slot, option in selection.chosen.items()},
            reasons=sentences,
            total_flops=total,
            model_name=model_name,
            mean_loss=mean_loss,
            tolerance=tolerance,
            max_lost_batch=max_lost_batch,
            damage=selection.damage,
            noise_ratio=selection.noise_ratio,
            optimal=selection.proven,
            optimal_gap=selection.gap,
            objective=task.objective,
            constraints=(*([f"budget: {task.budget}"] if task.budget.given else []), *restrictions.told),
            front=tuple(points),
            summary=plan_sentences(options, selection.chosen, told, spent, points, total, alike),
            notes=[*notes, *_unknown(scores, kept), *_may_err_alike(selection, limits)],
            loss_scale=extras.loss_scale,
            storage=extras.storage,
            records=extras.records,
            shared=extras.shared,
        )
    )


def _frame(sites: Sequence[Site], total_flops: float, extras: Extras) -> Frame:
    """What no cast changes: the bytes of a step but for those that the roles' casts decide one by one."""
    keep = parse_cast(KEEP)
    as_is = {(site.name, role): keep for site in sites for role in site.roles}
    decided = math.fsum(role_bytes(site, role, keep) for site in sites for role in site.roles)
    return Frame(total_flops, extras.memory_bytes(sites, as_is) - decided)


def _selected(
    options: Sequence[Menu], limits: Limits, frame: Frame, sites: Sequence[Site], extras: Extras, uniform: bool
) -> Selection:
    """The choice; its memory is counted again as a whole, since an activation that sites share saves less."""
    budget = options[0].task.budget.memory_bytes if options else None
    found = select(options, limits, frame, uniform_roles=uniform)
    while budget is not None:
        casts = {slot: option.cast for slot, option in found.chosen.items()}
        over = extras.memory_bytes(sites, casts) - budget
        if over <= 0:
            break
        frame = Frame(frame.total_flops, frame.fixed_bytes + max(over, 1.0))
        found = select(options, limits, frame, uniform_roles=uniform)
    return found


def _require_rates(task: Task, hardware: Hardware) -> None:
    if task.is_timed and not hardware.has_rates:
        raise InvalidPlan(
            f"no time can be predicted for {hardware.name}: its entry has no rates. Plan for share_8bit or memory, or "
            "give a Hardware with tflops and bandwidth_bytes_s"
        )


def _front_unit(mean_loss: float) -> float:
    unit = DEFAULT_TOLERANCE_SHARE * abs(mean_loss)
    return unit if math.isfinite(unit) else 0.0


def _unknown(scores: SlotScores, kept: Collection[str]) -> list[str]:
    """A note on the slots that stay as they are because no cast's effect could be predicted."""
    slots = [
        f"{site} {role}"
        for (site, role), places in scores.by_slot(scores.is_candidate).items()
        if site not in kept and not len(places)
    ]
    if not slots:
        return []
    count = len(scores.table)
    named = ", ".join(slots[:4]) + (", …" if len(slots) > 4 else "")
    return [
        (
            f"{len(slots)} of {count} slots stay as they are because no cast's damage or noise could be "
            f"predicted for them ({named}). That takes a loss of a known kind, curvature_steps of 1 or more, and a "
            "gradient at two steps or more"
        )
    ]


def _may_err_alike(selection: Selection, limits: Limits) -> list[str]:
    """A note on the gradients whose casts the window does not show to keep the limit on what is alike."""
    slots = [
        f"{site} {role}"
        for (site, role), option in selection.chosen.items()
        if option.row is not None and may_err_alike(option.row, limits)
    ]
    if not slots:
        return []
    named = ", ".join(slots[:4]) + (", …" if len(slots) > 4 else "")
    return [
        (
            f"the window does not settle whether the casts of {len(slots)} gradients err the same way in every batch "
            f"by more than the limit ({named}): more scored steps tell, curvature_steps=8 for example"
        )
    ]
