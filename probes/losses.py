"""The loss functions whose curvature the window knows: a random vector with the loss's own Hessian as covariance.

For a loss ℓ(z) with Hessian H in the model's outputs z, a vector v with E[v·vᵀ] = H, sent backward through the model,
gives gradients whose expected squares are the diagonal of the Gauss-Newton matrix. The draw is made for the summed
loss; `scale` says what the mean or a weighted mean divides by. Whatever the training code does to the loss afterwards
(accumulation, an auxiliary factor) shows in the gradient that reaches the loss function's result, and multiplies it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossCall:
    """One call of a known loss function.

    `outputs` is the model's output z as the loss took it; `draw(generator)` gives v, shaped as z, for the summed loss;
    `scale` is d(result)/d(summed loss).
    """

    name: str
    outputs: Tensor
    draw: Callable[[torch.Generator], Tensor]
    scale: float


def loss_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossCall | None:
    """What is known of a call of a loss function; None where it is no known loss or its reduction is "none"."""
    read = _KNOWN.get(function)
    if read is None:
        return None
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["reduction"] not in ("mean", "sum"):
        return None
    call = read(given)
    return call if call is None or call.outputs.requires_grad else None


def _cross_entropy(given: dict[str, Any]) -> LossCall | None:
    """v = √w·(p − e_ŷ) with ŷ drawn from the model's own distribution at each position, w the target's class weight.

    The Hessian of the logarithm of the softmax does not depend on the target, so label smoothing changes nothing.
    """
    logits, target, weight = given["input"], given["target"], given["weight"]
    classes = 1 if logits.dim() > 1 else 0
    if target.is_floating_point():
        if weight is not None:
            return None
        weights = torch.ones_like(logits.detach().select(classes, 0))
        total = float(weights.numel())
    else:
        weights = (target != given["ignore_index"]).to(logits.dtype)
        if weight is not None:
            weights = weights * weight.detach()[target.clamp(min=0)]
        total = float(weights.sum())

    def draw(generator: torch.Generator) -> Tensor:
        probabilities = logits.detach().float().softmax(classes).movedim(classes, -1)
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        drawn = torch.multinomial(rows, 1, generator=generator).reshape(probabilities.shape[:-1])
        chosen = F.one_hot(drawn, rows.shape[-1])
        vector = (probabilities - chosen) * weights.float().sqrt().unsqueeze(-1)
        return vector.movedim(-1, classes).to(logits.dtype)

    return LossCall("cross_entropy", logits, draw, _scale(given, total))


def _mse(given: dict[str, Any]) -> LossCall | None:
    """v = √2·normal noise: the Hessian of a squared error is 2, whatever the target."""
    outputs, target = given["input"], given["target"]
    if outputs.shape != target.shape or given.get("weight") is not None:
        return None

    def draw(generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, device=outputs.device)
        return (2**0.5 * noise).to(outputs.dtype)

    return LossCall("mse_loss", outputs, draw, _scale(given, outputs.numel()))


def _scale(given: dict[str, Any], total: float) -> float:
    if given["reduction"] == "sum":
        return 1.0
    return 1.0 / total if total else 0.0


_KNOWN: dict[Callable[..., Any], Callable[[dict[str, Any]], LossCall | None]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse,
}
