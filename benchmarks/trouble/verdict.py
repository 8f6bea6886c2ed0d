"""When a recipe fails and when a plan mends it: fixed here, before anything is run.

Runs are paired by seed: an arm's gap at a seed is its final loss less that of fp32 with the same seed, batches and
initial weights. The spread is the standard deviation of fp32's final loss over the seeds.

    fails   the 95% interval of the mean gap (Student's t) lies above the spread, or a loss is not finite
    mended  the mean gap is at most the spread
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

SEEDS = tuple(range(6))
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gap:
    """The mean of paired gaps and its interval, loss units; infinite where a loss was not finite."""

    mean: float
    lower: float
    upper: float

    @classmethod
    def of(cls, losses: Sequence[float], fp32: Sequence[float]) -> Gap:
        """Of an arm's final losses beside fp32's, seed by seed."""
        gaps = [loss - base for loss, base in zip(losses, fp32, strict=True)]
        if not all(map(math.isfinite, gaps)):
            return cls(math.inf, math.inf, math.inf)
        mean = statistics.fmean(gaps)
        reach = float(student.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        return cls(mean, mean - reach, mean + reach)


def spread(fp32: Sequence[float]) -> float:
    """The seed-to-seed standard deviation of fp32's final loss."""
    return statistics.stdev(fp32)


def fails(gap: Gap, of_seeds: float) -> bool:
    """Whether a recipe's loss is outside the spread."""
    return gap.lower > of_seeds


def mended(gap: Gap, of_seeds: float) -> bool:
    """Whether a plan's loss is within it."""
    return gap.mean <= of_seeds
