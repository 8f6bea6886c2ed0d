"""Scales by row and block: each product casts its operands anew, along its own inner dimension."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import convnet, encoder, mlp, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import advisor
from advisor.errors import InvalidPlan
from advisor.plan import Plan
from probes.casts import Cast, CastState

FINE = {"input": "e4m3fn/row", "weight": "int8/block32/e8m0up", "grad_output": "e5m2/row"}


class Calls(nn.Module):
    """One call of a function on two tensors, the second one a parameter where it is said to be."""

    def __init__(self, function: Callable[..., Tensor], weight: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands) if self.weight is None else self.function(*operands, self.weight)


def plan_of(model: nn.Module, inputs: tuple[Tensor, ...], casts: Mapping[str, str]) -> Plan:
    """A plan of the model with these casts by role; roles that are not named are kept."""
    given = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    optimizer = torch.optim.SGD([*model.parameters(), torch.zeros(1, requires_grad=True)], lr=0.0)
    with advisor.probe(model, optimizer, steps=1, curvature_steps=0) as window:
        model(*given).sum().backward()
        optimizer.step()
    model.zero_grad()
    role = next(iter(window.sites[0].roles))
    told = advisor.uniform(window, **{role: "fp32"}).to_dict()
    for one in told["assignments"]:
        one["cast"] = casts.get(one["role"], "fp32")
    return Plan.from_dict(told)


def along(text: str, x: Tensor, *dims: int) -> Tensor:
    """The obvious way: the tensor turned so that these dimensions are the last one, cast there, and turned back."""
    cast = Cast.parse(text)
    inner = [d % x.dim() for d in dims]
    rest = [d for d in range(x.dim()) if d not in inner]
    moved = x.detach().permute(*rest, *inner)
    matrix = moved.reshape(-1, math.prod(x.shape[d] for d in inner)).contiguous()
    result = cast(matrix).reshape(moved.shape)
    back = torch.empty_like(x.detach())
    back.permute(*rest, *inner).copy_(result)
    return back


def test_a_row_has_the_scale_of_its_largest_value() -> None:
    """The reference itself, against plain arithmetic."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([(row / (s := row.abs().max() / 448)).to(torch.float8_e4m3fn).float() * s for row in x])
    assert torch.equal(along("e4m3fn/row", x, -1), rows)
    columns = torch.stack([(c / (s := c.abs().max() / 448)).to(torch.float8_e4m3fn).float() * s for c in x.T]).T
    assert torch.equal(along("e4m3fn/row", x, 0), columns)


