"""Sites that could have more FLOPs in 8 bits but for the limit on what is alike in every batch.

A cast of a gradient over that limit is no candidate (`menu.errs_alike`), so a menu does not show what it would bring.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from advisor.candidates import SlotScores
from advisor.hardware import Hardware
from advisor.menu import SHARE_8BIT, Limits, Menu, menus
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
    scores: SlotScores,
    limits: Limits,
    hardware: Hardware,
    task: Task = SHARE_8BIT,
    *,
    kept: Collection[str] = (),
    native_only: bool = False,
) -> dict[str, ShutOut]:
    """By site name. `options`: the menus of what the limit leaves; `scores`: all of them, also those over the limit."""
    ratio = scores.systematic_ratio
    over: dict[str, list[float]] = {}
    for slot, places in scores.by_slot((ratio > limits.systematic) & (scores.bits <= 8)).items():
        if len(places) and slot[0] not in kept:
            over.setdefault(slot[0], []).extend(ratio[places].tolist())
    sites = {menu.site.name: menu.site for menu in options if menu.site.name in over}

    def opened(ratios: Mapping[str, float]) -> dict[str, Menu]:
        """The menus of these sites with the casts up to a ratio each."""
        most = np.array([ratios.get(site, limits.systematic) for site, _ in scores.table])[scores.slot_of]
        found = menus(
            scores,
            hardware,
            task,
            sites=[sites[name] for name in ratios],
            within=~(ratio > np.maximum(most, limits.systematic)),
            kept=kept,
            native_only=native_only,
        )
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
