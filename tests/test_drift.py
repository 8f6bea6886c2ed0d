"""Drift is measured in octaves and shares, and confidence falls with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.confidence import DAMAGE, FEWEST_STEPS, NOISE, confidence_from, halves_apart, scatter
from advisor.errors import AdvisorError
from probes.probing import probe
from probes.window import Window

STEPS = 8
E4M3 = "e4m3fn/tensor/current/nearest"


def fed(scale_of: Callable[[int], float], steps: int = STEPS, **options: Any) -> Window:
    """A window of a layer that learns nothing, its inputs' scale chosen step by step."""
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=steps, curvature_steps=0, **options) as window:
        for step in range(steps):
            x = torch.randn(256, 16) * scale_of(step)
            F.cross_entropy(model(x), torch.randint(0, 8, (256,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


def drifted(window: Window, later: Window | None = None) -> Any:
    return next(slot for slot in advisor.drift(window, later).slots if slot.role == "input")


def test_drift_within_a_window_is_that_of_its_halves() -> None:
    found = drifted(fed(lambda step: 1.0 if step < 4 else 4.0))
    assert found.amax_octaves == pytest.approx(2.0, abs=0.3)
    assert found.middle_octaves == pytest.approx(2.0, abs=0.03)
    assert found.error_octaves[E4M3] == pytest.approx(4.0, abs=0.3)  # energies: twice the octaves
    assert abs(found.underflow[E4M3]) < 1e-3  # a current scale follows


def test_drift_between_windows() -> None:
    one, other = fed(lambda step: 1.0), fed(lambda step: 0.25)
    there, back = drifted(one, other), drifted(other, one)
    assert there.middle_octaves == pytest.approx(-2.0, abs=0.03)
    assert back.middle_octaves == pytest.approx(-there.middle_octaves)
    assert back.error_octaves[E4M3] == pytest.approx(-there.error_octaves[E4M3])
    assert "from one window to the other" in advisor.drift(one, other).sentences[0]


def test_without_a_scale_underflow_drifts_as_well() -> None:
    found = advisor.drift(fed(lambda step: 1.0 if step < 4 else 2.0**-9), casts=["e4m3fn/none"])
    (slot,) = [slot for slot in found.slots if slot.role == "input"]
    assert slot.underflow["e4m3fn/none/nearest"] > 0.3
    assert any("underflow moved most" in sentence and "e4m3fn/none" in sentence for sentence in found.sentences)


def test_one_step_has_no_halves() -> None:
    with pytest.raises(AdvisorError, match="two recorded steps"):
        advisor.drift(fed(lambda step: 1.0, steps=1))


def of_inputs(window: Window, cast: str = E4M3) -> float | None:
    (row,) = [row for row in advisor.score(window, [cast]).rows if row["role"] == "input"]
    confidence: float | None = row["confidence"]
    return confidence


def test_confidence_falls_with_drift() -> None:
    steady, slow, fast = (of_inputs(fed(lambda step, k=k: 2.0 ** (k * step / STEPS))) for k in (0, 1, 6))
    assert steady is not None
    assert slow is not None
    assert fast is not None
    assert 1 > steady > slow > fast > 0
    assert steady == pytest.approx(math.erf(1 / (DAMAGE.floor * 2**0.5)), abs=0.02)
    assert fast < 0.2


def test_confidence_of_what_has_no_error_is_certain() -> None:
    assert of_inputs(fed(lambda step: 1.0), "fp32/none") == 1.0


def test_too_few_steps_have_no_confidence() -> None:
    assert of_inputs(fed(lambda step: 1.0, steps=FEWEST_STEPS - 1)) is None
    assert of_inputs(fed(lambda step: 1.0, steps=FEWEST_STEPS)) is not None


def test_a_scale_that_comes_and_goes_is_doubtful() -> None:
    steady, wild = (of_inputs(fed(lambda step, f=f: f ** (step % 2))) for f in (1.0, 64.0))
    assert steady is not None
    assert wild is not None
    assert wild < steady / 2


def test_confidence_is_the_normal_chance_of_a_factor_of_two() -> None:
    q = np.array([0.0, 0.1, -0.1, 0.0, 0.5, 0.6, 0.4, 0.5])
    assert halves_apart(q) == pytest.approx(0.5)
    drawn = np.random.default_rng(0).normal(size=200_000)
    for forward, spread in ((True, DAMAGE), (False, NOISE)):
        error = 0.3 / math.log(2) * spread.doubt
        sigma = math.hypot(spread.floor, spread.trend * 0.5, scatter(q) * math.sqrt(2 / 8), error)
        within = float((abs(sigma * drawn) <= 1).mean())
        assert confidence_from(q, forward, 0.3) == pytest.approx(within, abs=5 * 0.5 / 200_000**0.5)


def test_scatter_leaves_a_straight_line_out() -> None:
    line = np.arange(10.0)
    assert scatter(line) == pytest.approx(0.0, abs=1e-9)
    noise = np.random.default_rng(0).normal(size=1000)
    assert scatter(np.arange(1000) * 0.1 + noise) == pytest.approx(1.0, abs=5 / 2000**0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_steps_are_left_out(value: float) -> None:
    window = fed(lambda step: value if step == 3 else 1.0)
    confidence = of_inputs(window)
    assert confidence is not None
    assert confidence > 0.8
    assert math.isfinite(drifted(window).amax_octaves)


def test_ranks_of_a_steady_training_stay() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(16, 16) for _ in range(6)]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.weight.mul_(1.5**index)  # type: ignore[operator]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def window() -> Window:
        with probe(model, optimizer, steps=4, curvature_steps=0) as opened:
            for _ in range(4):
                x: Tensor = torch.randn(64, 16)
                F.mse_loss(model(x), x).backward()
                optimizer.step()
                optimizer.zero_grad()
        return opened

    one, other = window(), window()
    assert advisor.drift(one, other).damage_ranks[E4M3] > 0.95
    assert "rank correlation of the tensors by damage" in " ".join(advisor.drift(one).sentences)
