"""Fused recurrent layers: what a cast of an operand does to the gradients, against the layer itself with it cast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from benchmarks.advice.moved import CastBackward, casting
from probes.casts import Cast
from probes.noise import noise_energies
from probes.probing import probe
from probes.records import Slot
from probes.sites import ProductCall, SiteHook
from probes.undisturbed import undisturbed
from probes.window import Window
from tests.tensors import generator

CAST = Cast.parse("e5m2")
BATCH, LENGTH = 6, 5


class Caught(SiteHook):
    """The calls that a step meets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[ProductCall] = []

    def on_product(self, call: ProductCall) -> Any:
        self.calls.append(call)
        return call.run()


class Stack(nn.Module):
    """A recurrent layer alone, behind a linear one; what comes out of it is the result."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.recurrent = nn.Linear(4, 4), kind(4, 5, **options)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.recurrent(self.first(x))[0]
        return found


STACKS: list[tuple[type[nn.RNNBase], dict[str, Any]]] = [
    (nn.LSTM, {"num_layers": 2, "batch_first": True}),
    (nn.LSTM, {"bidirectional": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.RNN, {"num_layers": 2}),
]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("kind", "options"), STACKS)
def test_noise_of_a_recurrent_operand_is_the_difference_of_two_backward_passes(
    kind: type[nn.RNNBase], options: dict[str, Any], adaptive: bool
) -> None:
    """Against the layer itself with one tensor cast, of all that it sends back."""
    model = Stack(kind, **options)
    x = torch.randn(BATCH, LENGTH, 4, generator=generator(1))
    with Caught(model) as caught:
        result = model(x)
    call, g = caught.calls[1], torch.randn(result.shape, generator=generator(2))
    arrived = [g, *(torch.zeros_like(state) for state in call.results(call.run())[1:])]
    with undisturbed():
        found = noise_energies(call, call.joined(arrived), [CAST], adaptive)
    exact = sent_back(model, x, g, None)
    weights = [name for name, _ in model.recurrent.named_parameters() if name.startswith("weight")]
    for role in ("input", *weights):
        errors = {name: one - exact[name] for name, one in sent_back(model, x, g, role).items()}
        assert found[Slot("recurrent", role)][str(CAST)].ratio == pytest.approx(
            ratio_of(errors, exact, adaptive), rel=1e-3
        )
    assert Slot("recurrent", "state") not in found  # of zeros, which no cast moves


def sent_back(model: Stack, x: Tensor, g: Tensor, moved: str | None) -> dict[str, Tensor]:
    """Gradients of the layer's input and weights, with one of them cast."""
    layer = copy.deepcopy(model.recurrent)
    entering = model.first(x).detach()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name == moved:
                weight.copy_(CAST(weight))
    entering = (CAST(entering) if moved == "input" else entering).requires_grad_()
    layer(entering)[0].backward(g)
    found = {name: weight.grad for name, weight in layer.named_parameters() if name.startswith("weight")}
    return {name: one for name, one in {"input": entering.grad, **found}.items() if one is not None}


def ratio_of(errors: dict[str, Tensor], exact: dict[str, Tensor], adaptive: bool) -> float:
    """Of all together; where each element has its own step, the largest mean over a gradient's first two dimensions."""
    if not adaptive:
        whole = [sum(float(one.square().sum()) for one in each.values()) for each in (errors, exact)]
        return whole[0] / whole[1]
    return max(
        float(torch.nanmean(_along(errors[name], dimension) / _along(exact[name], dimension)))
        for name in errors
        for dimension in (0, 1)
    )


def _along(values: Tensor, dimension: int) -> Tensor:
    return values.movedim(dimension, 0).flatten(1).square().sum(1)


class Letters(nn.Module):
    """Which letter comes next."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.letters, self.recurrent, self.head = (
            nn.Embedding(7, 16),
            nn.LSTM(16, 24, batch_first=True),
            nn.Linear(24, 7),
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.recurrent(self.letters(x))[0])
        return found

    def loss(self, seed: int) -> Tensor:
        """Of a batch in which each letter is one or two after the one before."""
        draws = generator(seed)
        steps = torch.randint(1, 3, (16, 13), generator=draws)
        text = (torch.randint(7, (16, 1), generator=draws) + steps.cumsum(1)) % 7
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


@pytest.fixture(scope="module")
def letters() -> tuple[Letters, Window]:
    """Weights stand still while it is watched."""
    model = Letters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=12, curvature_steps=6, casts=[CAST, "int8"]) as window:
        for seed in range(12):
            model.loss(seed).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, window


def test_what_a_recurrent_operand_costs_of_the_batch_is_what_brute_force_says(letters: tuple[Letters, Window]) -> None:
    model, window = letters
    scores, site = advisor.score(window, [CAST]), "recurrent"
    for role in ("input", "weight_ih_l0", "weight_hh_l0"):
        (row,) = scores.of(site, role)
        assert row["noise_from"] == "measured"
        error, noise = brute_force(model, Slot(site, role))
        assert row["noise_ratio"] == pytest.approx(error / noise, rel=0.5)
        assert row["lost_batch_share"] == pytest.approx(row["noise_ratio"] / (1 + row["noise_ratio"]))


def brute_force(model: Letters, slot: Slot) -> tuple[float, float]:
    """Energies, over its weights' gradients, of the cast's error and of the minibatch's noise, from 40 batches."""
    exact = gradients_of(model)
    with CastBackward(model) as hook, casting(hook, slot, CAST):
        errors = gradients_of(model) - exact
    return float(errors.square().sum(1).mean()), float(exact.var(0).sum())


def gradients_of(model: Letters) -> Tensor:
    """Of the recurrent layer's weights, a row a batch."""
    weights = [weight for name, weight in model.recurrent.named_parameters() if name.startswith("weight")]
    rows = [torch.autograd.grad(model.loss(seed), weights) for seed in range(100, 140)]
    return torch.stack([torch.cat([one.flatten() for one in row]) for row in rows])


def test_a_plan_narrows_what_enters_a_recurrent_layer(letters: tuple[Letters, Window]) -> None:
    _, window = letters
    plan = advisor.recommend(window, "h100", tolerance=1.0, max_lost_batch=0.5)
    casts = {(one.site, one.role): advisor.Cast.parse(one.cast) for one in plan.assignments}
    assert casts["recurrent", "input"].bits == casts["recurrent", "weight_ih_l0"].bits == 8
    assert not any("could be predicted" in note for note in plan.notes)


def test_the_minibatch_s_noise_of_a_recurrent_layer_is_that_of_its_own_weights(letters: tuple[Letters, Window]) -> None:
    """That of all parameters together is twice as large."""
    model, window = letters
    exact = gradients_of(model)
    own = float(exact.var(0).sum() / exact.square().sum(1).mean())
    assert window.evidence("recurrent", "input").batch_noise == pytest.approx(own, rel=0.3)
