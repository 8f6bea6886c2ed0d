"""Gradients recorded with a loss scale are scored without it, and a scaled training is watched as any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from probes.errors import WindowError
from probes.probing import probe
from probes.window import Window


def watched(scale: Callable[[Tensor], Tensor], steps: int = 3, **options: Any) -> Window:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=steps, **options) as window:
        for _ in range(steps):
            loss = F.cross_entropy(model(torch.randn(64, 16)), torch.randint(0, 10, (64,)))
            scale(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


def _products(window: Window, cast: str) -> list[dict[str, Any]]:
    """Rows of products; weight gradients are as the optimizer takes them, which here is with the scale."""
    return advisor.score(window, [cast], slots=window.product_slots).rows


@pytest.mark.parametrize("factor", [1024.0, 1000.0])
def test_a_constant_scale_is_found_and_taken_out(factor: float) -> None:
    plain, scaled = watched(lambda loss: loss), watched(lambda loss: loss * factor)
    assert scaled.loss_scales == pytest.approx([factor] * 3)
    assert scaled.losses == pytest.approx(plain.losses, rel=1e-6)
    assert scaled.history("2", "grad_output").amax == pytest.approx(
        plain.history("2", "grad_output").amax * factor, rel=1e-6
    )
    for cast in ("e5m2/none", "e4m3fn", "fp16"):
        for one, other in zip(_products(plain, cast), _products(scaled, cast), strict=True):
            assert other["underflow"] == pytest.approx(one["underflow"], abs=2e-3)
            assert other["amax"] == pytest.approx(one["amax"], rel=1e-6)
            assert other["sqnr_db"] == pytest.approx(one["sqnr_db"], abs=0.5)
            assert other["damage"] == (None if one["damage"] is None else pytest.approx(one["damage"], rel=1e-3))


def test_a_given_scale_is_believed() -> None:
    assert watched(lambda loss: loss * 7, loss_scale=7.0).loss_scales == (7.0, 7.0, 7.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_no_scale_at_all_is_refused(scale: float) -> None:
    with pytest.raises(WindowError, match="loss_scale"):
        watched(lambda loss: loss, loss_scale=scale)


def test_a_division_for_accumulation_is_no_scale() -> None:
    assert watched(lambda loss: loss / 4).loss_scales == (1.0, 1.0, 1.0)


def test_a_scaler_tells_its_scale_and_a_skipped_step_is_closed() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    with probe(model, optimizer, steps=3, curvature_steps=1) as window:
        for step in range(3):
            x = torch.randn(5, 4) * (float("inf") if step == 1 else 1.0)
            scaler.scale(F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert window.steps == (0, 1, 2)
    assert window.loss_scales == (1024.0, 1024.0, 512.0)
    assert window.history("(root)", "input").positive_infs[1] + window.history("(root)", "input").negative_infs[1] == 20
    assert any("step 1 was skipped" in note for note in window.notes)


def test_a_step_is_skipped_where_only_parts_of_the_model_are_called() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    with probe(model, optimizer, steps=3, curvature_steps=0) as window:
        for step in range(3):
            x = torch.randn(5, 4) * (float("inf") if step == 1 else 1.0)
            logits = model["head"](model["body"](x))
            scaler.scale(F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert window.steps == (0, 1, 2)
    history = window.history("body", "input")
    assert (history.positive_infs + history.negative_infs).tolist() == [0, 20, 0]
    assert any("step 1 was skipped" in note for note in window.notes)


def test_scalers_are_left_as_they_were() -> None:
    before = (torch.amp.GradScaler.scale, torch.amp.GradScaler.update)
    watched(lambda loss: loss)
    assert (torch.amp.GradScaler.scale, torch.amp.GradScaler.update) == before
