"""How noisy a parameter's gradient is: the energy of the minibatch's noise over the gradient's own, noise included.

Write a gradient as g = ḡ + n with a noise of variance σ² in each element, independent from step to step. Two sources:

*moments*: an optimizer of Adam's family keeps m, the running mean of g, and v, that of g². After t steps
m̂ = Σ w_i·g_i with weights that add up to one, so that

    E[v̂] = ḡ² + σ²,   E[m̂²] = ḡ² + σ²·Σw²,   Σw² = (1-β₁)/(1+β₁) · (1+β₁^t)/(1-β₁^t)

and (v̂ - m̂²)/(1 - Σw²) is σ² without bias at any t above 1; after many steps 1/(1 - Σw²) is (1+β₁)/(2β₁). Moments
are believed from t = 2/(1-β₁) on, 20 for β₁ = 0.9, and only where v̂ is within a tenth of the energy of this window's
own gradients: v reaches a thousand steps back, and where gradients have since grown or shrunk it tells of another time.

*differences*: otherwise half the energy of the difference between the gradients of two successive recorded steps, in
a fixed strided sample of 2,048 elements. It has σ² without bias where ḡ changes little from one to the next.

Seen in small trainings with AdamW and SGD, against 200 minibatches at the window's last weights: where moments are
believed, within 0.01 of the true share; differences within 0.03 in most layers, and up to 0.15 above it where the
learning rate is so high that ḡ itself turns from step to step. Moments that are not fresh, but of another time by a
factor of 1.5, were off by 0.14: hence the tenth.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probes.strided import strided

SAMPLE = 2048  # elements of each gradient that are followed from step to step
FRESH = 2.0  # times 1/(1-β₁): steps from which on moments are asked
STALE = 1.1  # factor between v̂ and the energy of this window's gradients beyond which moments tell of other times

MOMENTS, DIFFERENCES = "moments", "differences"


@dataclass(frozen=True)
class Moments:
    """One parameter's at one step: sums over the same elements of each; on a device perhaps not computed yet.

    first_squared   Σ m², float64
    second          Σ v, float64
    gradient        Σ g² of that step's gradient, float64
    step            the optimizer's own count
    """

    first_squared: Tensor | float
    second: Tensor | float
    gradient: Tensor | float
    step: Tensor | float
    betas: tuple[float, float]

    @property
    def estimate(self) -> tuple[float, float] | None:
        """σ² and E[g²], summed over the elements; None where the moments are fresh or say nothing."""
        steps, (beta1, beta2) = float(self.step), self.betas
        if not (0 < beta1 < 1 and 0 < beta2 < 1) or steps * (1 - beta1) < FRESH * (1 - 1e-9):
            return None
        mean_squared = float(self.first_squared) / (1 - beta1**steps) ** 2
        energy = float(self.second) / (1 - beta2**steps)
        if not (math.isfinite(mean_squared) and math.isfinite(energy) and energy > 0):
            return None
        return max(energy - mean_squared, 0.0) / (1 - weight_energy(beta1, steps)), energy


def weight_energy(beta: float, steps: float) -> float:
    """Σw² of the bias-corrected running mean after some steps: 1 after the first, (1-β)/(1+β) after many."""
    return (1 - beta) / (1 + beta) * (1 + beta**steps) / (1 - beta**steps)


def noise_from_moments(found: Sequence[Moments]) -> float | None:
    """σ² over E[g²] from some steps' moments, 0 to 1; None where they are fresh, or of other times than these steps."""
    estimates = [estimate for moments in found if (estimate := moments.estimate) is not None]
    gradients = [float(moments.gradient) for moments in found]
    if not estimates or len(estimates) < len(found) or not all(map(math.isfinite, gradients)):
        return None
    noise, energy = (math.fsum(parts) / len(found) for parts in zip(*estimates, strict=True))
    seen = math.fsum(gradients) / len(gradients)
    if not energy / STALE <= seen <= energy * STALE:
        return None
    return min(noise / energy, 1.0)


