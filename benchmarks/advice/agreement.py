"""How well a prediction agrees with the truth: rank correlation, ratios, and what was aimed at.

Only pairs whose truth is decided count. A quantity that is to rank them, SQNR say, is compared by its ranks alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from scipy.stats import rankdata

from probes.records import GRADIENT

FEWEST = 4  # decided pairs, below which nothing is said


@dataclass(frozen=True)
class Target:
    """What a role of a model is to reach: a rank correlation, and a median of predicted over measured."""

    spearman: float
    lowest_ratio: float
    highest_ratio: float


TARGETS = MappingProxyType(
    {"input": Target(0.95, 0.7, 1.4), "weight": Target(0.95, 0.7, 1.4), GRADIENT: Target(0.9, 0.5, 2.0)}
)
"""Set before the first table was made. Other roles (attention's operands) have the forward ones' numbers beside them
for comparison, and no target."""
PLAN_FACTOR = 2.0  # the predicted total of a plan is to be within this factor of its measured gap


@dataclass(frozen=True)
class Agreement:
    """Over `decided` of `pairs` pairs; NaN with fewer than four decided or without a prediction for any.

    predicted   of the decided pairs, how many had a finite prediction
    spearman    rank correlation of predicted and measured
    ratio       median of predicted over measured; `low`, `high`: its quartiles
    """

    pairs: int
    decided: int
    predicted: int
    spearman: float
    ratio: float
    low: float
    high: float

    def meets(self, target: Target) -> bool:
        """Every decided pair is predicted, and both numbers are within the target."""
        return (
            self.predicted == self.decided >= FEWEST
            and self.spearman >= target.spearman
            and target.lowest_ratio <= self.ratio <= target.highest_ratio
        )


@dataclass(frozen=True)
class Compared:
    """One pair: measured with its standard error, and a prediction (None: there is none)."""

    measured: float
    standard_error: float
    predicted: float | None

    @property
    def decided(self) -> bool:
        """The truth exceeds twice its standard error."""
        return self.measured > 2 * self.standard_error


def agreement(compared: Sequence[Compared]) -> Agreement:
    """Of predictions in the truth's own units."""
    decided = [one for one in compared if one.decided]
    known = [
        (one.predicted, one.measured) for one in decided if one.predicted is not None and math.isfinite(one.predicted)
    ]
    ratios = [predicted / measured for predicted, measured in known]
    enough = len(known) >= FEWEST
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if enough else (math.nan,) * 3
    rank = spearman(*zip(*known, strict=True)) if enough else math.nan
    return Agreement(len(compared), len(decided), len(known), rank, ratio, low, high)


def spearman(one: Iterable[float], other: Iterable[float]) -> float:
    """Rank correlation, ties given their mean rank; NaN where one of them is the same everywhere."""
    first, second = rankdata(list(one)), rankdata(list(other))
    if first.std() == 0 or second.std() == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def ranking(compared: Sequence[Compared], by: Sequence[float | None]) -> tuple[float, int]:
    """Rank correlation of the truth with any quantity that should rise with it, and over how many decided pairs."""
    known = [
        (one.measured, value)
        for one, value in zip(compared, by, strict=True)
        if one.decided and value is not None and not math.isnan(value)
    ]
    return (spearman(*zip(*known, strict=True)) if len(known) >= FEWEST else math.nan), len(known)


def within_factor(predicted: float, measured: float, standard_error: float, factor: float = PLAN_FACTOR) -> bool:
    """Whether some value within two standard errors of the measured one is within the factor of the predicted."""
    low, high = measured - 2 * standard_error, measured + 2 * standard_error
    return low <= predicted * factor and predicted / factor <= high


def group_of(role: str) -> str:
    """The role as the table has it: a recurrent layer's weights are weights, attention's operands are others."""
    if role in TARGETS:
        return role
    return "weight" if role.startswith("weight") else "other"


def by_group(roles: Mapping[object, str]) -> dict[str, list[object]]:
    """What belongs to each group of roles, in the table's order."""
    found: dict[str, list[object]] = {name: [] for name in (*TARGETS, "other")}
    for key, role in roles.items():
        found[group_of(role)].append(key)
    return {name: keys for name, keys in found.items() if keys}
