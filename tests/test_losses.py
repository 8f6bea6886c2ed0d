"""The random vectors of each known loss have the loss's exact Hessian as covariance, whatever is done to it after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import hessian
from torch.overrides import TorchFunctionMode

from probes.errors import WindowError
from probes.losscall import LossCall
from probes.losses import curvature_of, loss_call
from tests.tensors import generator

ROWS, CLASSES = 5, 3
TARGET = torch.tensor([0, 2, -100, 1, 2])
KEPT = TARGET.clamp(min=0)
WEIGHT = torch.tensor([0.3, 1.0, 2.5])
SOFT = torch.rand(ROWS, CLASSES, generator=generator(3))
MASK = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])


def softmaxed(z: Tensor) -> Tensor:
    return z.log_softmax(1)


def numbers(z: Tensor) -> Tensor:
    return torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z, TARGET),
    "cross_entropy, one position": lambda z: F.cross_entropy(z[0], torch.tensor(1)),
    "cross_entropy, classes second": lambda z: F.cross_entropy(z.T[None], TARGET[None]),
    "cross_entropy, summed and divided": lambda z: F.cross_entropy(z, TARGET, reduction="sum") / 7,
    "cross_entropy, weighted": lambda z: F.cross_entropy(z, TARGET, WEIGHT.to(z)),
    "cross_entropy, smoothed": lambda z: F.cross_entropy(z, TARGET, label_smoothing=0.2),
    "cross_entropy, weighted and smoothed": lambda z: F.cross_entropy(z, TARGET, WEIGHT.to(z), label_smoothing=0.2),
    "cross_entropy, another index ignored": lambda z: F.cross_entropy(z, KEPT, ignore_index=0),
    "cross_entropy, soft": lambda z: F.cross_entropy(z, SOFT.to(z)),
    "cross_entropy, soft, weighted": lambda z: F.cross_entropy(z, SOFT.to(z), WEIGHT.to(z), label_smoothing=0.1),
    "cross_entropy, masked": lambda z: (F.cross_entropy(z, KEPT, reduction="none") * MASK.to(z)).sum() / 5,
    "cross_entropy, several weights": lambda z: 0.5 * F.cross_entropy(z, TARGET) + F.mse_loss(z, numbers(z)),
    "nll_loss": lambda z: F.nll_loss(softmaxed(z), TARGET, WEIGHT.to(z)),
    "nll_loss, summed": lambda z: F.nll_loss(softmaxed(z), TARGET, reduction="sum") / 3,
    "nll_loss, masked": lambda z: (F.nll_loss(softmaxed(z), KEPT, reduction="none") * MASK.to(z)).mean(),
    "kl_div": lambda z: F.kl_div(softmaxed(z), SOFT.to(z), reduction="batchmean"),
    "kl_div, mean": lambda z: F.kl_div(softmaxed(z), SOFT.to(z).log_softmax(1), log_target=True),
    "kl_div, masked": lambda z: (F.kl_div(softmaxed(z), SOFT.to(z), reduction="none").sum(1) * MASK.to(z)).sum(),
    "bce, logits": lambda z: F.binary_cross_entropy_with_logits(z, SOFT.to(z)),
    "bce, logits, weighted": lambda z: F.binary_cross_entropy_with_logits(
        z, SOFT.to(z), weight=WEIGHT.to(z), pos_weight=3 * WEIGHT.to(z), reduction="sum"
    ),
    "bce": lambda z: F.binary_cross_entropy(z.sigmoid(), SOFT.to(z), weight=WEIGHT.to(z).expand(ROWS, CLASSES)),
    "poisson, log": lambda z: F.poisson_nll_loss(z, SOFT.to(z), full=True),
    "poisson": lambda z: (
        F.poisson_nll_loss(z.square() + 1, SOFT.to(z), log_input=False) * 0 + F.mse_loss(z, SOFT.to(z))
    ),
    "gaussian, known variance": lambda z: F.gaussian_nll_loss(z, SOFT.to(z), var=SOFT.to(z) + 0.5),
    "gaussian, one variance a row": lambda z: F.gaussian_nll_loss(z, SOFT.to(z), var=MASK.to(z)[:, None] + 1),
    "mse_loss": lambda z: F.mse_loss(z, numbers(z)) * 3,
    "mse_loss, legacy reduction": lambda z: F.mse_loss(z, numbers(z), size_average=False),
    "mse_loss, both sides": lambda z: F.mse_loss(z[:2], z[2:4]),
    "mse_loss, masked": lambda z: (F.mse_loss(z, numbers(z), reduction="none").mean(1) * MASK.to(z)).sum() / 5,
    "mse_loss, broadcast": lambda z: F.mse_loss(z[:, :1].expand(ROWS, 3), numbers(z)),
    "mse_loss, weighted": lambda z: F.mse_loss(z, numbers(z), weight=SOFT.to(z)),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(z, numbers(z), beta=0.7),
    "huber_loss": lambda z: F.huber_loss(z, numbers(z), delta=0.7, reduction="sum"),
    "huber_loss, weighted": lambda z: F.huber_loss(z, numbers(z), delta=0.7, weight=SOFT.to(z)),
    "declared, diagonal": lambda z: curvature_of((z.square() * SOFT.to(z)).sum(1), z, (2 * SOFT).sqrt()) @ MASK.to(z),
    "declared, blocks": lambda z: (
        2 * curvature_of((z @ SOFT.to(z).T).square().sum() / 2, z, SOFT.T.expand(ROWS, 3, ROWS))
    ),
    "declared, drawn": lambda z: curvature_of(
        z.square().sum(), [z], lambda drawing: 2**0.5 * torch.randn(z.shape, generator=drawing)
    ),
}


class Losses(TorchFunctionMode):
    """Meets known losses, and the gradients that reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[LossCall, list[Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call = loss_call(func, args, kwargs or {})
        if call is not None:
            found: list[Tensor] = []
            self.met.append((call, found))
            result.register_hook(found.append)
        return result


def covariances(total: Callable[[Tensor], Tensor], z: Tensor, draws: int) -> Tensor:
    """g·gᵀ at z for each draw, of all losses met together, [draws, n, n]."""
    with Losses() as losses:
        loss = total(z)
    loss.backward(retain_graph=True)
    drawing = torch.Generator().manual_seed(7)
    found = torch.zeros(draws, z.numel())
    for call, gradients in losses.met:
        counts = call.counts(gradients[0])
        for i in range(draws):
            vectors = call.vectors(drawing, counts)
            pairs = [(o, v) for o, v in zip(call.outputs, vectors, strict=True) if o.requires_grad]
            outputs, starts = zip(*pairs, strict=True)
            found[i] += torch.autograd.grad(outputs, z, starts, retain_graph=True)[0].flatten()
    return found[:, :, None] * found[:, None, :]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:size_average and reduce")
@pytest.mark.parametrize("name", CASES)
def test_the_covariance_is_the_exact_hessian(name: str) -> None:
    z = torch.randn(ROWS, CLASSES, generator=generator(1))
    draws = 250
    found = covariances(CASES[name], z.clone().requires_grad_(), draws)
    exact = hessian(CASES[name], z.double()).reshape(z.numel(), z.numel()).float()
    spread = found.std(0) / draws**0.5
    assert exact.abs().max() > 0
    assert ((found.mean(0) - exact).abs() <= 5 * spread + 1e-5 * exact.abs().max()).all()
    assert found.mean(0).trace() == pytest.approx(float(exact.trace()), rel=0.25)


def test_a_learned_variance_has_the_fisher_information() -> None:
    """The variance's own second derivative depends on the target: its mean over targets is 1/(2·var²)."""
    variance = torch.tensor([0.5, 2.0])

    def total(z: Tensor) -> Tensor:
        return F.gaussian_nll_loss(z[:2], torch.zeros(2), z[2:], reduction="sum")

    z = torch.cat([torch.zeros(2), variance]).requires_grad_()
    found = covariances(total, z, 600)
    exact = torch.diag(torch.cat([1 / variance, 1 / (2 * variance**2)]))
    assert ((found.mean(0) - exact).abs() <= 5 * found.std(0) / 600**0.5 + 1e-6).all()


def test_a_rate_has_the_likelihoods_own_second_derivative() -> None:
    rate, target = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0])
    found = covariances(
        lambda z: F.poisson_nll_loss(z, target, log_input=False, reduction="sum"), rate.clone().requires_grad_(), 50
    )
    torch.testing.assert_close(found.mean(0).diagonal(), target / (rate + 1e-8) ** 2)


