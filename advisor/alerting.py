"""Alerts: what in a window somebody should look at, each by a rule with a threshold.

non_finite        where the first NaN or Inf was met: by step, and within a step by the order of execution, because
                  one NaN turns whole layers NaN within the step. If that was an Inf, the first NaN is told as well
skipped_step      non-finite values in steps that a GradScaler skipped: it found them, and lowered its scale
underflow_rising  more of a tensor underflows at the end of the window than at its start
amax_doubles      a largest value leaves all earlier ones far below: what a delayed scale does not survive
lost_updates      a parameter's master weight does not take its updates
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from advisor.castnames import short_cast
from advisor.execution import Stepwise, execution_order
from advisor.scores import DEFAULT_CASTS
from probes.casts import Cast
from probes.history import SlotHistory
from probes.parameter_records import UPDATE, WEIGHT_GRADIENT
from probes.records import Slot
from probes.window import Window


@dataclass(frozen=True)
class Rule:
    """`threshold`: the value from which on there is an alert; `unit` says of what."""

    threshold: float
    unit: str


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "non_finite": Rule(1, "NaN and Inf elements"),
        "skipped_step": Rule(1, "NaN and Inf elements"),
        # Ours. The share of all non-zero elements is what the last third of the window has more than the first.
        "underflow_rising": Rule(0.01, "share of the non-zero elements"),
        "amax_doubles": Rule(2.0, "times the largest of all earlier steps"),
        "lost_updates": Rule(0.1, "share of the weights that had a gradient"),
    }
)
EARLIER = 3  # ours: steps that must have been seen before a largest value can be called new
SIGMAS = 4.0  # ours: standard deviations of a step's underflow, were it by chance, that a rise exceeds
RISES_BY = 2.0  # ours: and the underflow at the end is this many times that at the start


@dataclass(frozen=True)
class Alert:
    """One finding. `step` None: of the whole window. `cast`: under which, where that matters.

    `followed`: of a non-finite origin, the other slots ("site role") that were non-finite then or later, in order.
    """

    rule: str
    site: str
    role: str
    step: int | None
    value: float
    sentence: str
    cast: str | None = None
    followed: tuple[str, ...] = ()

    @property
    def threshold(self) -> float:
        """That of its rule."""
        return RULES[self.rule].threshold


def alerts(window: Window, casts: Sequence[str | Cast] | None = None) -> tuple[Alert, ...]:
    """What should be looked at in a window: non-finite origins first, then each rule's worst first.

    `casts`: under which underflow is followed; by default the usual 8-bit and 16-bit ones. Empty where all is well.
    Raises UnknownFormat or InvalidCast for a cast that is none, CastNotScored, WindowError for an open window.
    """
    return found_in(Stepwise(window, casts or DEFAULT_CASTS))


def found_in(steps: Stepwise) -> tuple[Alert, ...]:
    """The same, of metrics that may be known already."""
    window = steps.window
    by_size = [_rising_underflow(steps), _doubling(window), _lost_updates(window)]
    return (
        *_non_finite(window),
        *(alert for found in by_size for alert in sorted(found, key=lambda alert: -alert.value)),
    )


def skipped_steps(window: Window) -> set[int]:
    """Steps that a GradScaler skipped, from the window's notes."""
    found = (re.match(r"step (\d+) was skipped by the GradScaler", note) for note in window.notes)
    return {int(match.group(1)) for match in found if match}


def _non_finite(window: Window) -> list[Alert]:
    order, skipped = execution_order(window), skipped_steps(window)
    met: list[tuple[int, int, Slot]] = []  # step, place in it, slot
    for place, slot in enumerate(order):
        history = window.history(*slot)
        met += [(step, place, slot) for step in history.steps[history.nonfinite > 0].tolist()]
    met.sort()
    found = [_skipped(window, met, step) for step in sorted(skipped & {step for step, *_ in met})]
    lasting = [entry for entry in met if entry[0] not in skipped]
    if not lasting:
        return found
    nans = [(step, place, slot) for step, place, slot in lasting if _at(window, slot, step, "nans")]
    first = _origin(window, lasting, "non_finite")
    return [first, *([_origin(window, nans, "non_finite")] if nans and nans[0] != lasting[0] else []), *found]


def _origin(window: Window, met: Sequence[tuple[int, int, Slot]], rule: str) -> Alert:
    step, _, slot = met[0]
    followed = [other for other in dict.fromkeys(entry[2] for entry in met) if other != slot]
    at_once = {other for at, _, other in met if at == step} - {slot}
    kind, count = _kind(window, slot, step), _at(window, slot, step, "nonfinite")
    elements = int(window.history(*slot).elements[window.history(*slot).steps == step][0])
    later = len(followed) - len(at_once)
    told = f"{kind} first seen in {slot.site} {slot.role} at step {step} ({count:,} of {elements:,} elements)"
    if followed:
        told += f"; {len(at_once)} other tensors in that step, {later} more in later ones"
    names = tuple(f"{other.site} {other.role}" for other in followed)
    return Alert(rule, slot.site, slot.role, step, float(count), told, followed=names)


