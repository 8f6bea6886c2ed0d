"""Two runs that differ from a chosen step and site on are told so, and equal ones are told to be equal."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advisor
from probes.casts import Cast
from probes.gradients import straight_through
from probes.probing import probe
from probes.records import Slot
from probes.window import Window
from tests.planted import Net

STEPS = 5


def run(cast: str | None = None, since: int = 0, seed: int = 0, scale: float = 1.0, lr: float = 0.1) -> Window:
    """A training in which, from step `since` on, what enters the last layer is cast."""
    torch.manual_seed(seed)
    model = Net()
    if cast is not None:
        chosen = Cast.parse(cast)
        model.between = lambda step, x: straight_through(x, chosen) if step >= since else x
    optimizer = torch.optim.SGD(model.parameters(), lr=lr / scale)
    with probe(model, optimizer, steps=STEPS, curvature_steps=0) as window:
        for model.step in range(STEPS):
            loss = F.cross_entropy(model(torch.randn(64, 8)), torch.randint(0, 4, (64,)))
            (loss * scale).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


def test_equal_runs_are_equal() -> None:
    found = advisor.compare(run(), run())
    assert found.first is None
    assert found.steps == (0, 1, 2, 3, 4)
    assert len(found.slots) == 27  # 9 of products; master, gradient and update of 6 parameters
    assert all(slot.distance == slot.middle_octaves == slot.amax_octaves == 0 for slot in found.slots)
    assert found.sentences == ("all 27 tensors have the same sketches at all 5 common steps",)


@pytest.mark.parametrize("since", [0, 2, 4])
def test_the_first_difference_is_where_it_was_planted(since: int) -> None:
    plain, cast = run(), run("e2m1", since)
    found = advisor.compare(plain, cast)
    assert found.first is not None
    assert (found.first.site, found.first.role, found.first.first_step) == ("down", "input", since)
    assert found.first_beyond_noise is not None
    assert (found.first_beyond_noise.site, found.first_beyond_noise.first_beyond_noise) == ("down", since)
    by_slot = {(slot.site, slot.role): slot for slot in found.slots}
    # Inputs are the same forever; weights from the step after on; gradients within the step.
    assert by_slot["up", "input"].first_step is None
    assert by_slot["down", "grad_output"].first_step == since
    assert by_slot["down", "weight"].first_step == (since + 1 if since < STEPS - 1 else None)
    assert "the first difference is in down input" in found.sentences[0]


def test_a_small_difference_is_within_noise() -> None:
    found = advisor.compare(run(), run("fp16", since=1))
    assert found.first is not None
    assert found.first.first_step == 1
    assert found.first_beyond_noise is None
    assert "by more than steps of training differ" in found.sentences[1]


def test_it_is_symmetric() -> None:
    one, other = run(), run("e2m1", 2)
    there, back = advisor.compare(one, other), advisor.compare(other, one)
    for left, right in zip(there.slots, back.slots, strict=True):
        assert (left.first_step, left.distance, left.noise) == (right.first_step, right.distance, right.noise)
        assert left.amax_octaves == pytest.approx(-right.amax_octaves)


def test_a_power_of_two_as_loss_scale_is_no_difference() -> None:
    scaled = run(scale=1024.0)
    assert scaled.loss_scales == pytest.approx([1024.0] * STEPS)
    products = [slot for slot in advisor.compare(run(), scaled).slots if slot.role != "weight_grad"]
    # (The optimizer's gradients are as it got them: this training never takes the scale out of them.)
    assert all(slot.first_beyond_noise is None for slot in products)
    assert max(slot.distance for slot in products) < 0.01


def test_a_shift_is_measured_in_octaves() -> None:
    def scaled(factor: float) -> Window:
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with probe(model, optimizer, steps=1, curvature_steps=0) as window:
            F.mse_loss(model(torch.randn(64, 8) * factor), torch.zeros(64, 4)).backward()
            optimizer.step()
        return window

    found = advisor.compare(scaled(1.0), scaled(4.0))
    (slot,) = [slot for slot in found.slots if (slot.site, slot.role) == ("(root)", "input")]
    assert (slot.middle_octaves, slot.amax_octaves) == (2.0, 2.0)
    assert slot.distance > 0.5


def test_what_only_one_has_is_listed() -> None:
    class Headless(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.up(x))

    torch.manual_seed(0)
    model = Headless()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=2, curvature_steps=0) as window:
        for _ in range(2):
            model(torch.randn(64, 8)).sum().backward()
            optimizer.step()
    found = advisor.compare(window, run())
    assert found.only_in_one == ()
    assert Slot("down", "input") in found.only_in_other
    assert {slot.site for slot in found.slots if "." not in slot.site} == {"up"}
    assert any(sentence.startswith("only in the second window: middle input") for sentence in found.sentences)


def test_nothing_in_common_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    assert advisor.compare(window, run()).sentences[0] == "the two windows have no tensor in common"
    assert math.isnan(advisor.drift(window, run()).damage_ranks["bf16/none/nearest"])