def test_all_ignored_counts_nothing() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    call = loss_call(F.cross_entropy, (z, torch.full((3,), -100)), {"reduction": "sum"})
    assert call is not None
    assert not call.vectors(torch.Generator(), call.counts(torch.ones(())))[0].any()


def test_losses_that_are_not_known_are_none() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    assert loss_call(F.l1_loss, (z, z), {}) is None
    assert loss_call(F.soft_margin_loss, (z, z), {}) is None
    assert loss_call(F.mse_loss, (z.detach(), z.detach()), {}) is None
    assert loss_call(F.kl_div, (z.log_softmax(1), z.softmax(1)), {}) is None  # both sides learn


def test_an_input_that_is_no_distribution_is_refused() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    call = loss_call(F.kl_div, (z, torch.ones(3, 4)), {"reduction": "sum"})
    assert call is not None
    with pytest.raises(ValueError, match="no logarithm of probabilities"):
        call.vectors(torch.Generator(), torch.ones(()))


def test_without_a_window_a_declaration_does_nothing() -> None:
    loss = torch.ones((), requires_grad=True)
    assert curvature_of(loss, loss, torch.ones(())) is loss


@pytest.mark.parametrize(
    ("loss", "factor", "says"),
    [(torch.ones(2), torch.ones(3, 4), "does not lead"), (torch.ones(()), torch.ones(4, 3), "a factor of shape")],
)
def test_a_declaration_that_does_not_hang_together_is_refused(loss: Tensor, factor: Tensor, says: str) -> None:
    with pytest.raises(WindowError, match=says):
        loss_call(curvature_of, (loss, torch.ones(3, 4, requires_grad=True), factor), {})
