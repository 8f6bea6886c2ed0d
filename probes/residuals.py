"""Losses of a residual, element by element: their Hessian is diagonal, and v is its root with random signs.

Both sides may come from the model (two networks that are brought together): moving one is moving the other back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probes.losscall import Given, LossCall, mean_over, signs

Curve = Callable[[Given, Tensor], Tensor | float]  # the second derivative of an element's loss at these residuals


def _residual_loss(name: str, curve: Curve, given: Given) -> LossCall:
    outputs, target, weight = given["input"], given["target"], given.get("weight")
    sides = [(side, sign) for side, sign in ((outputs, 1), (target, -1)) if side.requires_grad]
    shape = torch.broadcast_shapes(outputs.shape, target.shape)

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        residuals = outputs.detach().float() - target.detach().float()
        second = counts * curve(given, residuals) * (1.0 if weight is None else weight.detach().float())
        noise = signs(shape, generator) * second.sqrt()
        return tuple(sign * noise.sum_to_size(side.shape) for side, sign in sides)

    def count() -> Tensor | float:
        # F.mse_loss divides by the weights' sum, F.huber_loss by the number of elements (torch 2.9 to 2.13).
        return shape.numel() if weight is None or name != "mse_loss" else weight.detach().float().sum()

    return LossCall(name, tuple(side for side, _ in sides), draw, mean_over(given, count))


def _squared(_: Given, __: Tensor) -> float:
    return 2.0


def _smooth_l1(given: Given, residuals: Tensor) -> Tensor:
    """1/beta within beta, 0 beyond; a beta of 0 is the absolute error, which has none."""
    beta = given["beta"]
    return (residuals.abs() < beta).float() / (beta or 1.0)


def _huber(given: Given, residuals: Tensor) -> Tensor:
    return (residuals.abs() <= given["delta"]).float()


RESIDUALS: dict[Callable[..., Any], Callable[[Given], LossCall | None]] = {
    F.mse_loss: partial(_residual_loss, "mse_loss", _squared),
    F.smooth_l1_loss: partial(_residual_loss, "smooth_l1_loss", _smooth_l1),
    F.huber_loss: partial(_residual_loss, "huber_loss", _huber),
}
