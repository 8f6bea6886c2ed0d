"""One parameter with two uses: a product's weight whose rows are looked up, or that another product shares.

The use as a table reads single rows as they are; the use in a product needs a scale for all of them. Stored narrow, the
parameter is rounded for both; its gradient is the sum of both uses'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from advisor.castnames import short_cast
from advisor.diagnosis.costs import cost_of
from advisor.diagnosis.findings import THRESHOLDS, Finding, Remedy, either, named, percent
from advisor.diagnosis.outliers import bulk_of, casts_that_keep, scored_step
from advisor.diagnosis.recipes import Recipes
from probes.records import Site, Slot
from probes.window import Window

WEIGHT = "weight"


def tied_parameters(window: Window, recipes: Recipes) -> Iterator[Finding]:
    """Of each product whose weight has another use. Severe where a usual cast writes that weight badly."""
    sharing: dict[str, list[Site]] = defaultdict(list)
    for site in window.sites:
        if site.parameter is not None and WEIGHT in site.roles:
            sharing[site.parameter].append(site)
    for parameter, sites in sharing.items():
        record = window.parameter_record(parameter)
        lookups = () if record is None else record.lookups
        for site in sites:
            others = [f"{path} looks its rows up" for path in lookups]
            others += [f"{other.name} multiplies with it" for other in sites if other is not site]
            owner = parameter.rpartition(".")[0]
            if not others and owner and site.name.split("/")[0] != owner:
                others = [f"it belongs to {owner}"]  # two modules have it, and only one use was met
            if others and (found := _finding(window, site, parameter, others, recipes)) is not None:
                yield found


def _finding(window: Window, site: Site, parameter: str, others: list[str], recipes: Recipes) -> Finding | None:
    slot = Slot(site.name, WEIGHT)
    history = window.history(*slot)
    step = scored_step(history)
    if step is None or not recipes.forward:
        return None
    bulk, cast = min(((bulk_of(history, step, cast), cast) for cast in recipes.forward), key=lambda one: one[0].sqnr_db)
    bites = bulk.sqnr_db <= THRESHOLDS.bulk_sqnr_db
    cost, harmless = cost_of(window, slot, cast)
    name = short_cast(cast)
    does = (
        f"writes its bulk with {bulk.sqnr_db:.0f} dB"
        if bulk.flushed < THRESHOLDS.flushed
        else f"flushes {percent(bulk.flushed)} of its bulk to zero"
    )
    keeping = casts_that_keep(window, slot, step, cast) if bites else (str(cast),)
    shown = tuple(map(named, keeping))
    suits = f" as {either(shown)}" if shown else ""
    return Finding(
        cause="tied_parameter",
        site=site.name,
        role=WEIGHT,
        cast=str(cast),
        severe=bites and (recipes.asked or not harmless),
        numbers={"bulk_sqnr_db": bulk.sqnr_db, "flushed": bulk.flushed, "uses": 1.0 + len(others), **cost},
        sentence=(
            f"{site.name} weight is {parameter}, and {' and '.join(others)}: one tensor with two uses. {name} with one "
            f"scale {does}; stored so, it would be rounded for both uses"
        ),
        remedy=Remedy(
            "cast" if bites else "storage",
            f"keep {parameter} stored as it is and cast only the product's copy{suits}",
            keeping,
        ),
        size=THRESHOLDS.bulk_sqnr_db - bulk.sqnr_db,
    )
