"""Plans for time, memory, 8-bit share and least damage: equal to enumeration, within their budgets."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from advisor.candidates import by_slot
from advisor.castnames import KEEP, parse_cast
from advisor.cost import memory, shares, time_s
from advisor.device import Hardware
from advisor.errors import InvalidPlan
from advisor.hardware import hardware_named
from advisor.objectives import Budget, Task
from advisor.plan import Plan
from advisor.planner import plan_from_rows
from probes.records import Site
from tests.planned import CASTS, candidate, flops, linear, scores

H100 = hardware_named("h100")
LOST = 0.02


def large(seed: int, count: int = 3) -> tuple[list[Site], list[dict[str, Any]]]:
    """Sites so large that casting some of them saves time, two casts a role."""
    draw = random.Random(seed)
    sizes = [256, 1024, 4096, 8192]
    sites = [
        linear(f"layer.{place}", draw.choice(sizes), draw.choice(sizes), batch=draw.choice(sizes))
        for place in range(count)
    ]
    kept = {(site.name, role): draw.sample(CASTS, 2) for site in sites for role in site.roles}
    kept |= {("layer.0", role): ["e4m3fn", "bf16"] for role in sites[0].roles}
    return sites, [row for row in scores(sites, seed, -6, -3) if row["cast"] in kept[row["site"], row["role"]]]


def planned(
    sites: Sequence[Site], rows: list[dict[str, Any]], task: Task, tolerance: float | None, **options: Any
) -> Plan:
    given: dict[str, Any] = {"hardware": H100, "max_lost_batch": LOST, "total_flops": flops(sites), "mean_loss": 2.0}
    return plan_from_rows(sites, rows, tolerance=tolerance, task=task, **(given | options))


def every_plan(sites: Sequence[Site], rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Measures of every plan, site by site joined, by looking at every combination."""
    found: list[dict[str, float]] = [{"share_8bit": 0.0, "time_s": 0.0, "memory": 0.0, "damage": 0.0, "noise": 0.0}]
    table = by_slot(sites, rows)
    for site in sites:
        options = [
            [(parse_cast(KEEP), 0.0, 0.0)]
            + [
                (one.cast, one.damage, one.noise_ratio)
                for text, row in table[site.name, role].items()
                if (one := candidate(site, role, parse_cast(text), row)) is not None
            ]
            for role in site.roles
        ]
        of_site = []
        for picked in itertools.product(*options):
            casts = {(site.name, role): one[0] for role, one in zip(site.roles, picked, strict=True)}
            of_site.append(
                {
                    "share_8bit": shares([site], casts, H100).flops_8bit / flops(sites),
                    "time_s": time_s([site], casts, H100),
                    "memory": float(memory([site], casts).total_bytes),
                    "damage": math.fsum(one[1] for one in picked),
                    "noise": math.fsum(one[2] for one in picked),
                }
            )
        found = [{name: one[name] + other[name] for name in one} for one in found for other in of_site]
    return found


