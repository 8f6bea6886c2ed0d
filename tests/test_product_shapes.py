"""The matrices behind products: from real windows, against the shapes of the modules."""

from __future__ import annotations

import dataclasses
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.product_shapes import ProductShape, operand_elements, product_shapes
from probes.records import Product, Site
from probes.window import Window
from tests.planned import attention, linear


class Many(nn.Module):
    """One product of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 16, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.up = nn.Linear(8, 48)
        self.lstm = nn.LSTM(48, 32, batch_first=True)
        self.down = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.grouped(x).relu()).flatten(2).transpose(1, 2)[:, :64]
        split = self.up(x).view(x.shape[0], 64, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(split[0], split[1], split[2])
        batched = split[0] @ split[1].transpose(-1, -2)
        states, _ = self.lstm(self.up(x))
        return self.down(states) + attended.mean() + batched.mean()


@pytest.fixture(scope="module")
def window() -> Window:
    torch.manual_seed(0)
    model = Many()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with advisor.probe(model, optimizer, steps=2, curvature_steps=0) as found:
        for _ in range(2):
            for _ in range(2):  # micro-batches
                images, targets = torch.randn(3, 4, 8, 8), torch.randint(0, 10, (192,))
                F.cross_entropy(model(images).flatten(0, 1), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


def sizes(shapes: tuple[ProductShape, ...]) -> dict[str, tuple[float, ...]]:
    return {one.product.name: (one.batch, one.m, one.n, one.k, one.calls) for one in shapes}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "up",  # 3·64 tokens, called twice in each of two micro-batches
            {
                "forward": (1, 192, 48, 8, 4),
                "input_grad": (1, 192, 8, 48, 4),
                "weight_grad": (1, 8, 48, 192, 4),
            },
        ),
        (
            "grouped",  # two groups of 2 → 8 channels, 3·8·8 places; nobody needs the gradient of the images
            {"forward": (2, 192, 8, 18, 2), "weight_grad": (2, 18, 8, 192, 2)},
        ),
        (
            "back",  # each of 3·8·8 input places makes 8 channels × 2·2 outputs of 16 channels
            {
                "forward": (1, 192, 32, 16, 2),
                "input_grad": (1, 192, 16, 32, 2),
                "weight_grad": (1, 16, 32, 192, 2),
            },
        ),
        (
            "(root)/matmul.0",
            {
                "forward": (6, 64, 64, 8, 2),
                "lhs_grad": (6, 64, 8, 64, 2),
                "rhs_grad": (6, 8, 64, 64, 2),
            },
        ),
        (
            "lstm",  # 3 sequences of 64 steps; what meets the states runs step by step
            {
                "weight_ih_l0_forward": (1, 192, 128, 48, 2),
                "weight_ih_l0_input_grad": (1, 192, 48, 128, 2),
                "weight_ih_l0_grad": (1, 48, 128, 192, 2),
                "weight_hh_l0_forward": (1, 3, 128, 32, 128),
                "weight_hh_l0_hidden_grad": (1, 3, 32, 128, 128),
                "weight_hh_l0_grad": (1, 32, 128, 192, 2),
            },
        ),
    ],
)
def test_sizes_of_real_products(window: Window, name: str, expected: dict[str, tuple[float, ...]]) -> None:
    found = sizes(product_shapes(window.site(name)))
    assert found.keys() == expected.keys()
    for product, wanted in expected.items():
        assert found[product] == pytest.approx(wanted), product


def test_attention_is_one_product_a_head(window: Window) -> None:
    found = sizes(product_shapes(window.site("(root)/sdpa.0")))
    assert found["scores"] == pytest.approx((6, 64, 64, 8, 2))
    assert found["value_grad"] == pytest.approx((6, 64, 8, 64, 2))


def test_operations_a_step_stay_those_that_were_counted(window: Window) -> None:
    for site in window.sites:
        for one in product_shapes(site):
            assert one.exact
            assert one.flops * one.calls == pytest.approx(one.product.flops)


def test_operands_of_a_linear_layer_are_its_tensors() -> None:
    site = linear(inputs=64, outputs=32, batch=16)
    forward, _, weight_grad = product_shapes(site)
    assert list(operand_elements(forward)) == [16 * 64, 64 * 32, 16 * 32]
    assert sorted(operand_elements(weight_grad)) == sorted([16 * 64, 16 * 32, 64 * 32])


def test_without_a_gradient_the_inner_size_is_the_inputs_last() -> None:
    whole = linear(inputs=64, outputs=32, batch=16)
    site = dataclasses.replace(whole, roles=("input", "weight"), products=whole.products[:1])
    assert sizes(product_shapes(site)) == {"forward": (1, 16, 32, 64, 1)}


def test_shapes_that_change_from_call_to_call_are_taken_at_their_mean() -> None:
    whole = linear(inputs=64, outputs=32, batch=16)
    tokens = (24.0 + 16.0) / 2  # one recorded step of 24 and one of 16, the last seen
    elements = {"input": tokens * 64, "weight": 64.0 * 32, "grad_output": tokens * 32}
    products = tuple(dataclasses.replace(one, flops=2 * tokens * 64 * 32) for one in whole.products)
    site = dataclasses.replace(whole, elements=elements, products=products)
    assert sizes(product_shapes(site))["forward"] == (1, 20, 32, 64, 1)


def test_what_cannot_be_told_is_a_cube_of_the_same_operations() -> None:
    site = dataclasses.replace(
        attention(), op="multi_dot", products=(Product("forward2", ("partial", "value"), 2.0 * 30**3),)
    )
    (found,) = product_shapes(site)
    assert (found.batch, found.m, found.n, found.k, found.exact) == (1, 30, 30, 30, False)


def test_products_without_operations_are_left_out() -> None:
    site = dataclasses.replace(linear(), products=tuple(dataclasses.replace(p, flops=0.0) for p in linear().products))
    assert product_shapes(site) == ()


def test_hostile_records_give_sizes_of_at_least_one() -> None:
    shapes: dict[str, tuple[int, ...]] = {"input": (), "weight": (0, 0), "grad_output": (7,)}
    site = Site(
        "odd", "conv2d", ("input", "weight", "grad_output"), shapes, {}, dict.fromkeys(shapes, 0.0),
        (Product("forward", ("input", "weight"), 1e30), Product("input_grad", ("grad_output", "weight"), 3.0)),
        None, 0.0,
    )  # fmt: skip
    for op in (
        "conv2d",
        "conv_tbc",
        "conv_transpose1d",
        "sdpa",
        "lstm",
        "linear",
        "einsum",
        "grouped_mm",
        "unheard_of",
    ):
        for one in product_shapes(dataclasses.replace(site, op=op)):
            assert prod((one.batch, one.m, one.n, one.k)) >= 1
            assert one.calls >= 0
