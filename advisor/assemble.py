"""Puts a plan together: assignments, what they cost and save in all, what is approximate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from advisor.candidates import Row
from advisor.castnames import KEEP, parse_cast
from advisor.cost import APPROXIMATIONS as COST_APPROXIMATIONS
from advisor.cost import (
    RECORDED_APPROXIMATIONS,
    TIME_APPROXIMATIONS,
    WEIGHT,
    has_backward,
    memory,
    own_operand,
    shares,
    times_s,
)
from advisor.hardware import Hardware
from advisor.intervals import interval_of_sum, intervals_of
from advisor.loss_scale_choice import LossScale, is_bare
from advisor.menu import lost_share
from advisor.objectives import Objective
from advisor.plan import Assignment, FrontPoint, LossScaling, Plan, PlannedSite, Predicted
from advisor.storing import KEPT_AS_IT_IS, Storage
from probes.casts import Cast
from probes.parameter_records import ParameterRecord
from probes.records import GRADIENT, Site

APPROXIMATIONS = (
    "damage: second order in the loss (Gauss-Newton curvature, few draws); damages of different slots add up",
    "lost batch: noise ratios of all slots add up, which bounds the first layer and is too high behind it",
    "bias: systematic errors of clipping and flushing to zero are reported by slot and are in neither sum",
)

SPEED_NOTE = (
    "speedup is null: the hardware's entry has no rates; share_8bit and share_16bit say how much work gets narrower"
)
WATCH_NOTE = (
    "a short window cannot certify a long run: largest values can grow late in training. Watch the loss, "
    "and the overflow and underflow of the sites with the largest damage"
)

Slot = tuple[str, str]


@dataclass(frozen=True)
class Draft:
    """What a plan is made of. `casts`, `rows` (None: kept or not scored) and `reasons` have every slot."""

    kind: str
    sites: Sequence[Site]
    hardware: Hardware
    casts: Mapping[Slot, Cast]
    rows: Mapping[Slot, Row | None]
    reasons: Mapping[Slot, str]
    total_flops: float
    model_name: str
    mean_loss: float | None = None
    tolerance: float | None = None
    max_lost_batch: float | None = None
    damage: float | None = None
    noise_ratio: float | None = None
    optimal: bool | None = None
    optimal_gap: float | None = None
    objective: Objective = "share_8bit"
    constraints: Sequence[str] = ()
    front: tuple[FrontPoint, ...] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    loss_scale: LossScale | None = None
    storage: Storage = KEPT_AS_IT_IS
    records: Sequence[ParameterRecord] = ()
    shared: Mapping[Slot, Slot] = field(default_factory=dict)
    summary: Sequence[str] = ()


def assemble(draft: Draft) -> Plan:
    """The plan of a draft; `damage` and `noise_ratio` are the exact sums that were held to the limits."""
    seen = math.fsum(site.flops for site in draft.sites)
    total = max(draft.total_flops, seen) if math.isfinite(draft.total_flops) else seen
    assignments = _assignments(draft)
    narrow = shares(draft.sites, draft.casts, draft.hardware)
    keep = parse_cast(KEEP)
    as_is = dict.fromkeys(draft.casts, keep)
    before = memory(draft.sites, as_is, draft.records, shared=draft.shared)
    after = memory(draft.sites, draft.casts, draft.records, draft.storage.casts, draft.shared)
    time_before_s, time_after_s = None, None
    if draft.hardware.has_rates:
        time_before_s, time_after_s = times_s(draft.sites, (as_is, draft.casts), draft.hardware)
    widths = {own_operand(site, WEIGHT).format or "fp32" for site in draft.sites if WEIGHT in site.roles}
    own_weights = "+".join(sorted(widths)) or "fp32"
    return Plan(
        schema="numerics-advisor/plan/1",
        kind="planned" if draft.kind == "planned" else "uniform",
        model=draft.model_name,
        hardware=draft.hardware.name,
        tolerance=draft.tolerance,
        max_lost_batch=draft.max_lost_batch,
        objective=draft.objective,
        constraints=tuple(draft.constraints),
        mean_loss=draft.mean_loss,
        predicted=Predicted(
            damage=draft.damage,
            damage_se=_joint_error(assignments),
            damage_interval=_joint_interval(draft),
            noise_ratio=draft.noise_ratio,
            lost_batch_share=None if draft.noise_ratio is None else lost_share(draft.noise_ratio),
            share_8bit=narrow.flops_8bit / total if total else 0.0,
            share_16bit=narrow.flops_16bit / total if total else 0.0,
            flops=total,
            speedup=time_before_s / time_after_s if time_before_s and time_after_s else None,
            time_s=time_after_s,
            time_before_s=time_before_s,
            memory_bytes=after.total_bytes,
            memory_bytes_before=before.total_bytes,
            optimal=draft.optimal,
            optimal_gap=draft.optimal_gap,
        ),
        loss_scaling=_loss_scaling(draft),
        master_weights=draft.storage.master_weights or own_weights,
        optimizer_state=draft.storage.optimizer_state or own_weights,
        storage=draft.storage.rows,
        assignments=tuple(assignments),
        sites=tuple(_planned_site(site) for site in draft.sites),
        front=draft.front,
        summary=tuple(draft.summary),
        notes=(*draft.notes, *_slower(draft, time_before_s, time_after_s), *_notes(draft, seen, total)),
        approximations=(
            *APPROXIMATIONS,
            *(RECORDED_APPROXIMATIONS if draft.records else COST_APPROXIMATIONS),
            *(TIME_APPROXIMATIONS if draft.hardware.has_rates else ()),
        ),
    )


def _assignments(draft: Draft) -> list[Assignment]:
    slots = [(site.name, role) for site in draft.sites for role in site.roles]
    intervals = dict(zip(slots, intervals_of([draft.rows[slot] or {"role": slot[1]} for slot in slots]), strict=True))
    return [_assignment(draft, slot, intervals[slot]) for slot in slots]


def _assignment(draft: Draft, slot: Slot, interval: tuple[float, float] | None) -> Assignment:
    role = slot[1]
    cast, row = draft.casts[slot], draft.rows[slot]
    text = str(cast)
    kept = text == KEEP
    score: Row = row or {}

    def value(name: str, when_kept: float | None = None) -> float | None:
        found: Any = when_kept if kept else score.get(name)
        return None if found is None else float(found)

    forward = role != GRADIENT
    noise = value("noise_ratio", 0.0)
    return Assignment(
        site=slot[0],
        role=role,
        cast=text,
        damage=value("damage", 0.0) if forward else None,
        damage_se=value("damage_se", 0.0) if forward else None,
        damage_interval=((0.0, 0.0) if kept else interval) if forward else None,
        damage_from=None if kept else score.get("damage_from"),
        noise_ratio=noise,
        lost_batch_share=None if noise is None else lost_share(noise),
        bias=value("bias"),
        sqnr_db=value("sqnr_db"),
        underflow=value("underflow"),
        subnormal=value("subnormal"),
        overflow=value("overflow"),
        amax=value("amax"),
        flags=() if kept else tuple(score.get("flags") or ()),
        reason=draft.reasons[slot],
    )


def _planned_site(site: Site) -> PlannedSite:
    return PlannedSite(
        site=site.name,
        op=site.op,
        roles=site.roles,
        parameter=site.parameter,
        parameter_shape=site.parameter_shape,
        flops=site.flops,
    )


def _joint_error(assignments: Sequence[Assignment]) -> float | None:
    """Root of the sum of squared standard errors; None where a forward slot's is unknown."""
    errors = [one.damage_se for one in assignments if one.role != GRADIENT]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def _joint_interval(draft: Draft) -> tuple[float, float] | None:
    """The interval of the sum of damages; None where that of a forward slot is unknown."""
    cast = [slot for slot, given in draft.casts.items() if slot[1] != GRADIENT and str(given) != KEEP]
    rows = [draft.rows[slot] for slot in cast]
    known = [row for row in rows if row is not None]
    return interval_of_sum(known) if len(known) == len(rows) else None


