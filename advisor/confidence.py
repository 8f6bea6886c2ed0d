"""Confidence: the chance that the next window would give the same score, within a factor of two.

A window is used for the training that follows it. The error that a cast makes is known for every step, so its change
from the first half of the window to the second, and its scatter from step to step, say how the next window's will
differ:

    q       log2 of the error energy a step: Σδ²/elements in forward roles, to which damage is proportional; Σδ²/Σx² in
            all others, to which the lost batch share is
    d       mean q of the second half less mean q of the first
    s       standard deviation of q about the straight line through it
    e       standard error of the damage over the damage, in octaves; 0 for all other scores
    σ²      floor² + (trend·d)² + 2·s²/steps + (doubt·e)²

and confidence = erf(1/(σ·√2)): were the change to the next window of the same length normal with that σ, this share of
scores would stay within a factor of two. floor, trend and doubt are the table below.

Measured (`benchmarks/drift.py`; GPT and ConvNet, windows of 10 and 20 steps that follow each other, after 0, 30 and 120
steps): `drift.json` has what scores of each confidence came to on trainings that the constants were not chosen on. On
GPT, damage told with 0.38, 0.73 and 0.81 stayed within a factor of two in 0.39, 0.64 and 0.82 of the cases; noise told
with 0.28, 0.93 and 0.999 in 0.29, 0.90 and 0.996. Damage is less sure than its error energy, which stayed in 0.95: its
curvature comes from two scored steps. What this misses: in the first steps of a training the curvature itself falls,
which no half shows. A window says nothing of what has not happened in it: the confidence is for the next window, not
for the end of the training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from advisor.grid import Array
from advisor.metrics import Metrics


@dataclass(frozen=True)
class Spread:
    """What the change from window to window is made of.

    floor   standard deviation where nothing drifts, in octaves
    trend   the change to the next window over the change between this one's halves; a straight line has 2
    doubt   how much more the damage may be off than the standard error of so few scored steps says
    """

    floor: float
    trend: float
    doubt: float


# Ours: the likeliest on a grid, on 24 windows of seed 0 (`benchmarks/drift.py --seeds 1`).
DAMAGE = Spread(floor=0.6, trend=2.5, doubt=2.0)
NOISE = Spread(floor=0.3, trend=1.5, doubt=0.0)
FEWEST_STEPS = 4  # with fewer there are no halves to speak of


def confidence_of(metrics: Metrics, forward: bool, relative_se: float | None = None) -> float | None:
    """The chance, 0 to 1, that the next window of the same length gives this score within a factor of two.

    forward      whether the score is a damage, or the energy of rounding noise over the signal's
    relative_se  standard error of the damage over the damage, where it was measured

    1 where no step has an error at all; 0 where one half has errors and the other has none, or they are infinite; None
    where fewer than FEWEST_STEPS steps have finite non-zero elements.
    """
    q = log_error(metrics, forward)
    if len(q) < FEWEST_STEPS:
        return None
    exact = np.isneginf(q)
    if exact.all():
        return 1.0
    if not np.isfinite(q).all():
        return 0.0 if np.isposinf(q).any() or exact.mean() > 0.25 else confidence_from(q[~exact], forward, relative_se)
    return confidence_from(q, forward, relative_se)


def confidence_from(q: Array, forward: bool, relative_se: float | None = None) -> float:
    """The same from the log2 error energies of at least two steps, [S], all finite."""
    spread = DAMAGE if forward else NOISE
    sigma = math.hypot(spread.floor, spread.trend * halves_apart(q), scatter(q) * math.sqrt(2 / len(q)))
    if relative_se is not None and math.isfinite(relative_se):
        sigma = math.hypot(sigma, spread.doubt * relative_se / math.log(2))
    return math.erf(1 / (sigma * math.sqrt(2)))


def log_error(metrics: Metrics, forward: bool) -> Array:
    """log2 of each step's error energy, an element or over the signal's, of the steps with finite non-zero elements.

    -inf where there is no error, +inf where it is infinite.
    """
    some = metrics.nonzero > 0
    whole = metrics.elements - metrics.nonfinite if forward else metrics.signal_energy
    with np.errstate(divide="ignore"):
        return np.asarray(np.log2(metrics.error_energy[some] / whole[some]))


def halves_apart(q: Array) -> float:
    """Mean of the second half less that of the first; the middle one of an odd number is in neither."""
    half = len(q) // 2
    return float(q[-half:].mean() - q[:half].mean()) if half else 0.0


def scatter(q: Array) -> float:
    """Standard deviation about the least-squares line; 0 with fewer than three steps."""
    if len(q) < 3:
        return 0.0
    place = np.arange(len(q)) - (len(q) - 1) / 2
    slope = (place @ q) / (place @ place)
    left = q - q.mean() - slope * place
    return float(math.sqrt(left @ left / (len(q) - 2)))
