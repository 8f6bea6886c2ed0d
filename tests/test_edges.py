"""The gradient at a product's result arrives whatever the model does to the result in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes.edges import as_the_base, as_the_view, await_gradient, gradient_edge, order_behind
from tests.tensors import generator

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y * 1,
    "relu_": lambda y: y.relu_(),
    "F.relu in place": lambda y: F.relu(y, inplace=True),
    "mul_": lambda y: y.mul_(2.0),
    "a part": lambda y: (y[..., :2].mul_(3.0), y)[1],
}
SHAPES = [(3, 4), (2, 3, 4), (2, 5, 3, 4)]


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_the_gradient_arrives_in_the_result_s_shape(shape: tuple[int, ...], change: str) -> None:
    x, seen = torch.randn(shape, generator=generator(0)), []
    result = layer()(x)
    out_of_place = result.detach().clone().requires_grad_()
    await_gradient(result, seen.append)
    CHANGES[change](result).square().sum().backward()
    changed = out_of_place * 1
    CHANGES[change](changed).square().sum().backward()
    assert len(seen) == 1
    assert seen[0].shape == result.shape
    torch.testing.assert_close(seen[0], out_of_place.grad, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_another_gradient_can_go_on_in_its_place(shape: tuple[int, ...], change: str) -> None:
    x, model = torch.randn(shape, generator=generator(0)), layer()
    result = model(x)
    await_gradient(result, torch.ones_like)
    CHANGES[change](result).square().sum().backward()
    assert model.bias.grad is not None
    assert model.bias.grad.tolist() == [x[..., 0].numel()] * 6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_edge_is_reached_after_a_change_in_place(shape: tuple[int, ...]) -> None:
    result = layer()(torch.randn(shape, generator=generator(0)))
    edge = gradient_edge(result)
    (found,) = torch.autograd.grad(result.mul_(2.0).sum(), [edge])
    assert found.numel() == result.numel()
    assert (found == 2).all()


def ordered(rule: str) -> Tensor:
    """A product that einsum gives as a view with its dimensions in another order."""
    x, w = torch.randn(2, 3, 4, 5, generator=generator(0)), torch.randn(6, 4, 5, generator=generator(1))
    return torch.einsum(rule, x.requires_grad_(), w.requires_grad_())


RULES = ["binh,jnh->bnij", "binh,jnh->nbji", "binh,jnh->jnib"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("change", CHANGES)
def test_the_gradient_arrives_in_the_result_s_order(rule: str, change: str) -> None:
    result, seen = ordered(rule), []
    edge, order = gradient_edge(result), order_behind(result)
    out_of_place = result.detach().clone().requires_grad_()
    await_gradient(result, seen.append)
    loss = CHANGES[change](result).square().sum()
    (at_edge,) = torch.autograd.grad(loss, [edge], retain_graph=True)
    seen.clear()  # that pass has called it, too
    loss.backward()
    changed = out_of_place * 1
    CHANGES[change](changed).square().sum().backward()
    torch.testing.assert_close(seen, [out_of_place.grad], rtol=0, atol=0)
    there = as_the_view(at_edge, result.shape, order)
    torch.testing.assert_close(there, out_of_place.grad, rtol=0, atol=0)
    assert torch.equal(as_the_base(there, order).reshape(at_edge.shape), at_edge)


@pytest.mark.parametrize("rule", RULES)
def test_another_gradient_goes_on_in_its_order(rule: str) -> None:
    gradient = torch.randn(ordered(rule).shape, generator=generator(2))
    x = torch.randn(2, 3, 4, 5, generator=generator(0), requires_grad=True)
    w = torch.randn(6, 4, 5, generator=generator(1))
    (expected,) = torch.autograd.grad(torch.einsum(rule, x, w), x, gradient)
    result = torch.einsum(rule, x, w)
    await_gradient(result, lambda _: gradient)
    result.mul_(2.0).sum().backward()
    torch.testing.assert_close(x.grad, expected)
