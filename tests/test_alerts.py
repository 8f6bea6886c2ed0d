"""Alerts name what was planted: the site, the role and the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.alerting import RULES, Alert
from advisor.execution import execution_order
from probes.history import history_of, sparse_row
from probes.probing import probe
from probes.records import Slot
from probes.sketch import SketchArray
from probes.window import Window
from tests.planted import Net, Plant, unchanged

STEPS = 6


def window_with(between: Plant = unchanged, before: Callable[[int, Net], Any] = lambda step, model: None) -> Window:
    torch.manual_seed(0)
    model = Net()
    model.between = between
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with probe(model, optimizer, steps=STEPS, curvature_steps=0) as window:
        for model.step in range(STEPS):
            before(model.step, model)
            F.cross_entropy(model(torch.randn(64, 8)), torch.randint(0, 4, (64,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


def of_rule(window: Window, rule: str) -> list[Alert]:
    return [alert for alert in advisor.alerts(window) if alert.rule == rule]


def test_a_healthy_training_gives_no_alert() -> None:
    assert advisor.alerts(window_with()) == ()


@pytest.mark.parametrize("planted", [0, 3])
@pytest.mark.parametrize(("value", "kind"), [("nan", "NaN"), ("inf", "+Inf"), ("-inf", "-Inf")])
def test_the_first_non_finite_value_is_told_with_site_role_and_step(planted: int, value: str, kind: str) -> None:
    def between(step: int, x: Tensor) -> Tensor:
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[0, 0] = step == planted
        return x.masked_fill(mask, float(value))

    first, *rest = of_rule(window_with(between), "non_finite")
    assert (first.site, first.role, first.step, first.value) == ("down", "input", planted, 1.0)
    assert first.sentence.startswith(f"{kind} first seen in down input at step {planted} (1 of 1,024 elements)")
    assert first.followed[0] == "down grad_output"  # first by the order of execution, not by name
    assert "up input" not in first.followed or planted < STEPS - 1
    assert first.threshold == RULES["non_finite"].threshold
    if value == "nan":
        assert rest == []
    else:  # the softmax of an infinity is NaN
        (nan,) = rest
        assert (nan.site, nan.role, nan.step) == ("down", "grad_output", planted)


@pytest.mark.parametrize("layer", ["up", "middle", "down"])
def test_a_weight_that_turns_nan_is_told(layer: str) -> None:
    def before(step: int, model: Net) -> None:
        if step == 2:
            with torch.no_grad():
                model.get_parameter(f"{layer}.weight")[0, 0] = float("nan")

    (first,) = of_rule(window_with(before=before), "non_finite")
    assert first.step == 2
    assert (first.site, first.role) == (layer, "weight")


def test_a_gradient_that_turns_nan_in_backward_is_told_from_the_loss_side() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * float("nan")

    def between(step: int, x: Tensor) -> Tensor:
        return Backward.apply(x) if step == 1 else x

    (first,) = of_rule(window_with(between), "non_finite")
    assert (first.site, first.role, first.step) == ("middle", "grad_output", 1)
    assert first.followed[:1] == ("up grad_output",)


def test_steps_that_a_scaler_skipped_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    with probe(model, optimizer, steps=3, curvature_steps=0) as window:
        for step in range(3):
            x = torch.randn(5, 4) * (float("inf") if step == 1 else 1.0)
            scaler.scale(F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    (alert,) = advisor.alerts(window)
    assert (alert.rule, alert.site, alert.role, alert.step) == ("skipped_step", "(root)", "input", 1)
    assert "the GradScaler skipped the step, with a loss scale of 1024" in alert.sentence


@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_a_largest_value_that_doubles_is_told(factor: float) -> None:
    window = window_with(lambda step, x: x.clamp(-0.5, 0.5) * (factor if step >= 4 else 1.0))
    found = [alert for alert in of_rule(window, "amax_doubles") if alert.role == "input"]
    if factor < 2:
        assert found == []
        return
    (alert,) = found
    assert (alert.site, alert.step) == ("down", 4)
    assert alert.value == pytest.approx(factor, rel=1e-6)


def test_a_loss_scale_that_doubles_is_no_alert() -> None:
    def doubled(scaled: bool) -> Window:
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=scaled)
        x, target = torch.randn(64, 8), torch.randint(0, 4, (64,))
        with probe(model, optimizer, steps=STEPS, curvature_steps=0) as window:
            for _ in range(STEPS):
                scaler.scale(F.cross_entropy(model(x), target)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return window

    scaled = doubled(True)
    assert len(set(scaled.loss_scales)) > 1
    assert advisor.alerts(scaled) == ()
    assert advisor.compare(scaled, doubled(False)).first_beyond_noise is None


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_underflow_that_rises_is_told_with_its_cast(spread: float) -> None:
    def between(step: int, x: Tensor) -> Tensor:  # magnitudes spread over ever more octaves
        return x.sign() * 2.0 ** (-(1 + spread * step) * x.detach().abs() * 4)

    found = [alert for alert in of_rule(window_with(between), "underflow_rising") if alert.role == "input"]
    assert [(alert.site, alert.step) for alert in found] == [("down", None)]
    assert found[0].value >= RULES["underflow_rising"].threshold
    assert found[0].cast is not None
    window = window_with(between)
    rows = advisor.score(window, [found[0].cast], slots=[Slot("down", "input")]).rows
    assert rows[0]["underflow"] > 0
    assert of_rule(window_with(lambda step, x: between(3, x)), "underflow_rising") == []


def test_weights_that_take_no_update_are_told() -> None:
    def window_in(dtype: torch.dtype) -> Window:
        torch.manual_seed(0)
        model = nn.Linear(64, 64).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with probe(model, optimizer, steps=4, curvature_steps=0) as window:
            for _ in range(4):
                model(torch.randn(8, 64, dtype=dtype)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return window

    assert of_rule(window_in(torch.float32), "lost_updates") == []
    (alert,) = [alert for alert in of_rule(window_in(torch.bfloat16), "lost_updates") if alert.site == "weight"]
    assert alert.value > 0.9
    assert "less than half a step of bfloat16" in alert.sentence


def test_slots_are_in_the_order_of_execution() -> None:
    window = window_with()
    assert [slot for slot in execution_order(window) if window.is_product(slot)] == [
        *(Slot(site, role) for site in ("up", "middle", "down") for role in ("input", "weight")),
        *(Slot(site, "grad_output") for site in ("down", "middle", "up")),
    ]


def test_a_history_without_elements_is_no_matter() -> None:
    array = SketchArray(1)
    history = history_of([sparse_row(0, array.sums[0].numpy(), array.extremes[0].numpy())])
    assert history.elements.tolist() == [0]
    window = window_with()
    contents = window._held
    emptied = {**contents.histories, Slot("up", "input"): history}
    assert advisor.alerts(Window(type(contents)(**{**vars(contents), "histories": emptied}))) == ()
