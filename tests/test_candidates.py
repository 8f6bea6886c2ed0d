"""The columns of a plan's scores are what single rows say, and a menu's measures are what its casts cost."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from advisor.candidates import AS_IT_IS, SlotScores, by_slot
from advisor.castnames import KEEP, parse_cast
from advisor.cost import site_shares
from advisor.errors import InvalidPlan
from advisor.failures import OUTLIER_RATIO, crest_of
from advisor.hardware import hardware_named
from advisor.intervals import interval_of, intervals_of
from advisor.menu import Limits, menus
from advisor.objectives import Task
from advisor.reasons import _by_pressure
from probes.records import GRADIENT, Product, Site
from tests.planned import attention, candidate, linear, score

CASTS = ("e4m3fn", "e5m2", "int8", "bf16", "fp32", "e4m3fn/row", "e4m3fn/none")
ODD = (None, math.nan, math.inf, -1e-6, 0.0, 1e-6, 3e-6)
LIMITS = (Limits(2e-6, 0.02), Limits(0.0, 0.0), Limits(math.inf, 0.02))


def first_layer() -> Site:
    """Nobody needs its gradient: its weight enters no backward product, and its operation cannot follow rows."""
    site = linear("first")
    return Site(**{**vars(site), "op": "bilinear_like", "products": (Product("forward", ("input", "weight"), 100.0),)})


def odd_scores(seed: int) -> tuple[list[Site], list[dict[str, Any]]]:
    draw = random.Random(seed)
    sites, rows = [linear("up"), attention(), first_layer()], []
    for site in sites:
        for role in site.roles:
            for cast in draw.sample(CASTS, draw.randrange(len(CASTS) + 1)):
                row = score(
                    site.name, role, cast, 1e-6, noise_ratio=draw.choice(ODD), rms=draw.choice([None, 0.0, 1e-3])
                )
                if role == GRADIENT:
                    row |= {"systematic_ratio": draw.choice([None, 0.0, 1e-4, 1e-2])}
                else:
                    row |= {"damage": draw.choice(ODD), "confidence": draw.choice([None, 0.0, 0.9])}
                rows.append(row)
    return sites, rows


@pytest.mark.parametrize("seed", range(20))
def test_columns_say_what_single_rows_do(seed: int) -> None:
    sites, rows = odd_scores(seed)
    scores, table = SlotScores(sites, rows), by_slot(sites, rows)
    outliers = scores.first_outlier
    for site, role in [(one, role) for one in sites for role in one.roles]:
        slot = (site.name, role)
        told = [(text, candidate(site, role, parse_cast(text), row)) for text, row in table[slot].items()]
        span = scores.span(slot)
        assert [(scores.texts[place], scores.candidate(place)) for place in span] == told
        kept = [text for text, one in told if one is not None and text != KEEP]
        assert [scores.texts[place] for place in scores.by_slot(scores.is_candidate)[slot]] == kept
        far = [place for place in span if (crest_of(scores.rows[place]) or 0.0) > OUTLIER_RATIO]
        assert outliers.get(slot) == (far[0] if far else None)
    assert intervals_of(scores.rows) == [interval_of(row) for row in scores.rows]
    tensor = scores.candidate(AS_IT_IS)
    assert tensor is not None
    assert (str(tensor.cast), tensor.damage, tensor.noise_ratio, tensor.row) == (KEEP, 0.0, 0.0, None)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("seed", range(6))
def test_scores_are_ranked_by_the_limit_that_they_come_closest_to(seed: int, limits: Limits) -> None:
    scores = SlotScores(*odd_scores(seed))

    def pressure(place: int) -> tuple[float, ...]:
        option, row = scores.candidate(place), scores.rows[place]
        if option is None:
            return (math.inf, math.inf, math.inf)
        ratio = (row.get("systematic_ratio") or 0.0) if row["role"] == GRADIENT else 0.0
        costs = [(option.damage, limits.tolerance), (option.noise_ratio, limits.noise)]
        costs += [(ratio, limits.systematic)] if ratio > limits.systematic else []
        parts = [cost / limit if limit > 0 else math.inf * (cost > 0) if cost > 0 else 0.0 for cost, limit in costs]
        return (max(parts), option.damage, option.noise_ratio)

    ranked = _by_pressure(scores, limits)
    for slot in scores.table:
        span = scores.span(slot)
        assert ranked[span.start : span.stop] == sorted(span, key=lambda place: (pressure(place), scores.texts[place]))


@pytest.mark.parametrize("site", [linear("up"), attention(), linear("up", dtype="bfloat16")])
def test_a_menu_s_measures_are_those_of_its_casts(site: Site) -> None:
    rows = [
        score(site.name, role, cast, 1e-6 * number)
        for number, (role, cast) in enumerate(itertools.product(site.roles, ("e4m3fn", "e5m2", "bf16")), 1)
    ]
    h100 = hardware_named("h100")
    (menu,) = menus(SlotScores([site], rows), h100, Task("time"), whole=True)
    assert len(menu.combinations) == math.prod(menu.shape) == 4 ** len(site.roles)
    for item in range(0, len(menu.combinations), 7):
        picked = menu.picked(item)
        shares = site_shares(site, {role: one.cast for role, one in picked.items()}, h100)
        assert menu.measures["flops_8bit"][item] == pytest.approx(shares.flops_8bit)
        assert menu.measures["flops_16bit"][item] == pytest.approx(shares.flops_16bit)
        assert menu.measures["damage"][item] == pytest.approx(sum(one.damage for one in picked.values()))
        assert menu.measures["noise"][item] == pytest.approx(sum(one.noise_ratio for one in picked.values()))


def test_no_scores_leave_every_tensor_as_it_is() -> None:
    site = linear()
    (menu,) = menus(SlotScores([site], []), hardware_named("h100"))
    assert menu.texts == {role: [KEEP] for role in site.roles}
    assert np.asarray(menu.group.costs).tolist() == [[0.0, 0.0]]


def test_a_row_of_no_slot_is_refused() -> None:
    with pytest.raises(InvalidPlan, match="no slot of the window"):
        SlotScores([linear()], [score("down", "input", "e4m3fn", 1e-6)])
