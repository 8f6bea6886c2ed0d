"""Do damages add? The predicted total of a whole plan against the rise of the loss with all its casts at once.

Measured as a single pair is (`forward_truth.py`): every planned tensor moved by its rounding error, then by minus that,
and the mean of both rises. Plans: the advisor's own at two tolerances, and some drawn at random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import advisor
from benchmarks.advice.forward_truth import UNSEEN, losses
from benchmarks.advice.models import Trainable
from benchmarks.advice.predicted import Pair, Predicted
from benchmarks.advice.truth import CASTS
from probes.casts import Cast
from probes.records import GRADIENT, Slot
from probes.sites import ProductCall, SiteHook

BATCHES = 48
RANDOM_PLANS = 4
TOLERANCE_SHARES = (1e-4, 1e-3)  # of the window's mean loss: a tenth of the default, and the default
POOLS: tuple[tuple[str, ...], ...] = (("e4m3fn", "e5m2", "int8"), ("e4m3fn", "e5m2", "int8", "e3m2", "e2m3"))


@dataclass(frozen=True)
class PlanTotal:
    """predicted: the sum of the damages. measured, standard_error: the symmetric rise of the loss over batches."""

    plan: str
    slots: int
    predicted: float
    measured: float
    standard_error: float


class _AllMoved(SiteHook):
    """Every slot that `casts` names is moved by sign times its cast's error."""

    def __init__(self, model: nn.Module, casts: Mapping[Slot, Cast]) -> None:
        super().__init__(model)
        self.casts, self.sign = casts, 1

    def on_product(self, call: ProductCall) -> Any:
        """The product of the moved operands."""
        operands = []
        for role, x in zip(call.roles, call.operands, strict=True):
            cast = self.casts.get(Slot(call.site, role))
            operands.append(x if cast is None else x + self.sign * (cast(x) - x))
        return call.run(operands)


def plan_totals(trainable: Trainable, model: nn.Module, predicted: Predicted) -> list[PlanTotal]:
    """Each plan's; forward roles alone, for casts of gradients raise no step's loss."""
    damages = {pair: row["damage"] for pair, row in predicted.rows.items() if pair[0].role != GRADIENT}
    found = []
    for share in TOLERANCE_SHARES:
        plan = advisor.recommend(predicted.window, tolerance=share * predicted.loss, casts=CASTS)
        casts = {Slot(one.site, one.role): one.cast for one in plan.assignments if one.role != GRADIENT}
        kept = {slot: cast for slot, cast in casts.items() if (slot, cast) in damages}
        found.append((f"recommended, tolerance {share:g} of the loss", kept, plan.predicted.damage))
    for number in range(RANDOM_PLANS):
        kept = _drawn(damages, POOLS[number % len(POOLS)], number)
        total = math.fsum(damages[slot, cast] for slot, cast in kept.items())
        found.append((f"random {number + 1}", kept, total))
    return [
        PlanTotal(name, len(casts), total, *_measured(trainable, model, casts))
        for name, casts, total in found
        if casts and total is not None
    ]


def _drawn(damages: Mapping[Pair, float | None], pool: Sequence[str], seed: int) -> dict[Slot, str]:
    """A cast for each slot, from those of the pool that have a predicted damage there."""
    generator, found = random.Random(seed), {}
    names = [str(Cast.parse(name)) for name in pool]
    for slot in dict.fromkeys(slot for slot, _ in damages):
        known = [name for name in names if damages.get((slot, name)) is not None]
        if known:
            found[slot] = generator.choice(known)
    return found


def _measured(trainable: Trainable, model: nn.Module, casts: Mapping[Slot, str]) -> tuple[float, float]:
    batches = [trainable.batch(UNSEEN + index, 0) for index in range(BATCHES)]
    base = losses(trainable, model, batches)
    rises = 0.0 * base
    with torch.no_grad(), _AllMoved(model, {slot: Cast.parse(cast) for slot, cast in casts.items()}) as hook:
        for hook.sign in (1, -1):
            rises += (losses(trainable, model, batches) - base) / 2
    return float(rises.mean()), float(rises.std(ddof=1)) / math.sqrt(BATCHES)
