"""Tensors that outlive a step, in narrower formats: optimizer state, master weights, running statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from advisor.castnames import parse_cast, short_cast
from advisor.diagnosis.findings import THRESHOLDS, Finding, Remedy, percent
from advisor.diagnosis.recipes import Recipes
from advisor.lost_updates import epsilon_vanishes as vanishes
from advisor.lost_updates import lost_by_size
from advisor.metrics import measure
from probes.buffers import RUNNING
from probes.casts import Cast
from probes.parameter_records import BUFFER, MASTER, UPDATE, WEIGHT_GRADIENT, ParameterRecord
from probes.window import Window

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""State that optimizers of torch 2.13 divide by the root of: Adam and its kin, AMSGrad, RMSprop, Adagrad."""
FP32 = "fp32/none/nearest"
_OWN = {"float16": "fp16", "bfloat16": "bf16"}


def epsilon_vanishes(window: Window, recipes: Recipes) -> Iterator[Finding]:
    """Of each parameter whose epsilon is zero in the state's format, and with it some denominator."""
    for record in window.parameter_records:
        for state in (name for name in SECOND_MOMENTS if name in record.roles):
            own = _OWN.get(record.states.get(state, ""))
            for cast in recipes.state:
                if not vanishes(record, cast.format):
                    continue
                history = window.history(record.name, state)
                metrics = measure(history, cast).pooled()
                empty = float((metrics.underflows + history.zeros.sum()) / max(metrics.elements, 1.0))
                if empty >= THRESHOLDS.empty_denominators:
                    # The root of second moments of this size: what a step divides by.
                    divisor = (metrics.signal_energy / max(metrics.elements, 1.0)) ** 0.25
                    yield _epsilon(record, state, cast, empty, divisor, recipes.asked or own == cast.format.name)


def _epsilon(record: ParameterRecord, state: str, cast: Cast, empty: float, divisor: float, severe: bool) -> Finding:
    name, least = short_cast(cast), cast.format.smallest_subnormal
    enough = max(2.0 ** float(np.ceil(np.log2(least))), 1e-7)
    # An epsilon of the divisor's own order would make the steps shorter.
    or_larger = f", or take an epsilon of {enough:.0e} or more" if enough <= THRESHOLDS.epsilon_share * divisor else ""
    return Finding(
        cause="epsilon_vanishes",
        site=record.name,
        role=state,
        cast=str(cast),
        severe=severe,
        numbers={"epsilon": float(record.epsilon or 0.0), "smallest": least, "empty_denominators": empty},
        sentence=(
            f"{record.name} {state}: {record.name} is updated with epsilon {record.epsilon:g}, which is zero in {name} "
            f"(its smallest value is {least:.1g}), as are {percent(empty)} of the second moments, so the step divides "
            "by zero"
        ),
        remedy=Remedy(
            "storage",
            f"keep this state in fp32 or bf16{or_larger}",
            (str(parse_cast("bf16")), FP32),
        ),
        size=empty,
    )


def lost_updates(window: Window, recipes: Recipes) -> Iterator[Finding]:
    """Of each parameter whose updates a narrower master weight, or its own, would mostly not take, by their size.

    Severe are weights of products. Gains of norms and tables of variance 1, of which updates are a small part, lose
    theirs in healthy trainings too.
    """
    weights = {site.parameter for site in window.sites}
    for record in window.parameter_records:
        if not {MASTER, UPDATE} <= set(record.roles):
            continue
        own = parse_cast(_OWN[record.dtype]) if record.dtype in _OWN else None
        if own is not None:
            lost = _still(window, record)
            if lost is not None and lost >= THRESHOLDS.lost:
                yield _lost(window, record, own, lost, severe=True)
            continue
        for cast in recipes.master:
            lost = lost_by_size(window, record.name, cast)
            if lost is not None and lost >= THRESHOLDS.lost:
                severe = recipes.asked or (record.name in weights and lost >= THRESHOLDS.lost_severe)
                yield _lost(window, record, cast, lost, severe)


