"""The gradient through a cast: passed by default, cast or masked where asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import assert_same
from tensors import AWKWARD, generator
from torch import Tensor, nn

from probes.casts import Cast, CastState
from probes.errors import InvalidCast
from probes.gradients import straight_through

CASTS = [
    "e4m3fn",
    "bf16",
    "fp32",
    "int8/none/stochastic",
    "e5m2/block32",
    "e2m1/block16",
    "e5m2/tensor/delayed",
    "e8m0/none",
]


def leaf(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def many(seed: int = 0) -> Tensor:
    return torch.randn(6, 70, generator=generator(seed))


@pytest.mark.parametrize("text", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cast_passes_the_gradient_unchanged(text: str, dtype: torch.dtype) -> None:
    x, gradient = many().to(dtype).requires_grad_(), many(1).to(dtype)
    state = CastState(1)
    result = Cast.parse(text)(x, state)
    assert result.requires_grad
    assert_same(result.detach(), Cast.parse(text)(x.detach(), CastState(1)))
    result.backward(gradient)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert_same(x.grad, gradient)


def test_saturated_elements_get_their_gradient_by_default() -> None:
    x = leaf(1.0, 500.0, -1e9, float("inf"))
    Cast.parse("e4m3fn/none")(x).sum().backward()
    assert_same(x.grad, torch.ones(4))
    x.grad = None
    straight_through(x, Cast.parse("e4m3fn/none")).sum().backward()
    assert_same(x.grad, torch.ones(4))


@pytest.mark.parametrize("text", CASTS)
def test_no_gradient_in_no_graph_out(text: str) -> None:
    cast, x = Cast.parse(text), many()
    parameter = nn.Parameter(x.clone())
    assert not cast(x).requires_grad
    assert not straight_through(x, cast, cast).requires_grad
    with torch.no_grad():
        assert not cast(parameter).requires_grad
        assert not straight_through(parameter, cast, saturated="mask").requires_grad
    with torch.inference_mode():
        assert cast(torch.ones(3, 4)).is_inference()
        assert cast(parameter).shape == parameter.shape
    assert type(cast(parameter)) is Tensor
    assert type(straight_through(parameter, cast)) is Tensor
    assert_same(parameter.detach(), x)


def test_the_gradient_is_that_of_the_function_around_the_cast() -> None:
    """y = cast(W·cast(x)): the chain rule with the cast's values in place of its arguments."""
    cast = Cast.parse("e4m3fn/row")
    w, x = many(2)[:, :6].clone().requires_grad_(), many(3)[:, :5].clone().requires_grad_()
    loss = cast(cast(w) @ cast(x)).square().sum() / 2
    loss.backward()
    with torch.no_grad():
        outer = cast(cast(w) @ cast(x))
        assert_same(w.grad, outer @ cast(x).T)
        assert_same(x.grad, cast(w).T @ outer)


def test_a_smooth_function_through_a_fine_cast_has_its_finite_difference() -> None:
    cast, x = Cast.parse("fp32"), many()[0].double().requires_grad_()
    cast(x).sin().sum().backward()
    step = 1e-2
    with torch.no_grad():
        difference = (cast(x + step).sin() - cast(x - step).sin()) / (2 * step)
    torch.testing.assert_close(x.grad, difference, atol=1e-4, rtol=0)


def test_gradients_of_gradients() -> None:
    cast, x = Cast.parse("e5m2/none"), leaf(1.1, -2.3, 7.0)
    (first,) = torch.autograd.grad(cast(x).pow(3).sum(), x, create_graph=True)
    assert_same(first.detach(), 3 * cast(x.detach()) ** 2)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_same(second, 6 * cast(x.detach()))


@pytest.mark.parametrize("name", [name for name, x in AWKWARD.items() if x.numel()])
def test_gradients_of_awkward_tensors(name: str) -> None:
    x = AWKWARD[name].clone().requires_grad_()
    viewed = x.expand(2, *x.shape) if x.dim() else x  # so that gradients add up
    for cast in (Cast.parse("e4m3fn"), Cast.parse("e5m2/block32")):
        x.grad = None
        straight_through(viewed, cast, saturated="pass").sum().backward()
        assert_same(x.grad, torch.full(x.shape, 2.0 if x.dim() else 1.0))


def test_empty_tensors() -> None:
    x = torch.empty(0, 3, requires_grad=True)
    straight_through(x, Cast.parse("e4m3fn"), Cast.parse("e5m2"), saturated="mask").sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)


