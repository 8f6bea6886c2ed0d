"""Intervals hold what they claim where errors are as assumed, and say what they must at the edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import advisor
from advisor import intervals
from advisor.confidence import DAMAGE, loss_octaves, octaves_of
from advisor.intervals import (
    CALIBRATION,
    LEVEL,
    OWN_FLOOR,
    UNKNOWN_WINDOW,
    damage_intervals,
    interval_of,
    interval_of_sum,
    kind_of,
    noise_interval,
    total_interval,
)
from advisor.menu import lost_share
from probes.probing import probe
from probes.records import GRADIENT
from tests.models import mlp, train
from tests.planned import score

DRAWN = 20_000
SIGMAS = 5 * math.sqrt(LEVEL * (1 - LEVEL) / DRAWN)
INPUT, WEIGHT = kind_of("input", "directional", False), kind_of("weight", "directional", False)
FIGURES = {INPUT: CALIBRATION["input", "directional"], WEIGHT: CALIBRATION["weight", "directional"]}


def sure(octaves: float) -> float:
    """The confidence of a window whose σ is so many octaves."""
    return math.erf(1 / (octaves * math.sqrt(2)))


def test_confidence_and_its_octaves_are_inverse() -> None:
    for octaves in (0.25, 0.5, 1.0, 4.0):
        assert octaves_of(sure(octaves)) == pytest.approx(octaves, rel=1e-6)
    assert octaves_of([0.0, 1.0]).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("kind", [INPUT, WEIGHT])
def test_the_interval_holds_its_share(kind: int) -> None:
    """Truth is drawn as the model has it: centre, window, common and own."""
    draw, figures = np.random.default_rng(0), FIGURES[kind]
    off = draw.normal(0, math.hypot(0.7, figures.common, figures.own), DRAWN)
    truth = 3e-5 * figures.ratio * 2.0**off
    ((lower, upper),) = damage_intervals([3e-5], [3e-6], [sure(0.7)], [kind])
    assert abs(float(((lower <= truth) & (truth <= upper)).mean()) - LEVEL) < SIGMAS


def test_the_interval_of_a_sum_holds_its_share_and_is_narrower() -> None:
    """Twenty slots: what they share stays, what is their own shrinks."""
    draw, damage = np.random.default_rng(1), np.geomspace(1e-6, 1e-5, 20)
    kinds, window = np.arange(20) % 2 * (WEIGHT - INPUT) + INPUT, 0.7
    common = np.array([FIGURES[kind].common for kind in kinds.tolist()])
    own = np.array([math.hypot(FIGURES[kind].own, OWN_FLOOR) for kind in kinds.tolist()])
    centre = np.array([FIGURES[kind].ratio for kind in kinds.tolist()])
    shared = draw.normal(size=(DRAWN, 1)) * common + draw.normal(0, math.sqrt(window**2 - OWN_FLOOR**2), (DRAWN, 1))
    alone = draw.normal(size=(DRAWN, 20)) * own - own**2 * math.log(2) / 2  # the mean of such a factor is 1
    truth = (damage * centre * 2.0 ** (shared + alone)).sum(axis=1)
    lower, upper = total_interval(damage, np.zeros(20), np.full(20, sure(window)), kinds)
    assert abs(float(((lower <= truth) & (truth <= upper)).mean()) - LEVEL) < 0.01
    each = damage_intervals(damage, np.zeros(20), np.full(20, sure(window)), kinds)
    assert each[:, 0].sum() < lower < upper < each[:, 1].sum()


def test_arrays_and_rows_agree() -> None:
    rows = [score("up", role, "e4m3fn", cost) for role in ("input", "weight") for cost in (1e-6, 1e-3)]
    rows = [row | {"confidence": 0.6 + 0.1 * place} for place, row in enumerate(rows)]
    ends = damage_intervals(
        *([row[name] for row in rows] for name in ("damage", "damage_se", "confidence")),
        [kind_of(row["role"], row["damage_from"], False) for row in rows],
    )
    assert [interval_of(row) for row in rows] == [tuple(pair) for pair in ends.tolist()]
    assert interval_of_sum(rows[:1]) == pytest.approx(interval_of(rows[0]), rel=0.05)


def test_a_damage_that_may_be_nothing_has_an_upper_bound_alone() -> None:
    row = score("up", "input", "e4m3fn", 1e-6, damage_se=1e-6, confidence=0.8)
    lower, upper = interval_of(row) or (math.nan, math.nan)
    assert lower == 0
    assert upper > 1e-6 + 2e-6
    below = interval_of(row | {"damage": -1e-6})
    assert below is not None
    assert below[0] == 0
    assert 0 < below[1] < upper


@pytest.mark.parametrize("relative", [0.6, 4.0, 1e3, 1e8])
def test_draws_are_added_to_a_damage_that_may_be_nothing_and_no_factor_of_it(relative: float) -> None:
    """An error of many times the damage is in its confidence too; the bound stays in the error's order."""
    draws = DAMAGE.doubt * relative / math.log(2)
    row = score("up", "input", "e4m3fn", 1e-6, damage_se=1e-6 * relative, confidence=sure(math.hypot(draws, 0.7)))
    _, upper = interval_of(row) or (math.nan, math.nan)
    assert 2 * relative < upper / 1e-6 < 1.25 * 2 ** (1.96 * math.hypot(UNKNOWN_WINDOW, 0.6)) * (1 + 3 * relative)
    assert (interval_of_sum([row, row]) or (0.0, math.inf))[1] < 2 * upper