def _loss_scaling(draft: Draft) -> LossScaling:
    """The loss scale that the scores were made for, where a chosen cast needs it; why there is none otherwise."""
    bare = [slot for slot, cast in draft.casts.items() if slot[1] == GRADIENT and is_bare(cast)]
    if not bare:
        why = "every gradient that is cast has a scale of its own or a format with fp32's exponents"
        return LossScaling(kind="none", reason=why)
    scale = draft.loss_scale
    if scale is not None:
        return LossScaling(kind="static", scale=scale.factor, reason=scale.told(len(bare)))
    shares = [row["underflow"] for slot in bare if (row := draft.rows[slot]) is not None]
    worst = f"; at worst {100 * max(shares):.2g}% of a gradient underflows" if shares else ""
    return LossScaling(kind="none", reason=f"{len(bare)} gradients are cast without a scale and were scored so{worst}")


def _notes(draft: Draft, seen: float, total: float) -> list[str]:
    notes = []
    if total > seen:
        notes.append(
            f"{100 * (1 - seen / total):.2g}% of the matrix FLOPs were seen at no site; they stay "
            "as they are and count as not narrow"
        )
    if any(not has_backward(site) for site in draft.sites):
        names = [site.name for site in draft.sites if not has_backward(site)]
        notes.append(f"no gradient reached {len(names)} sites in the window ({', '.join(names[:3])})")
    notes += draft.storage.notes
    if draft.optimal is False and draft.optimal_gap is not None:
        notes.append(_gap_note(draft))
    if not draft.hardware.has_rates:
        notes.append(SPEED_NOTE)
    return [*notes, WATCH_NOTE]


def _slower(draft: Draft, before_s: float | None, after_s: float | None) -> list[str]:
    """A note where the plan takes longer than no plan: small products, whose casts cost more than they gain."""
    if before_s is None or after_s is None or after_s <= before_s:
        return []
    way_out = "" if draft.objective == "time" else "; objective='time' narrows only what gains by it"
    longer = f"{after_s / before_s:.2g} times as long with this plan"
    why = "at these sizes the casts cost more than 8 bits gain"
    return [f"on {draft.hardware.name} the matrix products take {longer}: {why}{way_out}"]


def _gap_note(draft: Draft) -> str:
    """By how much a plan that the solver did not find could be better."""
    gap = draft.optimal_gap
    unit = {
        "share_8bit": f"{100 * (gap or 0):.2g}% of the matrix FLOPs more in 8 bits",
        "time": f"{gap:.2g} s a step less",
        "memory": f"{gap:.2g} bytes less",
        "damage": f"{gap:.2g} less loss",
    }
    return f"the solver stopped before its proof was complete: another plan might have {unit[draft.objective]} at most"