class Differences:
    """Noise from successive gradients: samples are kept for one step, sums stay on the device until they are asked."""

    def __init__(self) -> None:
        self._last: dict[torch.device, _Samples] = {}
        self._spare: dict[torch.device, Tensor] = {}  # of the step before that, for the next one's
        self._sums: dict[tuple[str, ...], Tensor] = {}  # noise and energy, [2, parameters]

    def add(self, gradients: Mapping[str, Tensor], divisor: Tensor | None = None) -> None:
        """The gradients of a step, as the optimizer uses them once divided by `divisor`: dense and floating ones."""
        now = {
            device: _Samples.of(found, divisor, self._spare.pop(device, None))
            for device, found in _by_device(gradients).items()
        }
        for device, samples in now.items():
            before = self._last.get(device)
            followed, sums = samples.against(before) if before is not None else ((), None)
            if sums is not None:
                self._sums[followed] = self._sums[followed] + sums if followed in self._sums else sums
        self._spare = {device: samples.values for device, samples in self._last.items()}
        self._last = now

    def forget(self) -> None:
        """Let go of the samples."""
        self._last, self._spare = {}, {}

    def sums(self) -> dict[str, tuple[float, float]]:
        """Each parameter's noise and gradient energy, summed over steps and sampled elements; waits for the device."""
        total: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for names, sums in self._sums.items():
            for name, noise, energy in zip(names, *sums.tolist(), strict=True):
                before = total[name]
                total[name] = before[0] + noise, before[1] + energy
        return dict(total)


@dataclass(frozen=True)
class _Samples:
    """Those of several gradients on one device, one after another: `values` float32 [sum of `sizes`]."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    values: Tensor

    @classmethod
    def of(cls, gradients: Mapping[str, Tensor], divisor: Tensor | None, spare: Tensor | None) -> _Samples:
        """`spare` is written over where it has the size: what stays from step to step breaks up the training's heap."""
        sampled = {name: sample for name, each in gradients.items() if (sample := strided(each, SAMPLE)).numel()}
        sizes = tuple(map(len, sampled.values()))
        first = next(iter(gradients.values()))
        if spare is None or len(spare) != sum(sizes):
            spare = torch.empty(sum(sizes), dtype=torch.float32, device=first.device)
        values = spare
        if sampled:
            torch._foreach_copy_(list(values.split(sizes)), list(sampled.values()))
        if divisor is not None:
            values.div_(divisor.to(values.device, non_blocking=True))
        return cls(tuple(sampled), sizes, values)

    def against(self, before: _Samples) -> tuple[tuple[str, ...], Tensor | None]:
        """The parameters that both have, and their noise and energy: float64 [2, parameters]; None where none is.

        Zero where a step had Inf or NaN, which says nothing of the noise.
        """
        names, sizes, pair = self.names, self.sizes, (self.values, before.values)
        if before.names != names or before.sizes != sizes:
            ours, theirs = self._parts(), before._parts()
            names = tuple(name for name in self.names if name in theirs and theirs[name].shape == ours[name].shape)
            sizes = tuple(len(ours[name]) for name in names)
            if names:
                pair = torch.cat([ours[name] for name in names]), torch.cat([theirs[name] for name in names])
        if not names:
            return (), None
        now, then = (values.double() for values in pair)
        squares = torch.stack([(now - then).square_(), now.square_().add_(then.square_())])
        found = _summed(squares, sizes) / 2
        return names, torch.where(found.isfinite().all(dim=0), found, 0.0)

    def _parts(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values.split(self.sizes), strict=True))


def _summed(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sums of so many columns each; none of the sizes is 0."""
    if values.device.type == "cpu":
        firsts = np.cumsum([0, *sizes[:-1]])
        return torch.from_numpy(np.add.reduceat(values.numpy(), firsts, axis=1))
    return torch.stack([part.sum(dim=1) for part in values.split(tuple(sizes), dim=1)], dim=1)


def _by_device(gradients: Mapping[str, Tensor]) -> dict[torch.device, dict[str, Tensor]]:
    found: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, gradient in gradients.items():
        found[gradient.device][name] = gradient
    return found
