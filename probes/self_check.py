"""A check of the backward error on what is known of it: int8 against e4m3fn on products of Student-t matrices.

The fewer degrees of freedom ν, the heavier the tails. An integer's steps are as wide as the largest value wants them,
so a float is better below some ν and the integer above it: with one scale a tensor at about 6, with a scale for every
row of the left matrix and every column of the right one at about 2.5 (Rasquinha and Tabak 2024, sec. IV-A). Medians to
compare with are from an independent calculation in numpy, 10 trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from probes.backward_error import backward_errors
from probes.casts import Cast

FREEDOM = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 15.0, 30.0, math.inf)
SIZE = 512
GRANULARITIES = ("tensor", "row")


class Reference(NamedTuple):
    """A median of 10 trials, and the spread of one trial: the standard deviation of its logarithm, ours of 40."""

    median: float
    spread: float


REFERENCE: Mapping[float, Mapping[str, Reference]] = MappingProxyType(
    {
        3.0: {"int8": Reference(0.0131, 0.38), "e4m3fn": Reference(0.00245, 0.004)},
        5.0: {"int8": Reference(0.00327, 0.18), "e4m3fn": Reference(0.00203, 0.004)},
        15.0: {"int8": Reference(0.00109, 0.08), "e4m3fn": Reference(0.00182, 0.003)},
        math.inf: {"int8": Reference(0.00071, 0.038), "e4m3fn": Reference(0.00175, 0.003)},
    }
)
"""ν → format → median backward error with one scale a tensor, 512 × 512. int8's hangs on the few largest values."""
REFERENCE_TRIALS = 10
REFERENCE_DIGITS = 0.007  # 0.00071 may stand for anything within so much of it


class Crossover(NamedTuple):
    """The ν above which int8 is known to be better; up to `float_until` e4m3fn must be, from `integer_from` on int8."""

    known: float
    float_until: float
    integer_from: float


CROSSOVERS: Mapping[str, Crossover] = MappingProxyType({"tensor": Crossover(6, 4, 12), "row": Crossover(2.5, 2, 3)})


@dataclass(frozen=True)
class SelfCheck:
    """Median backward errors for one ν and one granularity, mean over the trials of [size, size] matrices."""

    freedom: float
    granularity: str
    int8: float
    e4m3fn: float
    trials: int
    size: int = SIZE

    @property
    def better(self) -> str:
        """The format with the smaller median."""
        return "int8" if self.int8 < self.e4m3fn else "e4m3fn"


def self_check(trials: int = 3, size: int = SIZE, freedom: Sequence[float] = FREEDOM, seed: int = 0) -> list[SelfCheck]:
    """One record a granularity and ν, in rising ν: every element of `trials` products of [size, size] matrices.

    The known figures are for the default size. Takes about a second a trial, and draws from no generator but its own.
    Raises ValueError for no trial or an empty matrix.
    """
    if trials < 1 or size < 1:
        raise ValueError(f"a self-check takes one trial and a size of 1 at least, got {trials} and {size}")
    casts = {
        (name, by): Cast.parse(f"{name}/{by}/current/nearest") for name in ("int8", "e4m3fn") for by in GRANULARITIES
    }
    generator = np.random.default_rng(seed)
    medians: dict[tuple[float, str, str], list[float]] = {}
    for nu in sorted(freedom):
        for _ in range(trials):
            left, right = (torch.from_numpy(_student(nu, size, generator)) for _ in range(2))
            for (name, by), cast in casts.items():
                errors = backward_errors(left, right, cast)
                medians.setdefault((nu, name, by), []).append(float(errors.median()))
    means = {key: sum(found) / trials for key, found in medians.items()}
    return [
        SelfCheck(nu, by, means[nu, "int8", by], means[nu, "e4m3fn", by], trials, size)
        for by in GRANULARITIES
        for nu in sorted(freedom)
    ]


def crossover(records: Iterable[SelfCheck], granularity: str) -> float:
    """The ν at which int8 becomes better than e4m3fn; NaN where it does not, 0 where it is better from the first on.

    Between two records the logarithm of the ratio of medians is taken as linear in log ν (1/ν next to infinity).
    """
    chosen = sorted((one for one in records if one.granularity == granularity), key=lambda one: one.freedom)
    if chosen and chosen[0].better == "int8":
        return 0.0
    for before, after in pairwise(chosen):
        if after.better == "int8":
            below, above = (math.log(one.int8 / one.e4m3fn) for one in (before, after))
            way = below / (below - above)
            if math.isinf(after.freedom):
                return before.freedom / (1 - way) if way < 1 else math.inf
            return math.exp((1 - way) * math.log(before.freedom) + way * math.log(after.freedom))
    return math.nan


def disagreements(records: Sequence[SelfCheck]) -> list[str]:
    """What contradicts the known, in sentences; nothing does where the list is empty.

    On either side of a crossover the better format is known; and a median is held against its reference, which it may
    miss by four standard deviations of its own trials and the reference's. Records of another size are not judged.
    """
    found = []
    for one in (record for record in records if record.size == SIZE):
        known, where = CROSSOVERS[one.granularity], f"scale by {one.granularity}, ν = {one.freedom:g}"
        if one.freedom <= known.float_until and one.better == "int8":
            found.append(f"{where}: int8 is better, which it should be only above {known.known:g}")
        if one.freedom >= known.integer_from and one.better != "int8":
            found.append(f"{where}: e4m3fn is better, which it should be only below {known.known:g}")
        references = REFERENCE.get(one.freedom, {}) if one.granularity == "tensor" else {}
        for name, reference in references.items():
            median = getattr(one, name)
            bound = 4 * reference.spread * math.sqrt(1 / one.trials + 1 / REFERENCE_TRIALS) + REFERENCE_DIGITS
            if not abs(math.log(median / reference.median)) <= bound:
                found.append(f"{where}: the median of {name} is {median:.3g}, the reference's {reference.median:.3g}")
    return found


def lines(records: Sequence[SelfCheck]) -> list[str]:
    """The records as a table of text, with references and crossovers."""
    found = [f"{'scale by':<9} {'ν':>4} {'int8':>9} {'e4m3fn':>9}  {'better':<7} known"]
    for one in records:
        nu = "∞" if math.isinf(one.freedom) else f"{one.freedom:g}"
        row = f"{one.granularity:<9} {nu:>4} {one.int8:>9.3g} {one.e4m3fn:>9.3g}  {one.better:<7}"
        if one.granularity == "tensor" and one.freedom in REFERENCE:
            row += " " + " and ".join(f"{reference.median:.3g}" for reference in REFERENCE[one.freedom].values())
        found.append(row.rstrip())
    for granularity, known in CROSSOVERS.items():
        if any(one.granularity == granularity for one in records):
            found.append(
                f"scale by {granularity}: int8 is better for ν above {crossover(records, granularity):.2g}, "
                f"known: about {known.known:g}"
            )
    return found


def _student(freedom: float, size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """float32 [size, size]."""
    shape = (size, size)
    values = generator.standard_normal(shape) if math.isinf(freedom) else generator.standard_t(freedom, shape)
    return values.astype(np.float32)
