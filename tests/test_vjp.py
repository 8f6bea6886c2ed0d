"""Gradients at a product's operands by the product itself: autograd's own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes.sites import ProductCall, SiteHook
from probes.vjp import Pullback, vjp

CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "1d, of one sample": (lambda x, w: F.conv1d(x, w, padding=2), (4, 9), (6, 4, 3)),
    "2d": (lambda x, w: F.conv2d(x, w, None, (2, 1), (1, 0), (1, 2), 2), (3, 4, 9, 8), (6, 2, 3, 3)),
    "3d": (lambda x, w: F.conv3d(x, w, stride=2, padding=1), (2, 3, 5, 6, 7), (4, 3, 3, 3, 3)),
    "same": (lambda x, w: F.conv2d(x, w, padding="same"), (3, 4, 9, 8), (6, 4, 3, 3)),
    "same, of an even kernel": (lambda x, w: F.conv2d(x, w, padding="same"), (3, 4, 9, 8), (6, 4, 2, 4)),
    "valid": (lambda x, w: F.conv2d(x, w, padding="valid"), (3, 4, 9, 8), (6, 4, 3, 3)),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 2, (1, 1)),
        *((3, 4, 5, 5), (4, 3, 3, 3)),
    ),
    "transposed, of one sample": (lambda x, w: F.conv_transpose1d(x, w, stride=3), (4, 5), (4, 3, 2)),
    "aten's": (
        lambda x, w: torch.ops.aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], True, [0, 0], 1),
        *((3, 4, 5, 5), (4, 3, 3, 3)),
    ),
}


class Watch(SiteHook):
    calls: list[ProductCall]

    def on_product(self, call: ProductCall) -> Any:
        self.calls = [call]
        return call.run()


class Convolving(nn.Module):
    def __init__(self, function: Callable[..., Tensor], weight: Tensor) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("wanted", [[0], [1], [0, 1]])
def test_convolutions(name: str, wanted: list[int]) -> None:
    torch.manual_seed(0)
    function, shape, weight = CONVOLUTIONS[name]
    model, x = Convolving(function, torch.randn(weight)), torch.randn(shape, requires_grad=True)
    watch = Watch(model)
    with watch:
        y = model(x)
    g = torch.randn_like(y)
    leaves = [x, model.weight]
    expected = torch.autograd.grad(y, [leaves[place] for place in wanted], g)
    found = vjp(watch.calls[0], [leaf.detach() for leaf in leaves], g, wanted)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


class Recurring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)[0]
        return found


def test_several_gradients_at_one_result_take_one_pass_forward() -> None:
    torch.manual_seed(0)
    model, x = Recurring(), torch.randn(5, 2, 3)
    with Watch(model) as watch:
        model(x)
    (call,), passes = watch.calls, []
    call.function, function = lambda *args: passes.append(1) or function(*args), call.function
    operands = [operand.detach() for operand in call.operands]
    result, wanted = call.plain(operands), range(len(operands))
    pullback, gradients = Pullback(call, operands, wanted), [torch.randn_like(result) for _ in range(3)]
    passes.clear()
    found = [pullback.of(gradient) for gradient in gradients]
    assert len(passes) == 1
    for each, gradient in zip(found, gradients, strict=True):
        assert all(map(torch.equal, each, vjp(call, operands, gradient, wanted)))