def test_the_upper_end_does_not_fall_where_a_damage_stops_being_told() -> None:
    ends = []
    for relative in (0.49, 0.51):
        draws = DAMAGE.doubt * relative / math.log(2)
        row = score("up", "input", "e4m3fn", 1e-6, damage_se=1e-6 * relative, confidence=sure(math.hypot(draws, 0.7)))
        ends.append((interval_of(row) or (0.0, 0.0))[1])
    assert ends[0] < ends[1] < 1.6 * ends[0]


def test_edges() -> None:
    row = score("up", "input", "e4m3fn", 1e-6, confidence=0.8)
    assert interval_of(row | {"damage": 0.0, "damage_se": 0.0}) == (0.0, 0.0)
    assert interval_of(row | {"damage": None}) is None
    assert interval_of(row | {"damage": math.nan}) is None
    assert interval_of(row | {"confidence": 0.0}) == (0.0, math.inf)
    assert interval_of_sum([row, row | {"damage": None}]) is None
    assert interval_of_sum([]) == (0.0, 0.0)
    assert interval_of_sum([row, row | {"confidence": 0.0}]) == (0.0, math.inf)


def width(row: dict[str, Any]) -> float:
    lower, upper = interval_of(row) or (math.nan, math.nan)
    return math.log2(upper / lower)


def test_less_is_known_with_less_confidence_from_sketches_and_without_steps() -> None:
    row = score("up", "input", "e4m3fn", 1e-6, confidence=0.8)
    assert width(row) < width(row | {"confidence": 0.5})
    assert width(row) < width(row | {"damage_from": "sketch"}) < width(row | {"whole_batch": True})
    unknown = width(row | {"confidence": None})
    assert unknown == pytest.approx(width(row | {"confidence": sure(UNKNOWN_WINDOW)}))


def test_a_loss_that_moves_says_that_damage_will() -> None:
    draw = np.random.default_rng(0)
    steady = loss_octaves((2.0 * 2 ** draw.normal(0, 0.01, 20)).tolist())
    falling = loss_octaves(np.geomspace(2.0, 1.0, 20).tolist())
    jumpy = loss_octaves((2.0 * 2 ** draw.normal(0, 1.0, 20)).tolist())
    assert steady < 0.05
    assert falling == pytest.approx(3 * 0.5, rel=0.1)  # half an octave from half to half, FALLING for one
    assert 0.5 < jumpy < 2.5
    assert loss_octaves([1.0, 2.0]) == loss_octaves([-1.0] * 20) == loss_octaves([math.nan] * 20) == 0


def test_scores_and_plans_have_them() -> None:
    _, _, window = train(mlp, 8, lambda model, optimizer: probe(model, optimizer, steps=8))
    for row in advisor.score(window).rows:
        if row["damage"] is None:
            assert row["damage_interval"] is None
        else:
            lower, upper = row["damage_interval"]
            assert 0 <= lower < upper
            assert upper > row["damage"]
    plan = advisor.recommend(window, tolerance=1.0, max_lost_batch=0.9)
    forward = [one for one in plan.assignments if one.role != "grad_output"]
    assert all(one.damage_interval is not None for one in forward)
    assert all(one.damage_interval is None for one in plan.assignments if one.role == "grad_output")
    assert plan.predicted.damage_interval is not None
    lower, upper = plan.predicted.damage_interval
    assert lower < (plan.predicted.damage or 0) < upper
    uppers = [one.damage_interval[1] for one in forward if one.damage_interval is not None]
    assert upper < math.fsum(uppers)


def test_the_floor_of_the_window_is_shared() -> None:
    assert DAMAGE.floor > OWN_FLOOR


def test_a_gradient_s_lost_batch_has_an_interval() -> None:
    window = train(mlp, 8, lambda model, optimizer: probe(model, optimizer, steps=8, curvature_steps=2))[2]
    rows = advisor.score(window, ["e4m3fn", "e2m1"]).rows
    assert {row["role"] for row in rows if row["lost_batch_interval"] is not None} == {GRADIENT}
    for row in rows:
        if row["role"] == GRADIENT and row["lost_batch_share"] is not None:
            low, high = row["lost_batch_interval"]
            assert 0 <= low < row["lost_batch_share"] < high <= 1
            assert [lost_share(end) for end in noise_interval(row)] == pytest.approx([low, high], rel=1e-12)
            assert row["noise_from"] == ("measured" if row["cast"].startswith("e4m3fn") else "sketch")


def test_noise_that_was_measured_is_surer_than_what_other_casts_tell() -> None:
    ends = intervals.noise_intervals([0.01, 0.01, 0.01, math.nan], [0.9, 0.9, 0.3, 0.9], [True, False, True, True])
    width = np.log2(ends[:, 1] / ends[:, 0])
    assert width[0] < width[1]
    assert width[0] < width[2]
    assert np.isnan(ends[3]).all()
    assert np.allclose(intervals.noise_intervals([0.0], [0.9], [True]), 0.0)
