"""Tensors that a plan keeps in another format: rounded after each step, exactly as the reference arithmetic does."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import convnet, mlp, train
from torch import Tensor, nn

import advisor
from advisor.errors import InvalidPlan, PlanMismatch
from advisor.plan import LossScaling, Plan, Stored
from probes.casts import Cast
from probes.errors import UnsupportedTensor
from probes.window import Window

Build = Callable[..., torch.optim.Optimizer]


@pytest.fixture(scope="module")
def window() -> Window:
    return train(mlp, 3, lambda model, optimizer: advisor.probe(model, optimizer, steps=2, curvature_steps=0))[2]


def stored(cast: str, *slots: tuple[str, str]) -> list[Stored]:
    return [Stored(name=name, role=role, cast=cast, reason="a test's") for name, role in slots]


def plan_of(window: Window, rows: list[Stored]) -> Plan:
    return advisor.uniform(window, input="fp32", storage=rows)


def masters(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, "master") for name, _ in model.named_parameters()]


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, foreach=False),
    "foreach": partial(torch.optim.AdamW, foreach=True),
    "fused": partial(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masters_and_states_are_those_of_a_training_that_rounds_by_hand(window: Window, build: Build) -> None:
    states = ["momentum_buffer"] if build is OPTIMIZERS["sgd"] else ["exp_avg", "exp_avg_sq"]
    names = [name for name, _ in mlp().named_parameters()]
    rows = stored("bf16", *masters(mlp())) + stored("e5m2", *((name, state) for name in names for state in states))
    plan = plan_of(window, rows)
    bf16, e5m2 = Cast.parse("bf16"), Cast.parse("e5m2")

    class ByHand:
        """torch's own dtypes do the rounding: what is kept is what a bfloat16 tensor would hold."""

        def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            self.model, self.optimizer = model, optimizer

        def __enter__(self) -> None:
            self.round()
            self.hook = self.optimizer.register_step_post_hook(lambda *_: self.round())

        def __exit__(self, *_: Any) -> None:
            self.hook.remove()

        def round(self) -> None:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.copy_(parameter.bfloat16().float())
                    for state in states:
                        if parameter in self.optimizer.state:
                            kept = self.optimizer.state[parameter][state]
                            kept.copy_(e5m2(kept))

    model, losses, applied = train(mlp, 8, lambda model, optimizer: advisor.apply(plan, model, optimizer), build)
    expected, hand, _ = train(mlp, 8, ByHand, build)
    assert losses == hand
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(found, bf16(found.detach()))
    counts = {(row["site"], row["role"]): row["count"] for row in applied.report() if row["how"] == "stored"}
    assert counts == {**dict.fromkeys(masters(mlp()), 9), **{(name, s): 8 for name in names for s in states}}
    assert "exp_avg_sq" in str(applied) or "momentum_buffer" in str(applied)


def test_an_update_below_half_a_step_is_lost_and_stochastic_rounding_keeps_it_on_average() -> None:
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with advisor.probe(model, optimizer, steps=1, curvature_steps=0) as window:
        (0.0 * model(torch.randn(2, 64)).sum()).backward()
        optimizer.step()

    def trained(cast: str, steps: int = 64) -> Tensor:
        model.weight.data.fill_(1.0)
        with advisor.apply(plan_of(window, stored(cast, ("weight", "master"))), model, optimizer):
            for _ in range(steps):
                model.weight.grad = torch.full((64, 64), -(2.0**-11))  # an eighth of bf16's half step above 1
                optimizer.step()
        return model.weight.detach()

    assert torch.equal(trained("bf16"), torch.ones(64, 64))
    # Each step adds 2⁻¹¹ on average, with a variance of at most 2⁻⁷·2⁻¹¹ each: 5σ of the mean of 4,096 weights.
    found = float((trained("bf16/none/stochastic").double() - 1).mean())
    assert abs(found - 64 * 2.0**-11) < 5 * math.sqrt(64 * 2.0**-18 / 4096)


