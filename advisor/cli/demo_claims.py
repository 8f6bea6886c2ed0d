"""What the demo claims, checked against what it measured.

Nothing here is a result; only the limits are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEAST_FALL = 1 / 3  # of the baseline's loss, from its first step to the mean of its last ones
LAST_STEPS = 10
# Gaps are held against what the baseline's training gained: its first loss minus its held-out loss at the end. Two
# fp32 trainings that differ by a rounding error end up to 0.5% of that apart.
LARGEST_PLAN_GAP = 0.02
SMALLEST_BAD_GAP = 0.05  # and its interval must lie above the plan's


@dataclass(frozen=True)
class Claim:
    """said: the claim with its numbers; holds: whether the numbers bear it out."""

    said: str
    holds: bool


def claims(run: dict[str, Any], bad_run: dict[str, Any], window: dict[str, Any]) -> list[Claim]:
    """The demo's claims on a run with the plan, a run with a bad recipe, and the window that was recorded."""
    verdict, bad = run["verdict"], bad_run["verdict"]
    first, last = _ends([point["loss"] for point in run["curves"]["baseline"]])
    gained = first - verdict["baseline_loss"]
    gap, bad_gap = verdict["gap"], _or_infinite(bad["gap"])
    low = _or_infinite((bad["gap_interval"] or [None])[0])
    seen = window["coverage"]["share"]
    return [
        Claim(
            f"the fp32 baseline learns: its loss falls by at least a third ({first:.2f} -> {last:.2f})",
            last <= (1 - LEAST_FALL) * first,
        ),
        Claim(f"every matrix product was seen ({100 * seen:.1f}% of the FLOPs)", seen > 0.999),
        Claim(
            f"the plan puts products in 8 bits ({100 * (verdict['share_8bit'] or 0):.0f}% of the FLOPs)",
            (verdict["share_8bit"] or 0) > 0,
        ),
        Claim(
            f"the plan costs little: gap {_signed(gap)}, at most {100 * LARGEST_PLAN_GAP:.0f}% of what "
            f"training gained ({LARGEST_PLAN_GAP * gained:.4f})",
            gap is not None and gap <= LARGEST_PLAN_GAP * gained,
        ),
        Claim(
            f"the bad recipe costs much: gap {_signed(bad_gap)}, at least {100 * SMALLEST_BAD_GAP:.0f}% of it "
            f"({SMALLEST_BAD_GAP * gained:.4f}), intervals apart",
            bad_gap >= SMALLEST_BAD_GAP * gained and low > _or_infinite((verdict["gap_interval"] or [None, None])[1]),
        ),
    ]


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    """The first loss, and the mean of the last ones; NaN (which bears out no claim) where there is none."""
    if not losses:
        return math.nan, math.nan
    last = losses[-LAST_STEPS:]
    return losses[0], sum(last) / len(last)


def _or_infinite(value: float | None) -> float:
    """A loss that became NaN is as bad as can be."""
    return math.inf if value is None or math.isnan(value) else value


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.4f}"