# A cast for each way


@pytest.mark.parametrize("backward", ["e5m2/none", "e5m2/tensor/current", "e4m3fn/block32", "bf16", "int8/row"])
def test_the_gradient_is_cast_apart(backward: str) -> None:
    x, gradient = many().requires_grad_(), many(1)
    result = straight_through(x, Cast.parse("e4m3fn/row"), Cast.parse(backward))
    assert_same(result.detach(), Cast.parse("e4m3fn/row")(x.detach()))
    result.backward(gradient)
    assert_same(x.grad, Cast.parse(backward)(gradient))


def test_either_way_may_be_left_as_it_is() -> None:
    x, gradient, cast = many().requires_grad_(), many(1), Cast.parse("e4m3fn")
    only_back = straight_through(x, None, cast)
    assert_same(only_back.detach(), x.detach())
    only_back.backward(gradient)
    assert_same(x.grad, cast(gradient))
    x.grad = None
    straight_through(x, cast, None).backward(gradient)
    assert_same(x.grad, gradient)
    x.grad = None
    neither = straight_through(x, None)
    neither.backward(gradient)
    assert_same(x.grad, gradient)
    assert_same(neither.detach(), x.detach())


def test_the_dimension_is_that_of_both_casts() -> None:
    x, gradient, cast = many().requires_grad_(), many(1), Cast.parse("e4m3fn/row")
    result = straight_through(x, cast, cast, dimension=0)
    assert_same(result.detach(), cast(x.detach(), dimension=0))
    result.backward(gradient)
    assert_same(x.grad, cast(gradient, dimension=0))


# Masks


@pytest.mark.parametrize("scale", [0.5, 1.0, 0.015625])
def test_the_mask_is_that_of_torchs_fake_quantize(scale: float) -> None:
    near = torch.tensor([126.49, 126.5, 127.0, 127.49, 127.5, 127.51, 128.0, 200.0, 0.0, 0.3]) * scale
    x = torch.cat([near, -near, many().flatten() * 60 * scale])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    result = straight_through(ours, Cast.parse(f"int8/tensor/static={scale}"), saturated="mask")
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, 0, -127, 127)
    assert_same(result.detach() + 0.0, expected.detach() + 0.0)
    gradient = torch.linspace(1, 2, len(x))
    result.backward(gradient)
    expected.backward(gradient)
    assert_same(ours.grad, theirs.grad)
    assert 0 < (ours.grad == 0).sum() < len(x)


