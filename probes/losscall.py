"""One call of a loss function whose curvature is known, and the random vector that has it as covariance.

For a loss ℓ(z) with Hessian H in the model's outputs z, a vector v with E[v·vᵀ] = H, sent backward through the model,
gives gradients whose expected squares are the diagonal of the Gauss-Newton matrix. A loss is a sum of items' losses:
rows of a cross-entropy, elements of a squared error. What each item counts in the training's total is the gradient
that reaches the loss function's result, times what the reduction divides by; v grows by its square root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Draw = Callable[[torch.Generator, Tensor], tuple[Tensor, ...]]
Given = Mapping[str, Any]


@dataclass(frozen=True)
class LossCall:
    """One call of a known loss function.

    `outputs`: what of the model it took, as it took it. `draw(generator, counts)` gives v for each of them, float32,
    items counting `counts` (not negative; broadcastable to the items, the shape of the loss under reduction "none").
    `share()` is d(result)/d(an item's loss), a number or a tensor, the same for all items.
    """

    name: str
    outputs: tuple[Tensor, ...]
    draw: Draw
    share: Callable[[], Tensor | float] = lambda: 1.0
    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", tuple(output._version for output in self.outputs))

    @property
    def intact(self) -> bool:
        """No output has been changed in place since."""
        return self.versions == tuple(output._version for output in self.outputs)

    def counts(self, gradient: Tensor) -> Tensor:
        """What each item counts in the total, given the gradient that reached the result; float32, any sign."""
        return gradient.detach().float() * self.share()

    def vectors(self, generator: torch.Generator, counts: Tensor) -> list[Tensor]:
        """One draw, in the outputs' own dtypes."""
        drawn = self.draw(generator, counts)
        return [v.to(output.dtype) for v, output in zip(drawn, self.outputs, strict=True)]


def mean_over(given: Given, count: Callable[[], Tensor | float]) -> Callable[[], Tensor | float]:
    """The `share` of a loss whose mean divides by `count()`; nothing is divided under "sum" and "none"."""
    if given["reduction"] != "mean":
        return lambda: 1.0
    return lambda: 1.0 / count()


def signs(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """+1 or -1 with equal chance: of all noise with covariance 1, that with the smallest spread."""
    return torch.randint(0, 2, shape, generator=generator, device=generator.device).float() * 2 - 1