def _skipped(window: Window, met: Sequence[tuple[int, int, Slot]], step: int) -> Alert:
    of_step = [entry for entry in met if entry[0] == step]
    found = _origin(window, of_step, "skipped_step")
    scale = dict(zip(window.steps, window.loss_scales, strict=True)).get(step, 1.0)
    told = f"{found.sentence}; the GradScaler skipped the step, with a loss scale of {scale:g}"
    return Alert("skipped_step", found.site, found.role, step, found.value, told, followed=found.followed)


def _kind(window: Window, slot: Slot, step: int) -> str:
    kinds = {"nans": "NaN", "positive_infs": "+Inf", "negative_infs": "-Inf"}
    return " and ".join(told for name, told in kinds.items() if _at(window, slot, step, name))


def _at(window: Window, slot: Slot, step: int, name: str) -> int:
    history: SlotHistory = window.history(*slot)
    return int(getattr(history, name)[history.steps == step].sum())


def _rising_underflow(steps: Stepwise) -> list[Alert]:
    found = []
    for slot in steps.window.slots:
        rises = []
        for cast in steps.casts:
            metrics = steps.of(slot, cast)
            underflow = metrics.underflow[metrics.nonzero > 0]
            third = len(underflow) // 3
            if third:
                before, after = float(np.median(underflow[:third])), float(np.median(underflow[-third:]))
                chance = math.sqrt(2 * after * (1 - after) / max(float(np.median(metrics.nonzero)), 1.0))
                if after - before > SIGMAS * chance:
                    rises.append((after - before, cast, before, after))
        rise, cast, before, after = max(rises, default=(0.0, "", 0.0, 0.0))
        if rise >= RULES["underflow_rising"].threshold and after >= RISES_BY * before:
            told = (
                f"{slot.site} {slot.role}: underflow in {short_cast(steps.casts[cast])} rose from {before:.2%} "
                f"to {after:.2%} of the non-zero elements within the window"
            )
            found.append(Alert("underflow_rising", *slot, None, rise, told, cast))
    return found


def _doubling(window: Window) -> list[Alert]:
    """For each slot, the step whose largest value exceeds all earlier ones by most."""
    found = []
    for slot in window.slots:
        history = window.history(*slot)
        amax = history.amax.astype(np.float64) / history.gain
        before = np.maximum.accumulate(amax)[:-1]
        if len(amax) <= EARLIER:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = np.where(before > 0, amax[1:] / before, 0.0)[EARLIER - 1 :]
        at = int(np.argmax(growth))
        if growth[at] >= RULES["amax_doubles"].threshold:
            step = int(history.steps[EARLIER + at])
            told = (
                f"{slot.site} {slot.role}: the largest value at step {step}, {amax[EARLIER + at]:.3g}, is "
                f"{growth[at]:.1f} times the largest of all {EARLIER + at} steps before it"
            )
            found.append(Alert("amax_doubles", *slot, step, float(growth[at]), told))
    return found


def _lost_updates(window: Window) -> list[Alert]:
    """Weights that had a gradient and did not move: the update was less than half a step of their own format."""
    found = []
    records = [record for record in window.parameter_records if {UPDATE, WEIGHT_GRADIENT} <= set(record.roles)]
    moved: Counter[int] = Counter()  # by step; where nothing moves at all, the learning rate is zero
    for record in records:
        updates = window.history(record.name, UPDATE)
        moved.update(dict(zip(updates.steps.tolist(), updates.nonzero.tolist(), strict=True)))
    for record in records:
        updates, gradients = window.history(record.name, UPDATE), window.history(record.name, WEIGHT_GRADIENT)
        common, of_updates, of_gradients = np.intersect1d(updates.steps, gradients.steps, return_indices=True)
        pushed = gradients.nonzero[of_gradients] * np.array([moved[step] > 0 for step in common.tolist()], dtype=bool)
        still = updates.zeros[of_updates] - gradients.zeros[of_gradients]
        lost = np.divide(still, pushed, out=np.zeros(len(common)), where=pushed > 0)
        if not len(lost) or lost.max() < RULES["lost_updates"].threshold:
            continue
        worst = int(lost.argmax())
        told = (
            f"{record.name}: {lost[worst]:.1%} of its weights had a gradient at step {common[worst]} and did not move, "
            f"because the update is less than half a step of {record.dtype}"
        )
        found.append(Alert("lost_updates", record.name, UPDATE, int(common[worst]), float(lost[worst]), told))
    return found
