"""What users demand of a plan: sites that stay, one cast a role, native kernels alone."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from advisor.candidates import by_slot
from advisor.castnames import KEEP, parse_cast
from advisor.cost import native_refusal, operand, product_shapes, shares
from advisor.errors import InvalidPlan
from advisor.hardware import hardware_named
from advisor.objectives import Budget, Task
from advisor.plan import Plan
from advisor.planner import plan_from_rows
from advisor.restrictions import Restrictions
from probes.records import Site
from tests.planned import attention, candidate, flops, linear, score, scores

H100 = hardware_named("h100")


def planned(
    sites: Sequence[Site],
    rows: list[dict[str, Any]],
    tolerance: float | None,
    restrictions: Restrictions,
    **options: Any,
) -> Plan:
    given: dict[str, Any] = {"hardware": H100, "max_lost_batch": 0.02, "total_flops": flops(sites), "mean_loss": 2.0}
    return plan_from_rows(sites, rows, tolerance=tolerance, restrictions=restrictions, **(given | options))


def cast_sites(plan: Plan) -> set[str]:
    return {one.site for one in plan.assignments if one.cast != KEEP}


BLOCKS = [linear(name) for name in ("stem", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head")]
NAMES = {site.name for site in BLOCKS}


@pytest.mark.parametrize(
    ("restrictions", "touched"),
    [
        (Restrictions(keep=("head",)), NAMES - {"head"}),
        (Restrictions(keep=("blocks.0", "stem")), {"blocks.1.up", "blocks.1.down", "head"}),
        (Restrictions(keep=("blocks.*.up",)), NAMES - {"blocks.0.up", "blocks.1.up"}),
        (Restrictions(only=("blocks",)), NAMES - {"stem", "head"}),
        (Restrictions(only=("blocks",), keep=("*.down",)), {"blocks.0.up", "blocks.1.up"}),
        (Restrictions(first_last=1), NAMES - {"stem", "head"}),
        (Restrictions(first_last=2), {"blocks.0.down", "blocks.1.up"}),
    ],
)
def test_sites_that_stay(restrictions: Restrictions, touched: set[str]) -> None:
    plan = planned(BLOCKS, scores(BLOCKS, seed=1, lowest=-9, highest=-8), 1.0, restrictions)
    assert cast_sites(plan) == touched
    assert plan.constraints
    for one in plan.assignments:
        if one.site not in touched:
            assert one.reason.startswith("stays fp32: ")


@pytest.mark.parametrize(
    ("glob", "says"),
    [("blocks.0.upp", "did you mean 'blocks.0.up'"), ("tail", "Sites: stem, blocks.0.up"), ("blocks.7", "blocks.")],
)
def test_a_glob_that_matches_nothing_is_refused(glob: str, says: str) -> None:
    for restrictions in (Restrictions(keep=(glob,)), Restrictions(only=(glob,))):
        with pytest.raises(InvalidPlan, match=says):
            planned(BLOCKS, [], 1.0, restrictions)


def uniform_by_enumeration(sites: Sequence[Site], rows: list[dict[str, Any]], tolerance: float) -> float:
    """8-bit FLOPs of the best recipe with the best set of sites, by looking at all of both."""
    return max(flops for flops, damage, _ in uniform_plans(sites, rows) if damage <= tolerance)


def uniform_plans(sites: Sequence[Site], rows: list[dict[str, Any]]) -> Iterator[list[float]]:
    """8-bit FLOPs, damage and noise of every recipe with every set of sites, within the limit on noise."""
    table = by_slot(sites, rows)
    roles = sorted({role for site in sites for role in site.roles})
    casts = {
        role: [KEEP, *sorted({text for site in sites if role in site.roles for text in table[site.name, role]})]
        for role in roles
    }
    for picked in itertools.product(*(casts[role] for role in roles)):
        recipe = dict(zip(roles, picked, strict=True))
        items = []
        for site in sites:
            options = [
                candidate(site, role, parse_cast(recipe[role]), table[site.name, role].get(recipe[role], {}))
                for role in site.roles
                if recipe[role] != KEEP
            ]
            if any(option is None for option in options):
                continue
            chosen = {(site.name, role): parse_cast(recipe[role]) for role in site.roles}
            known = [option for option in options if option is not None]
            items.append(
                (
                    shares([site], chosen, H100).flops_8bit,
                    math.fsum(option.damage for option in known),
                    math.fsum(option.noise_ratio for option in known),
                )
            )
        for taken in itertools.product((0, 1), repeat=len(items)):
            sums = [math.fsum(item[k] for item, take in zip(items, taken, strict=True) if take) for k in range(3)]
            if sums[2] <= 0.02 / 0.98:
                yield sums


@pytest.mark.parametrize("seed", range(8))
def test_one_cast_a_role_equals_enumeration(seed: int) -> None:
    draw = random.Random(seed)
    sites = [linear(f"layer.{place}", inputs=draw.choice([32, 64, 96])) for place in range(6)]
    rows = [row for row in scores(sites, seed, -6, -3) if row["cast"] in ("e4m3fn", "e5m2", "int8")]
    tolerance = 10 ** draw.uniform(-5, -2.5)
    plan = planned(sites, rows, tolerance, Restrictions(uniform_roles=True))
    for role in sites[0].roles:
        assert len({one.cast for one in plan.assignments if one.role == role} - {KEEP}) <= 1
    assert plan.predicted.share_8bit * flops(sites) == pytest.approx(uniform_by_enumeration(sites, rows, tolerance))
    assert plan.predicted.optimal
    assert plan.predicted.damage is not None
    assert plan.predicted.damage <= tolerance
    free = planned(sites, rows, tolerance, Restrictions())
    assert plan.predicted.share_8bit <= free.predicted.share_8bit


def test_one_cast_a_role_is_none_that_errs_alike() -> None:
    """Of two casts of one format the better costs less, but may not be taken: the other is tried."""
    site = linear()
    rows = [score("up", role, "e4m3fn", 1e-6) for role in site.roles]
    rows[2] |= {"systematic_ratio": 2e-3, "systematic_ratio_se": 1e-4}
    rows.append(score("up", "grad_output", "e4m3fn/tensor/current:pow2", 2e-6))
    plan = planned([site], rows, 1e-3, Restrictions(uniform_roles=True))
    assert plan.predicted.share_8bit == 1


@pytest.mark.parametrize("seed", range(3))
def test_one_cast_a_role_at_sites_of_two_kinds(seed: int) -> None:
    """A linear layer and fused attention share the gradient's role alone."""
    sites = [linear("up"), attention("a/sdpa.0"), linear("down"), attention("b/sdpa.0")]
    rows = [row for row in scores(sites, seed, -6, -3) if row["cast"] in ("e4m3fn", "e5m2")]
    tolerance = 3e-4
    plan = planned(sites, rows, tolerance, Restrictions(uniform_roles=True))
    for role in {role for site in sites for role in site.roles}:
        assert len({one.cast for one in plan.assignments if one.role == role} - {KEEP}) <= 1
    assert plan.predicted.share_8bit * flops(sites) == pytest.approx(uniform_by_enumeration(sites, rows, tolerance))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_one_cast_a_role_within_a_budget(share: float, seed: int) -> None:
    sites = [linear(f"layer.{place}", inputs=32 * (1 + place % 3)) for place in range(4)]
    rows = [row for row in scores(sites, seed, -6, -3) if row["cast"] in ("e4m3fn", "e5m2")]
    plan = planned(sites, rows, None, Restrictions(uniform_roles=True), task=Task("damage", Budget(share_8bit=share)))
    assert plan.predicted.share_8bit >= share - 1e-9
    wanted = share * flops(sites) * (1 - 1e-9)
    least = min(damage for narrow, damage, _ in uniform_plans(sites, rows) if narrow >= wanted)
    assert plan.predicted.damage == pytest.approx(least, rel=1e-6)


