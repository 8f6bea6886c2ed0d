"""What a short window cannot have seen, told from what it has: a plan's warnings.

Each is a sentence where its cause shows in the window, with its numbers: a training that is young (the loss falls, the
updates grow with a learning rate that warms up), largest values that grow, tensors that are not there at every step
(experts, rare tokens), and too few steps for what is estimated from step to step. What never shows in a window, and so
is always said, is that outliers can come late: SwiGLU's in trillion-token runs, after 200 billion tokens (Fishman et
al. 2024, "Scaling FP8 training to trillion-token LLMs").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advisor.castnames import KEEP
from advisor.confidence import halves_apart
from advisor.failures import OUTLIER_RATIO
from advisor.plan import Assignment, Plan
from probes.parameter_records import UPDATE
from probes.records import GRADIENT, Slot
from probes.window import Window

NAMED = 3  # slots that a warning names
SIGMAS = 3.0  # standard deviations that a slope must be from zero to be carried on. Ours
FALLS = 0.05  # share of the loss by which it falls from half to half in a training that is young. Ours
MOVES = 1.25  # factor by which the updates' size changes within a window where the learning rate moves. Ours
FEWEST_DIFFERENCES = 8  # recorded steps from which on successive differences tell the minibatch's noise. Ours
SOON = 10_000  # steps within which a largest value that grows as in the window doubles: worth a warning. Ours


@dataclass(frozen=True)
class Growth:
    """How a slot's largest value moves: octaves a step, and the standard error of that."""

    octaves: float
    error: float

    @property
    def certain(self) -> bool:
        """Whether it grows beyond what its scatter explains."""
        return self.octaves > SIGMAS * self.error

    def steps_to(self, times: float) -> float:
        """Steps until it is so many times as large, if it goes on in a straight line of its logarithm."""
        return math.log2(times) / self.octaves


def growth_of(window: Window, slot: Slot) -> Growth | None:
    """The least-squares slope of log2 of the largest values; None with fewer than four non-zero ones."""
    history = window.history(*slot)
    kept = (history.amax > 0) & np.isfinite(history.amax)
    steps, octaves = history.steps[kept].astype(np.float64), np.log2(history.amax[kept] / history.gain[kept])
    if len(steps) < 4 or steps[0] == steps[-1]:
        return None
    place = steps - steps.mean()
    slope = float(place @ octaves / (place @ place))
    left = octaves - octaves.mean() - slope * place
    return Growth(slope, math.sqrt(float(left @ left) / (len(steps) - 2) / float(place @ place)))


def cautions(plan: Plan, windows: Sequence[Window]) -> list[str]:
    """The warnings of a plan that was made from these windows, latest last."""
    last = windows[-1]
    cast = [one for one in plan.assignments if one.cast != KEEP and Slot(one.site, one.role) in set(last.slots)]
    if not cast:
        return []
    return [
        *_young(last, len(windows)),
        *_learning_rate(last),
        *_growing(last, cast),
        *_not_always_there(last, cast),
        *_few_steps(last, cast),
        *_late_outliers(last, cast),
    ]


def _young(window: Window, count: int) -> list[str]:
    losses = np.array([loss for loss in window.losses if math.isfinite(loss) and loss > 0])
    if len(losses) < 4:
        return []
    falls = 1 - 2.0 ** halves_apart(np.log2(losses))
    noise = window.loss_noise * math.sqrt(4 / len(losses)) / float(losses.mean())
    if falls < FALLS or falls < 2 * noise:
        return []
    again = "" if count > 1 else ", and give both windows to recommend"
    return [
        (
            f"the training is young: within the window the loss falls by {_share(falls)} from half to half, and the "
            f"curvature moves with it. Record another window later{again}"
        )
    ]


