"""From windows to a plan: score, set the limits, and hand both to the planner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from advisor.castnames import require_plannable
from advisor.errors import InvalidPlan
from advisor.hardware import Hardware, hardware_named
from advisor.plan import Plan
from advisor.planner import DEFAULT_TOLERANCE_SHARE, plan_from_rows
from advisor.scores import DEFAULT_CASTS, score
from advisor.watching import watched
from probes.casts import Cast
from probes.errors import WindowError
from probes.formats import FORMATS
from probes.window import Window

WORST = (
    "damage",
    "damage_se",
    "noise_ratio",
    "lost_batch_share",
    "underflow",
    "subnormal",
    "overflow",
    "amax",
)


def recommend(
    window: Window | Sequence[Window],
    hardware: str = "h100",
    tolerance: float | None = None,
    max_lost_batch: float = 0.02,
    casts: Sequence[str | Cast] | None = None,
) -> Plan:
    """The plan that puts most work into 8 bits within the limits, and says why.

    window          one window, or several of the same model (early and late, say): each cast then counts with the
                    worst that any of them saw
    hardware        a name of the hardware table: which pairs of formats its matrix units take
    tolerance       rise of the loss that all casts together may cost, in loss units; default 0.1% of the window's
                    mean loss
    max_lost_batch  share of the batch that rounding noise in the gradients may cost, at least 0 and below 1
    casts           candidates; default: e4m3fn, e5m2 and int8 per tensor, bf16 and fp16

    Raises InvalidPlan for limits that make no sense, UnknownHardware, CastNotScored for a candidate that a window does
    not tell enough of (scales by row, column or block), and WindowError for windows of different models.
    """
    windows = [window] if isinstance(window, Window) else list(window)
    if not windows:
        raise WindowError("recommend needs a window, or a list of at least one")
    target = hardware_named(hardware)
    last = windows[-1]
    _require_same_model(windows)
    losses = [loss for each in windows for loss in each.losses if math.isfinite(loss)]
    mean_loss = math.fsum(losses) / len(losses) if losses else math.nan
    if tolerance is None:
        if not losses:
            raise InvalidPlan(
                "the window has no finite loss (no backward call on a scalar was seen, or the loss was NaN or "
                "infinite), so there is no default tolerance: give tolerance=… in loss units"
            )
        tolerance = DEFAULT_TOLERANCE_SHARE * abs(mean_loss)
    notes = [note for each in windows for note in each.notes]
    if len(windows) > 1:
        notes.append(f"made from {len(windows)} windows; each cast counts with the worst that any of them saw")
    if not casts:
        notes += _left_out(target)
    candidates = [Cast.parse(cast) if isinstance(cast, str) else cast for cast in casts or DEFAULT_CASTS]
    require_plannable(candidates)
    plan = plan_from_rows(
        last.sites,
        _worst([score(each, candidates, slots=each.product_slots).rows for each in windows]),
        hardware=target,
        tolerance=tolerance,
        max_lost_batch=max_lost_batch,
        total_flops=last.total_flops,
        mean_loss=mean_loss,
        model_name=last.model_name,
        notes=notes,
    )
    return watched(plan, windows)


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
            row["sqnr_db"] = -float(_worse(-row["sqnr_db"], -other["sqnr_db"]) or 0.0)
    return list(rows.values())


def _worse(one: float | None, other: float | None) -> float | None:
    """The larger; unknown (None) is worse than any number, and NaN worse than any but that."""
    if one is None or other is None:
        return None
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
