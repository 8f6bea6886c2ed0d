"""Was the window long enough to settle a choice, and what window would be?

A choice is settled where the whole interval lies on one side of the limit. Where it straddles the limit, more scored
steps narrow it: what their draws add to σ falls with the root of their number, drift and calibration stay. So either
some multiple of them settles it, or none does, and then only a paired run can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from advisor.castnames import parse_cast
from advisor.confidence import FEWEST_STEPS, octaves_of_draws
from advisor.intervals import DEVIATIONS, centred, interval_of, spread_of
from probes.tiles import tiling_name

MOST_TIMES = 16  # ours: as many scored steps as anyone would add


@dataclass(frozen=True)
class Settling:
    """How an interval that straddles a limit can be narrowed.

    times    how many times the scored steps settle it if the damage is as predicted; None: no number up to MOST_TIMES
    factor   from its middle to either end, the interval then (with MOST_TIMES, if `times` is None)
    few_steps  whether the cast was seen at too few steps to tell how its damage drifts
    finer    of a cast with scales finer than a tensor's, which windows sketch for at the scored steps alone: what to
             open the window with, as `row`
    """

    lower: float
    upper: float
    times: int | None
    factor: float
    few_steps: bool
    finer: str | None = None

    @property
    def clause(self) -> str:
        """The same in words."""
        if self.few_steps and self.finer is not None:
            return (
                f"its scales were sketched at fewer than {FEWEST_STEPS} steps, and how it drifts is unknown: "
                f"open the window with finer=['{self.finer}'] or curvature_steps={FEWEST_STEPS}"
            )
        if self.few_steps:
            return f"record {FEWEST_STEPS} steps or more: with fewer, how it drifts is unknown"
        if self.times is None:
            return (
                f"more scored steps would leave a factor of {self.factor:.2g} either way, from drift and calibration: "
                "only a paired run settles it"
            )
        return (
            f"{self.times} times the scored steps (curvature_steps={2 * self.times} where it was 2) would narrow it to "
            f"a factor of {self.factor:.2g} either way and settle it"
        )


def settling(row: Mapping[str, Any], limit: float) -> Settling | None:
    """What would settle whether this score's damage is within a limit above 0; None where it is settled, or unknown."""
    return settling_within(row, interval_of(row), limit)


def settling_within(row: Mapping[str, Any], ends: tuple[float, float] | None, limit: float) -> Settling | None:
    """The same where the score's interval is known."""
    if ends is None or not ends[0] < limit < ends[1]:
        return None
    found = _narrowed(ends, limit, centred(row), spread_of(row), _draws(row), row.get("confidence") is None)
    return replace(found, finer=_finer(row))


def _finer(row: Mapping[str, Any]) -> str | None:
    cast = parse_cast(row["cast"])
    return None if cast.has_one_scale else tiling_name(cast).removesuffix("/current")


def _draws(row: Mapping[str, Any]) -> float:
    return float(octaves_of_draws(row.get("damage_se") or 0.0, row["damage"])) if row["damage"] > 0 else 0.0


def _narrowed(
    ends: tuple[float, float], limit: float, middle: float, spread: float, draws: float, few_steps: bool
) -> Settling:
    """σ without draws stays; that of the draws falls with the root of their number."""
    rest = max(spread**2 - draws**2, 0.0)
    needed = (math.log2(limit / middle) / DEVIATIONS) ** 2 if middle > 0 else 0.0
    times: int | None = None
    if needed > rest:
        times = max(2, math.ceil(draws**2 / (needed - rest)))
    if times is not None and times > MOST_TIMES:
        times = None
    factor = 2.0 ** min(DEVIATIONS * math.sqrt(rest + draws**2 / (times or MOST_TIMES)), 99.0)
    return Settling(*ends, times=times, factor=factor, few_steps=few_steps)
