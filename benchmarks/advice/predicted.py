"""What the advisor predicts, from one window of the same trainings that `truth.py` measures by brute force.

A window is opened at the checkpoint and follows the training's next steps, as a user's would: `advisor.score` then
gives damage and gradient noise for every slot and cast. Beside them what a rule of thumb would go by: SQNR, the share
that underflows, and the backward error of the product, both operands cast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import advisor
from benchmarks.advice.models import MODELS, Start, fresh, train
from benchmarks.advice.truth import CASTS
from probes.casts import Cast
from probes.edges import await_gradient
from probes.errors import ProbeError
from probes.product_errors import ProductError, pooled, site_backward_errors
from probes.records import GRADIENT, Slot
from probes.sites import ProductCall, SiteHook
from probes.window import Window

STEPS = 16  # of the window
SCORED = 8  # of them, each with two draws of the curvature, eight where samples mix (BatchNorm)
MIXED = 48  # steps of the window where samples mix, all of them scored
COST_STEPS = 3  # of each kind, for the cost of a scored step
TYPICAL = 0.5  # quantile of a product's backward errors that stands for it

Pair = tuple[Slot, str]


@dataclass(frozen=True)
class Predicted:
    """One model's. `rows`: `advisor.score`'s, of the slots of products. `backward_error`: a site's products, in the
    forward pass and in its weight gradient, None where they could not be followed."""

    window: Window
    scored_steps: int
    rows: dict[Pair, dict[str, Any]]
    backward_error: dict[Pair, float | None]
    loss: float

    def of(self, pair: Pair, column: str) -> float | None:
        """One number of the pair's score; None where there is no such score or it has none."""
        row = self.rows.get(pair)
        value = None if row is None else row[column]
        return None if value is None else float(value)


def predict(start: Start, candidates: Sequence[str | Cast] = CASTS) -> Predicted:
    """Open the window at the model's checkpoint, score it, and sample the products' backward errors.

    candidates   the casts that the scored steps measure; the others are told from sketches
    """
    trainable, (model, optimizer, step) = start.trainable, start.load()
    errors = _sampled_errors(start)
    steps, scored = _steps_and_scored(model)
    with advisor.probe(model, optimizer, steps=steps, curvature_steps=scored, casts=candidates) as window:
        train(model, optimizer, trainable, start.seed, step, steps)
    rows = advisor.score(window, CASTS, slots=window.product_slots).rows
    return Predicted(
        window,
        scored,
        {(Slot(row["site"], row["role"]), row["cast"]): row for row in rows},
        {(Slot(row["site"], row["role"]), row["cast"]): _error_of(errors, row) for row in rows},
        statistics.fmean(window.losses),
    )


def _steps_and_scored(model: nn.Module) -> tuple[int, int]:
    """Steps of the model's window, and how many of them are scored.

    Where samples mix, what the network's own curvature adds to Gauss-Newton's damage varies from batch to batch by 1 to
    7 times that damage: eight steps tell little of its mean.
    """
    mixes = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return (MIXED, MIXED) if mixes else (STEPS, SCORED)


def cost_of_a_scored_step(name: str) -> float:
    """What one scored step takes more than a plain one, in plain steps: medians of processor time, in this process.

    The window of `predict`: all casts of the benchmark, and backward errors.
    """
    trainable = MODELS[name]
    model, optimizer, _ = fresh(trainable, 0)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(COST_STEPS + 1):  # the first is thrown away: kernels are loaded in it
        for scored in (False, True):
            seconds[scored].append(_seconds_of_a_step(name, model, optimizer, turn, scored))
    plain, scored_s = (statistics.median(seconds[kind][1:]) for kind in (False, True))
    return scored_s / plain - 1


def _seconds_of_a_step(name: str, model: Any, optimizer: Any, step: int, scored: bool) -> float:
    started = time.process_time()
    if not scored:
        train(model, optimizer, MODELS[name], 0, step, 1)
        return time.process_time() - started
    with advisor.probe(model, optimizer, steps=1, curvature_steps=1, casts=CASTS):
        started = time.process_time()
        train(model, optimizer, MODELS[name], 0, step, 1)
        return time.process_time() - started


class _BackwardErrors(SiteHook):
    """Samples every product that it can follow, with both operands cast."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.found: list[ProductError] = []

    def on_product(self, call: ProductCall) -> Any:
        """The product; it is sampled when its gradient comes."""
        result = call.run()

        def arrived(gradient: Tensor) -> None:
            try:
                self.found += site_backward_errors(call, gradient, CASTS)
            except ProbeError:
                return  # a recurrent layer's products are not followed one by one

        for part in call.results(result):
            if part.requires_grad:
                await_gradient(part, arrived)
        return result


def _sampled_errors(start: Start) -> dict[tuple[str, str, str], float]:
    """(site, product, cast) → typical backward error, in one training step at the checkpoint's weights."""
    trainable, (model, _, step) = start.trainable, start.load()
    with _BackwardErrors(model) as hook:
        trainable.loss(model, trainable.batch(step, start.seed)).backward()
    return {(one.site, one.product, one.cast): one.errors.quantile(TYPICAL) for one in pooled(hook.found)}


def _error_of(errors: dict[tuple[str, str, str], float], row: dict[str, Any]) -> float | None:
    """The forward product's for what enters it; the weight gradient's for a gradient. None where there is none."""
    names = ("weight_grad", "rhs_grad", "value_grad") if row["role"] == GRADIENT else ("forward", "output", "scores")
    found = (errors.get((row["site"], name, row["cast"])) for name in names)
    return next((error for error in found if error is not None), None)