def _learning_rate(window: Window) -> list[str]:
    """Whether the updates' size moves: the root of their mean square, over all parameters, first to last step seen."""
    squares: dict[int, float] = {}
    for slot in window.slots:
        if slot.role == UPDATE and not window.is_product(slot):
            history = window.history(*slot)
            for step, square in zip(history.steps.tolist(), history.sum_of_squares.tolist(), strict=True):
                squares[step] = squares.get(step, 0.0) + square
    seen = [squares[step] for step in sorted(squares)]
    if len(seen) < 2 or not (seen[0] > 0 and math.isfinite(seen[-1])):
        return []
    times = math.sqrt(seen[-1] / seen[0])
    if 1 / MOVES < times < MOVES:
        return []
    what = "warms up" if times > 1 else "falls"
    return [
        (
            f"the optimizer's updates become {times:.2g} times as large within the window, as where a learning rate "
            f"{what}: ranges of weights and gradients will differ once it has settled"
        )
    ]


def _growing(window: Window, cast: Sequence[Assignment]) -> list[str]:
    found = []
    for one in cast:
        growth = growth_of(window, Slot(one.site, one.role))
        if growth is not None and growth.certain and growth.steps_to(2) <= SOON:
            found.append((growth.steps_to(2), one.site, one.role))
    if not found:
        return []
    found.sort()
    named = ", ".join(f"{site} {role} ({in_steps(steps)})" for steps, site, role in found[:NAMED])
    return [
        (
            f"the largest values of {len(found)} of {len(cast)} cast tensors grow within the window; going on so they "
            f"double in steps: {named}"
        )
    ]


def _not_always_there(window: Window, cast: Sequence[Assignment]) -> list[str]:
    """Tensors that some recorded steps did not have, or had only zeros of."""
    steps, found = len(window.steps), []
    for one in cast:
        there = int((window.history(one.site, one.role).nonzero > 0).sum())
        if there < steps:
            found.append((there, one.site, one.role))
    if not found:
        return []
    found.sort()
    named = ", ".join(f"{site} {role} (in {there})" for there, site, role in found[:NAMED])
    return [
        (
            f"{len(found)} cast tensors held something at only some of the {steps} recorded steps, as experts and rare "
            f"tokens do: {named}. What they hold at other times is unknown: a longer window (steps=) sees more of it"
        )
    ]


def _few_steps(window: Window, cast: Sequence[Assignment]) -> list[str]:
    if len(window.steps) >= FEWEST_DIFFERENCES or not any(one.noise_ratio for one in cast):
        return []
    return [
        (
            f"the window's {len(window.steps)} recorded steps are few to tell the minibatch's noise from, and so the "
            f"lost batch: {FEWEST_DIFFERENCES} or more (steps=) settle it"
        )
    ]


def _late_outliers(window: Window, cast: Sequence[Assignment]) -> list[str]:
    """Always said of activations in 8 bits, with those whose largest values stand out already."""
    narrow = [one for one in cast if one.role != GRADIENT and one.cast.split("/")[1] == "tensor"]
    if not narrow:
        return []
    crests = []
    for one in narrow:
        history = window.history(one.site, one.role)
        kept = (history.elements > 0) & (history.sum_of_squares > 0)
        rms = np.sqrt(history.sum_of_squares[kept] / history.elements[kept])
        crest = float(np.max(history.amax[kept] / rms, initial=0.0))
        if OUTLIER_RATIO < crest < math.inf:
            crests.append((-crest, one.site, one.role))
    crests.sort()
    named = ", ".join(f"{site} {role} ({-crest:.0f}× the RMS)" for crest, site, role in crests[:NAMED])
    already = f" Outliers stand out already in {named}." if named else ""
    return [
        (
            "a short window cannot certify a long run, and outliers can come after any: SwiGLU's did after 200 billion "
            f"tokens.{already} `watch` has thresholds"
        )
    ]


def in_steps(count: float) -> str:
    """A number of steps in words."""
    return f"about {count:,.0f}" if count < 1e6 else f"{count:.0e}"


def _share(value: float) -> str:
    return f"{100 * value:.2g}%"
