"""From windows to a plan: score, set the limits, and hand both to the planner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advisor.castnames import require_plannable
from advisor.cost import shared_tensors
from advisor.diagnosis.findings import Finding
from advisor.errors import CastNotScored, InvalidPlan
from advisor.hardware import Hardware, hardware_named
from advisor.loss_scale_choice import LossScale, is_bare, loss_scale_for, scaled_rows, under
from advisor.objectives import Budget, Objective, Task
from advisor.plan import Plan
from advisor.planner import DEFAULT_TOLERANCE_SHARE, Extras, plan_from_rows
from advisor.restrictions import Restrictions, globs
from advisor.scores import DEFAULT_CASTS, score
from advisor.storing import AS_IS, storage_of
from advisor.watching import watched
from probes.casts import Cast
from probes.errors import WindowError
from probes.formats import FORMATS
from probes.records import GRADIENT
from probes.window import Window

BY_ROW = Cast.parse("e4m3fn/row")

WORST = (
    "damage",
    "damage_se",
    "underflow",
    "subnormal",
    "overflow",
    "amax",
)
NOISE = ("noise_ratio", "lost_batch_share", "lost_batch_interval", "noise_from")
SYSTEMATIC = ("systematic_ratio", "systematic_ratio_se")
"""What a row says of one measurement, and so has from one window: the one in which the first of them is worst."""


def recommend(
    window: Window | Sequence[Window],
    hardware: str | Hardware = "h100",
    tolerance: float | None = None,
    max_lost_batch: float = 0.02,
    casts: Sequence[str | Cast] | None = None,
    *,
    objective: Objective = "share_8bit",
    budget: Mapping[str, float] | None = None,
    uniform_roles: bool = False,
    keep: str | Sequence[str] | None = None,
    only: str | Sequence[str] | None = None,
    first_last: int | bool = 0,
    native_only: bool = False,
    master_weights: str = AS_IS,
    optimizer_state: str = AS_IS,
    findings: Sequence[Sequence[Finding]] | None = None,
) -> Plan:
    """The plan that puts most work into 8 bits within the limits, or is best at another objective, and says why.

    window          one window, or several of the same model (early and late, say): each cast then counts with the
                    worst that any of them saw
    hardware        a name of the hardware table, or a Hardware: which pairs of formats its matrix units take, how fast
    tolerance       rise of the loss that all casts together may cost, in loss units; default 0.1% of the window's
                    mean loss, and none for the objective "damage"
    max_lost_batch  share of the batch that rounding noise in the gradients may cost, at least 0 and below 1. A fortieth
                    of that noise may be alike in every batch, cast by cast, because that does not average out
    casts           candidates; default: e4m3fn, e5m2 and int8 per tensor, bf16 and fp16, and e4m3fn with a scale a row
                    where the hardware multiplies that and the window tells of it
    objective       "share_8bit", "time" (of matrix products and casts), "memory", or "damage": the least, within a
                    budget
    budget          what the plan must reach: {"share_8bit": at least, "time_s": at most, "memory_bytes": at most}
    uniform_roles   one cast a role, the same at every site that is cast at all
    keep            globs of modules or sites that stay as they are
    only            globs of those that may be touched
    first_last      how many sites at the beginning and at the end of the model stay as they are; True: 1
    native_only     casts to 8 bits only at sites all of whose products native kernels run
    master_weights, optimizer_state
                    "as-is"; a cast such as "bf16" or "fp16", for all; or "auto": 16 bits where the window shows that
                    nothing is lost by it
    findings        what `diagnose` says of each window, where that is known already: the notes say the severe ones

    Raises InvalidPlan for limits and demands that make no sense or cannot be kept, and for globs that match nothing;
    UnknownHardware; CastNotScored for a candidate that a window does not tell enough of (scales by row or block without
    `finer`), and WindowError for windows of different models.
    """
    windows = [window] if isinstance(window, Window) else list(window)
    if not windows:
        raise WindowError("recommend needs a window, or a list of at least one")
    if findings is not None and len(findings) != len(windows):
        raise WindowError(f"recommend got findings of {len(findings)} windows and {len(windows)} windows")
    target = hardware_named(hardware)
    task = Task(objective, Budget.of(budget))
    restrictions = Restrictions(globs(keep), globs(only), int(first_last), uniform_roles, native_only)
    last = windows[-1]
    _require_same_model(windows)
    losses = [loss for each in windows for loss in each.losses if math.isfinite(loss)]
    mean_loss = math.fsum(losses) / len(losses) if losses else math.nan
    if tolerance is None and objective != "damage":
        tolerance = _default_tolerance(mean_loss)
    notes = [note for each in windows for note in each.notes]
    if len(windows) > 1:
        notes.append(f"made from {len(windows)} windows; each cast counts with the worst that any of them saw")
    if not casts:
        notes += _left_out(target)
    candidates = [Cast.parse(cast) if isinstance(cast, str) else cast for cast in casts or _usual(windows, target)]
    require_plannable(candidates)
    scale = loss_scale_for(windows, candidates)
    plan = plan_from_rows(
        last.sites,
        _worst([_rows(each, candidates, scale) for each in windows]),
        hardware=target,
        tolerance=tolerance,
        max_lost_batch=max_lost_batch,
        total_flops=last.total_flops,
        mean_loss=mean_loss,
        model_name=last.model_name,
        notes=notes,
        task=task,
        restrictions=restrictions,
        extras=Extras(
            loss_scale=scale,
            storage=storage_of(windows, master_weights, optimizer_state),
            records=last.parameter_records,
            shared=shared_tensors(last),
        ),
    )
    return watched(plan, windows, findings)


def _default_tolerance(mean_loss: float) -> float:
    if math.isnan(mean_loss):
        raise InvalidPlan(
            "the window has no finite loss (no backward call on a scalar was seen, or the loss was NaN or "
            "infinite), so there is no default tolerance: give tolerance=… in loss units"
        )
    return DEFAULT_TOLERANCE_SHARE * abs(mean_loss)


def _usual(windows: Sequence[Window], target: Hardware) -> list[Cast]:
    """The usual candidates, and scales by row where they can be multiplied and every window tells of them."""
    found = list(DEFAULT_CASTS)
    if target.takes(BY_ROW.format.name, BY_ROW.format.name) and target.takes_scales("row", "row"):
        try:
            for each in windows:
                score(each, [BY_ROW], slots=each.product_slots)
        except CastNotScored:
            return found
        found.append(BY_ROW)
    return found


def _rows(window: Window, casts: Sequence[Cast], scale: LossScale | None) -> list[dict[str, Any]]:
    """The scores of a window's products, gradients without a scale of their own under the loss scale."""
    rows: list[dict[str, Any]] = score(window, casts, slots=window.product_slots).rows
    if scale is None:
        return rows
    gradients = [slot for slot in window.product_slots if slot.role == GRADIENT]
    bare = {str(cast): cast for cast in casts if is_bare(cast)}
    scaled = score(window, [under(cast, scale.factor) for cast in bare.values()], slots=gradients).rows
    others = [row for row in rows if row["role"] != GRADIENT or row["cast"] not in bare]
    return [*others, *scaled_rows(scaled, scale.factor)]


