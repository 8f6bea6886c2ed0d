"""Damage with the network's own second derivative, against the exact ½·δᵀHδ of small networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from probes import curvature, network_curvature
from probes.casts import Cast
from probes.probing import probe
from probes.records import Slot
from probes.shrinking import Ratio, believed
from probes.undisturbed import undisturbed
from probes.window import Window
from tests.test_curvature import Catcher
from tests.test_curvature_windows import gauss_newton

CAST = Cast.parse("e5m2")
BATCH = 6


@pytest.fixture(autouse=True)
def many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRAWS", "DRAWS_WHOLE_BATCH"):
        monkeypatch.setattr(curvature, name, 200)
    monkeypatch.setattr(network_curvature, "DRAWS", 200)


def watched(model: nn.Module, step: Callable[[], None]) -> Window:
    """One scored step, after which the weights are as before."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=1, curvature_steps=1, casts=[CAST]) as window:
        step()
        optimizer.step()
    return window


def full(model: nn.Module, name: str, loss: Callable[[], Tensor]) -> float:
    """½·δᵀHδ of a parameter, H the whole Hessian."""
    parameter = model.get_parameter(name)
    (slope,) = torch.autograd.grad(loss(), parameter, create_graph=True)
    delta = CAST(parameter.detach()) - parameter.detach()
    (curve,) = torch.autograd.grad(slope, parameter, delta)
    return float(0.5 * (curve * delta).sum())


def targets(z: Tensor) -> Tensor:
    return torch.arange(z.flatten(0, -2).shape[0]) % z.shape[-1]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.last(torch.tanh(mixed.transpose(1, 2).flatten(2)))
        return found


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), (4,), "0"),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), (4,), "0"),
    "attention": (Attending, (7, 8), "qkv"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("squared", [False, True])
def test_with_gauss_newton_it_is_the_whole_second_order(name: str, squared: bool) -> None:
    """Far from a fit, where the network's own part is large, of either sign."""
    torch.manual_seed(0)
    build, shape, site = MODELS[name]
    model, x = build(), torch.randn(BATCH, *shape)

    def of_outputs(z: Tensor) -> Tensor:
        return F.mse_loss(z, 3 + 0 * z.detach()) if squared else F.cross_entropy(8 * z.flatten(0, -2), targets(z))

    with Catcher(model, BATCH) as caught:
        z = model(x)
        total = of_outputs(z)
    assert caught.loss is not None
    known, outputs = caught.sums(total), list(caught.loss.outputs)
    slopes = torch.autograd.grad(total, outputs, retain_graph=True)
    with undisturbed():
        found = network_curvature.network_curvature(outputs, slopes, caught.met, [CAST], known, seed=0)
    beyond = found[Slot(site, "weight")]
    measured, spread = float(beyond.unit * beyond.energy), float(beyond.variance.sqrt() * beyond.energy)
    with sdpa_kernel(SDPBackend.MATH):  # which autograd can go back through twice by itself
        exact = full(model, f"{site}.weight", lambda: of_outputs(model(x)))
        exact -= gauss_newton(model, x, f"{site}.weight", of_outputs)
    assert abs(measured - exact) < 5 * spread
    assert abs(exact) > 3 * spread  # so that nothing at all would not pass


def test_a_kink_is_felt_where_nothing_normalises_behind_it() -> None:
    """±δ before a ReLU raises its mean, which no second derivative shows."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(4096, 8)

    def loss() -> Tensor:
        z = model(x)
        return F.mse_loss(z, 3 + 0 * z.detach())

    window = watched(model, lambda: loss().backward())
    weight = model.get_parameter("0.weight").detach()
    delta, losses = CAST(weight) - weight, []
    with torch.no_grad():
        for sign in (0, 1, -2):
            weight += sign * delta
            losses.append(float(loss().double()))
    exact = (losses[1] + losses[2]) / 2 - losses[0]
    (measured,), (beyond,) = (
        window.evidence("0", "weight").directional.values(),
        window.evidence("0", "weight").beyond.values(),
    )
    assert measured == pytest.approx(exact, rel=0.15)
    assert abs(beyond) > 0.3 * exact


def test_without_a_second_derivative_gauss_newton_stays_and_it_is_said() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), Once(), nn.Linear(5, 3)), torch.randn(BATCH, 4)
    window = watched(model, lambda: F.mse_loss(model(x), torch.ones(BATCH, 3)).backward())
    assert any("Gauss-Newton's alone" in note for note in window.notes)
    evidence = window.evidence("0", "weight")
    assert all(value > 0 for value in evidence.directional.values())
    assert evidence.beyond == {}


class Once(nn.Module):
    """A custom function that can be gone back through once."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.Function.apply(x)
        return found


def test_noise_around_nothing_is_not_believed() -> None:
    """Ratios that are noise alone come out near their mean; those that differ by more than their noise stay."""
    draws = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).tolist()
    noise = {Slot(str(i), "input"): [Ratio(value, 0.0) for value in pair] for i, pair in enumerate(draws)}
    means = [sum(one.value for one in pair) / 2 for pair in noise.values()]
    left = [one.value for one in believed(noise).values()]
    assert sum(value**2 for value in left) < 0.5 * sum(value**2 for value in means)
    apart = {
        slot: [Ratio(one.value + 10 * (i % 2), 0.0) for one in pair] for i, (slot, pair) in enumerate(noise.items())
    }
    for i, (slot, found) in enumerate(believed(apart).items()):
        mean = sum(one.value for one in apart[slot]) / 2
        assert abs(found.value - mean) < 0.5 or mean < -0.5, i


def test_what_is_known_to_be_nothing_stays_nothing() -> None:
    known = {Slot("head", "weight"): [Ratio(0.0, 0.0)] * 2, Slot("a", "weight"): [Ratio(3.0, 0.1), Ratio(3.2, 0.1)]}
    found = believed(known)
    assert found[Slot("head", "weight")].value == 0
    assert found[Slot("a", "weight")].value > 2
    assert believed({}) == {}
