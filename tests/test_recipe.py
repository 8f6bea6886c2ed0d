"""The same recipe at every site: exactly the roles named, and its cost from the window's own scores."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advisor
from advisor.castnames import KEEP
from advisor.errors import CastNotScored, InvalidPlan, UnknownHardware
from probes.errors import UnknownFormat
from probes.window import Window


@pytest.fixture(scope="module")
def window() -> Window:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with advisor.probe(model, optimizer, steps=3) as opened:
        for _ in range(3):
            F.cross_entropy(model(torch.randn(32, 8)), torch.randint(4, (32,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return opened


def test_only_the_roles_named_are_cast(window: Window) -> None:
    plan = advisor.uniform(window, input="int8/none", grad_output="e5m2/none")
    assert plan.kind == "uniform"
    assert {(one.role, one.cast) for one in plan.assignments} == {
        ("input", "int8/none/nearest"),
        ("weight", KEEP),
        ("grad_output", "e5m2/none/nearest"),
    }
    assert plan.predicted.share_8bit == 0
    assert plan.tolerance is None
    reasons = {one.role: one.reason for one in plan.assignments}
    assert reasons["weight"] == "left as it is: the recipe does not name this role."
    assert reasons["input"].startswith("int8/none/nearest as asked for every input: ")


def test_its_cost_is_the_sum_of_the_scores(window: Window) -> None:
    plan = advisor.uniform(window, input="e4m3fn", weight=advisor.Cast.parse("e4m3fn"), grad_output="e5m2")
    rows = advisor.score(window, casts=["e4m3fn", "e5m2"], slots=window.product_slots).rows
    chosen = [row for row in rows if row["cast"].startswith("e5m2") == (row["role"] == "grad_output")]
    damages = [row["damage"] for row in chosen if row["role"] != "grad_output"]
    assert plan.predicted.damage == pytest.approx(math.fsum(damages))
    assert plan.predicted.damage > 0
    # The first layer's weight enters no gradient: nobody needs that of the data.
    noises = [row["noise_ratio"] for row in chosen if (row["site"], row["role"]) != ("0", "weight")]
    assert plan.predicted.noise_ratio == pytest.approx(math.fsum(noises))
    assert plan.predicted.share_8bit == 1
    assert advisor.uniform(window, hardware="a100", input="e4m3fn", weight="e4m3fn").predicted.share_8bit == 0


def test_keeping_everything_costs_nothing(window: Window) -> None:
    predicted = advisor.uniform(window, input="fp32").predicted
    assert (predicted.damage, predicted.noise_ratio, predicted.share_8bit) == (0, 0, 0)
    assert predicted.memory_bytes == predicted.memory_bytes_before


def test_an_unknown_role_is_named(window: Window) -> None:
    with pytest.raises(InvalidPlan, match=r"role 'inputs': did you mean 'input'\? Its roles: grad_output, input"):
        advisor.uniform(window, inputs="int8")


def test_no_role_is_refused(window: Window) -> None:
    with pytest.raises(InvalidPlan, match="at least one role"):
        advisor.uniform(window)


def test_a_recipe_may_have_any_scale_of_a_whole_tensor(window: Window) -> None:
    plan = advisor.uniform(window, input="e4m3fn/tensor/delayed", weight="int8/tensor/static=0.01/zero")
    assert {one.cast for one in plan.assignments if one.role == "input"} == {
        "e4m3fn/tensor/delayed(len=16,margin=0)/nearest"
    }
    assert all(one.sqnr_db is not None and one.sqnr_db > 5 for one in plan.assignments if one.role == "input")
    assert advisor.Plan.from_dict(plan.to_dict()) == plan


def test_a_recipe_may_have_scales_by_block_that_the_window_was_opened_for(window: Window) -> None:
    plan = advisor.uniform(window, input="e4m3fn/block32", weight="e4m3fn/block32", grad_output="e4m3fn/row")
    assert all(one.sqnr_db is not None and one.sqnr_db > 20 for one in plan.assignments)
    assert advisor.Plan.from_dict(plan.to_dict()) == plan
    with pytest.raises(CastNotScored, match="block16"):
        advisor.uniform(window, input="e2m1/block16")
    with pytest.raises(InvalidPlan, match="a scale for every column"):
        advisor.uniform(window, input="e4m3fn/column")


def test_other_wrong_names_are_refused(window: Window) -> None:
    with pytest.raises(UnknownFormat):
        advisor.uniform(window, input="int9")
    with pytest.raises(UnknownHardware):
        advisor.uniform(window, hardware="h1000", input="int8")