def _left_out(target: Hardware) -> list[str]:
    """A note on the formats of 8 bits that the hardware multiplies and no usual candidate has."""
    usual = {cast.format.name for cast in DEFAULT_CASTS}
    others = [name for name in target.formats if name not in usual and FORMATS[name].bits <= 8]
    if not others:
        return []
    return [f"{target.name} also multiplies {', '.join(others)}; name them among the casts to have them as candidates"]


def _require_same_model(windows: Sequence[Window]) -> None:
    sites = {site.name for site in windows[-1].sites}
    for each in windows:
        other = sites.symmetric_difference(site.name for site in each.sites)
        if other:
            raise WindowError(f"the windows are not of one model: only some have {', '.join(sorted(other)[:5])}")


def _worst(tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a slot and cast: the last window's, with the worst of each number that limits a plan."""
    rows = {(row["site"], row["role"], row["cast"]): dict(row) for row in tables[-1]}
    for table in tables[:-1]:
        for other in table:
            row = rows.setdefault((other["site"], other["role"], other["cast"]), dict(other))
            for name in WORST:
                row[name] = _worse(row[name], other[name])
            noisier = max((row, other), key=lambda one: _badness(one["noise_ratio"], unknown=math.inf))
            row |= {name: noisier.get(name) for name in NOISE}
            # What a window from before it was measured does not tell limits nothing.
            more_alike = max((row, other), key=lambda one: _badness(one.get("systematic_ratio"), unknown=-math.inf))
            row |= {name: more_alike.get(name) for name in SYSTEMATIC}
            row["sqnr_db"] = -float(_worse(-row["sqnr_db"], -other["sqnr_db"]) or 0.0)
    return list(rows.values())


def _badness(value: float | None, unknown: float) -> tuple[float, bool]:
    """Sorts a measurement; `unknown`: what one that is missing counts as, NaN being next to it."""
    if value is None:
        return unknown, True
    return (unknown, False) if math.isnan(value) else (value, False)


def _worse(one: float | None, other: float | None) -> float | None:
    """The larger; unknown (None) is worse than any number, and NaN worse than any but that."""
    if one is None or other is None:
        return None
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
