"""Master weights and optimizer state are kept in 16 bits only where the window shows that nothing is lost by it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advisor
from advisor.errors import InvalidPlan
from advisor.lost_updates import lost_of
from advisor.storing import MOST_LOST, storage_of
from probes.casts import Cast
from probes.parameter_records import MASTER
from probes.window import Window


def window_of(build: Any, scale: float = 1.0, steps: int = 6) -> Window:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = build(model.parameters())
    with advisor.probe(model, optimizer, steps=steps) as window:
        for _ in range(steps):
            (scale * F.cross_entropy(model(torch.randn(64, 16)), torch.randint(0, 10, (64,)))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


@pytest.fixture(scope="module")
def fast() -> Window:
    """Updates of a tenth of a weight."""
    return window_of(partial(torch.optim.Adam, lr=3e-2))


@pytest.fixture(scope="module")
def slow() -> Window:
    """Updates below half a step of bf16."""
    return window_of(partial(torch.optim.Adam, lr=1e-6))


def test_as_is_is_the_default(fast: Window) -> None:
    found = storage_of([fast])
    assert found.rows == ()
    assert found.notes == ("master weights and optimizer state stay as they are",)
    plan = advisor.recommend(fast)
    assert plan.storage == ()
    assert plan.master_weights == plan.optimizer_state == "fp32"


def test_weights_that_take_their_updates_may_be_narrow(fast: Window) -> None:
    found = storage_of([fast], master_weights="auto")
    assert found.rows
    for row in found.rows:
        assert row.role == MASTER
        cast = Cast.parse(row.cast)
        assert cast.format.bits == 16
        if cast.rounding == "nearest":
            assert lost_of(fast, row.name, [cast])[row.cast] <= MOST_LOST


def test_weights_that_lose_their_updates_stay(slow: Window) -> None:
    assert storage_of([slow], master_weights="auto").rows == ()
    forced = storage_of([slow], master_weights="bf16")
    assert {row.cast for row in forced.rows} == {"bf16/none/nearest"}
    assert len(forced.rows) == 4
    shares = [lost_of(slow, row.name, [Cast.parse("bf16")])[row.cast] for row in forced.rows]
    assert max(shares) > 0.9
    assert any("it loses 1e+02% of its updates" in row.reason or "of its updates" in row.reason for row in forced.rows)


def test_one_window_that_loses_them_is_enough(fast: Window, slow: Window) -> None:
    assert storage_of([fast, slow], master_weights="auto").rows == ()
    assert storage_of([slow, fast], master_weights="auto").rows == ()


def test_state_that_fits_is_kept_in_bf16(fast: Window) -> None:
    found = storage_of([fast], optimizer_state="auto")
    assert found.optimizer_state == "bf16"
    casts = {(row.role, row.cast) for row in found.rows}
    assert casts == {("exp_avg", "bf16/none/nearest"), ("exp_avg_sq", "bf16/none/stochastic")}
    assert all("epsilon 1e-08 stays" in row.reason for row in found.rows)


def test_epsilon_that_vanishes_is_told(fast: Window) -> None:
    """1e-8 is zero in fp16: asked for it is done and said, by itself it is never chosen."""
    found = storage_of([fast], optimizer_state="fp16")
    assert all("epsilon 1e-08 vanishes" in row.reason for row in found.rows)
    none = window_of(partial(torch.optim.Adam, lr=1e-3, eps=1e-42))
    assert storage_of([none], optimizer_state="auto").rows == ()


def test_memory_counts_what_is_stored(fast: Window) -> None:
    plain = advisor.recommend(fast, tolerance=0.0)
    small = advisor.recommend(fast, tolerance=0.0, master_weights="bf16", optimizer_state="bf16")
    elements = sum(record.elements for record in fast.parameter_records)
    assert plain.predicted.memory_bytes - small.predicted.memory_bytes == pytest.approx(elements * 3 * 2, abs=4)
    assert small.predicted.memory_bytes_before == plain.predicted.memory_bytes_before
    assert small.master_weights == small.optimizer_state == "bf16"
    assert advisor.Plan.from_dict(small.to_dict()) == small
    budget = small.predicted.memory_bytes
    with pytest.raises(InvalidPlan, match="memory_bytes can be at least"):
        advisor.recommend(fast, tolerance=0.0, budget={"memory_bytes": budget})
    kept = advisor.recommend(
        fast, tolerance=0.0, budget={"memory_bytes": budget}, master_weights="bf16", optimizer_state="bf16"
    )
    assert kept.predicted.memory_bytes <= budget


def test_a_plan_with_stored_tensors_can_be_carried_out(fast: Window) -> None:
    plan = advisor.recommend(fast, master_weights="bf16", optimizer_state="auto")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with advisor.apply(plan, model, optimizer):
        F.cross_entropy(model(torch.randn(8, 16)), torch.randint(0, 10, (8,))).backward()
        optimizer.step()
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())
        assert torch.equal(optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"].bfloat16())