@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40)])
@pytest.mark.parametrize(
    "cast", ["e4m3fn/row", "int8/column", "e4m3fn/block32/e8m0up", "e2m1/block16", "e4m3fn/block1x128", "e5m2/row"]
)
def test_the_three_products_of_a_linear_layer(cast: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(40, 36), torch.randn(shape, requires_grad=True)
    g = torch.randn(*shape[:-1], 36)
    plan = plan_of(model, (x,), {"input": cast, "weight": cast, "grad_output": cast})
    with advisor.apply(plan, model) as applied:
        y = model(x)
    y.backward(g)
    w, samples = model.weight.detach(), tuple(range(len(shape) - 1))
    assert torch.equal(y, F.linear(along(cast, x, -1), along(cast, w, -1), model.bias))
    assert torch.equal(x.grad, along(cast, g, -1) @ along(cast, w, 0))
    left, right = along(cast, g, *samples).flatten(0, -2), along(cast, x, *samples).flatten(0, -2)
    assert torch.equal(model.weight.grad, left.T @ right)
    assert torch.allclose(model.bias.grad, along(cast, g, -1).flatten(0, -2).sum(0), rtol=1e-6, atol=1e-6)
    assert [(row["role"], row["how"], row["count"]) for row in applied.report()] == [
        ("input", "emulated", 2),
        ("weight", "emulated", 2),
        ("grad_output", "emulated", 2),
    ]


# function, shapes of the operands, whether the right one is a parameter; then the dimensions that scales run along:
# left and right in the forward product, right and gradient in the left's gradient, left and gradient in the right's.
PRODUCTS: dict[str, tuple[Any, ...]] = {
    "matmul": (torch.matmul, (6, 40), (40, 8), False, -1, -2, -1, -1, -2, -2),
    "matmul of batches": (torch.matmul, (3, 6, 40), (3, 40, 8), False, -1, -2, -1, -1, -2, -2),
    "bmm": (torch.bmm, (3, 6, 40), (3, 40, 8), False, -1, -2, -1, -1, -2, -2),
    "matmul with a weight": (torch.matmul, (3, 6, 40), (40, 8), True, -1, -2, -1, -1, (0, 1), (0, 1)),
    "weight first": (lambda x, w: w @ x, (40, 6), (8, 40), True, -2, -1, -2, -2, -1, -1),
    "from the right": (lambda x, w: w.__rmatmul__(x), (6, 40), (40, 8), True, -1, -2, -1, -1, -2, -2),
    "addmm": (lambda x, w: torch.addmm(x[:, :8], x, w, alpha=2), (6, 40), (40, 8), True, -1, -2, -1, -1, -2, -2),
    "conv2d": (
        lambda x, w: F.conv2d(x, w, padding=1, stride=2, groups=2),
        *((3, 8, 7, 7), (6, 4, 3, 3), True, 1, (1, 2, 3), (0, 2, 3), 1, (0, 2, 3), (0, 2, 3)),
    ),
    "conv1d of one sample": (F.conv1d, (8, 33), (6, 8, 3), True, 0, (1, 2), (0, 2), 0, 1, 1),
    "conv_transpose2d": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        *((3, 8, 5, 5), (8, 4, 3, 3), True, 1, (0, 2, 3), (1, 2, 3), 1, (0, 2, 3), (0, 2, 3)),
    ),
    "aten.convolution": (
        lambda x, w: torch.ops.aten.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        *((3, 8, 5, 5), (4, 8, 3, 3), True, 1, (1, 2, 3), (0, 2, 3), 1, (0, 2, 3), (0, 2, 3)),
    ),
    "einsum": (
        lambda x, w: torch.einsum("bthd,hde->bte", x, w),
        *((2, 5, 3, 12), (3, 12, 9), True, (2, 3), (0, 1), 2, 2, (0, 1), (0, 1)),
    ),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 2), (5, 6, 7), (6, 7, 9), False, (1, 2), (0, 1), 2, 1, 0, 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("cast", ["e4m3fn/row", "int8/block32"])
def test_the_three_products_of_every_kind(name: str, cast: str) -> None:
    function, left, right, owned, *dims = PRODUCTS[name]
    a_forward, b_forward, b_backward, g_left, a_backward, g_right = (
        (one,) if isinstance(one, int) else one for one in dims
    )
    torch.manual_seed(0)
    a, b = torch.randn(left, requires_grad=True), torch.randn(right)
    model = Calls(function, b if owned else None)
    if not owned:
        b.requires_grad_()
    inputs = (a,) if owned else (a, b)
    b = model.weight if owned else b
    roles = {"input": cast, "weight": cast, "lhs": cast, "rhs": cast, "grad_output": cast}
    plan = plan_of(model, inputs, roles)
    with advisor.apply(plan, model) as applied:
        y = model(*inputs)
    g = torch.randn_like(y)
    y.backward(g)
    assert {row["count"] for row in applied.report()} == {2}

    addend = a.detach() if name == "addmm" else None

    def product(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w) if addend is None else torch.addmm(addend[:, :8], x, w, alpha=2)

    assert torch.equal(y, product(along(cast, a, *a_forward), along(cast, b, *b_forward)))
    leaf = a.detach().requires_grad_()
    (expected,) = torch.autograd.grad(product(leaf, along(cast, b, *b_backward)), leaf, along(cast, g, *g_left))
    if addend is not None:  # its gradient is that of the input's product
        expected[:, :8] += along(cast, g, *g_left)
    assert torch.allclose(a.grad, expected, rtol=1e-5, atol=1e-5)
    leaf = b.detach().requires_grad_()
    (expected,) = torch.autograd.grad(product(along(cast, a, *a_backward), leaf), leaf, along(cast, g, *g_right))
    assert torch.allclose(b.grad, expected, rtol=1e-5, atol=1e-5)


