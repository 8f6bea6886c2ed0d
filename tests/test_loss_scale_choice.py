"""The loss scale that a plan asks for: from sketches alone, right for the gradients themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.loss_scale_choice import HEADROOM, LossScale, loss_scale_for, scaled_rows, under
from probes.casts import Cast
from probes.records import GRADIENT
from probes.window import Window

FP16, E5M2 = Cast.parse("fp16"), Cast.parse("e5m2/none")


def window_of(factor: float, seen: list[Tensor] | None = None, steps: int = 3) -> Window:
    """A training whose loss, and so every gradient, is multiplied by `factor`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if seen is not None:
        for layer in (model[0], model[2], model[4]):
            layer.register_forward_hook(partial(_keep, seen))
    with advisor.probe(model, optimizer, steps=steps, curvature_steps=0 if seen is not None else 2) as window:
        for _ in range(steps):
            (factor * F.cross_entropy(model(torch.randn(64, 16)), torch.randint(0, 10, (64,)))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


def _keep(seen: list[Tensor], module: nn.Module, given: Any, result: Tensor) -> None:
    result.register_hook(lambda gradient: seen.append(gradient.clone()))


@pytest.fixture(scope="module")
def tiny() -> Window:
    return window_of(1e-6)


@pytest.mark.parametrize("cast", [FP16, E5M2])
def test_what_it_does_to_the_gradients_themselves(cast: Cast) -> None:
    seen: list[Tensor] = []
    found = loss_scale_for([window_of(1e-6, seen)], [cast, Cast.parse("e4m3fn")])
    assert found is not None
    assert found.factor == 2.0 ** round(torch.log2(torch.tensor(found.factor)).item())
    largest = max(float(gradient.abs().max()) for gradient in seen)
    assert largest * found.factor * HEADROOM <= cast.format.largest
    for gradient in seen:
        nonzero = gradient != 0
        before = (cast(gradient) == 0)[nonzero].double().mean()
        after = (cast(gradient * found.factor) == 0)[nonzero].double().mean()
        assert before > 0.3
        assert after < 5e-3  # three elements of a step
    assert found.unscaled > 0.3
    assert found.scaled < 1e-3


@pytest.mark.parametrize("cast", [FP16, E5M2])
def test_half_the_factor_would_be_worse(cast: Cast, tiny: Window) -> None:
    """The smallest factor that is as good as any: what is left of the range is headroom."""
    found = loss_scale_for([tiny], [cast])
    assert found is not None
    slots = [slot for slot in tiny.product_slots if slot.role == GRADIENT]

    def worst(factor: float) -> float:
        rows = advisor.score(tiny, [under(cast, factor)], slots=slots).rows
        return max(-row["sqnr_db"] + 1000 * row["underflow"] for row in rows)

    assert worst(found.factor / 4) > worst(found.factor) + 0.1


def test_no_factor_where_none_is_needed() -> None:
    assert loss_scale_for([window_of(1.0)], [FP16]) is None
    assert loss_scale_for([window_of(1.0)], [Cast.parse("e4m3fn"), Cast.parse("bf16")]) is None
    assert loss_scale_for([window_of(0.0)], [FP16]) is None


def test_gradients_beyond_the_largest_value_are_scaled_down() -> None:
    """No headroom alone is no reason, overflow is."""

    def far_off(by: float) -> Window:
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with advisor.probe(model, optimizer, steps=1) as window:
            F.mse_loss(model(torch.ones(1, 4)), torch.full((1, 4), by)).backward()
            optimizer.step()
        return window

    assert loss_scale_for([far_off(1e5)], [FP16]) is None
    found = loss_scale_for([far_off(1e6)], [FP16])
    assert found is not None
    assert found.factor == 2.0**-7


def test_the_largest_gradient_of_all_windows_limits_it(tiny: Window) -> None:
    alone, both = loss_scale_for([tiny], [E5M2]), loss_scale_for([tiny, window_of(1.0)], [E5M2])
    assert alone is not None
    assert both is not None
    assert both.factor < alone.factor


def plan_with(window: Window, **options: Any) -> advisor.Plan:
    plan: advisor.Plan = advisor.recommend(window, tolerance=1.0, max_lost_batch=0.5, casts=["fp16"], **options)
    return plan


def test_a_plan_asks_for_it_and_is_scored_with_it(tiny: Window) -> None:
    plan = plan_with(tiny)
    assert plan.loss_scaling.kind == "static"
    found = loss_scale_for([tiny], [FP16])
    assert found is not None
    assert plan.loss_scaling.scale == found.factor
    assert "would lose" in plan.loss_scaling.reason
    gradients = [one for one in plan.assignments if one.role == GRADIENT]
    assert {one.cast for one in gradients} == {"fp16/none/nearest"}
    assert all(one.underflow is not None and one.underflow < 1e-3 for one in gradients)
    assert advisor.Plan.from_dict(plan.to_dict()) == plan


def test_a_plan_that_needs_none_has_none(tiny: Window) -> None:
    plan = advisor.recommend(tiny, tolerance=1.0, max_lost_batch=0.5, casts=["e4m3fn", "bf16"])
    assert plan.loss_scaling.kind == "none"
    assert plan.loss_scaling.scale is None
    assert plan_with(window_of(1.0)).loss_scaling.kind == "none"


def test_scores_are_named_after_the_casts_they_stand_for(tiny: Window) -> None:
    slots = [slot for slot in tiny.product_slots if slot.role == GRADIENT]
    rows = scaled_rows(advisor.score(tiny, [under(FP16, 1024.0)], slots=slots).rows, 1024.0)
    assert {(row["cast"], row["loss_scale"]) for row in rows} == {("fp16/none/nearest", 1024.0)}
    assert str(under(FP16, 1024.0)) == "fp16/tensor/static=0.0009765625/nearest"


def test_the_reason_is_made_of_the_numbers(tiny: Window) -> None:
    found = loss_scale_for([tiny], [FP16])
    assert isinstance(found, LossScale)
    assert found.told(3).startswith("3 gradients are cast without a scale of their own; as fp16, ")
    assert "16×" in found.told(3)
