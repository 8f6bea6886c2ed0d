"""How much of what was found of the network's own curvature is believed, slot by slot.

Found from a few draws on a few batches, it is noisy, and for a network that fits its data well it is noise around
next to nothing: a calibrated model's residuals are zero in the mean, and Gauss-Newton alone is the better guess. Where
a network is far from that, all slots tell so together. So each slot's ratio of the two, x = R / Gauss-Newton, is drawn
towards the mean of all slots' ratios, the more the noisier it is beside what they differ by (empirical Bayes with a
normal prior; mean and spread of the prior by moments, DerSimonian and Laird 1986). That mean is itself drawn towards
zero, which is Gauss-Newton, where few or noisy slots tell of it, and what is unsure of it is in every slot's variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probes.records import Slot

OF_ALL = 3.0  # degrees of freedom that the noise of all slots together counts as, beside a slot's own
USUAL = (
    1.0  # ours: by how much of Gauss-Newton's damage the mean of all slots may well differ from it, before any is seen
)
LEAST = 0.3  # of Gauss-Newton's damage: what is kept where the network's own curvature seems to undo more of it

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """What the network's own curvature adds to Gauss-Newton's damage of a slot, as a share of it, and the variance."""

    value: float
    variance: float


def believed(found: Mapping[Slot, Sequence[Ratio]]) -> dict[Slot, Ratio]:
    """Each slot's ratio given one a scored step; steps may differ in number. Slots without any are left out.

    A ratio of exactly zero without variance is known, and stays: nothing lies between the slot and the loss.
    """
    slots = [slot for slot, ratios in found.items() if ratios]
    if not slots:
        return {}
    means = np.array([np.mean([one.value for one in found[slot]]) for slot in slots])
    noise = _noise([found[slot] for slot in slots])
    open_ = noise > 0
    prior, unsure, spread = _prior(means[open_], noise[open_])
    weight = np.where(open_, spread / np.where(noise + spread > 0, noise + spread, 1.0), 1.0)
    values = np.maximum(weight * means + (1 - weight) * prior, LEAST - 1)
    variances = weight * noise + (1 - weight) ** 2 * unsure
    return {
        slot: Ratio(float(value), float(variance))
        for slot, value, variance in zip(slots, values, variances, strict=True)
    }


def _noise(found: Sequence[Sequence[Ratio]]) -> Array:
    """Variance of each slot's mean: between steps where there are several, else between draws; with that of all."""
    own, degrees = [], []
    for ratios in found:
        values = [one.value for one in ratios]
        several = len(values) > 1
        own.append(np.var(values, ddof=1) / len(values) if several else ratios[0].variance)
        degrees.append(len(values) - 1 if several else 1)
    variances, freedom = np.array(own), np.array(degrees, dtype=np.float64)
    known = variances == 0
    together = np.mean(variances[~known]) if not known.all() else 0.0
    return np.where(known, 0.0, (freedom * variances + OF_ALL * together) / (freedom + OF_ALL))


def _prior(means: Array, noise: Array) -> tuple[float, float, float]:
    """The mean of the slots' true ratios, the variance of that mean, and the variance of the ratios."""
    if not len(means):
        return 0.0, 0.0, 0.0
    middle = float(np.median(means))
    spread = max(0.0, float(np.mean((means - middle) ** 2 - noise)))
    weights = 1 / (noise + spread)
    certainty = float(np.sum(weights)) + 1 / USUAL**2
    return float(np.sum(weights * means)) / certainty, 1 / certainty, spread