def test_outside_the_block_nothing_is_left_but_the_values(window: Window) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    plan = plan_of(window, stored("fp16", *((name, "epsilon") for name, _ in model.named_parameters())))
    seen = []
    with advisor.apply(plan, model, optimizer) as applied:
        inner = optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["eps"]))
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["eps"] == 1e-8  # between steps: what a checkpoint made here would keep
        inner.remove()
    assert seen == [0.0]
    assert {row["count"] for row in applied.report() if row["role"] == "epsilon"} == {1}
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_an_epsilon_that_underflows_shows() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    with advisor.probe(model, optimizer, steps=1, curvature_steps=0) as window:
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0]])  # two columns of the weight get a gradient of 0

    def weights(cast: str) -> Tensor:
        fresh = copy.deepcopy(model)
        stepper = torch.optim.Adam(fresh.parameters())
        with advisor.apply(plan_of(window, stored(cast, ("weight", "epsilon"))), fresh, stepper):
            fresh(x).sum().backward()
            stepper.step()
        return fresh.weight.detach()

    assert weights("bf16").isfinite().all()
    assert torch.equal(weights("fp16").isnan(), torch.tensor([[False, True, False, True]]).expand(4, 4))


@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_gradients_are_collected_in_their_format_scaled_as_the_loss_is(window: Window, scale: float | None) -> None:
    torch.manual_seed(0)
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = stored("fp16:inf", *((name, "weight_grad") for name, _ in model.named_parameters()))
    scaling = None if scale is None else LossScaling(kind="dynamic", reason="", scale=scale, growth_interval=9)
    plan = advisor.uniform(window, input="fp32", storage=rows, loss_scaling=scaling)
    inputs = [torch.randn(4, 16) for _ in range(3)]
    factor = scale or 1.0

    def total(x: Tensor) -> Tensor:
        return 1e-4 * model(x).sum()

    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for x in inputs:
        found = torch.autograd.grad(total(x), list(model.parameters()))
        for kept, gradient in zip(expected, found, strict=True):
            kept.copy_((factor * (kept + gradient)).half().float() / factor)
    with advisor.apply(plan, model, optimizer) as applied:
        for x in inputs:
            total(x).backward()
        for parameter, kept in zip(model.parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, kept, rtol=2**-10, atol=0)  # autograd may sum in another order
            assert torch.equal(parameter.grad * factor, (parameter.grad * factor).half().float())
        assert {row["count"] for row in applied.report() if row["role"] == "weight_grad"} == {3}
        (1e9 * total(inputs[0])).backward()
        optimizer.step()
        assert (applied.loss_scaler is not None and applied.loss_scaler.skipped) == (scale is not None)


def test_buffers_are_rounded_after_each_forward() -> None:
    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return advisor.probe(model, optimizer, steps=1, curvature_steps=0)

    _, _, window = train(convnet, 2, watch)
    plan = plan_of(window, stored("fp16", ("1.running_mean", "buffer"), ("1.running_var", "buffer")))
    torch.manual_seed(0)
    model, optimizer = convnet(), None
    reference = copy.deepcopy(model)
    with advisor.apply(plan, model, optimizer) as applied:
        for _ in range(3):
            x = torch.randn(8, 1, 8, 8)
            model(x).sum().backward()
            reference(x)
            for name in ("running_mean", "running_var"):
                kept = reference.get_submodule("1").get_buffer(name)
                kept.copy_(kept.half().float())
                assert torch.equal(model.get_submodule("1").get_buffer(name), kept)
        model.eval()
        model(x)
    # Once at the start and after the three forwards; evaluation changed nothing.
    assert [row["count"] for row in applied.report() if row["role"] == "buffer"] == [4, 4]


