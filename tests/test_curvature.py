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
from probes.curvature import Met, Reached, Sums, curvature_sums
from probes.edges import gradient_edge
from probes.losscall import LossCall
from probes.losses import loss_call
from probes.noise import noise_energies
from probes.probing import probe
from probes.records import Slot
from probes.samples import by_sample, sample_dimension
from probes.sites import ProductCall, SiteHook
from probes.undisturbed import undisturbed
from tests.tensors import generator

CAST = Cast.parse("e5m2")


class Catcher(SiteHook):
    """Catches the products and the loss call of one step."""

    def __init__(self, model: nn.Module, batch: int | None) -> None:
        super().__init__(model)
        self.batch, self.met = batch, []
        self.loss: LossCall | None = None
        self.result: Tensor | None = None

    def on_product(self, call: ProductCall) -> Tensor:
        result = call.run()
        self.met.append(Reached(Met.of(call, [result], self.batch), (gradient_edge(result),)))
        return result

    def on_other(self, function: Any, args: Any, kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        found = loss_call(function, args, kwargs)
        if found is not None:
            self.loss, self.result = found, result
        return result

    def sums(self, total: Tensor, seed: int = 1) -> dict[Slot, Sums]:
        """The curvature of the loss that was caught, given the total it is a part of."""
        assert self.loss is not None
        assert self.result is not None
        (gradient,) = torch.autograd.grad(total, self.result, retain_graph=True)
        with undisturbed():
            return curvature_sums(self.loss, self.loss.counts(gradient), self.met, [CAST], seed)


def draw_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "DRAWS", 500)
    monkeypatch.setattr(curvature, "DRAWS_WHOLE_BATCH", 500)


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


def masked(z: Tensor) -> Tensor:
    """The mean over the user's own mask, as language models take it; the second of two items a sample is left out."""
    losses = F.cross_entropy(z, torch.arange(len(z)) % z.shape[1], reduction="none")
    mask = torch.linspace(0, 2, len(z))
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("loss", [cross_entropy, weighted, summed, squared, masked])
@pytest.mark.parametrize("batch", [6, None])
def test_damage_of_a_linear_layer_is_the_exact_second_order(
    loss: Callable[[Tensor], Tensor], batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear model's Gauss-Newton matrix is its Hessian: ½δᵀHδ can be had exactly."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(6, 5)
    draw_often(monkeypatch)
    with Catcher(model, batch) as caught:
        total = loss(model(x))
    sums = caught.sums(total)
    weight = model.weight.detach()
    cases: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "weight": (weight, lambda w: loss(F.linear(x, w, model.bias.detach()))),
        "input": (x, lambda inputs: loss(F.linear(inputs, weight, model.bias.detach()))),
    }
    for role, (operand, again) in cases.items():
        matrix = hessian(again, operand).reshape(operand.numel(), operand.numel())
        delta = (CAST(operand) - operand).reshape(-1)
        got = sums[Slot("(root)", role)]
        assert float(got.curvature) == pytest.approx(float(matrix.trace()), rel=0.15)
        assert float(got.directional[0]) == pytest.approx(float(0.5 * delta @ matrix @ delta), rel=0.2)


def test_damage_through_a_deeper_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind ReLUs, the loss's Hessian in a first layer's weight is still Gauss-Newton (piecewise linear)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    x = torch.randn(8, 4)
    draw_often(monkeypatch)
    with Catcher(model, 8) as caught:
        loss = cross_entropy(model(x))
    sums = caught.sums(loss)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def total(weight: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, weight, parameters["0.bias"]))
        return cross_entropy(F.linear(hidden, parameters["2.weight"], parameters["2.bias"]))

    matrix = hessian(total, parameters["0.weight"]).reshape(24, 24)
    delta = (CAST(parameters["0.weight"]) - parameters["0.weight"]).reshape(-1)
    assert float(sums[Slot("0", "weight")].directional[0]) == pytest.approx(
        float(0.5 * delta @ matrix @ delta), rel=0.2
    )


