"""Confidence: the chance that the next window would give the same score, within a factor of two.

A window is used for the training that follows it. The error that a cast makes is known for every step, so its change
from the first half of the window to the second, and its scatter from step to step, say how the next window's will
differ:

    q       log2 of the error energy a step: Σδ²/elements in forward roles, to which damage is proportional; Σδ²/Σx² in
            all others, to which the lost batch share is
    d       mean q of the second half less mean q of the first
    s       standard deviation of q about the straight line through it
    e       standard error of the damage over the damage, in octaves; 0 for all other scores
    m       how the loss itself moves (`loss_octaves`): the curvature moves with it, in all slots alike; 0 for others
    σ²      floor² + (trend·d)² + 2·s²/steps + (doubt·e)² + m²

and confidence = erf(1/(σ·√2)): were the change to the next window of the same length normal with that σ, this share of
scores would stay within a factor of two. floor, trend and doubt are the table below.

Measured (`benchmarks/drift.py`, `drift.json`; windows of 10 and 20 steps that follow each other, after 0, 30 and 120
steps of trainings of a GPT and a ConvNet on which nothing was chosen): damage told with a confidence of 0.29, 0.65,
0.86 and 0.92 in the mean stayed within a factor of two in 0.46, 0.57, 0.98 and 0.98 of 1,140 cases. It is less sure
than its error energy, which stayed in 0.95 and 1.00: its curvature comes from two scored steps. A window says nothing
of what has not happened in it: the confidence is for the next window, not for the end of the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erfinv

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


# Ours. Of damage, the likeliest of a few on 16 trainings of four models (`benchmarks/intervals.py --first-seed 0`); of
# noise, the likeliest on a grid, on 24 windows of seed 0 (`benchmarks/drift.py --seeds 1`).
DAMAGE = Spread(floor=0.5, trend=2.0, doubt=1.5)
NOISE = Spread(floor=0.3, trend=1.5, doubt=0.0)
FALLING = 3.0  # ours: octaves of damage for one of the loss, from half to half
FEWEST_STEPS = 4  # with fewer there are no halves to speak of


def confidence_of(
    metrics: Metrics, forward: bool, relative_se: float | None = None, loss_moves: float = 0.0
) -> float | None:
    """The chance, 0 to 1, that the next window of the same length gives this score within a factor of two.

    forward      whether the score is a damage, or the energy of rounding noise over the signal's
    relative_se  standard error of the damage over the damage, where it was measured
    loss_moves   `loss_octaves` of the window, for a damage

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
        return (
            0.0
            if np.isposinf(q).any() or exact.mean() > 0.25
            else confidence_from(q[~exact], forward, relative_se, loss_moves)
        )
    return confidence_from(q, forward, relative_se, loss_moves)


def confidence_from(q: Array, forward: bool, relative_se: float | None = None, loss_moves: float = 0.0) -> float:
    """The same from the log2 error energies of at least two steps, [S], all finite."""
    spread = DAMAGE if forward else NOISE
    sigma = math.hypot(spread.floor, spread.trend * halves_apart(q), scatter(q) * math.sqrt(2 / len(q)))
    if relative_se is not None and math.isfinite(relative_se):
        sigma = math.hypot(sigma, spread.doubt * relative_se / math.log(2))
    if forward:
        sigma = math.hypot(sigma, loss_moves)
    return math.erf(1 / (sigma * math.sqrt(2)))


def octaves_of_draws(damage_se: ArrayLike, damage: ArrayLike) -> Array:
    """What the draws of the scored steps add to σ, octaves; 0 where the standard error is NaN."""
    relative = np.nan_to_num(np.asarray(damage_se, dtype=np.float64)) / np.asarray(damage, dtype=np.float64)
    return np.asarray(DAMAGE.doubt * relative / math.log(2))


def octaves_of(confidence: ArrayLike) -> Array:
    """The σ of which a confidence was made, octaves: 0 for certainty, infinite for none, NaN for NaN."""
    with np.errstate(divide="ignore"):
        return np.asarray(1 / (math.sqrt(2) * erfinv(np.asarray(confidence, dtype=np.float64))))


def loss_octaves(losses: Sequence[float]) -> float:
    """What a moving loss says of how the curvature moves, octaves; 0 with fewer than FEWEST_STEPS positive losses.

    FALLING times the change of its logarithm between the window's halves, so far as noise does not explain that, and
    the noise itself: where the loss jumps from batch to batch, so does the curvature of the few that were scored.
    """
    positive = [loss for loss in losses if math.isfinite(loss) and loss > 0]
    if len(positive) < FEWEST_STEPS:
        return 0.0
    octaves = np.log2(positive)
    noise = float(np.median(np.abs(np.diff(octaves)))) * 1.4826 / math.sqrt(2)
    by_chance = noise**2 * 2 / (len(octaves) // 2)
    falls = math.sqrt(max(halves_apart(octaves) ** 2 - by_chance, 0.0))
    return math.hypot(FALLING * falls, noise)


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
