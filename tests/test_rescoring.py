"""A window's file answers for casts and hardware that nobody thought of when it was recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import advisor
from advisor.estimates import Estimates, NoiseEstimates
from advisor.hardware import HARDWARE
from advisor.planner import plan_from_rows
from probes.probing import probe
from probes.window import Window
from tests.models import convnet, encoder, mlp, train

BEFORE = ["e4m3fn", "e5m2", "int8", "bf16", "fp16"]
LATER = ["e4m3fnuz", "e5m2fnuz", "e3m4", "bf16", "fp16"]
OF_SKETCHES = ("underflow", "subnormal", "overflow", "sqnr_db", "amax", "rms", "bias", "shrinking", "flags")


def window_of(build: Any, casts: list[str]) -> Window:
    """The same training, whatever is measured of it."""
    window: Window = train(
        build, 8, lambda model, optimizer: probe(model, optimizer, steps=8, curvature_steps=4, casts=casts)
    )[2]
    return window


@pytest.mark.parametrize("build", [mlp, encoder])
def test_a_stored_window_gives_the_plan_of_a_fresh_one(build: Any, tmp_path: Path) -> None:
    window_of(build, BEFORE).save(tmp_path / "window")
    stored, fresh = advisor.load_window(tmp_path / "window"), window_of(build, LATER)
    for old, new in zip(advisor.score(stored, LATER).rows, advisor.score(fresh, LATER).rows, strict=True):
        assert [repr(old[name]) for name in OF_SKETCHES] == [repr(new[name]) for name in OF_SKETCHES]
    worst = sum(row["damage"] or 0 for row in advisor.score(fresh, ["e4m3fnuz"]).rows)
    for tolerance in (0.0, 10 * worst):
        plans = [
            advisor.recommend(window, hardware="mi300x", casts=LATER, tolerance=tolerance, max_lost_batch=0.9)
            for window in (stored, fresh)
        ]
        chosen = [{(one.site, one.role): one.cast for one in plan.assignments} for plan in plans]
        assert chosen[0] == chosen[1]
        assert plans[0].predicted.share_8bit == plans[1].predicted.share_8bit
        assert plans[0].predicted.damage == pytest.approx(plans[1].predicted.damage, rel=0.5)
    assert plans[0].predicted.share_8bit > 0.5


def test_hardware_needs_nothing_of_the_window() -> None:
    """The candidates being the same, the plan for any hardware is exactly that of a fresh window."""
    one, another = window_of(mlp, BEFORE), window_of(mlp, BEFORE)
    for name in HARDWARE:
        plans = [
            advisor.recommend(window, hardware=name, tolerance=1.0, max_lost_batch=0.9) for window in (one, another)
        ]
        assert plans[0].to_dict() == plans[1].to_dict()


def test_a_device_that_came_later_is_planned_for_from_the_file(tmp_path: Path) -> None:
    """A row of the hardware table written after the recording, which multiplies formats that no candidate had."""
    window_of(mlp, BEFORE).save(tmp_path / "window")
    known = HARDWARE["h100"]
    rates = {**known.tflops, "e3m4": known.tflops["e4m3fn"]}
    later = replace(known, name="later", pairs={("fp32", "fp32"), ("e3m4", "e3m4")}, tflops=rates)
    plans = []
    for window in (advisor.load_window(tmp_path / "window"), window_of(mlp, ["e3m4", "bf16"])):
        rows = advisor.score(window, ["e3m4", "bf16"], slots=window.product_slots).rows
        plans.append(
            plan_from_rows(
                window.sites,
                rows,
                hardware=later,
                tolerance=1.0,
                max_lost_batch=0.9,
                total_flops=window.total_flops,
                mean_loss=1.0,
            )
        )
    casts = [{(one.site, one.role): one.cast for one in plan.assignments} for plan in plans]
    assert casts[0] == casts[1]
    assert any(cast.startswith("e3m4") for cast in casts[0].values())
    assert plans[0].predicted.damage == pytest.approx(plans[1].predicted.damage, rel=0.5)


def test_a_cast_that_makes_the_same_error_takes_its_measurement() -> None:
    window = window_of(mlp, ["e5m2", "int8"])
    scores = advisor.score(window, ["e5m2", "e5m2fnuz"], slots=window.product_slots)
    for row in scores.rows:
        if row["role"] != "grad_output" and row["cast"].startswith("e5m2fnuz"):
            (same,) = (other for other in scores.of(row["site"], row["role"]) if other["cast"].startswith("e5m2/"))
            if row["sqnr_db"] == pytest.approx(same["sqnr_db"], rel=1e-12):
                assert (row["damage"], row["damage_se"]) == (same["damage"], same["damage_se"])
                assert row["damage_from"] == "directional"


@pytest.mark.parametrize("build", [mlp, convnet, encoder])
def test_noise_of_casts_that_flush_is_told_by_those_that_flush_more_and_less(build: Any) -> None:
    """Casts of gradients that were no candidates, of 3 to 7 bits, against a window in which they were."""
    unseen = ["e3m2", "e2m3", "e2m1", "int4", "e3m1"]
    truth, guess = (
        advisor.score(window_of(build, casts), unseen).columns for casts in (unseen, ["e4m3fn", "e5m2", "bf16"])
    )
    known = (truth["role"] == "grad_output") & (truth["noise_ratio"] > 0) & (guess["noise_from"] == "sketch")
    assert known.sum() >= 6
    octaves = np.log2(guess["noise_ratio"][known] / truth["noise_ratio"][known])
    assert abs(np.median(octaves)) < 0.3
    assert np.sqrt(np.mean(octaves**2)) < 0.6


def test_rounding_and_flushing_are_told_apart() -> None:
    """Noise 2·E where nothing is flushed, and beside it what grows with the flushed share u as (u/(1 − u))^3."""
    flushed = np.array([[0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9]])
    error = np.array([[0.003, 0.0007, 0.002, 0.01, 0.02, 0.1, 0.2]])
    exact = 2 * error + 0.1 * (flushed / (1 - flushed)) ** 3
    some = np.array([[True, True, True, False, False, False, True]])
    none = np.zeros(error.shape)
    estimates = NoiseEstimates(np.where(some, exact, np.nan), error, none, flushed, none[0] > 0)
    assert estimates.rounding[0] == pytest.approx(2, rel=1e-3)
    np.testing.assert_allclose(estimates.values, exact, rtol=0.02)
    # Of draws, what is flushed is not lost in the mean.
    random = NoiseEstimates(np.where(some, exact, np.nan), error, none, flushed, np.arange(7) == 5)
    assert random.values[0, 5] == pytest.approx(2 * error[0, 5], rel=1e-3)


def test_what_shrinks_a_tensor_is_told_by_a_cast_that_does_little_else() -> None:
    """Rounding toward zero, predicted with and without one candidate that flushes everything: before a BatchNorm
    weights shrink for nothing."""
    flush, unseen = "int4/tensor/static=1e+36", "e4m3fn/tensor/current/zero"
    truth = advisor.score(window_of(convnet, [unseen]), [unseen]).columns["damage"]
    off = []
    for casts in (BEFORE, [*BEFORE, flush]):
        guess = advisor.score(window_of(convnet, casts), [unseen]).columns["damage"]
        known = (truth > 0) & (guess > 0)
        off.append(float(np.sqrt(np.mean(np.log2(guess[known] / truth[known]) ** 2))))
    assert off[1] < 0.5 < off[0]


def test_two_parts_are_told_apart() -> None:
    """Damage 3·(S − B) + 50·B, of casts that shrink nothing, half and all."""
    share = np.array([[0.0, 0.05, 1.0, 0.3]])
    sketched = np.array([[1.0, 2.0, 4.0, 8.0]])
    exact = sketched * (3 * (1 - share) + 50 * share)
    measured = np.where([[True, False, True, False]], exact, np.nan)
    estimates = Estimates(measured, sketched, share, sketched)
    assert (estimates.coherence[0], estimates.shrink_coherence[0]) == (3.0, 50.0)
    np.testing.assert_allclose(estimates.values, exact)
    blind = Estimates(np.where([[True, False, False, False]], exact, np.nan), sketched, share, sketched)
    np.testing.assert_allclose(blind.values[0, 1:], 3 * sketched[0, 1:])