def test_what_saturates_is_what_rounds_beyond_the_largest_value() -> None:
    x = leaf(448.0, 463.9, 464.0, 464.1, -500.0, float("inf"), float("nan"), 0.0)
    straight_through(x, Cast.parse("e4m3fn/none"), saturated="mask").sum().backward()
    assert_same(x.grad, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
    assert Cast.parse("int4/none").saturates(torch.tensor([7.4, 7.5, -8.5, -8.6])).tolist() == [
        False,
        True,
        False,
        True,
    ]
    assert not Cast.parse("e4m3fn").saturates(torch.empty(0, 2)).numel()


@pytest.mark.parametrize("scale", ["none", "tensor/current", "row/current", "block32/e8m0", "tensor/static=0.01"])
@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_what_saturates_is_what_would_overflow(scale: str, how: str, dtype: torch.dtype) -> None:
    x = (many() * 8 * torch.arange(-3.0, 3.0)[:, None].exp2() * (300 if scale == "none" else 1)).to(dtype)
    x[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    cast, state = Cast.parse(f"e4m3fn/{scale}/{how}"), CastState(4)
    beyond = cast.saturates(x, state)
    assert_same(beyond, Cast.parse(f"{cast}:inf")(x, CastState(4)).isnan() & ~x.isnan())
    assert state == CastState(4)
    wide = x.requires_grad_()
    straight_through(wide, cast, saturated="mask", state=state).sum().backward()
    assert_same(wide.grad, (~beyond).to(dtype))


def test_toward_zero_what_is_clipped_saturates() -> None:
    x = torch.tensor([448.0, 479.0, 480.0, 1e9])  # 448 is where 479 belongs anyway, one step below 480
    assert Cast.parse("e4m3fn/none/zero").saturates(x).tolist() == [False, False, True, True]


def test_a_masked_gradient_is_cast_as_well() -> None:
    x, backward = leaf(1.0, 500.0, 2.0), Cast.parse("e5m2/none")
    straight_through(x, Cast.parse("e4m3fn/none"), backward, saturated="mask").backward(torch.tensor([1.1, 1.1, 9e9]))
    assert_same(x.grad, torch.tensor([1.0, 0.0, 57344.0]))


@pytest.mark.parametrize("word", ["clip", "mask ", "", None])
def test_another_word_is_refused(word: str) -> None:
    with pytest.raises(InvalidCast, match=r"no way to treat saturated elements .*\(there is pass, mask\)"):
        straight_through(torch.ones(3), Cast.parse("bf16"), saturated=word)


# States


@pytest.mark.parametrize("saturated", ["pass", "mask"])
def test_a_call_uses_its_state_once(saturated: str) -> None:
    delayed, drawn = Cast.parse("e4m3fn/tensor/delayed"), Cast.parse("e5m2/none/stochastic")
    forward, backward = CastState(1), CastState(2)
    x = many().requires_grad_()
    result = straight_through(x, delayed, drawn, saturated=saturated, state=forward, backward_state=backward)
    assert [float(one) for one in forward.history] == [float(x.detach().abs().max())]
    assert backward.calls == 0
    result.backward(many(1))
    assert backward.calls == 1
    assert len(forward.history) == 1
    assert_same(x.grad, drawn(many(1), CastState(2)))
    straight_through(x, drawn, saturated=saturated, state=backward)
    assert backward.calls == 2


def test_delayed_masks_are_of_the_scale_that_the_call_uses() -> None:
    cast, state, x = Cast.parse("e4m3fn/tensor/delayed"), CastState(), leaf(1.0, 2.0, -4.0)
    straight_through(x, cast, saturated="mask", state=state).sum().backward()
    assert_same(x.grad, torch.ones(3))  # the first call scales currently
    x.grad = None
    state.history.clear()
    state.history.append(2.0)
    straight_through(x, cast, saturated="mask", state=state).sum().backward()
    assert_same(x.grad, torch.tensor([1.0, 1.0, 0.0]))


def test_one_state_for_two_casts_draws_twice() -> None:
    cast, state, x = Cast.parse("e5m2/none/stochastic"), CastState(5), many().requires_grad_()
    straight_through(x, cast, cast, state=state, backward_state=state).backward(many())
    assert state.calls == 2
    assert not torch.equal(x.grad, cast(many(), CastState(5)))
    assert_same(x.grad, cast(many(), CastState(5, calls=1)))


def test_a_layer_learns_through_its_casts() -> None:
    """Weights, activations and gradients in 8 bits: the loss falls as without casts, within a factor."""
    torch.manual_seed(0)
    inputs, wanted = many(4), many(4)[:, :7] * 2 - 1
    plain = nn.Linear(70, 7)
    cast = copy.deepcopy(plain)
    forward, backward = Cast.parse("e4m3fn/row"), Cast.parse("e5m2/tensor/current/stochastic")

    def trained(layer: nn.Linear, through: bool) -> float:
        state, optimizer = CastState(1), torch.optim.SGD(layer.parameters(), lr=0.05)
        for _ in range(100):
            weight, given = layer.weight, inputs
            if through:
                weight, given = straight_through(weight, forward), straight_through(given, forward)
            output = nn.functional.linear(given, weight, layer.bias)
            if through:
                output = straight_through(output, None, backward, backward_state=state)
            loss = (output - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    start = (plain(inputs) - wanted).square().mean().item()
    assert trained(plain, through=False) < 0.1 * start
    assert trained(cast, through=True) < 0.15 * start


def test_the_mask_is_of_the_very_draws_that_the_cast_makes() -> None:
    """Without a state both come from the process's own, wherever that is."""
    cast = Cast.parse("e4m3fn/none/stochastic:inf")
    for _ in range(3):
        x = (448 + 31 * torch.rand(5000, generator=torch.Generator().manual_seed(3))).requires_grad_()
        result = straight_through(x, cast, saturated="mask")
        result.nan_to_num().sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad == 0, result.isnan())
        cast(torch.ones(3))  # another draw between


def test_without_a_cast_the_result_is_a_tensor_of_its_own() -> None:
    x = torch.ones(3, requires_grad=True)
    straight_through(x, None).mul_(2)
    assert (x == 1).all()
