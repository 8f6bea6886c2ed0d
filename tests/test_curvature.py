"""Predicted damage against the exact second order of small models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian

from probes import curvature
from probes.casts import Cast
from probes.curvature import Met, curvature_sums, noise_ratios, sample_dimension, sample_sums
from probes.losses import loss_call
from probes.records import Slot
from probes.sites import ProductCall, SiteHook
from tests.tensors import generator

CAST = Cast.parse("e5m2")


class Catcher(SiteHook):
    """Catches the products and the loss call of one step."""

    def __init__(self, model: nn.Module, batch: int | None) -> None:
        super().__init__(model)
        self.batch, self.met, self.loss = batch, [], None

    def on_product(self, call: ProductCall) -> Tensor:
        result = call.run()
        self.met.append(Met.of(call, result, self.batch))
        return result

    def on_other(self, function: Any, args: Any, kwargs: Any) -> Any:
        self.loss = loss_call(function, args, kwargs) or self.loss
        return function(*args, **kwargs)


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


def weighted(z: Tensor) -> Tensor:
    target = torch.arange(len(z)) % z.shape[1]
    target[0] = -100
    return F.cross_entropy(z, target, weight=torch.linspace(0.2, 2, z.shape[1]), label_smoothing=0.1)


def summed(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1], reduction="sum") / 7


def squared(z: Tensor) -> Tensor:
    return F.mse_loss(z, torch.zeros_like(z)) * 3


@pytest.mark.parametrize(("loss", "outside"), [(cross_entropy, 1.0), (weighted, 1.0), (summed, 1 / 7), (squared, 3.0)])
@pytest.mark.parametrize("batch", [6, None])
def test_damage_of_a_linear_layer_is_the_exact_second_order(
    loss: Callable[[Tensor], Tensor], outside: float, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear model's Gauss-Newton matrix is its Hessian: ½δᵀHδ can be had exactly."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(6, 5)
    monkeypatch.setattr(curvature, "DRAWS", 500)
    with Catcher(model, batch) as caught:
        loss(model(x))
    assert caught.loss is not None
    sums = curvature_sums(caught.loss, caught.met, [CAST], seed=1)
    c = caught.loss.scale * outside
    weight = model.weight.detach()
    cases: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "weight": (weight, lambda w: loss(F.linear(x, w, model.bias.detach()))),
        "input": (x, lambda inputs: loss(F.linear(inputs, weight, model.bias.detach()))),
    }
    for role, (operand, total) in cases.items():
        matrix = hessian(total, operand).reshape(operand.numel(), operand.numel())
        delta = (CAST(operand) - operand).reshape(-1)
        got = sums[Slot("(root)", role)]
        assert c * got.curvature == pytest.approx(float(matrix.trace()), rel=0.15)
        assert c * got.directional[str(CAST)] == pytest.approx(float(0.5 * delta @ matrix @ delta), rel=0.2)


def test_damage_through_a_deeper_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind ReLUs, the loss's Hessian in a first layer's weight is still Gauss-Newton (piecewise linear)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    x = torch.randn(8, 4)
    monkeypatch.setattr(curvature, "DRAWS", 500)
    with Catcher(model, 8) as caught:
        cross_entropy(model(x))
    sums = curvature_sums(caught.loss, caught.met, [CAST], seed=1)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def total(weight: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, weight, parameters["0.bias"]))
        return cross_entropy(F.linear(hidden, parameters["2.weight"], parameters["2.bias"]))

    matrix = hessian(total, parameters["0.weight"]).reshape(24, 24)
    delta = (CAST(parameters["0.weight"]) - parameters["0.weight"]).reshape(-1)
    got = caught.loss.scale * sums[Slot("0", "weight")].directional[str(CAST)]
    assert got == pytest.approx(float(0.5 * delta @ matrix @ delta), rel=0.2)


def test_products_that_the_loss_does_not_reach_get_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with Catcher(model, 2) as caught:
        model(torch.randn(2, 4))
        cross_entropy(model[1](torch.randn(2, 4)))
    met = [entry for entry in caught.met if entry.call.site == "0"]
    assert curvature_sums(caught.loss, met, [CAST], seed=0) == {}


def test_an_operand_changed_in_place_is_left_out() -> None:
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)  # autograd does not need the input then, and lets it be changed
    x = torch.randn(2, 4)
    with Catcher(model, 2) as caught:
        loss_input = model(x)
        x.add_(1)
        cross_entropy(loss_input)
    assert not caught.met[0].intact
    assert curvature_sums(caught.loss, caught.met, [CAST], seed=0) == {}


def test_a_weight_used_several_times_has_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same δ in three products: their parts add up before the square."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(6, 4)
    monkeypatch.setattr(curvature, "DRAWS", 1000)

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, inputs: Tensor) -> Tensor:
            for _ in range(3):
                inputs = inputs + torch.relu(self.layer(inputs))
            return inputs

    with Catcher(Repeated(), 6) as caught:
        outputs = caught.model(x)
        cross_entropy(outputs)
    got = curvature_sums(caught.loss, caught.met, [CAST], seed=1)[Slot("layer", "weight")]
    weight = layer.weight.detach()
    delta = CAST(weight) - weight

    def run(w: Tensor) -> Tensor:
        inputs = x
        for _ in range(3):
            inputs = inputs + torch.relu(F.linear(inputs, w, layer.bias.detach()))
        return inputs

    _, moved = torch.autograd.functional.jvp(run, weight, delta)
    p = run(weight).softmax(1)
    exact = 0.5 * ((p * moved.square()).sum(1) - (p * moved).sum(1).square()).mean()
    assert caught.loss.scale * got.directional[str(CAST)] == pytest.approx(float(exact), rel=0.15)


@pytest.mark.parametrize(
    ("shape", "batch", "dimension"),
    [
        ((6, 4), 6, 0),
        ((12, 4), 6, 0),
        ((18, 6), 6, 0),  # flattened rows of as many features as there are samples
        ((3, 6, 4), 6, 1),
        ((5, 4), 6, None),
        ((0, 4), 0, None),
        ((4, 4), None, None),
        ((), 6, None),
    ],
)
def test_samples_are_found_in_a_tensor(shape: tuple[int, ...], batch: int | None, dimension: int | None) -> None:
    values = torch.randn(shape, generator=generator())
    assert sample_dimension(values, batch, values) == dimension
    sums = sample_sums(values, values, dimension, batch)
    assert len(sums) == (1 if dimension is None else batch)
    torch.testing.assert_close(sums.sum(), values.double().square().sum(), rtol=1e-6, atol=0)


def test_a_transposed_batch_is_found_by_its_memory() -> None:
    transposed = torch.zeros(6, 12, 4).transpose(0, 1)
    assert sample_dimension(transposed.contiguous(), 6, transposed) == 1


def test_flattened_rows_are_grouped_by_sample() -> None:
    values = torch.arange(12.0).reshape(6, 2)
    assert sample_sums(values, torch.ones_like(values), 0, 3).tolist() == [
        0 + 1 + 2 + 3,
        4 + 5 + 6 + 7,
        8 + 9 + 10 + 11,
    ]


def test_noise_is_that_of_the_gradients_computed_with_the_cast() -> None:
    model, x = nn.Linear(8, 6), torch.randn(5, 8, requires_grad=True)
    with Catcher(model, 5) as caught:
        result = model(x)
    g = torch.randn(5, 6)
    ratios = noise_ratios(caught.met[0].call, g, [CAST], adaptive=False)
    w = model.weight.detach()
    x = x.detach()
    assert result.shape == g.shape

    def relative(error: Tensor, exact: Tensor) -> float:
        return float(error.square().sum() / exact.square().sum())

    name = str(CAST)
    assert ratios[Slot("(root)", "grad_output")][name] == pytest.approx(
        relative((CAST(g) - g).T @ x, g.T @ x), rel=1e-4
    )
    assert ratios[Slot("(root)", "input")][name] == pytest.approx(relative(g.T @ (CAST(x) - x), g.T @ x), rel=1e-4)
    assert ratios[Slot("(root)", "weight")][name] == pytest.approx(relative(g @ (CAST(w) - w), g @ w), rel=1e-4)


def test_a_channel_that_is_flushed_counts_where_each_element_has_its_own_step() -> None:
    """One output channel's gradients vanish in int8: nothing to the whole gradient's energy, a quarter to Adam."""
    model, x = nn.Linear(8, 4), torch.randn(50, 8)
    with Catcher(model, 50) as caught:
        model(x)
    g = torch.randn(50, 4, generator=generator()) * torch.tensor([1.0, 1.0, 1.0, 1e-4])
    cast = Cast.parse("int8")

    def of(adaptive: bool) -> float:
        return noise_ratios(caught.met[0].call, g, [cast], adaptive)[Slot("(root)", "grad_output")][str(cast)]

    assert of(adaptive=False) < 0.001
    assert of(adaptive=True) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("reduction", ["none"])
def test_losses_that_are_not_known_are_none(reduction: str) -> None:
    z = torch.randn(3, 4, requires_grad=True)
    assert loss_call(F.cross_entropy, (z, torch.zeros(3, dtype=torch.long)), {"reduction": reduction}) is None
    assert loss_call(F.l1_loss, (z, z), {}) is None
    assert loss_call(F.mse_loss, (z.detach(), z.detach()), {}) is None
