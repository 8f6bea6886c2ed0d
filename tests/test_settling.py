"""A choice whose interval straddles the limit says so, and what window would settle it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from advisor.confidence import DAMAGE
from advisor.hardware import hardware_named
from advisor.intervals import interval_of, noise_interval, spread_of
from advisor.planner import plan_from_rows
from advisor.settling import MOST_TIMES, settling
from probes.casts import Cast
from probes.tiles import checked_names
from tests.planned import linear, score


def row(draws: float, drift: float = 0.3, damage: float = 1e-4) -> dict[str, Any]:
    """A score whose standard error and drift add so many octaves to σ."""
    error = draws * math.log(2) / DAMAGE.doubt * damage
    sure = math.erf(1 / (math.hypot(draws, drift) * math.sqrt(2)))
    return score("up", "input", "e4m3fn", damage, damage_se=error, confidence=sure)


def upper_end(told: dict[str, Any]) -> float:
    ends = interval_of(told)
    assert ends is not None
    return ends[1]


def test_an_interval_on_one_side_is_settled() -> None:
    lower, upper = interval_of(row(0.8)) or (0.0, 0.0)
    assert settling(row(0.8), upper * 1.01) is None
    assert settling(row(0.8), lower * 0.99) is None
    assert settling(row(0.8), upper * 0.99) is not None
    assert settling(score("up", "input", "e4m3fn", None), 1e-3) is None


def test_more_scored_steps_settle_what_draws_leave_open() -> None:
    """The number that is named does it, and half of it does not."""
    limit = 0.9 * upper_end(row(0.8))
    found = settling(row(0.8), limit)
    assert found is not None
    assert found.times is not None
    assert f"curvature_steps={2 * found.times}" in found.clause
    assert settling(row(0.8 / math.sqrt(found.times)), limit) is None
    assert settling(row(0.8 / math.sqrt(found.times - 1)), limit) is not None or found.times == 2


def test_the_factor_is_what_is_left() -> None:
    found = settling(row(0.8), 0.9 * upper_end(row(0.8)))
    assert found is not None
    assert found.times is not None
    left = spread_of(row(0.8 / math.sqrt(found.times)))
    assert found.factor == pytest.approx(2 ** (1.96 * left), rel=1e-3)


def test_what_drift_and_calibration_leave_open_takes_a_paired_run() -> None:
    found = settling(row(0.5, drift=1.5), 2e-4)
    assert found is not None
    assert found.times is None
    assert "only a paired run settles it" in found.clause
    assert found.factor == pytest.approx(2 ** (1.96 * spread_of(row(0.5 / math.sqrt(MOST_TIMES), drift=1.5))), rel=1e-3)


def test_too_few_steps_ask_for_more() -> None:
    found = settling(row(0.5) | {"confidence": None}, 2e-4)
    assert found is not None
    assert "record 4 steps or more" in found.clause


def test_scales_by_row_that_scored_steps_alone_have_ask_for_more_of_these() -> None:
    """However long the window is, its steps in between have no sketches by row."""
    for cast, name in (("e4m3fn/row", "row"), ("e2m1/block32/e8m0", "block32/e8m0")):
        found = settling(row(0.5) | {"confidence": None, "cast": str(Cast.parse(cast))}, 2e-4)
        assert found is not None
        assert f"finer=['{name}']" in found.clause
        assert "record" not in found.clause
        checked_names([name])


def test_gradient_noise_near_its_limit_asks_for_a_longer_window() -> None:
    """At twice the limit it is not settled, at a hundred times it is, and more confidence narrows it."""
    site = linear()

    def reason(noise: float, confidence: float) -> str:
        rows = [score("up", role, "e4m3fn", 1e-7, confidence=0.9) for role in site.roles]
        rows[2] |= {"noise_ratio": noise, "confidence": confidence}
        plan = plan_from_rows(
            [site],
            rows,
            hardware=hardware_named("h100"),
            tolerance=1e-3,
            max_lost_batch=0.02,
            total_flops=site.flops,
            mean_loss=2.3,
        )
        return next(one.reason for one in plan.assignments if one.role == "grad_output")

    assert "not settled: it may lose" in reason(0.03, 0.9)
    assert "a longer window (steps=) narrows that" in reason(0.03, 0.9)
    assert "not settled" not in reason(2.0, 0.9)
    lower, upper = noise_interval(score("up", "grad_output", "e4m3fn", 0.03, confidence=0.9)) or (0.0, 0.0)
    doubtful = noise_interval(score("up", "grad_output", "e4m3fn", 0.03, confidence=0.3)) or (0.0, 0.0)
    assert doubtful[0] < lower < 0.03 < upper < doubtful[1]
    assert noise_interval(score("up", "input", "e4m3fn", 0.03)) is None
