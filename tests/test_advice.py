"""From a window to a plan: the right site reacts, the tolerance buys 8-bit share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.advice import _worst
from advisor.errors import CastNotScored, InvalidPlan, UnknownHardware
from advisor.hardware import hardware_named
from probes.errors import InvalidCast, UnknownFormat, WindowError
from probes.probing import probe
from probes.window import Window
from tests.models import convnet, encoder, mlp, train
from tests.planned import score


def window_of(build: Any = mlp, steps: int = 6) -> Window:
    window: Window = train(build, steps, lambda model, optimizer: probe(model, optimizer, steps=steps))[2]
    return window


@pytest.mark.parametrize("build", [mlp, convnet, encoder])
def test_every_slot_is_scored_for_every_cast(build: Any) -> None:
    window = window_of(build)
    assert len(advisor.score(window).rows) == 5 * len(window.slots)
    rows = advisor.score(window, slots=window.product_slots).rows
    assert len(rows) == 5 * len(window.product_slots)
    for row in rows:
        assert 0 <= row["underflow"] <= 1
        assert row["sqnr_db"] > 10
        if row["role"] == "grad_output":
            assert row["damage"] is None
        else:
            assert row["damage"] > 0
            assert 0 < row["damage_se"] < 3 * row["damage"]  # six steps of a new model tell little of its curvature
        if row["noise_ratio"] is not None:
            assert row["lost_batch_share"] == pytest.approx(1 - 1 / (1 + row["noise_ratio"]))
        assert all(type(value) in (str, float, bool, list, dict, type(None)) for value in row.values()), row


def test_a_cast_that_was_no_candidate_is_estimated_from_the_sketches() -> None:
    torch.manual_seed(0)
    casts = ["e4m3fn", "int8", "e5m2"]
    _, _, told = train(mlp, 8, lambda model, optimizer: probe(model, optimizer, steps=8, casts=casts))
    _, _, untold = train(mlp, 8, lambda model, optimizer: probe(model, optimizer, steps=8, casts=["bf16", "int8"]))
    for slot in told.product_slots:
        measured = advisor.score(told, ["e4m3fn"]).of(*slot)[0]
        estimated = advisor.score(untold, ["e4m3fn"]).of(*slot)[0]
        assert estimated["sqnr_db"] == measured["sqnr_db"]
        if slot.role == "grad_output":
            continue
        assert (measured["damage_from"], estimated["damage_from"]) == ("directional", "sketch")
        assert 0.4 < estimated["damage"] / measured["damage"] < 2.5


class Stack(nn.Module):
    """Four linear sites; one input channel of `second` may be multiplied, and its weights divided, by a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)
        self.third, self.last = nn.Linear(64, 64), nn.Linear(64, 10)
        self.register_buffer("scale", torch.ones(64).index_fill(0, torch.tensor([5]), factor))
        with torch.no_grad():
            self.second.weight.div_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.first(x)) * self.scale
        return self.last(F.gelu(self.third(F.gelu(self.second(hidden)))))


