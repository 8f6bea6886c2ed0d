"""Losses that are the negative logarithm of a probability.

Where a function takes logits, v has the loss's own Hessian. Where it takes what a link function made of them
(log-probabilities, probabilities, a variance), its own Hessian is not that of the whole: nll_loss is linear in its
input. There v has the Fisher information as covariance, E over targets drawn from the model, which carried back
through the link is the curvature at the logits: −e_ŷ at log-probabilities becomes p − e_ŷ behind their softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probes.losscall import Given, LossCall, mean_over, signs


def _cross_entropy(given: Given) -> LossCall:
    """v = √w·(p − e_ŷ), ŷ drawn from the model at each position independently, w what the target weighs there.

    The Hessian of the logarithm of the softmax does not depend on the target but for its weight: label smoothing
    changes nothing where classes are not weighted.
    """
    logits, weigh = given["input"], _ClassWeights(given)

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        vector = logits.detach().float().softmax(weigh.dimension)
        chosen = _chosen(vector, weigh.dimension, generator)
        vector.scatter_add_(weigh.dimension, chosen, vector.new_full((), -1.0).expand(chosen.shape))
        return (vector.mul_((counts * weigh.items()).sqrt_().unsqueeze(weigh.dimension)),)

    return LossCall("cross_entropy", (logits,), draw, mean_over(given, weigh.total))


def _nll(given: Given) -> LossCall:
    """v = −√w·e_ŷ at the log-probabilities. If they do not add up to one (no softmax before), it is scaled by that."""
    logarithms, weigh = given["input"], _ClassWeights({**given, "label_smoothing": 0.0})

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        probabilities = logarithms.detach().float().exp()
        whole = probabilities.sum(weigh.dimension)
        chosen = _chosen(probabilities, weigh.dimension, generator)
        root = (counts * weigh.items() * whole).sqrt_().unsqueeze(weigh.dimension)
        return (probabilities.zero_().scatter_(weigh.dimension, chosen, -root),)

    return LossCall("nll_loss", (logarithms,), draw, mean_over(given, weigh.total))


class _ClassWeights:
    """What each position's target weighs, and what a mean divides by, as F.cross_entropy has them."""

    def __init__(self, given: Given) -> None:
        self._target, self._weight = given["target"], given["weight"]
        self._smoothing, self._ignored = given["label_smoothing"], given["ignore_index"]
        self._outputs = given["input"]
        self.dimension = 1 if self._outputs.dim() > 1 else 0

    def items(self) -> Tensor:
        """Float32, one a position: 0 where the target is ignored."""
        classes = self._outputs.shape[self.dimension]
        weight = None if self._weight is None else self._weight.detach().float()
        if self._target.is_floating_point():
            target = self._target.detach().float()
            target = target * (1 - self._smoothing) + self._smoothing / classes
            return target.movedim(self.dimension, -1).mul(1.0 if weight is None else weight).sum(-1)
        kept = self._kept()
        if weight is None:
            return kept
        own = weight[self._target.clamp(0, classes - 1)]
        return kept * ((1 - self._smoothing) * own + self._smoothing * weight.mean())

    def total(self) -> Tensor | float:
        """Of soft targets the number of positions, of others the targets' own weights, without the smoothing."""
        if self._target.is_floating_point():
            return self._outputs.numel() / max(self._outputs.shape[self.dimension], 1)
        kept = self._kept()
        if self._weight is not None:
            kept = kept * self._weight.detach().float()[self._target.clamp(0, len(self._weight) - 1)]
        return kept.sum()

    def _kept(self) -> Tensor:
        return (self._target != self._ignored).float()


def _kl_div(given: Given) -> LossCall | None:
    """As nll_loss with a target spread over classes: its whole mass weighs the position."""
    logarithms, target = given["input"], given["target"]
    if target.requires_grad:
        return None

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        probabilities = logarithms.detach().float().exp()
        classes = _dimension_of_classes(probabilities)
        masses = target.detach().float()
        masses = counts * (masses.exp() if given["log_target"] else masses)
        weights = masses.expand(probabilities.shape).sum(classes, keepdim=True)
        chosen = _chosen(probabilities, classes, generator)
        return (probabilities.zero_().scatter_(classes, chosen, -weights.sqrt()),)

    if given["reduction"] == "batchmean":
        return LossCall("kl_div", (logarithms,), draw, lambda: 1.0 / max(logarithms.shape[0], 1))
    return LossCall("kl_div", (logarithms,), draw, mean_over(given, logarithms.numel))


