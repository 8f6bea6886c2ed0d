"""Minibatch noise of gradients: constants by brute force, and both sources against what a stream was made of."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from probes.gradient_noise import Differences, Moments, noise_from_moments, weight_energy
from probes.probing import probe
from tests.models import mlp, train
from tests.tensors import generator

MEAN, NOISE = 1.0, 2.0  # energies of the mean gradient and of the noise, an element: noise is two thirds of all
WIDTH = 20_000


def stream(steps: int, seed: int = 0) -> list[Tensor]:
    draws = generator(seed)
    mean = MEAN**0.5 * torch.randn(WIDTH, generator=draws, dtype=torch.float64)
    return [mean + NOISE**0.5 * torch.randn(WIDTH, generator=draws, dtype=torch.float64) for _ in range(steps)]


def moments(gradients: list[Tensor], betas: tuple[float, float]) -> Moments:
    """What Adam's own lines make of a stream."""
    first, second = torch.zeros(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    for gradient in gradients:
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
    energy = gradients[-1].square().sum()
    return Moments(first.square().sum(), second.sum(), energy, float(len(gradients)), betas)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 400])
def test_the_energy_of_the_running_mean_weights(beta: float, steps: int) -> None:
    weights = [(1 - beta) * beta**age / (1 - beta**steps) for age in range(steps)]
    assert sum(weights) == pytest.approx(1)
    assert weight_energy(beta, steps) == pytest.approx(sum(weight**2 for weight in weights))


def test_the_constant_of_many_steps_is_that_of_the_design() -> None:
    for beta in (0.8, 0.9, 0.95):
        assert 1 / (1 - weight_energy(beta, 10_000)) == pytest.approx((1 + beta) / (2 * beta))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.8, 0.99)])
@pytest.mark.parametrize("steps", [20, 60, 300])
def test_moments_give_the_variance_that_the_stream_has(betas: tuple[float, float], steps: int) -> None:
    estimate = moments(stream(steps), betas).estimate
    assert estimate is not None
    noise, energy = (value / WIDTH for value in estimate)
    # An element's g² has the standard deviation √(2·NOISE² + 4·MEAN·NOISE) = 4, its v̂ after 20 steps 0.9 or less,
    # its m̂² 2·√(MEAN·NOISE·Σw²) = 0.73; MEAN itself is a draw, of √2.
    five_sigma = 5 * 1.2 / math.sqrt(WIDTH)
    assert abs(noise - NOISE) < five_sigma
    assert abs(energy - MEAN - NOISE) < 5 * 1.7 / math.sqrt(WIDTH)
    assert abs(noise * (1 - weight_energy(betas[0], steps)) - NOISE) > five_sigma  # so the test can tell


def test_fresh_moments_and_those_of_other_times_are_not_believed() -> None:
    gradients = stream(100)
    assert noise_from_moments([moments(gradients[:19], (0.9, 0.999))]) is None
    assert noise_from_moments([moments(gradients, (0.9, 0.999))]) == pytest.approx(2 / 3, abs=0.03)
    assert noise_from_moments([]) is None
    shrunk = [*gradients, *(gradient / 10 for gradient in gradients[:10])]
    assert noise_from_moments([moments(shrunk, (0.9, 0.999))]) is None
    assert noise_from_moments([moments([gradient * math.nan for gradient in gradients], (0.9, 0.999))]) is None
    assert noise_from_moments([moments([gradient * 0 for gradient in gradients], (0.9, 0.999))]) is None


def test_differences_give_it_too() -> None:
    found = Differences()
    for gradient in stream(40):
        found.add({"a": gradient.view(100, 200).float(), "b": gradient.float() * 3})
    for noise, energy in found.sums().values():
        # 39 pairs of 2,048 elements: a pair's estimate varies by about its own value, neighbours share a gradient.
        assert abs(noise / energy - 2 / 3) < 5 / math.sqrt(39 * 1900 / 2)


def test_differences_skip_what_is_not_finite_or_not_there() -> None:
    gradients = [gradient.float() for gradient in stream(30)]
    gradients[5] = gradients[5] * math.inf
    found = Differences()
    for step, gradient in enumerate(gradients):
        found.add({"a": gradient} if step % 7 else {"a": gradient, "b": gradient})
    found.add({})
    found.add({"a": torch.zeros(0), "b": gradients[0]})
    sums = found.sums()
    assert set(sums) == {"a"}
    assert sums["a"][0] / sums["a"][1] == pytest.approx(2 / 3, abs=0.05)
    assert Differences().sums() == {}


def test_differences_of_scaled_gradients_are_unscaled() -> None:
    plain, scaled = Differences(), Differences()
    for step, gradient in enumerate(stream(6)):
        factor = torch.tensor(2.0 ** (8 + step))
        plain.add({"a": gradient.float()})
        scaled.add({"a": gradient.float() * factor}, factor)
    assert plain.sums() == scaled.sums()


class Noisy(nn.Module):
    """A parameter whose gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100, 200))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


@pytest.mark.parametrize(
    ("optimizer", "before", "source"),
    [
        (torch.optim.AdamW, 0, "differences"),
        (torch.optim.AdamW, 60, "moments"),
        (partial(torch.optim.NAdam, lr=1e-3), 60, "moments"),
        (partial(torch.optim.AdamW, fused=True), 60, "moments"),
        (torch.optim.SGD, 60, "differences"),
        (torch.optim.Adamax, 60, "differences"),
    ],
)
def test_a_window_says_how_noisy_and_how_it_knows(optimizer: type, before: int, source: str) -> None:
    model = Noisy()
    stepper = optimizer(model.parameters())

    def step(gradient: Tensor) -> None:
        stepper.zero_grad()
        model(gradient.view(100, 200).float()).backward()
        stepper.step()

    gradients = stream(before + 12)
    for gradient in gradients[:before]:
        step(gradient)
    with probe(model, stepper, steps=12, curvature_steps=0) as window:
        for gradient in gradients[before:]:
            step(gradient)
    (record,) = window.parameter_records
    assert record.noise_from == source
    assert record.gradient_noise == pytest.approx(2 / 3, abs=0.05)
    assert record.signal_to_noise == pytest.approx(0.5, abs=0.12)


def test_noise_reaches_the_sites_and_weight_gradients() -> None:
    window = train(mlp, 10, partial(probe, steps=8))[2]
    for site in window.sites:
        record = window.parameter_record(site.parameter)
        assert record is not None
        assert window.evidence(site.name, "input").batch_noise == record.gradient_noise
        assert window.evidence(site.parameter, "weight_grad").batch_noise == record.gradient_noise
