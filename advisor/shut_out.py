"""Sites that could have more FLOPs in 8 bits but for the limit on what is alike in every batch.

A cast of a gradient over that limit is no candidate (`menu.errs_alike`), so a menu does not show what it would bring.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from advisor.castnames import parse_cast
from advisor.hardware import Hardware
from advisor.menu import SHARE_8BIT, Limits, Menu, Row, errs_alike, menus
from advisor.objectives import Task

NEARLY = 1e-9  # relative: FLOPs that are equal but for rounding


@dataclass(frozen=True)
class ShutOut:
    """A site's menu with the gradient's casts up to `ratio`, the least `systematic_ratio` that reaches the most FLOPs
    in 8 bits that the site can have without the limit; `flops`: how many more than with it."""

    menu: Menu
    ratio: float
    flops: float


def shut_out(
    options: Sequence[Menu],
    rows: Sequence[Row],
    limits: Limits,
    hardware: Hardware,
    task: Task = SHARE_8BIT,
    *,
    kept: Collection[str] = (),
    native_only: bool = False,
) -> dict[str, ShutOut]:
    """By site name. `options`: the menus of what the limit leaves; `rows`: all scores, also those over the limit."""
    over: dict[str, list[float]] = {}
    for row in rows:
        if row["site"] not in kept and errs_alike(row, limits) and parse_cast(row["cast"]).bits <= 8:
            over.setdefault(row["site"], []).append(row["systematic_ratio"])
    sites = {menu.site.name: menu.site for menu in options if menu.site.name in over}
    of_them = [row for row in rows if row["site"] in sites]

    def opened(ratios: Mapping[str, float]) -> dict[str, Menu]:
        """The menus of these sites with the casts up to a ratio each."""
        within = [
            row
            for row in of_them
            if (most := ratios.get(row["site"])) is not None
            and (not errs_alike(row, limits) or row["systematic_ratio"] <= most)
        ]
        found = menus([sites[name] for name in ratios], within, hardware, task, kept=kept, native_only=native_only)
        return {menu.site.name: menu for menu in found}

    before = {name: menu.most_flops_8bit for name, menu in opened(dict.fromkeys(sites, limits.systematic)).items()}
    found, left = {}, {}
    for name, menu in opened({name: max(over[name]) for name in sites}).items():
        if menu.most_flops_8bit - before[name] > NEARLY * max(menu.site.flops, 1.0):
            left[name] = menu.most_flops_8bit
    while left:
        ratios = {name: min(over[name]) for name in left}
        for name, menu in opened(ratios).items():
            over[name] = [ratio for ratio in over[name] if ratio > ratios[name]]
            if menu.most_flops_8bit >= left[name] * (1 - NEARLY):
                found[name] = ShutOut(menu, ratios[name], left.pop(name) - before[name])
    return found
