"""A plan as a whole says what limits it, and planning again with what it names does what it says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from advisor.hardware import hardware_named
from advisor.plan import Plan
from advisor.planner import plan_from_rows
from tests.planned import attention, flops, linear, score, scores


def planned(rows: list[dict[str, Any]], sites: Sequence[Any], tolerance: float = 1e-3, lost: float = 0.02) -> Plan:
    return plan_from_rows(
        sites,
        rows,
        hardware=hardware_named("h100"),
        tolerance=tolerance,
        max_lost_batch=lost,
        total_flops=flops(sites),
        mean_loss=2.3,
    )


def uniform_rows(sites: Sequence[Any], **costs: float) -> list[dict[str, Any]]:
    """e4m3fn and bf16 in every slot; damage by site name, noise 1e-6."""
    rows = []
    for site in sites:
        for role in site.roles:
            damage = costs.get(site.name.split(".")[-1], 1e-6)
            rows.append(score(site.name, role, "e4m3fn", damage, noise_ratio=1e-6, confidence=0.9))
            rows.append(score(site.name, role, "bf16", damage * 1e-4, noise_ratio=1e-10, confidence=0.9))
    return rows


def numbers(pattern: str, plan: Plan) -> list[float]:
    """The numbers of the one sentence that has the pattern."""
    (found,) = [match for told in plan.summary if (match := re.search(pattern, told))]
    return [float(group) for group in found.groups()]


def test_all_in_8_bits() -> None:
    sites = [linear("a"), linear("b")]
    assert planned(uniform_rows(sites), sites).summary[0] == "all matrix FLOPs are in 8 bits"


def test_the_tolerance_holds_back_and_the_one_that_is_named_would_not() -> None:
    sites = [linear("blocks.0.up"), linear("blocks.1.up"), linear("head")]
    rows = uniform_rows(sites, head=4e-4, up=1e-4)
    plan = planned(rows, sites, tolerance=5e-4)
    assert plan.predicted.share_8bit == pytest.approx(2 / 3)
    assert plan.summary[0].startswith("kept from 8 bits: 33% by the tolerance of 5.0e-04")
    assert any(told.startswith("head holds back 33%") and "head input" not in told for told in plan.summary)
    (needed,) = numbers(r"^a tolerance of (\S+) would let all of it in", plan)
    assert planned(rows, sites, tolerance=needed * 1.001).predicted.share_8bit == pytest.approx(1)
    assert planned(rows, sites, tolerance=needed * 0.98).predicted.share_8bit < 1


def test_lost_batch_holds_back_and_the_limit_that_is_named_would_not() -> None:
    sites = [linear("a"), linear("b")]
    rows = [row | {"noise_ratio": (row["noise_ratio"] or 0) * 5e3} for row in uniform_rows(sites)]
    plan = planned(rows, sites, lost=0.02)
    assert "by the limit of 2% on lost batch" in plan.summary[0]
    (needed,) = numbers(r"a limit of (\S+)% on lost batch would let all of it in", plan)
    assert planned(rows, sites, lost=needed / 100 * 1.01).predicted.share_8bit == pytest.approx(1)
    assert planned(rows, sites, lost=needed / 100 * 0.9).predicted.share_8bit < 1


def test_what_the_hardware_does_not_take_is_not_blamed_on_a_limit() -> None:
    site = attention()
    plan = planned([score(site.name, role, "e4m3fn", 1e-9) for role in site.roles], [site])
    assert plan.summary[0].startswith("kept from 8 bits: 50% because no cast of theirs gives h100 a pair of 8 bits")


def test_what_is_alike_in_every_batch_holds_back_and_the_limit_that_is_named_would_not() -> None:
    """Of two casts the less alike is named, and of the FLOPs those that the gradient's products hold."""
    sites = [linear("a"), linear("b")]
    rows = [row | {"systematic_ratio": 1e-5} for row in uniform_rows(sites)]
    for row in rows:
        if (row["site"], row["role"]) == ("a", "grad_output") and row["cast"].startswith("e4m3fn"):
            row["systematic_ratio"] = 3e-3
    rows.append(score("a", "grad_output", "e5m2", 0.0, noise_ratio=1e-5) | {"systematic_ratio": 2e-3})
    plan = planned(rows, sites)
    assert plan.predicted.share_8bit == pytest.approx(2 / 3)
    assert plan.summary[0].startswith("kept from 8 bits: 33% by the limit on what is alike in every batch (")
    assert any(told.startswith("a holds back 33%: ") and "alike" not in told for told in plan.summary)
    (needed,) = numbers(r"^a limit of (\S+)% on lost batch would let all of it in", plan)
    assert numbers(r"under a limit of (\S+)% on lost batch \(max_lost_batch\)", plan) == [needed]
    assert planned(rows, sites, lost=needed / 100).predicted.share_8bit == pytest.approx(1)
    assert planned(rows, sites, lost=needed / 100 * 0.9).predicted.share_8bit < 1