def test_products_that_the_loss_does_not_reach_get_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with Catcher(model, 2) as caught:
        model(torch.randn(2, 4))
        loss = cross_entropy(model[1](torch.randn(2, 4)))
    caught.met = [one for one in caught.met if one.product.call.site == "0"]
    assert caught.sums(loss) == {}


def test_an_operand_changed_in_place_is_left_out() -> None:
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)  # autograd does not need the input then, and lets it be changed
    x = torch.randn(2, 4)
    with Catcher(model, 2) as caught:
        loss_input = model(x)
        x.add_(1)
        loss = cross_entropy(loss_input)
    assert not caught.met[0].product.intact
    assert caught.sums(loss) == {}


def test_a_weight_used_several_times_has_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same δ in three products: their parts add up before the square."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(6, 4)
    draw_often(monkeypatch)

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, inputs: Tensor) -> Tensor:
            for _ in range(3):
                inputs = inputs + torch.relu(self.layer(inputs))
            return inputs

    with Catcher(Repeated(), 6) as caught:
        loss = cross_entropy(caught.model(x))
    got = caught.sums(loss)[Slot("layer", "weight")]
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
    assert float(got.directional[0]) == pytest.approx(float(exact), rel=0.15)


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
    rows = by_sample(values, dimension, batch)
    assert len(rows) == (1 if dimension is None else batch)
    assert rows.flatten().sort().values.equal(values.flatten().sort().values)


def test_a_transposed_batch_is_found_by_its_memory() -> None:
    transposed = torch.zeros(6, 12, 4).transpose(0, 1)
    assert sample_dimension(transposed.contiguous(), 6, transposed) == 1


def test_flattened_rows_are_grouped_by_sample() -> None:
    values = torch.arange(12).reshape(6, 2)
    assert by_sample(values, 0, 3).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_noise_is_that_of_the_gradients_computed_with_the_cast() -> None:
    model, x = nn.Linear(8, 6), torch.randn(5, 8, requires_grad=True)
    with Catcher(model, 5) as caught:
        result = model(x)
    g = torch.randn(5, 6)
    with undisturbed():
        found = noise_energies(caught.met[0].product.call, g, [CAST], adaptive=False)
    w = model.weight.detach()
    x = x.detach()
    assert result.shape == g.shape

    def relative(error: Tensor, exact: Tensor) -> float:
        return float(error.square().sum() / exact.square().sum())

    expected = {
        "grad_output": relative((CAST(g) - g).T @ x, g.T @ x),
        "input": relative(g.T @ (CAST(x) - x), g.T @ x),
        "weight": relative(g @ (CAST(w) - w), g @ w),
    }
    for role, ratio in expected.items():
        assert found[Slot("(root)", role)][str(CAST)].ratio == pytest.approx(ratio, rel=1e-4)


def test_a_channel_that_is_flushed_counts_where_each_element_has_its_own_step() -> None:
    """One output channel's gradients vanish in int8: nothing to the whole gradient's energy, a quarter to Adam."""
    model, x = nn.Linear(8, 4), torch.randn(50, 8)
    with Catcher(model, 50) as caught:
        model(x)
    g = torch.randn(50, 4, generator=generator()) * torch.tensor([1.0, 1.0, 1.0, 1e-4])
    cast = Cast.parse("int8")

    def of(adaptive: bool) -> float:
        with undisturbed():
            found = noise_energies(caught.met[0].product.call, g, [cast], adaptive)
        return found[Slot("(root)", "grad_output")][str(cast)].ratio

    assert of(adaptive=False) < 0.001
    assert of(adaptive=True) == pytest.approx(0.25, abs=0.01)


def test_a_channel_counts_by_its_energy_over_all_steps() -> None:
    """One that is flushed in nine steps of ten, in which it has next to nothing, has lost next to nothing."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=10, curvature_steps=10, casts=["int8"]) as window:
        for step in range(10):
            aim = torch.tensor([1.0, 1.0, 1.0, 1.0 if step == 4 else 1e-4])
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(50, 8)) * aim, aim * torch.randn(50, 4)).backward()
            optimizer.step()
    noise = window.evidence("(root)", "grad_output").relative_noise["int8/tensor/current/nearest"]
    assert noise < 0.01  # a mean of the steps' own ratios would be 0.22
