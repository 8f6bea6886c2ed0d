"""What is alike in the errors of all batches, against errors whose mean is known and against brute force."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from probes.casts import Cast
from probes.joining import joined_evidence
from probes.mean_error import NUMBERS, MeanError, Signs, Sketches, settled
from probes.probing import probe
from probes.records import Evidence
from probes.window import Window
from probes.windowfile import window_from_bytes
from tests.ranks import on_ranks
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


def test_one_call_s_gradient_has_its_energy_exactly_and_a_sum_of_calls_in_expectation() -> None:
    """Two calls whose gradients nearly cancel, under a loss scale; the errors' sketches are of their sum."""
    scale, first, second = 1024.0, *torch.randn(2, 3000, generator=generator())
    second = 0.3 * second - first
    error, calls = first.square(), []
    for seed in range(300):
        one, other = (Sketches([scale * gradient], seed).of([scale * error]) for gradient in (first, second))
        sketch, energy = settled(one, scale)
        assert energy == pytest.approx(float(first.square().sum()), rel=1e-5)
        assert torch.allclose(sketch.float(), Signs(seed).sketched([error]), rtol=1e-4, atol=1e-3)
        calls.append(settled(one + other, scale)[1])
    energies, exact = torch.tensor(calls), float((first + second).square().sum())
    assert abs(float(energies.mean()) - exact) < 5 * float(energies.std()) / math.sqrt(len(calls))


def head() -> nn.Module:
    """Of 40 classes it knows none: the gradient of the right one is large, and those of the others are flushed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 40))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draws = generator(seed)
    return torch.randn(64, 16, generator=draws), torch.randint(0, 40, (64,), generator=draws)


@pytest.mark.parametrize(
    ("optimizer", "parts"), [(torch.optim.SGD, 1), (torch.optim.Adam, 1), (torch.optim.SGD, 4), (torch.optim.SGD, 16)]
)
def test_scored_steps_tell_it_as_brute_force_does(optimizer: type[torch.optim.Optimizer], parts: int) -> None:
    """All weights stand still; brute force casts the gradient at the head's result itself, in 200 batches.

    `parts`: micro-batches of a step, each of which is cast by itself.
    """
    model, steps = head(), 8
    stepper = optimizer(model.parameters(), lr=0.0)
    with probe(model, stepper, steps=steps, curvature_steps=steps, casts=[HEAD]) as window:
        for seed in range(steps):
            for x, target in zip(*(whole.chunk(parts) for whole in batch(seed)), strict=True):
                (F.cross_entropy(model(x), target) / parts).backward()
            stepper.step()
            stepper.zero_grad()
    told = window.evidence("2", "grad_output")
    cast, errors, energy = Cast.parse(HEAD), [], 0.0
    for seed in range(1000, 1200):
        x, target = batch(seed)
        hidden = model[:2](x).detach()
        logits = model[2](hidden).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
        rounded = torch.cat([cast(part) for part in gradient.chunk(parts)])
        errors.append((rounded - gradient).T @ hidden)
        energy += float((gradient.T @ hidden).square().sum()) / 200
    mean = torch.stack(errors).mean(0)
    exact = float(mean.square().sum()) / energy
    whole = sum(float(error.square().sum()) for error in errors) / 200 / energy
    assert exact > 0.5 * whole  # most of it is alike
    assert abs(told.systematic_noise[HEAD] - exact) < 4 * told.systematic_noise_se[HEAD] + 0.1 * exact
    assert advisor.score(window, [HEAD]).of("2", "grad_output")[0]["systematic_ratio"] > 0


class Twice(nn.Module):
    """A head that is called twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x).relu()) + self.head(self.body(x).tanh())
        return found


@pytest.mark.parametrize("steps", [1, 2])
def test_several_calls_in_a_step_are_one_batch(steps: int) -> None:
    model = Twice()
    stepper = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, stepper, steps=2, curvature_steps=steps, casts=[HEAD]) as window:
        for seed in range(2):
            x, target = batch(seed)
            F.cross_entropy(model(x), target).backward()
            stepper.step()
            stepper.zero_grad()
    told = window.evidence("head", "grad_output")
    assert HEAD in told.relative_noise
    assert told.systematic_noise.keys() == told.systematic_noise_se.keys()
    assert told.systematic_noise.keys() == (told.relative_noise.keys() if steps > 1 else set())


def errors_of_rows(*rows: int) -> Evidence:
    """Of a head that takes the same 400 rows in each step, as often as makes that many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 200))
    stepper = torch.optim.SGD(model.parameters(), lr=0.0)
    x, target = torch.randn(400, 16, generator=generator()), torch.randint(0, 200, (400,), generator=generator())
    with probe(model, stepper, steps=len(rows), curvature_steps=len(rows), casts=[HEAD]) as window:
        for count in rows:
            times = count // 400
            F.cross_entropy(model(x.repeat(times, 1)), target.repeat(times)).backward()
            stepper.step()
            stepper.zero_grad()
    return window.evidence("2", "grad_output")


def test_batches_of_several_sizes_err_in_the_same_elements() -> None:
    """One size is above the rows that are taken of the input's gradient, the other below; the weight's is the same."""
    alike, ragged = errors_of_rows(400, 400), errors_of_rows(800, 400)
    assert ragged.systematic_noise[HEAD] == pytest.approx(alike.systematic_noise[HEAD], rel=1e-3)


def part_of_the_batches(ranks: int, rank: int) -> Window:
    model = head()
    model = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    stepper = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, stepper, steps=8, curvature_steps=8, casts=[HEAD]) as window:
        for seed in range(8):
            x, target = (whole[:16].chunk(ranks)[rank] for whole in batch(seed))
            F.cross_entropy(model(x), target).backward()
            stepper.step()
            stepper.zero_grad()
    return window


def of_two(rank: int) -> bytes:
    return part_of_the_batches(2, rank).to_bytes()


def test_ranks_tell_it_as_one_process_does(tmp_path: Path) -> None:
    ranks = [window_from_bytes(data).evidence("2", "grad_output") for data in on_ranks(2, of_two, tmp_path)]
    whole = part_of_the_batches(1, 0).evidence("2", "grad_output")
    assert ranks[0] == ranks[1]
    assert ranks[0].batch_noise == pytest.approx(whole.batch_noise, rel=1e-3)
    error = math.hypot(ranks[0].systematic_noise_se[HEAD], whole.systematic_noise_se[HEAD])
    assert abs(ranks[0].systematic_noise[HEAD] - whole.systematic_noise[HEAD]) < 3 * error


def test_ranks_do_not_tell_what_cannot_be_joined() -> None:
    known = Evidence(systematic_noise={HEAD: 0.1}, systematic_noise_se={HEAD: 0.01}, batch_noise=0.5)
    assert joined_evidence([known, known]).systematic_noise[HEAD] == pytest.approx(0.15)
    assert joined_evidence([known, known]).systematic_noise_se[HEAD] == pytest.approx(0.015)
    without = dataclasses.replace(known, batch_noise=None)
    for ranks in ([known, None], [known, Evidence(batch_noise=0.5)], [without, without]):
        assert joined_evidence(ranks).systematic_noise == joined_evidence(ranks).systematic_noise_se == {}


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