def test_native_only_takes_whole_sites_that_kernels_run() -> None:
    sites = [linear("up"), linear("odd", inputs=30), attention("attn/sdpa.0")]
    rows = [score(site.name, role, cast, 1e-9) for site in sites for role in site.roles for cast in ("e4m3fn", "e5m2")]
    plan = planned(sites, rows, 1.0, Restrictions(native_only=True))
    assert cast_sites(plan) == {"up"}
    (site, *_) = sites
    for shape in product_shapes(site):
        left, right = (operand(site, role, plan.cast("up", role)) for role in shape.product.operands)
        assert (left.bits, right.bits) == (8, 8)
        assert native_refusal(shape, left, right, H100) is None
    assert cast_sites(planned(sites, rows, 1.0, Restrictions())) == {"up", "odd", "attn/sdpa.0"}


def test_native_only_never_casts_half_a_site() -> None:
    """Without a cast for the gradient two of three products would want the others as they were."""
    site = linear("up")
    rows = [score("up", role, "e4m3fn", 1e-9) for role in ("input", "weight")]
    assert cast_sites(planned([site], rows, 1.0, Restrictions(native_only=True))) == set()
    assert cast_sites(planned([site], rows, 1.0, Restrictions())) == {"up"}


def test_rows_of_scales_count_where_the_hardware_takes_them() -> None:
    site = linear("up")
    rows = [score("up", role, "e4m3fn/row", 1e-9) for role in site.roles]
    assert planned([site], rows, 1.0, Restrictions()).predicted.share_8bit == 1
    assert planned([site], rows, 1.0, Restrictions(), hardware=hardware_named("a100")).predicted.share_8bit == 0
    mixed = [row | {"cast": "e4m3fn"} if row["role"] == "weight" else row for row in rows]
    assert planned([site], mixed, 1.0, Restrictions()).predicted.share_8bit == 1, "a tensor's scale is one for all rows"
