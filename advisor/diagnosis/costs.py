"""What a cast is predicted to cost at one slot, and whether that is harmless."""

from __future__ import annotations

import math

from advisor.diagnosis.findings import THRESHOLDS
from advisor.scores import score
from probes.casts import Cast
from probes.records import GRADIENT, Slot
from probes.window import Window

HARMLESS = 0.1  # ours: of what a whole plan may cost, the share that one tensor may


def cost_of(window: Window, slot: Slot, cast: Cast) -> tuple[dict[str, float], bool]:
    """`damage`, of a gradient `lost_batch_share`, by name, and whether it is below a tenth of what the planner allows a
    whole plan by default. Nothing and False where neither is known."""
    (row,) = score(window, [cast], slots=[slot]).rows
    if slot.role == GRADIENT:
        lost = row["lost_batch_share"]
        return ({}, False) if lost is None else ({"lost_batch_share": lost}, lost <= HARMLESS * THRESHOLDS.lost_batch)
    damage, losses = row["damage"], [loss for loss in window.losses if math.isfinite(loss)]
    if damage is None or not losses:
        return {}, False
    return {"damage": damage}, damage <= HARMLESS * THRESHOLDS.tolerance_share * abs(math.fsum(losses) / len(losses))
