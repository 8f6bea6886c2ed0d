"""A plan carried out: every product computed from cast operands, every gradient cast before it is used."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.errors import InvalidPlan, PlanMismatch
from advisor.plan import Plan
from probes.casts import Cast, CastState
from probes.probing import probe
from probes.window import Window
from tests.models import convnet, encoder, mlp, train

RECIPE = {"input": "e4m3fn", "weight": "int8", "grad_output": "e5m2"}


def window_of(model: nn.Module, *shape: int) -> Window:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        result = model(torch.randn(shape))
        F.mse_loss(result, torch.zeros_like(result)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return window


def test_the_three_products_are_those_of_the_cast_tensors() -> None:
    model, x, g = nn.Linear(8, 6), torch.randn(5, 8, requires_grad=True), torch.randn(5, 6)
    plan = advisor.uniform(window_of(model, 5, 8), **RECIPE)
    with advisor.apply(plan, model) as applied:
        y = model(x)
    y.backward(g)
    q = {role: Cast.parse(cast) for role, cast in RECIPE.items()}
    qx, qw, qg = q["input"](x.detach()), q["weight"](model.weight.detach()), q["grad_output"](g)
    assert torch.equal(y, F.linear(qx, qw, model.bias))
    assert torch.equal(x.grad, qg @ qw)
    assert torch.equal(model.weight.grad, qg.T @ qx)
    assert torch.equal(model.bias.grad, qg.sum(0))
    assert [(row["role"], row["how"], row["count"]) for row in applied.report()] == [
        ("input", "emulated", 1),
        ("weight", "emulated", 1),
        ("grad_output", "emulated", 1),
    ]


@pytest.mark.parametrize("build", [mlp, convnet, encoder])
def test_training_with_a_plan_and_its_report(build: Any) -> None:
    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return probe(model, optimizer, steps=3)

    _, plain, window = train(build, 6, watch)
    plan = advisor.recommend(window, tolerance=1.0, max_lost_batch=0.5)
    assert plan.predicted.share_8bit > 0.5

    _, losses, applied = train(build, 6, lambda model, optimizer: advisor.apply(plan, model, optimizer))
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.05)
    rows = applied.report()
    assert {row["how"] for row in rows} <= {"emulated", "kept"}
    assert all(row["count"] == 6 for row in rows), rows
    assert "emulated" in str(applied)


def test_a_kept_plan_changes_no_bit() -> None:
    _, plain, window = train(mlp, 4, lambda model, optimizer: probe(model, optimizer, steps=2))
    _, losses, _ = train(
        mlp, 4, lambda model, optimizer: advisor.apply(advisor.uniform(window, input="fp32"), model, optimizer)
    )
    assert losses == plain


def test_one_plan_at_a_time_on_a_model() -> None:
    model, other = mlp(), mlp()
    plan = advisor.uniform(train(mlp, 2, lambda m, o: probe(m, o, steps=2))[2], input="e4m3fn")
    applied = advisor.apply(plan, model)
    with applied, advisor.apply(plan, other):  # another model's is no trouble
        for second in (applied, advisor.apply(plan, model)):
            with pytest.raises(InvalidPlan, match="is carried out on this model already"):
                second.__enter__()
        model(torch.randn(4, 16)).sum().backward()
        other(torch.randn(4, 16)).sum().backward()
    assert {row["count"] for row in applied.report()} == {1}
    with applied:
        model(torch.randn(4, 16))
    assert {row["count"] for row in applied.report() if row["role"] == "input"} == {2}
    assert not torch.overrides._get_current_function_mode_stack()


def test_stochastic_casts_are_reproducible_and_leave_the_users_stream_alone() -> None:
    _, _, window = train(mlp, 3, lambda model, optimizer: probe(model, optimizer, steps=2))
    plan = advisor.uniform(window, grad_output="e5m2/tensor/current/stochastic")

    def losses(seed: int) -> list[float]:
        # train draws its batches from the global stream: other draws would give other batches and losses
        return train(mlp, 4, lambda model, optimizer: advisor.apply(plan, model, optimizer, seed=seed))[1]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)
    model, x = nn.Linear(8, 6), torch.randn(5, 8)
    random = advisor.uniform(window_of(model, 5, 8), input="e5m2/tensor/current/stochastic")
    before = torch.get_rng_state()
    with advisor.apply(random, model):
        model(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_scales_of_every_kind_are_applied_with_a_history_of_their_slot() -> None:
    model, batches = nn.Linear(8, 6), [torch.randn(5, 8) * 2.0**k for k in (0, 3, 1)]
    recipe = {
        "input": "e4m3fn/tensor/delayed(len=2,margin=1)/zero",
        "weight": "e3m4/tensor/static=0.02",
        "grad_output": "e2m3/tensor/delayed/nearest",
    }
    plan = advisor.uniform(window_of(model, 5, 8), **recipe)
    q, history, gradients = {role: Cast.parse(cast) for role, cast in recipe.items()}, CastState(), CastState()
    with advisor.apply(plan, model) as applied:
        for x in batches:
            model.weight.grad = None
            y = model(x)
            y.square().sum().backward()
            qx = q["input"](x, history)
            assert torch.equal(y, F.linear(qx, q["weight"](model.weight.detach()), model.bias))
            assert torch.equal(model.weight.grad, q["grad_output"](2 * y.detach(), gradients).T @ qx)
    assert [(row["role"], len(row["history"])) for row in applied.state_dict()] == [
        ("input", 2),
        ("weight", 0),
        ("grad_output", 3),
    ]


def test_the_casts_state_goes_from_one_training_to_the_next() -> None:
    model, batches = nn.Linear(8, 6), [torch.randn(5, 8) * 3.0**k for k in (1, 0, -1, 1)]
    plan = advisor.uniform(
        window_of(model, 5, 8), input="e4m3fn/tensor/delayed/stochastic", weight="int8/none/stochastic"
    )

    def results(applied: advisor.apply, some: list[Tensor]) -> list[Tensor]:
        with applied:
            return [model(x).detach() for x in some]

    through = results(advisor.apply(plan, model, seed=3), batches)
    first, second = advisor.apply(plan, model, seed=3), advisor.apply(plan, model, seed=3)
    start = results(first, batches[:2])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(torch.stack([*start, *results(second, batches[2:])]), torch.stack(through))
    assert not torch.equal(through[2], results(advisor.apply(plan, model, seed=3), batches[2:])[0])
    with pytest.raises(PlanMismatch, match="of another plan"):
        second.load_state_dict(first.state_dict()[1:])


def test_a_format_for_scales_is_refused_at_once() -> None:
    model = nn.Linear(8, 6)
    told = advisor.uniform(window_of(model, 5, 8), **RECIPE).to_dict()
    told["assignments"][1]["cast"] = "e8m0/none"
    with pytest.raises(InvalidPlan, match=r"\(root\) weight is to be cast as e8m0/none.*e8m0 is a format for scales"):
        advisor.apply(Plan.from_dict(told), model)


def test_what_cannot_be_placed_is_said() -> None:
    from torch.utils.checkpoint import checkpoint

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.layer(x)
            result: Tensor = checkpoint(lambda h: (h @ h.t()) @ h, hidden, use_reentrant=False)
            return result

    model = Bare()
    plan = advisor.uniform(window_of(model, 4, 4), lhs="int8")
    with advisor.apply(plan, model) as applied:
        model(torch.randn(4, 4)).sum().backward()
    assert applied.report()[-1] == {"site": None, "role": None, "cast": None, "how": "not placed", "count": 2}
    assert "not placed" in str(applied)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Linear(16, 32)), r"3 \(the model has no parameter 3\.weight\)"),
        (nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 10)), r"0 \(its weight is \[8, 16\]"),
        (nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.ReLU(), nn.Linear(32, 10)), r"0 \(its weight is \[16, 32\]"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_the_sites(model: nn.Module, says: str) -> None:
    _, _, window = train(mlp, 2, lambda model, optimizer: probe(model, optimizer, steps=2))
    with pytest.raises(PlanMismatch, match=says):
        advisor.apply(advisor.recommend(window), model)


def test_products_that_the_plan_does_not_name_are_reported() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.both = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) if self.both else self.first(x)

    model = Grown()
    plan = advisor.uniform(window_of(model, 3, 4), **RECIPE)
    model.both = True
    with advisor.apply(plan, model) as applied:
        model(torch.randn(3, 4)).sum().backward()
    assert applied.report()[-1] == {
        "site": "second",
        "role": None,
        "cast": None,
        "how": "not in the plan",
        "count": 1,
    }


def test_a_plan_is_applied_to_what_is_recomputed() -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    plan = advisor.uniform(window_of(model, 5, 8), **RECIPE)
    x = torch.randn(5, 8)

    def gradients(recompute: bool) -> list[Tensor]:
        model.zero_grad()
        with advisor.apply(plan, model):
            result = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
            result.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_watching_a_training_with_a_plan() -> None:
    model = nn.Linear(8, 6)
    plan: Plan = advisor.uniform(window_of(model, 5, 8), **RECIPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with advisor.apply(plan, model, optimizer) as applied, probe(model, optimizer, steps=1) as window:
        model(torch.randn(5, 8)).sum().backward()
        optimizer.step()
    assert window.history("(root)", "input").elements.tolist() == [40]
    assert all(row["count"] == 1 for row in applied.report())


def test_a_compiled_model_is_cast_as_it_is_uncompiled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(6, 8)
    plan = advisor.uniform(window_of(model, 6, 8), input="e2m1", weight="e2m1")
    compiled = torch.compile(model, backend="aot_eager")
    plain = compiled(x)
    with advisor.apply(plan, model):
        expected = model(x)
    with advisor.apply(plan, compiled) as applied:
        found = compiled(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert {row["how"] for row in applied.report() if row["role"] == "input"} == {"emulated"}
    assert torch.equal(compiled(x), plain)
    torch._dynamo.reset()