def attended(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **given)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "mask": {"attn_mask": torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) > 0.4},
    "added": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(1))},
    "grouped": {"enable_gqa": True},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_by_its_six_products_is_attention(kind: str) -> None:
    """With a cast that changes nothing, by row, the gradients are torch's own."""
    torch.manual_seed(0)
    heads = 2 if kind == "grouped" else 4
    q, k, v = (torch.randn(2, n, 5, 8, requires_grad=True) for n in (4, heads, heads))
    given = dict(ATTENTIONS[kind])
    if kind == "added":
        given["attn_mask"] = given["attn_mask"].clone().requires_grad_()
    model = Calls(lambda *operands: attended(*operands, **given))
    plan = plan_of(model, (q, k, v), dict.fromkeys(("query", "key", "value", "grad_output"), "fp32/row"))
    leaves = [q, k, v, *([given["attn_mask"]] if kind == "added" else [])]
    g = torch.randn(2, 4, 5, 8)

    def result(applied: bool) -> list[Tensor]:
        torch.manual_seed(3)
        if applied:
            with advisor.apply(plan, model):
                y = model(q, k, v)
        else:
            y = model(q, k, v)
        return [y, *torch.autograd.grad(y, leaves, g)]

    for found, expected in zip(result(True), result(False), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


GRADCHECKED: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b), ((3, 4), (2, 4), (2,))),
    "linear of three dimensions": (lambda x, w: F.linear(x, w).relu_(), ((2, 3, 4), (2, 4))),
    "baddbmm": (lambda a, x, w: torch.baddbmm(a, x, w, beta=0.5, alpha=2), ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 2), ((2, 4, 5, 5), (2, 2, 3, 3), (2,))),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, stride=2), ((2, 3, 4), (3, 2, 3))),
    "einsum": (lambda x, w: torch.einsum("bthd,hde->bte", x, w), ((2, 3, 2, 2), (2, 2, 3))),
    "attention": (lambda q, k, v: attended(q, k, v, is_causal=True), ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradients_of_a_cast_that_changes_nothing_are_the_derivatives(name: str) -> None:
    """In float64 an fp64 cast by row is the identity, and takes the way of all casts by row."""
    function, shapes = GRADCHECKED[name]
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes)
    model = Calls(function)
    roles = ("input", "weight", "lhs", "rhs", "query", "key", "value", "grad_output")
    plan = plan_of(model, inputs, dict.fromkeys(roles, "fp64/row"))
    with advisor.apply(plan, model) as applied:
        assert torch.autograd.gradcheck(model, inputs)
    assert {row["how"] for row in applied.report()} == {"emulated"}


def test_the_six_products_of_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 32, requires_grad=True) for _ in range(3))
    g = torch.randn(2, 3, 5, 32)
    model, cast = Calls(attended), "e2m3/row"
    plan = plan_of(model, (q, k, v), dict.fromkeys(("query", "key", "value", "grad_output"), cast))
    with advisor.apply(plan, model) as applied:
        y = model(q, k, v)
    y.backward(g)
    assert {row["count"] for row in applied.report()} == {2}
    scale = 32**-0.5
    p = ((along(cast, q, -1) @ along(cast, k, -1).mT) * scale).softmax(-1)
    assert torch.allclose(y, p @ along(cast, v, -2), atol=1e-5)
    at_p = along(cast, g, -1) @ along(cast, v, -1).mT
    at_scores = p * (at_p - (p * at_p).sum(-1, keepdim=True)) * scale
    assert torch.allclose(q.grad, at_scores @ along(cast, k, -2), atol=1e-5)
    assert torch.allclose(k.grad, at_scores.mT @ along(cast, q, -2), atol=1e-5)
    assert torch.allclose(v.grad, p.mT @ along(cast, g, -2), atol=1e-5)


def test_a_tensor_with_one_scale_beside_others_is_cast_once() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(40, 36), torch.randn(5, 40, requires_grad=True)
    delayed, state = "e4m3fn/tensor/delayed", CastState()
    plan = plan_of(model, (x,), {"input": "e4m3fn/row", "weight": delayed, "grad_output": "fp32"})
    with advisor.apply(plan, model) as applied:
        for factor in (1.0, 3.0):
            model.weight.data.mul_(factor)
            model.zero_grad()
            x.grad = None
            y = model(x)
            g = torch.randn(5, 36)
            y.backward(g)
            w = Cast.parse(delayed)(model.weight.detach(), state)
            assert torch.equal(y, F.linear(along("e4m3fn/row", x, -1), w, model.bias))
            assert torch.equal(x.grad, g @ w)
            assert torch.equal(model.weight.grad, g.T @ along("e4m3fn/row", x, 0))
    assert [row["count"] for row in applied.report()] == [4, 2, 2]