@pytest.mark.parametrize("cast", ["bf16/none/stochastic", "e4m3fn/tensor/current/stochastic", "e4m3fn/block32"])
def test_a_training_goes_on_from_its_states(window: Window, cast: str) -> None:
    names = [name for name, _ in mlp().named_parameters()]
    plan = plan_of(window, stored(cast, *masters(mlp()), *((name, "exp_avg") for name in names)))

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = mlp().eval()
        return model, torch.optim.Adam(model.parameters(), lr=1e-2)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for k in which:
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(k))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    through, optimizer = fresh()
    with advisor.apply(plan, through, optimizer):
        steps(through, optimizer, range(6))

    model, optimizer = fresh()
    with advisor.apply(plan, model, optimizer) as applied:
        steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), json.dumps(applied.state_dict())
    model, optimizer = fresh()
    model.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    applied = advisor.apply(plan, model, optimizer)
    applied.load_state_dict(json.loads(saved[1]))
    with applied:
        steps(model, optimizer, range(3, 6))
    for found, wanted in zip(model.parameters(), through.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_step_with_a_closure_and_one_inside_a_wrapper(window: Window) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 16)).square().sum()
        loss.backward()
        return loss

    with advisor.apply(plan_of(window, stored("bf16", *masters(model))), model, Wrapper(optimizer)) as applied:
        Wrapper(optimizer).step(closure)
    assert {row["count"] for row in applied.report() if row["how"] == "stored"} == {2}
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (stored("bf16", ("7.weight", "master")), "the model has no such parameter"),
        (stored("bf16", ("0.weight", "buffer")), r"keeps the buffer 0\.weight.*the model has none"),
        (stored("e4m3fn/tensor/delayed", ("0.weight", "master")), "a delayed scale is of calls before"),
        (stored("e8m0/none", ("0.weight", "master")), "a format for scales"),
        (stored("fp16", ("0.weight", "epsilon")), "not to all 4 parameters of its group"),
        (stored("e4m3fn", ("0.weight", "epsilon")), "by no scale of its own"),
        (stored("bf16", ("0.weight", "master"), ("0.weight", "master")), "names a tensor twice"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_once(window: Window, rows: list[Stored], says: str) -> None:
    model = mlp()
    with pytest.raises(InvalidPlan, match=says):
        advisor.apply(plan_of(window, rows), model, torch.optim.Adam(model.parameters()))


def test_a_master_weight_that_this_optimizer_does_not_update_is_refused(window: Window) -> None:
    model = mlp()
    plan = plan_of(window, stored("bf16", *masters(model)))
    with pytest.raises(PlanMismatch, match=r"names master of 0\.weight, and the optimizer has not that parameter"):
        advisor.apply(plan, model, torch.optim.SGD(mlp().parameters(), 0.1))
    frozen = model.get_parameter("0.weight").requires_grad_(False)
    rest = [parameter for parameter in model.parameters() if parameter is not frozen]
    with advisor.apply(plan, model, torch.optim.SGD(rest, 0.1)):
        pass
    assert torch.equal(frozen, frozen.bfloat16().float())


def test_a_block_that_cannot_be_entered_or_is_cut_short_leaves_nothing(window: Window) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    rows = stored("fp16", *((name, "epsilon") for name in names)) + stored("bf16", *masters(model))
    applied = advisor.apply(plan_of(window, rows), model, optimizer)
    model.get_parameter("3.bias").data = torch.zeros(10).to(torch.float8_e4m3fn)  # which a cast does not take
    with pytest.raises(UnsupportedTensor), applied:
        pass
    model.get_parameter("3.bias").data = torch.zeros(10)

    def throw(*_: Any) -> None:
        raise KeyboardInterrupt

    with applied:
        model(torch.randn(4, 16)).sum().backward()
        optimizer.register_step_pre_hook(throw)  # after the epsilon has been lent
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        assert optimizer.param_groups[0]["eps"] == 0.0
    assert optimizer.param_groups[0]["eps"] == 1e-8
    assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_only_a_step_can_show_is_refused_then(window: Window) -> None:
    model = mlp()
    plan = plan_of(window, stored("bf16", ("0.weight", "exp_avg")))
    with pytest.raises(InvalidPlan, match="give apply the optimizer"):
        advisor.apply(plan, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with advisor.apply(plan, model, optimizer):
        model(torch.randn(4, 16)).sum().backward()
        with pytest.raises(PlanMismatch, match=r"SGD keeps no tensor 'exp_avg' for 0\.weight"):
            optimizer.step()
    with pytest.raises(PlanMismatch, match="has not that parameter"):
        advisor.apply(plan, model, torch.optim.Adam([model.get_parameter("3.weight")]))
