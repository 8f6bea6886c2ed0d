"""What is alike in the errors of all batches, against errors whose mean is known and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from probes.casts import Cast
from probes.mean_error import NUMBERS, MeanError, Signs
from probes.probing import probe
from probes.window import Window
from tests.tensors import generator

HEAD = "e2m1/tensor/current/nearest"


def estimated(errors: Tensor, seed: int = 0) -> MeanError:
    """Of errors [steps, elements] in a gradient of energy one."""
    found = MeanError()
    for error in errors:
        found.add(Signs(seed).sketched([error]), 1.0)
    return found


def test_a_sketch_has_its_error_s_products_in_expectation() -> None:
    one, other = torch.randn(2, 3000, generator=generator(), dtype=torch.float64)
    other += one
    products = torch.tensor(
        [float(Signs(seed).sketched([one]) @ Signs(seed).sketched([other])) for seed in range(400)], dtype=torch.float64
    )
    exact = float(one @ other)
    assert abs(float(products.mean()) - exact) < 5 * float(products.std()) / 20
    # The spread that the module's docstring tells of: (|a|²|b|² + ⟨a,b⟩²)/NUMBERS.
    told = math.sqrt((float(one @ one) * float(other @ other) + exact**2) / NUMBERS)
    assert float(products.std()) == pytest.approx(told, rel=0.2)


@pytest.mark.parametrize("steps", [2, 8])
def test_the_mean_s_energy_is_without_bias_and_its_standard_error_is_right(steps: int) -> None:
    """Errors in 40 directions, a quarter of the energy of which is alike."""
    mean = torch.full((40,), math.sqrt(0.25 / 40))
    found = []
    for seed in range(200):
        noise = math.sqrt(0.75 / 40) * torch.randn(steps, 40, generator=generator(seed))
        found.append(estimated(mean + noise, seed))
    ratios = torch.tensor([one.ratio for one in found])
    errors = torch.tensor([one.ratio_se for one in found])
    assert abs(float(ratios.mean()) - 0.25) < 5 * float(ratios.std()) / math.sqrt(len(found))
    assert 0.5 < float(errors.square().mean().sqrt() / ratios.std()) < 2


def test_one_step_tells_nothing() -> None:
    assert math.isnan(estimated(torch.ones(1, 8)).ratio)
    assert math.isnan(estimated(torch.ones(1, 8)).ratio_se)
    assert math.isnan(MeanError().ratio)


def head() -> nn.Module:
    """Of 40 classes it knows none: the gradient of the right one is large, and those of the others are flushed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 40))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draws = generator(seed)
    return torch.randn(64, 16, generator=draws), torch.randint(0, 40, (64,), generator=draws)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_scored_steps_tell_it_as_brute_force_does(optimizer: type[torch.optim.Optimizer]) -> None:
    """All weights stand still; brute force casts the gradient at the head's result itself, in 200 batches."""
    model, steps = head(), 8
    stepper = optimizer(model.parameters(), lr=0.0)
    with probe(model, stepper, steps=steps, curvature_steps=steps, casts=[HEAD]) as window:
        for seed in range(steps):
            x, target = batch(seed)
            F.cross_entropy(model(x), target).backward()
            stepper.step()
            stepper.zero_grad()
    told = window.evidence("2", "grad_output")
    cast, errors, energy = Cast.parse(HEAD), [], 0.0
    for seed in range(1000, 1200):
        x, target = batch(seed)
        hidden = model[:2](x).detach()
        logits = model[2](hidden).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
        errors.append((cast(gradient) - gradient).T @ hidden)
        energy += float((gradient.T @ hidden).square().sum()) / 200
    mean = torch.stack(errors).mean(0)
    exact = float(mean.square().sum()) / energy
    whole = sum(float(error.square().sum()) for error in errors) / 200 / energy
    assert exact > 0.5 * whole  # most of it is alike
    assert abs(told.systematic_noise[HEAD] - exact) < 4 * told.systematic_noise_se[HEAD] + 0.1 * exact
    assert advisor.score(window, [HEAD]).of("2", "grad_output")[0]["systematic_ratio"] > 0


def window_of(casts: list[str], steps: int) -> Window:
    model = head()
    stepper = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, stepper, steps=8, curvature_steps=steps, casts=casts) as window:
        for seed in range(8):
            x, target = batch(seed)
            F.cross_entropy(model(x), target).backward()
            stepper.step()
            stepper.zero_grad()
    return window


def test_a_plan_leaves_a_head_alone_whose_errors_are_alike() -> None:
    """With the usual candidates and two scored steps: e2m1 is told from what other casts flush."""
    plan = advisor.recommend(window_of(["e4m3fn", "e5m2", "int8"], 2), tolerance=10.0, casts=["e2m1"])
    (gradient,) = (one for one in plan.assignments if (one.site, one.role) == ("2", "grad_output"))
    assert gradient.cast == "fp32/none/nearest"
    assert "it errs the same way in every batch" in gradient.reason


def test_what_is_rounded_at_random_is_not_alike() -> None:
    random = "e4m3fn/tensor/current/stochastic"
    told = window_of([random, HEAD], 8).evidence("2", "grad_output")
    assert abs(told.systematic_noise[random]) < 5 * told.systematic_noise_se[random]
    assert told.systematic_noise[HEAD] > 5 * told.systematic_noise_se[HEAD]