@pytest.mark.parametrize("build", [mlp, convnet, encoder])
def test_a_training_with_scales_by_row_and_its_report(build: Any) -> None:
    _, plain, window = train(
        build, 5, lambda model, optimizer: advisor.probe(model, optimizer, steps=2, curvature_steps=0)
    )
    told = advisor.uniform(window, input="fp32").to_dict()
    for one in told["assignments"]:
        one["cast"] = "e4m3fn/row" if one["role"] != "grad_output" else "e5m2/row/current/stochastic"
    plan = Plan.from_dict(told)
    _, losses, applied = train(build, 5, lambda model, optimizer: advisor.apply(plan, model, optimizer))
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.05)
    assert {row["how"] for row in applied.report()} == {"emulated"}
    assert train(build, 5, lambda model, optimizer: advisor.apply(plan, model, optimizer))[1] == losses


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recomputed_is_cast_alike(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(inplace=True), nn.Linear(8, 6))
    x = torch.randn(5, 40, requires_grad=True)
    plan = plan_of(model, (x,), FINE)

    def gradients(recompute: bool) -> list[Tensor]:
        model.zero_grad()
        with advisor.apply(plan, model):
            y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
            y.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_under_autocast_and_used_twice() -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    x = torch.randn(5, 40, requires_grad=True)
    plan = plan_of(model, (x,), {"input": "e4m3fn/row", "weight": "e4m3fn/row", "grad_output": "bf16"})
    with advisor.apply(plan, model), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        z = model(y)
    assert z.dtype == torch.bfloat16
    g = torch.randn(5, 40).bfloat16()
    z.backward(g)

    def turned(values: Tensor, *dims: int) -> Tensor:
        return along("e4m3fn/row", values.detach(), *dims).bfloat16()

    assert torch.equal(y, F.linear(turned(x, -1), turned(model.weight, -1), model.bias.bfloat16()))
    second = g @ turned(model.weight, 0)
    assert torch.equal(x.grad, (second @ turned(model.weight, 0)).float())
    expected = (g.T @ turned(y, 0)).float() + (second.T @ turned(x, 0)).float()
    assert torch.allclose(model.weight.grad, expected, rtol=1e-2, atol=1e-3)


def test_a_second_derivative_is_refused_by_torch() -> None:
    model, x = nn.Linear(8, 6), torch.randn(5, 8, requires_grad=True)
    plan = plan_of(model, (x,), FINE)
    with advisor.apply(plan, model):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_what_is_checkpointed_is_not_kept_alive() -> None:
    """The graph alone keeps operands, so that a checkpoint frees them."""
    model, x = nn.Linear(8, 6), torch.randn(5, 8, requires_grad=True)
    plan = plan_of(model, (x,), FINE)
    with advisor.apply(plan, model):
        hidden = x * 2
        alive = weakref.ref(hidden)
        with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: torch.zeros(5, 8)):
            y = model(hidden)
        del hidden
    assert y.requires_grad
    assert alive() is None


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


@pytest.mark.parametrize(
    ("model", "shapes", "says"),
    [
        (Recurrent(), ((4, 2, 8),), "'lstm' does not show"),
        (
            Calls(lambda x, y, z: torch.einsum("ab,bc,cd->ad", x, y, z)),
            ((3, 4), (4, 5), (5, 6)),
            "einsum of 3 operands",
        ),
        (Calls(lambda x, y: torch.zeros(3, 5).addmm_(x, y)), ((3, 4), (4, 5)), "addmm_ writes into a tensor"),
        (Calls(lambda x, y: torch.einsum("ab,bb->a", x, y)), ((3, 4), (4, 4)), "takes a diagonal"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_site(
    model: nn.Module, shapes: tuple[tuple[int, ...], ...], says: str
) -> None:
    inputs = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    plan = plan_of(model, inputs, {})
    told = plan.to_dict()
    for one in told["assignments"]:
        one["cast"] = "e4m3fn/row"
    with pytest.raises(InvalidPlan, match=says), advisor.apply(Plan.from_dict(told), model):
        model(*inputs)