def _dimension_of_classes(probabilities: Tensor) -> int:
    """Along which probabilities add up to one: usually the last or the second."""
    for dimension in dict.fromkeys((probabilities.dim() - 1, 1, *range(probabilities.dim()))):
        if dimension < probabilities.dim() and bool(
            torch.isclose(probabilities.sum(dimension), torch.ones(()).to(probabilities), atol=0.02).all()
        ):
            return dimension
    raise ValueError("the input of kl_div is no logarithm of probabilities along any dimension")


def _chosen(probabilities: Tensor, dimension: int, generator: torch.Generator) -> Tensor:
    """A class drawn at each position from its probabilities: int64, of size 1 along `dimension`.

    Where the running sum passes a uniform number: seven times as fast as torch.multinomial at 8,192 classes on a CPU
    (torch 2.13), and without its limit of 2^24 of them. A class of probability 0 is never passed.
    """
    sums = probabilities.movedim(dimension, -1).cumsum(-1)
    shape = (*sums.shape[:-1], 1)
    places = torch.rand(shape, generator=generator, device=generator.device) * sums[..., -1:]
    drawn = torch.searchsorted(sums.contiguous(), places, right=True).clamp_(max=sums.shape[-1] - 1)
    return drawn.movedim(-1, dimension)


def _bce_with_logits(given: Given) -> LossCall | None:
    """Per element w·(1 + (pos_weight − 1)·y)·σ(1 − σ)."""
    logits, target, weight, positive = (given[name] for name in ("input", "target", "weight", "pos_weight"))
    if target.requires_grad:
        return None

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        values = logits.detach().float()
        second = counts * values.sigmoid() * (-values).sigmoid()
        if weight is not None:
            second = second * weight.detach().float()
        if positive is not None:
            second = second * (1 + (positive.detach().float() - 1) * target.detach().float())
        return (signs(values.shape, generator) * second.sqrt(),)

    return LossCall("binary_cross_entropy_with_logits", (logits,), draw, mean_over(given, logits.numel))


def _bce(given: Given) -> LossCall | None:
    """The Fisher information at a probability: w/(p(1 − p)), which behind a sigmoid is w·p(1 − p)."""
    probabilities, target, weight = (given[name] for name in ("input", "target", "weight"))
    if target.requires_grad:
        return None

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        values = probabilities.detach().float()
        spread = (values * (1 - values)).clamp(min=1e-12)  # F.binary_cross_entropy's own clamp is at log p = −100
        fisher = counts / spread * (1.0 if weight is None else weight.detach().float())
        return (signs(values.shape, generator) * fisher.sqrt(),)

    return LossCall("binary_cross_entropy", (probabilities,), draw, mean_over(given, probabilities.numel))


def _poisson_nll(given: Given) -> LossCall | None:
    """exp(z) where z is the rate's logarithm; at a rate itself y/(z + eps)²."""
    outputs, target = given["input"], given["target"]
    if target.requires_grad:
        return None
    shape = torch.broadcast_shapes(outputs.shape, target.shape)

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        values = outputs.detach().float()
        second = values.exp() if given["log_input"] else target.detach().float() / (values + given["eps"]).square()
        return ((signs(shape, generator) * (counts * second).sqrt()).sum_to_size(outputs.shape),)

    return LossCall("poisson_nll_loss", (outputs,), draw, mean_over(given, shape.numel))


def _gaussian_nll(given: Given) -> LossCall | None:
    """The Fisher information of a normal distribution: 1/var at the mean, 1/(2·var²) at the variance."""
    mean, target, variance = given["input"], given["target"], given["var"]
    if target.requires_grad:
        return None
    shape = torch.broadcast_shapes(mean.shape, target.shape)
    learned = isinstance(variance, Tensor) and variance.requires_grad
    outputs = ([mean] if mean.requires_grad else []) + ([variance] if learned else [])

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        spread = torch.as_tensor(variance, device=mean.device).detach().float().clamp(min=given["eps"])
        one_short = spread.dim() > 0 and spread.shape != mean.shape and spread.shape == mean.shape[:-1]
        spread = spread.unsqueeze(-1) if one_short else spread
        at_mean = signs(shape, generator) * (counts / spread).sqrt()
        at_variance = signs(shape, generator) * (counts / 2).sqrt() / spread
        found = [at_mean.sum_to_size(mean.shape)] if mean.requires_grad else []
        if learned:
            found.append(at_variance.sum_to_size(spread.shape).reshape(variance.shape))
        return tuple(found)

    return LossCall("gaussian_nll_loss", tuple(outputs), draw, mean_over(given, shape.numel))


LIKELIHOODS: dict[Callable[..., Any], Callable[[Given], LossCall | None]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.kl_div: _kl_div,
    F.binary_cross_entropy_with_logits: _bce_with_logits,
    F.binary_cross_entropy: _bce,
    F.poisson_nll_loss: _poisson_nll,
    F.gaussian_nll_loss: _gaussian_nll,
}
