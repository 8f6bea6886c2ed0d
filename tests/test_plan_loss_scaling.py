"""Loss scaling as a plan asks for it: casts see scaled gradients, the user and the optimizer true ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from models import mlp, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import advisor
from advisor.errors import InvalidPlan
from advisor.plan import LossScaling, Plan
from probes.casts import Cast
from probes.window import Window


@pytest.fixture(scope="module")
def window() -> Window:
    return train(mlp, 3, lambda model, optimizer: advisor.probe(model, optimizer, steps=2, curvature_steps=0))[2]


def scaling(kind: Any = "static", scale: float | None = 2.0**10, **others: Any) -> LossScaling:
    return LossScaling(kind=kind, reason="a test's", scale=scale, **others)


def plan_of(window: Window, how: LossScaling, gradient: str = "fp32") -> Plan:
    return advisor.uniform(window, grad_output=gradient, loss_scaling=how)


def stepper(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)


def grads(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


@pytest.mark.parametrize("start", ["tensor", "function", "gradient", "two roots", "checkpoint", "reentrant"])
def test_without_casts_a_power_of_two_changes_no_bit(window: Window, start: str) -> None:
    model = mlp().eval()
    x = torch.randn(8, 16, requires_grad=True)

    def backward() -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        for _ in range(2):  # the second one accumulates
            if start in ("checkpoint", "reentrant"):
                y = checkpoint(model, x, use_reentrant=start == "reentrant")
            else:
                y = model(x)
            match start:
                case "function":
                    torch.autograd.backward(y.sum())
                case "gradient":
                    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
                case "two roots":
                    total = y.sum()
                    torch.autograd.backward([total, total.square()], [torch.tensor(0.5), None])
                case _:
                    y.square().sum().backward()
        return [*grads(model), x.grad.clone()]

    plain = backward()
    with advisor.apply(plan_of(window, scaling()), model, stepper(model)):
        scaled = backward()
    assert same(plain, scaled)
    assert same(plain, backward())


def test_small_gradients_survive_a_cast_under_a_scale(window: Window) -> None:
    model, x = mlp().eval(), torch.randn(8, 16)

    def gradient(how: LossScaling) -> Tensor:
        model.zero_grad()
        with advisor.apply(plan_of(window, how, "fp16"), model, stepper(model)):
            (1e-9 * model(x).sum()).backward()
        return grads(model)[-1]

    assert not gradient(LossScaling(kind="none", reason="")).any()
    g = torch.full((8, 10), 1e-9)
    expected = (Cast.parse("fp16")(g * 2.0**20) / 2.0**20).sum(0)
    assert torch.allclose(gradient(scaling(scale=2.0**20)), expected, rtol=1e-6, atol=0)


def overflowing(model: nn.Module, factor: float = 1.0) -> Tensor:
    return factor * model(torch.ones(4, 16)).sum()


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_overflows_is_skipped_wholly_and_the_scale_is_halved(window: Window, closure: bool) -> None:
    torch.manual_seed(0)
    model = mlp().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    how = scaling("dynamic", 2.0**15, growth_interval=2)
    with advisor.apply(plan_of(window, how, "fp16:inf"), model, optimizer) as applied:

        def step(factor: float) -> None:
            def compute() -> Tensor:
                optimizer.zero_grad()
                loss = overflowing(model, factor)
                loss.backward()
                return loss

            if closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()

        step(1.0)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        step(4.0)  # 4·2¹⁵ is more than fp16 holds
        after = model.state_dict(), optimizer.state_dict()
        assert all(map(torch.equal, before[0].values(), after[0].values()))
        for kept, found in zip(before[1]["state"].values(), after[1]["state"].values(), strict=True):
            assert all(torch.equal(kept[name], found[name]) for name in kept)
        assert not grads(model)[-1].isfinite().all()  # the user still sees them
        scaler = applied.loss_scaler
        assert scaler is not None
        assert (scaler.scale, scaler.skipped, scaler.steps) == (2.0**14, 1, 2)
        for _ in range(4):
            step(0.5)
        assert scaler.changes == [(0, 2.0**15), (2, 2.0**14), (4, 2.0**15), (6, 2.0**16)]
        step(1.0)
        assert scaler.skipped == 2
    row = applied.report()[-1]
    assert (row["site"], row["role"], row["count"], row["skipped"]) == ("(loss)", "scale", 7, 2)
    assert row["changes"][-1] == [7, 2.0**15]
    assert "loss scaled, dynamic" in str(applied)


def test_minimums_rise_with_the_steps(window: Window) -> None:
    model = mlp().eval()
    optimizer = stepper(model)
    how = scaling("dynamic", 4.0, growth_interval=100, minimums=((2, 8.0), (4, 32.0)))
    scales = []
    with advisor.apply(plan_of(window, how), model, optimizer) as applied:
        for k in range(6):
            scales.append(applied.loss_scaler.scale)
            overflowing(model, float("inf") if k in (0, 3) else 1.0).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert scales == [4.0, 2.0, 8.0, 8.0, 32.0, 32.0]
    assert applied.loss_scaler.skipped == 2


def test_an_overflow_that_clipping_hides_is_found(window: Window) -> None:
    model = mlp().eval()
    optimizer = stepper(model)
    before = copy.deepcopy(model.state_dict())
    with advisor.apply(plan_of(window, scaling("dynamic")), model, optimizer) as applied:
        overflowing(model, float("inf")).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
    assert applied.loss_scaler.skipped == 1
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_clipping_sees_true_gradients(window: Window) -> None:
    def trained(plan: Plan | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp().eval()
        optimizer = stepper(model)
        norms = []

        def steps() -> None:
            for k in range(3):
                x = torch.randn(8, 16, generator=torch.Generator().manual_seed(k))
                model(x).square().sum().backward()
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
                optimizer.step()
                optimizer.zero_grad()

        if plan is None:
            steps()
        else:
            with advisor.apply(plan, model, optimizer):
                steps()
        return [*norms, *(parameter.detach() for parameter in model.parameters())]

    assert same(trained(None), trained(plan_of(window, scaling())))
    assert same(trained(None), trained(plan_of(window, scaling("dynamic"))))


def test_the_scale_goes_on_from_its_state(window: Window) -> None:
    plan = plan_of(window, scaling("dynamic", 2.0**12, growth_interval=3), "fp16:inf")

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, factors: list[float]) -> None:
        for factor in factors:
            overflowing(model, factor).backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    factors = [1.0, 100.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    model = mlp().eval()
    start = copy.deepcopy(model)
    with advisor.apply(plan, model, stepper(model)) as applied:
        steps(model, applied._optimizer, factors)
    again = start
    optimizer = stepper(again)
    first = advisor.apply(plan, again, optimizer)
    with first:
        steps(again, optimizer, factors[:4])
    second = advisor.apply(plan, again, optimizer)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with second:
        steps(again, optimizer, factors[4:])
    assert second.loss_scaler.state_dict() == applied.loss_scaler.state_dict()
    assert second.loss_scaler.changes == [(0, 4096.0), (2, 2048.0), (5, 4096.0)]
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_gradients_that_were_not_scaled_are_told(window: Window) -> None:
    model = mlp().eval()
    optimizer = stepper(model)
    with advisor.apply(plan_of(window, scaling()), model, optimizer) as applied:
        found = torch.autograd.grad(model(torch.ones(2, 16)).sum(), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert "1 steps had gradients from no backward pass that was met" in applied.report()[-1]["how"]


def test_gradients_of_fp16_parameters_are_told_to_end_in_fp16(window: Window) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = mlp().to(dtype)
        optimizer = stepper(model)
        with advisor.apply(plan_of(window, scaling()), model, optimizer) as applied:
            model(torch.ones(2, 16, dtype=dtype)).sum().backward()
            optimizer.step()
        assert ("divided in fp16" in applied.report()[-1]["how"]) == (dtype == torch.float16)


def test_outside_the_block_no_hook_is_left(window: Window) -> None:
    model = mlp()
    optimizer = stepper(model)
    with advisor.apply(plan_of(window, scaling("dynamic")), model, optimizer):
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_window_within_takes_the_scale_out(window: Window, kind: str) -> None:
    def watched(how: LossScaling | None) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = mlp().eval()
        optimizer = stepper(model)
        x, target = torch.randn(8, 16), torch.randint(0, 10, (8,))

        def steps() -> Window:
            with advisor.probe(model, optimizer, steps=3, curvature_steps=1) as found:
                for _ in range(3):
                    nn.functional.cross_entropy(model(x), target).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            return found

        if how is None:
            found = steps()
        else:
            with advisor.apply(plan_of(window, how), model, optimizer):
                found = steps()
        return advisor.score(found, casts=["e5m2/none", "int8"]).rows

    for plain, scaled in zip(watched(None), watched(scaling(kind, 2.0**12)), strict=True):
        for name in ("underflow", "amax", "sqnr_db", "damage", "lost_batch_share"):
            if plain[name] is None:
                assert scaled[name] is None
            else:
                assert scaled[name] == pytest.approx(plain[name], rel=1e-5), (plain["site"], plain["role"], name)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (scaling(scale=1000.0), "a loss scale is a power of two"),
        (scaling(scale=None), "static and has no scale"),
        (scaling("dynamic", minimums=((1, 3.0),)), "a loss scale is a power of two"),
        (scaling("dynamic", minimums=((5, 4.0), (1, 8.0))), "minimums rise from 0 on"),
        (scaling("dynamic", growth_interval=0), "growth interval is 1 step or more"),
        (scaling(minimums=((1, 4.0),)), "neither minimums nor a growth interval"),
    ],
)
def test_scales_that_cannot_be_used_are_refused(window: Window, how: LossScaling, says: str) -> None:
    model = mlp()
    with pytest.raises(InvalidPlan, match=says):
        advisor.apply(plan_of(window, how), model, stepper(model))
    with pytest.raises(InvalidPlan, match="give apply the optimizer"):
        advisor.apply(plan_of(window, scaling()), model)