def plan_of(factor: float) -> Any:
    torch.manual_seed(0)
    model = Stack(factor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(1)
    with probe(model, optimizer, steps=4) as window:
        while not window.done:
            F.cross_entropy(model(torch.randn(256, 32)), torch.randint(0, 10, (256,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return advisor.recommend(window)


def test_an_outlier_channel_changes_its_site_and_no_other() -> None:
    plain, planted = plan_of(1.0), plan_of(300.0)
    before = {(one.site, one.role): one for one in plain.assignments}
    changed = {(one.site, one.role) for one in planted.assignments if one.cast != before[one.site, one.role].cast}
    assert ("second", "input") in changed
    assert {site for site, _ in changed} == {"second"}
    after = next(one for one in planted.assignments if (one.site, one.role) == ("second", "input"))
    assert after.reason != before["second", "input"].reason
    assert "RMS" in after.reason


def test_a_larger_tolerance_buys_more_8_bit_work() -> None:
    window = window_of(encoder)
    worst = max(row["damage"] or 0 for row in advisor.score(window).rows)
    shares = [
        advisor.recommend(window, tolerance=tolerance, max_lost_batch=0.5).predicted.share_8bit
        for tolerance in (0.0, worst / 50, 10 * worst)
    ]
    assert shares[0] < shares[1] < shares[2]


def test_less_lost_batch_allows_less() -> None:
    window = window_of(encoder)
    plans = [advisor.recommend(window, tolerance=1.0, max_lost_batch=share) for share in (0.0, 0.0005, 0.5)]
    shares = [plan.predicted.share_8bit for plan in plans]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]
    for plan, limit in zip(plans, (0.0, 0.0005, 0.5), strict=True):
        assert plan.predicted.lost_batch_share <= limit * (1 + 1e-9)


def test_the_default_tolerance_is_a_thousandth_of_the_mean_loss() -> None:
    window = window_of()
    mean = math.fsum(window.losses) / len(window.losses)
    plan = advisor.recommend(window)
    assert plan.tolerance == pytest.approx(mean / 1000)
    assert plan.predicted.damage <= plan.tolerance


def test_several_windows_count_with_their_worst() -> None:
    early, late = window_of(steps=4), window_of(steps=8)
    both = advisor.recommend([early, late], tolerance=1.0, max_lost_batch=0.9)
    for one in both.assignments:
        rows = [advisor.score(window, [one.cast]).of(one.site, one.role)[0] for window in (early, late)]
        damages = [row["damage"] for row in rows]
        assert one.damage == (None if None in damages else max(damages))


def test_what_one_measurement_tells_comes_from_one_window() -> None:
    """The window with the most noise tells all of noise, and that with the most alike its error too."""
    row = score("up", "grad_output", "e5m2", 0.01)
    noisy = row | {"noise_ratio": 0.5, "lost_batch_share": 1 / 3, "lost_batch_interval": [0.2, 0.6], "noise_from": "a"}
    late = row | {"lost_batch_interval": [0.005, 0.02], "noise_from": "b"}
    noisy |= {"systematic_ratio": 1e-6, "systematic_ratio_se": 1e-7}
    late |= {"systematic_ratio": 5e-3, "systematic_ratio_se": 4e-3}
    for tables in ([[noisy], [late]], [[late], [noisy]]):
        (found,) = _worst(tables)
        assert (found["noise_ratio"], found["lost_batch_share"], found["noise_from"]) == (0.5, 1 / 3, "a")
        assert found["lost_batch_interval"] == [0.2, 0.6]
        assert (found["systematic_ratio"], found["systematic_ratio_se"]) == (5e-3, 4e-3)
    (found,) = _worst([[late], [noisy | {"noise_ratio": None, "systematic_ratio": None}]])
    assert (found["noise_ratio"], found["noise_from"], found["systematic_ratio"]) == (None, "a", 5e-3)
    (found,) = _worst([[late], [noisy | {"noise_ratio": math.nan, "systematic_ratio": math.nan}]])
    assert math.isnan(found["noise_ratio"])
    assert found["systematic_ratio"] == 5e-3


def test_windows_of_different_models_are_refused() -> None:
    with pytest.raises(WindowError, match="not of one model"):
        advisor.recommend([window_of(mlp), window_of(convnet)])


def test_a_window_without_a_loss_asks_for_a_tolerance() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        model(torch.randn(3, 4)).backward(torch.ones(3, 4))
        optimizer.step()
    with pytest.raises(InvalidPlan, match="give tolerance"):
        advisor.recommend(window)
    plan = advisor.recommend(window, tolerance=0.1)
    assert {one.cast for one in plan.assignments} == {"fp32/none/nearest"}
    assert any("no loss function" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"hardware": "h1000"}, UnknownHardware, "h100"),
        ({"tolerance": -1.0}, InvalidPlan, "tolerance"),
        ({"tolerance": math.nan}, InvalidPlan, "tolerance"),
        ({"max_lost_batch": 1.0}, InvalidPlan, "max_lost_batch"),
        ({"casts": ["fp8"]}, UnknownFormat, "e4m3fn"),
        ({"casts": ["e4m3fn/diagonal"]}, InvalidCast, "diagonal"),
        ({"casts": ["e4m3fn", "e4m3fn/block128x128"]}, CastNotScored, "has a scale for every block128x128"),
        ({"casts": ["e4m3fn/column"]}, InvalidPlan, "a scale for every column"),
        ({"objective": "share_8bits"}, InvalidPlan, "did you mean 'share_8bit'"),
        ({"objective": "damage"}, InvalidPlan, "casts nothing, unless it has a budget"),
        ({"budget": {"share8": 0.5}}, InvalidPlan, "did you mean 'share_8bit'"),
        ({"budget": {"share_8bit": 1.5}}, InvalidPlan, "a share from 0 to 1"),
        ({"budget": {"time_s": -1.0}}, InvalidPlan, "0 or more"),
        ({"budget": {"share_8bit": 1.0}, "tolerance": 0.0}, InvalidPlan, r"share_8bit can be at most 0\b"),
        ({"keep": "last"}, InvalidPlan, "keep names 'last', and no site or module of the window matches"),
        ({"only": ["00"]}, InvalidPlan, "did you mean '0'"),
        ({"first_last": -1}, InvalidPlan, "0 or more"),
        ({"master_weights": "bf17"}, InvalidPlan, "master_weights='bf17'"),
        ({"optimizer_state": "e4m3fn/row"}, InvalidPlan, "no tensor is kept so"),
        ({"casts": ["e8m0"]}, CastNotScored, "e8m0 is a format for scales"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        advisor.recommend(window_of(), **arguments)


@pytest.mark.parametrize(
    ("cast", "says"), [("e4m3fn/row", "a scale for every row"), ("e8m0/none", "without a sign and without zero")]
)
def test_a_window_does_not_measure_what_it_cannot(cast: str, says: str) -> None:
    model = mlp()
    with pytest.raises(WindowError, match=says):
        advisor.probe(model, torch.optim.SGD(model.parameters(), lr=0.1), casts=["e4m3fn", cast])


def test_evidence_of_a_cast_that_cannot_be_scored_is_left_aside() -> None:
    window = window_of(steps=2)
    header = window.header()
    for slot in header["slots"]:
        for kind in ("directional", "directional_se"):
            slot["evidence"][kind]["e4m3fn/row/current/nearest"] = 1.0
    newer = Window.from_parts(header, [window.history(*slot) for slot in window.slots])
    assert advisor.score(newer).rows == advisor.score(window).rows


def test_new_casts_are_measured_scored_and_planned_like_the_usual_ones() -> None:
    casts = ["e4m3fnuz", "e2m1", "int4", "e8m3", "tf32", "e3m4/tensor/delayed", "e4m3fn/tensor/current:pow2/zero"]
    _, _, window = train(mlp, 4, lambda model, optimizer: probe(model, optimizer, steps=4, casts=casts))
    rows = advisor.score(window, [*casts, "fp64", "e3m2/tensor/static=0.1"], slots=window.product_slots).rows
    assert len(rows) == 9 * len(window.product_slots)
    for row in rows:
        measured = row["cast"].split("/")[0] not in ("fp64", "e3m2")
        assert row["damage_from"] == (None if row["role"] == "grad_output" else "directional" if measured else "sketch")
        assert row["sqnr_db"] > 0
    exact = [row for row in rows if row["cast"].startswith("fp64")]
    assert {row["sqnr_db"] for row in exact} == {math.inf}
    plan = advisor.recommend(window, hardware="mi300x", casts=casts, tolerance=1.0, max_lost_batch=0.9)
    assert plan.predicted.share_8bit > 0.5
    assert {one.cast.split("/")[0] for one in plan.assignments} <= {"e4m3fnuz", "fp32"}
    assert "also multiplies" not in str(plan.notes)
    assert "also multiplies" not in str(advisor.recommend(window, hardware="h100").notes)
    assert "mi300x also multiplies e4m3fnuz, e5m2fnuz" in str(advisor.recommend(window, hardware="mi300x").notes)


def test_a_plan_for_old_hardware_uses_its_pairs() -> None:
    plan = advisor.recommend(window_of(), hardware="a100", tolerance=1.0, max_lost_batch=0.9)
    narrow = {one.cast.split("/")[0] for one in plan.assignments} - {"fp32", "bf16", "fp16"}
    assert narrow == {"int8"}


def test_scales_by_row_are_candidates_where_they_are_multiplied() -> None:
    """An H100 multiplies e4m3fn by row, and windows tell of it; an A100 has no 8-bit floats."""
    window = window_of(encoder)
    plans = {
        name: advisor.recommend(window, hardware=name, tolerance=1.0, max_lost_batch=0.9) for name in ("h100", "a100")
    }
    assert plans["h100"].predicted.share_8bit > 0.9  # the products inside fused attention are out of reach
    casts = {name: {one.cast for one in plan.assignments} for name, plan in plans.items()}
    assert not any("row" in cast for cast in casts["a100"])
    named = advisor.recommend(window, tolerance=1.0, max_lost_batch=0.9, casts=["e4m3fn/row"])
    assert {one.cast for one in named.assignments} == {"e4m3fn/row/current/nearest"}
    assert named.predicted.share_8bit == plans["h100"].predicted.share_8bit
    model = encoder()
    with advisor.apply(named, model) as applied:
        model(torch.randn(2, 7, 16)).sum().backward()
    assert {row["how"] for row in applied.report()} == {"emulated"}


def test_a_device_of_ones_own_is_taken_as_it_is() -> None:
    mine = dataclasses.replace(
        hardware_named("h100"), name="mine", pairs=frozenset({("e5m2", "e5m2"), ("fp32", "fp32")})
    )
    plan = advisor.recommend(window_of(), hardware=mine, tolerance=1.0, max_lost_batch=0.9)
    assert plan.hardware == "mine"
    assert plan.predicted.share_8bit == 1
    assert {one.cast.split("/")[0] for one in plan.assignments} == {"e5m2"}


@pytest.mark.parametrize("objective", ["share_8bit", "time", "memory"])
def test_the_same_window_gives_the_same_bytes(objective: Any, tmp_path: Any) -> None:
    window = window_of(encoder)
    demands: dict[str, Any] = {"objective": objective, "first_last": True, "optimizer_state": "auto"}
    for name in ("a", "b"):
        advisor.recommend(window, **demands).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