def test_what_is_alike_and_dear_takes_both_limits() -> None:
    sites = [linear("a"), linear("b")]
    rows = uniform_rows(sites, a=1e-4, b=4e-4)
    for row in rows:
        if row["role"] == "grad_output" and row["cast"].startswith("e4m3fn"):
            row["systematic_ratio"] = 2e-3
    plan = planned(rows, sites, tolerance=5e-4)
    told = plan.summary[0]
    assert "by the limit on what is alike in every batch and the tolerance of 5.0e-04" in told
    assert "no cast of theirs" not in told
    tolerance, lost = numbers(r"^a tolerance of (\S+) and a limit of (\S+)% on lost batch would let all of it in", plan)
    assert planned(rows, sites, tolerance * 1.001, lost / 100).predicted.share_8bit == pytest.approx(1)
    assert planned(rows, sites, tolerance * 0.98, lost / 100).predicted.share_8bit < 1
    assert planned(rows, sites, tolerance * 1.001, lost / 100 * 0.9).predicted.share_8bit < 1


def test_errors_that_are_alike_without_bound_have_no_limit() -> None:
    rows = [row | {"systematic_ratio": float("inf")} for row in uniform_rows([linear("a")])]
    told = planned(rows, [linear("a")]).summary
    assert any("may do so under no limit" in one for one in told)
    assert not any("would let all of it in" in one for one in told)


def test_repeated_blocks_are_told_together() -> None:
    sites = [linear(f"blocks.{index}.down") for index in range(4)]
    plan = planned(uniform_rows(sites, down=1e-3), sites, tolerance=1e-5)
    assert any(told.startswith("blocks.0-3.down hold back 100%") for told in plan.summary)


def test_the_front_says_what_more_tolerance_buys() -> None:
    sites = [linear(f"layer.{index}") for index in range(6)]
    plan = planned(scores(sites, seed=5), sites, tolerance=1e-5)
    more = [point for point in plan.front if point.share_8bit > plan.predicted.share_8bit + 1e-9]
    told = [sentence for sentence in plan.summary if "would bring" in sentence]
    assert bool(told) == bool(more)
    assert f"{100 * more[0].share_8bit:.1f}% into 8 bits" in told[0]


def test_a_total_that_may_pass_the_tolerance_is_not_settled() -> None:
    sites = [linear("a")]
    rows = uniform_rows(sites, a=2e-4)
    plan = planned(rows, sites, tolerance=5e-4)
    assert plan.predicted.damage_interval is not None
    assert plan.predicted.damage_interval[1] > 5e-4
    (room,) = numbers(r"does not settle whether.*a tolerance of (\S+) would leave room", plan)
    assert room < 5e-4
    assert not any("does not settle" in told for told in planned(rows, sites, tolerance=1e-1).summary)


def test_below_its_turning_point_a_site_leaves_8_bits() -> None:
    site = linear("up")
    rows = scores([site], seed=3, lowest=-6, highest=-5)
    plan = planned(rows, [site], tolerance=1e-3)
    reason = next(one.reason for one in plan.assignments if one.role == "input")
    found = re.search(r"below a tolerance of (\S+) or a limit of \S+% on lost batch this site would go back", reason)
    assert found is not None, reason
    turning = float(found.group(1))
    assert plan.predicted.share_8bit == pytest.approx(1)
    assert planned(rows, [site], tolerance=turning * 1.06).predicted.share_8bit == pytest.approx(1)
    assert planned(rows, [site], tolerance=turning * 0.94).predicted.share_8bit < 1


def test_an_empty_plan_has_nothing_to_say() -> None:
    assert planned([], []).summary == ()
