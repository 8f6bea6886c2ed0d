"""The mean of a cast's error over batches: what is alike in all of them, and does not average out over steps.

Noise that a cast adds to a gradient is as good as a smaller batch. A mean error is not: where small gradients are
flushed in every batch, or a large one is always rounded the same way, the training goes where nothing leads it. One
batch's error holds both parts. The product of two batches' errors has the energy of their mean in expectation, because
what is each batch's own is independent. A batch is what the optimizer steps on: the errors of micro-batches, and of
several calls of one layer, are summed before anything is multiplied, and so are their gradients.

So errors are kept from one scored step to the next, not whole but as sketches: sums of their elements with random
signs, the same in each step, whose products are products of the errors in expectation (the count sketch of Charikar,
Chen and Farach-Colton 2002, with every k-th element in one sum). Sketches add up as what they are of does. Each takes
three float32 copies of that part of the gradient which is calculated (`cuts.py`), for a moment; the signs, a byte an
element, are drawn again at each call of a layer. Sketching adds some 1/√NUMBERS of the error's energy to the
uncertainty of one product of two steps; that there are few steps, and few products, adds most of the rest.

The energy counts over the whole gradient, whatever the optimizer. Element by element, as Adam divides, the errors that
are alike are mostly those of rare tokens, whose flushed gradients harm little; over the whole gradient the energies of
head casts rank as the rise of the loss does (`docs/advice.md`, whole trainings).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 512  # of a sketch: what is added to the uncertainty is 4% of the error's energy
ONE_PAIR = 0.2  # of the error's energy: how far the product of two steps' errors is from its mean. Ours, see `ratio_se`


class Signs:
    """Sketches errors, those of the same size and seed with the same signs."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: Tensor | None = None

    def sketched(self, errors: Sequence[Tensor]) -> Tensor:
        """Of all parts of one error, float32: [NUMBERS]."""
        whole = torch.cat([error.flatten() for error in errors])
        if self._drawn is None:
            generator = torch.Generator(whole.device).manual_seed(self._seed)
            bits = torch.randint(0, 2, whole.shape, generator=generator, device=whole.device, dtype=torch.int8)
            self._drawn = 2 * bits - 1
        return F.pad(whole * self._drawn, (0, -len(whole) % NUMBERS)).view(-1, NUMBERS).sum(0)


class Sketches:
    """Sketches errors in one call's gradient, beside that gradient: those of a step's calls, with one seed, add up."""

    def __init__(self, gradient: Sequence[Tensor], seed: int) -> None:
        self._signs = Signs(seed)
        sketch = self._signs.sketched(gradient).double()
        energy = torch.stack([torch.linalg.vector_norm(part).double().square() for part in gradient]).sum()
        self._gradient = torch.cat([sketch, (energy - sketch.square().sum())[None]]).float()

    def of(self, error: Sequence[Tensor]) -> Tensor:
        """float32 [2·NUMBERS + 1]: the error's, the gradient's, and the gradient's energy without its sketch's.

        `error` has the gradient's parts. The last number is there for the energy of a single call to be exact, and that
        of a sum to be uncertain in the products of two calls' gradients alone.
        """
        return torch.cat([self._signs.sketched(error), self._gradient])


def settled(summed: Tensor, divisor: float) -> tuple[Tensor, float]:
    """Of a step's sum of `Sketches.of`, on the CPU: the error's sketch, and the energy of the gradient that it is in.

    `divisor`: of gradients (the loss scale).
    """
    error, gradient, rest = summed.double().split([NUMBERS, NUMBERS, 1])
    energy = float(gradient.square().sum() + rest) / divisor**2
    return error / divisor, max(energy, 0.0)


class MeanError:
    """The energy of a mean error over its gradient's, from each step's sketch and each gradient's energy."""

    def __init__(self) -> None:
        self._sketches: list[Tensor] = []
        self._signals: list[float] = []

    def add(self, sketch: Tensor, signal: float) -> None:
        """Another step's, on the CPU; `signal`: the energy of the gradient that the error is in."""
        self._sketches.append(sketch.double())
        self._signals.append(signal)

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self._sketches)

    @property
    def ratio(self) -> float:
        """Without bias, and therefore below zero now and then; NaN with fewer than two steps or without a gradient."""
        return self._ratio(range(self.steps))

    @property
    def ratio_se(self) -> float:
        """Its standard error, by leaving out one step after the other.

        Two steps have one product of errors alone, which says nothing of how others would scatter: there it is ONE_PAIR
        of the error's energy. Products of two of eight steps scattered by 0.05 to 0.32 of it on the benchmark's LSTM.
        """
        if self.steps < 3:
            signal = math.fsum(self._signals)
            energy = math.fsum(float(sketch.square().sum()) for sketch in self._sketches)
            return ONE_PAIR * energy / signal if self.steps == 2 and signal > 0 else math.nan
        without = [self._ratio([step for step in range(self.steps) if step != left]) for left in range(self.steps)]
        return math.sqrt((self.steps - 1) * statistics.pvariance(without))

    def _ratio(self, steps: Sequence[int]) -> float:
        signal = math.fsum(self._signals[step] for step in steps)
        if len(steps) < 2 or not signal > 0:
            return math.nan
        each = torch.stack([self._sketches[step] for step in steps])
        products = float(each.sum(0).square().sum() - each.square().sum())
        return products / (len(steps) - 1) / signal