def _still(window: Window, record: ParameterRecord) -> float | None:
    """Of a weight that is narrow already: the share of the elements with a gradient that did not move; None where
    nothing did, as at a learning rate of zero."""
    if WEIGHT_GRADIENT not in record.roles:
        return None
    updates, gradients = window.history(record.name, UPDATE), window.history(record.name, WEIGHT_GRADIENT)
    moved, pushed = int(updates.nonzero.sum()), int(gradients.nonzero.sum())
    return 1 - moved / pushed if 0 < moved <= pushed else None


def _lost(window: Window, record: ParameterRecord, cast: Cast, lost: float, severe: bool) -> Finding:
    name = short_cast(cast)
    weights, updates = window.history(record.name, MASTER), window.history(record.name, UPDATE)
    sizes = [
        float(np.sqrt(history.sum_of_squares.sum() / max(int(history.elements.sum()), 1)))
        for history in (weights, updates)
    ]
    return Finding(
        cause="lost_updates",
        site=record.name,
        role=MASTER,
        cast=str(cast),
        severe=severe,
        numbers={"lost": lost, "weight_rms": sizes[0], "update_rms": sizes[1]},
        sentence=(
            f"{record.name} master: updates of {sizes[1]:.1e} on weights of {sizes[0]:.1e} (RMS) are below half a step "
            f"of {name}, which does not take {percent(lost)} of them"
        ),
        remedy=Remedy(
            "storage",
            f"keep master weights in fp32, or round {name} stochastically",
            (str(parse_cast(f"{cast.format.name}/none/stochastic")), FP32),
        ),
        size=lost,
    )


def narrow_buffers(window: Window, recipes: Recipes) -> Iterator[Finding]:
    """Of each buffer that moves, under the first cast in which it overflows or stands still."""
    for record in window.buffer_records:
        own = _OWN.get(record.dtype)
        history = window.history(record.name, BUFFER)
        for cast in recipes.buffer:
            metrics = measure(history, cast, record.dtype).pooled()
            lost = lost_by_size(window, record.name, cast, role=BUFFER) or 0.0
            over = metrics.overflow if metrics.nonzero else 0.0
            infinite = float(history.nonfinite.sum() / max(int(history.elements.sum()), 1))
            if own == cast.format.name:
                over, lost = max(over, infinite), max(lost, _stood_still(window, record))
            if over > 0 or lost >= THRESHOLDS.lost:
                yield _buffer(record, cast, metrics.amax, over, lost, recipes.asked or own == cast.format.name)
                break


def _stood_still(window: Window, record: ParameterRecord) -> float:
    """Of a running statistic that is narrow already: the share of its elements that a step did not move. BatchNorm
    moves all of its own at every step; of other buffers only some may have been meant to."""
    updates = window.history(record.name, UPDATE)
    if record.name.rpartition(".")[2] not in RUNNING:
        return 0.0
    return float(updates.zeros.sum() / max(int(updates.elements.sum()), 1))


def _buffer(record: ParameterRecord, cast: Cast, amax: float, over: float, lost: float, severe: bool) -> Finding:
    name = short_cast(cast)
    if over > 0:
        harm = (
            f"holds values up to {amax:.3g} and {name} ends at {cast.format.largest:g}: {percent(over)} of them, and "
            "of the batch's own statistics, overflow"
        )
    else:
        harm = f"moves by less than half a step of {name}, which does not take {percent(lost)} of its moves"
    return Finding(
        cause="narrow_buffer",
        site=record.name,
        role=BUFFER,
        cast=str(cast),
        severe=severe,
        numbers={"amax": amax, "overflow": over, "lost": lost},
        sentence=f"{record.name} buffer: this running statistic {harm}",
        remedy=Remedy("storage", "keep the module's buffers, and its own arithmetic, in fp32", (FP32,)),
        size=max(over, lost),
    )