def value(plan: Plan, objective: str) -> float:
    told = plan.predicted
    known = {"share_8bit": told.share_8bit, "time_s": told.time_s, "memory": told.memory_bytes, "damage": told.damage}
    found = known[objective]
    assert found is not None
    return float(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", ["share_8bit", "time", "memory"])
def test_the_best_within_the_tolerance(objective: Any, seed: int) -> None:
    sites, rows = large(seed)
    tolerance = 10 ** random.Random(seed).uniform(-5, -3)
    plan = planned(sites, rows, Task(objective), tolerance)
    kept = [one for one in every_plan(sites, rows) if one["damage"] <= tolerance and one["noise"] <= LOST / (1 - LOST)]
    name = {"time": "time_s"}.get(objective, objective)
    best = max(one[name] for one in kept) if name == "share_8bit" else min(one[name] for one in kept)
    assert value(plan, name) == pytest.approx(best, rel=1e-6)
    assert plan.predicted.optimal
    assert plan.objective == objective


@pytest.mark.parametrize("seed", range(4))
def test_the_least_damage_within_a_budget(seed: int) -> None:
    sites, rows = large(seed)
    every = [one for one in every_plan(sites, rows) if one["noise"] <= LOST / (1 - LOST)]
    for name, reach in (("share_8bit", 0.7), ("time_s", 0.5), ("memory", 0.5)):
        low, high = min(one[name] for one in every), max(one[name] for one in every)
        asked = low + reach * (high - low)
        budget = Budget(**{{"memory": "memory_bytes"}.get(name, name): asked})
        plan = planned(sites, rows, Task("damage", budget), None)
        good = [one for one in every if (one[name] >= asked if name == "share_8bit" else one[name] <= asked)]
        assert value(plan, "damage") == pytest.approx(min(one["damage"] for one in good), rel=1e-6, abs=1e-15)
        reached = value(plan, name)
        assert reached >= asked * (1 - 1e-9) if name == "share_8bit" else reached <= asked
        assert plan.tolerance is None
        assert plan.constraints[0].startswith("budget: at ")


def test_a_plan_gives_back_what_it_was_asked_for() -> None:
    """The 8-bit share of one plan as the budget of the next: reached, at no more damage."""
    sites, rows = large(7)
    first = planned(sites, rows, Task(), 1e-4)
    again = planned(sites, rows, Task("damage", Budget(share_8bit=first.predicted.share_8bit)), None)
    assert again.predicted.share_8bit >= first.predicted.share_8bit * (1 - 1e-9)
    assert again.predicted.damage is not None
    assert first.predicted.damage is not None
    assert again.predicted.damage <= first.predicted.damage * (1 + 1e-9)


def test_small_products_are_left_alone_for_time() -> None:
    """Casting a product of microseconds takes longer than it saves; for the 8-bit share it counts all the same."""
    sites = [linear("small", 64, 64, batch=64), linear("large", 8192, 8192, batch=8192)]
    rows = scores(sites, seed=0, lowest=-9, highest=-8)
    fast = planned(sites, rows, Task("time"), 1.0)
    assert {one.cast for one in fast.assignments if one.site == "small"} == {KEEP}
    assert any(parse_cast(one.cast).bits == 8 for one in fast.assignments if one.site == "large")
    assert fast.predicted.speedup is not None
    assert fast.predicted.speedup > 1.2
    narrow = planned(sites, rows, Task(), 1.0)
    assert narrow.predicted.share_8bit == 1
    assert narrow.predicted.time_s is not None
    assert fast.predicted.time_s is not None
    assert fast.predicted.time_s < narrow.predicted.time_s


def test_a_budget_beyond_reach_says_what_can_be_had() -> None:
    sites, rows = large(1)
    with pytest.raises(InvalidPlan, match=r"share_8bit can be at most 0\.\d+\. Ask for less"):
        planned(sites, rows, Task("share_8bit", Budget(share_8bit=1.0)), 1e-4)
    with pytest.raises(InvalidPlan, match=r"memory_bytes can be at least \d"):
        planned(sites, rows, Task("damage", Budget(memory_bytes=1.0)), None)
    with pytest.raises(InvalidPlan, match=r"time_s can be at least \d"):
        planned(sites, rows, Task("share_8bit", Budget(time_s=1e-9)), 1e-4)


def test_time_needs_a_device_with_rates() -> None:
    bare = Hardware(name="mine", title="Mine", pairs=H100.pairs, memory_bytes=10**9, source="none")
    sites, rows = large(2)
    with pytest.raises(InvalidPlan, match="no time can be predicted for mine"):
        planned(sites, rows, Task("time"), 1e-4, hardware=bare)
    plan = planned(sites, rows, Task(), 1e-4, hardware=bare)
    assert plan.predicted.speedup is None
    assert plan.hardware == "mine"


@pytest.mark.parametrize("objective", ["time", "memory"])
def test_the_front_is_of_the_objective(objective: Any) -> None:
    sites, rows = large(3)
    front = planned(sites, rows, Task(objective), 1e-4).front
    values = [point.time_s if objective == "time" else point.memory_bytes for point in front]
    assert None not in values
    assert values == sorted(values, key=lambda found: -(found or 0))
    assert len(values) > 2
