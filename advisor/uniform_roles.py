"""One cast a role at every site that is cast: which recipe, and which sites take part in it.

Most kernels are chosen for a whole model and not layer by layer. A site takes the recipe in all its roles or stays as
it is, so with the recipe given the sites are a knapsack of two items each, which is solved as ever.

Which recipes are worth solving is told by prices on the limits. At given prices a recipe's worth is the sum of what
each site gains by it after paying, and where that is less than nothing the site stays as it is; worth and the price of
the limits together are a bound of what any choice of sites can reach with the recipe. The prices are those that make
the best recipe's bound lowest. Recipes are solved in the order of their bounds, until the next one's is no better than
what was found: that is the best of all. Kinds of sites that share no role but the gradient's are looked at one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from advisor.candidates import Candidate, SlotScores
from advisor.castnames import KEEP, parse_cast
from advisor.knapsack import Choice, Group, solve
from advisor.menu import Limits, Menu
from probes.records import GRADIENT

Array = NDArray[np.float64]
Recipe = dict[str, str]  # role → canonical cast

# All ours. Casts that are tried for a role; recipes of a kind of sites that go into joint ones; joint ones solved.
MOST_CASTS = 6
MOST_OF_A_KIND = 24
MOST_SOLVED = 24
MOST_PLANES = 40
HIGHEST_PRICE = 1e6


@dataclass(frozen=True)
class Uniform:
    """The casts of each menu's roles, in their order, and the choice that they come from."""

    picked: tuple[dict[str, Candidate], ...]
    choice: Choice


def tried_casts(scores: SlotScores, limits: Limits) -> dict[str, set[str]]:
    """The casts that are worth trying for each role: of each format the one that most sites can have, at the least
    cost in all; of many formats the narrowest."""
    scale = [limit if 0 < limit < math.inf else 1.0 for limit in (limits.tolerance, limits.noise)]
    harm: dict[str, dict[str, list[float]]] = {role: {} for site in scores.sites for role in site.roles}
    costs = scores.damage / scale[0] + scores.noise / scale[1]
    can_be = scores.is_candidate & ~(scores.systematic_ratio > limits.systematic)
    for (_, role), places in scores.by_slot(can_be).items():
        for place, cost in zip(places.tolist(), costs[places].tolist(), strict=True):
            harm[role].setdefault(scores.texts[place], []).append(cost)
    chosen = {}
    for role, casts in harm.items():
        formats: dict[str, str] = {}
        for text in sorted(casts, key=lambda text: (-len(casts[text]), math.fsum(casts[text]), text)):
            formats.setdefault(text.split("/")[0], text)
        order = sorted(
            formats.values(),
            key=lambda text: (parse_cast(text).bits, -len(casts[text]), math.fsum(casts[text]), text),
        )
        chosen[role] = set(order[:MOST_CASTS])
    return chosen


def uniform_choice(options: Sequence[Menu], limits: Sequence[float]) -> Uniform | None:
    """The best recipe and the sites that take it, or None where none that was tried keeps the limits.

    `options`: menus that leave out no combination (`Menu(..., whole=True)`); `limits`: one number for each cost of
    their groups. The same menus and limits give the same answer.
    """
    if not options:
        return Uniform((), Choice((), (), tuple(0.0 for _ in limits), ()))
    casts = _texts(options)
    sites = [_Sites(part, casts, limits) for part in _apart(options)]
    stay = np.sum([menu.group.costs[0] for menu in options], axis=0)
    rest = np.where(np.isfinite(limits), np.asarray(limits) - stay, 0.0)
    base = math.fsum(menu.group.gains[0, 0] for menu in options)
    prices = _prices(sites, rest, casts.get(GRADIENT, [KEEP]))
    joint = _joint(sites, prices, casts.get(GRADIENT, [KEEP]))
    best: Uniform | None = None
    solved = 0
    for worth, recipe in joint:
        bound = base + worth + float(prices @ rest)
        slack = 1e-12 * (abs(bound) + abs(base))
        if best is not None and bound <= best.choice.gains[0] + slack and solved > 1:
            return best
        if solved == MOST_SOLVED:
            return best and _unproven(best, bound)
        items = [[0, *_items(menu, [recipe])[1].tolist()] for menu in options]
        if not _may_keep(options, items, limits):
            continue
        solved += 1
        found = _solved(options, items, limits)
        if found is not None and (best is None or found.choice.gains > best.choice.gains):
            best = found
    return best


def _may_keep(options: Sequence[Menu], items: Sequence[Sequence[int]], limits: Sequence[float]) -> bool:
    """Whether every limit by itself could be kept: a budget for a share may want more than a recipe can bring."""
    least = [menu.group.costs[index].min(axis=0) for menu, index in zip(options, items, strict=True)]
    return bool((np.sum(least, axis=0) <= np.asarray(limits)).all())


def _unproven(found: Uniform, bound: float) -> Uniform:
    choice = found.choice
    gap = max(0.0, bound - choice.gains[0])
    return replace(found, choice=replace(choice, proven=(False,) * len(choice.proven), gap=gap))


def _solved(options: Sequence[Menu], items: Sequence[list[int]], limits: Sequence[float]) -> Uniform | None:
    """The sites that take a recipe, of which `items` has the place in each menu beside the one that stays."""
    groups = [
        Group(menu.group.gains[index], menu.group.costs[index]) for menu, index in zip(options, items, strict=True)
    ]
    choice = solve(groups, limits)
    if choice is None:
        return None
    taken = [index[item] for index, item in zip(items, choice.items, strict=True)]
    return Uniform(tuple(menu.picked(item) for menu, item in zip(options, taken, strict=True)), choice)


def _items(menu: Menu, recipes: Sequence[Recipe]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The places of the recipes that a site can take, and of their combinations in its menu."""
    whole = np.zeros(len(recipes), dtype=np.intp)
    can = np.ones(len(recipes), dtype=bool)
    for role, size in zip(menu.site.roles, menu.shape, strict=True):
        place = {text: at for at, text in enumerate(menu.texts[role])}
        at = np.array([place.get(recipe[role], -1) for recipe in recipes], dtype=np.intp)
        can &= at >= 0
        whole = whole * size + at
    items = np.searchsorted(menu.combinations, whole).clip(max=len(menu.combinations) - 1)
    can &= (menu.combinations[items] == whole) & (items > 0)
    return np.flatnonzero(can), items[can]


class _Sites:
    """Sites that share roles: what each would gain and spend by each recipe of theirs, beyond staying as it is."""

    def __init__(self, options: Sequence[Menu], casts: Mapping[str, Sequence[str]], limits: Sequence[float]) -> None:
        roles = sorted({role for menu in options for role in menu.site.roles} - {GRADIENT})
        self.recipes: dict[str, list[Recipe]] = {}
        self._gain: dict[str, Array] = {}
        self._cost: dict[str, Array] = {}
        bounded = np.isfinite(limits)
        for gradient in casts.get(GRADIENT, [KEEP]):
            self.recipes[gradient] = [
                {**dict(zip(roles, picked, strict=True)), GRADIENT: gradient}
                for picked in itertools.product(*(casts[role] for role in roles))
            ]
            gains = np.zeros((len(self.recipes[gradient]), len(options)))
            costs = np.zeros((len(limits), *gains.shape))
            for column, menu in enumerate(options):
                can, items = _items(menu, self.recipes[gradient])
                gains[can, column] = menu.group.gains[items, 0] - menu.group.gains[0, 0]
                costs[:, can, column] = ((menu.group.costs[items] - menu.group.costs[0]) * bounded).T
            self._gain[gradient], self._cost[gradient] = gains, costs

    def worth(self, gradient: str, prices: Array) -> Array:
        """[recipes]: what the sites gain that gain by it, at these prices."""
        return np.asarray(self._left(gradient, prices).clip(min=0.0).sum(axis=1))

    def spent(self, gradient: str, recipe: int, prices: Array) -> Array:
        """[limits]: what these sites spend with a recipe."""
        taken = self._left(gradient, prices)[recipe] > 0
        return np.asarray(self._cost[gradient][:, recipe, taken].sum(axis=1))

    def span(self, gradient: str) -> float:
        """The most that a recipe changes the first goal, up or down."""
        return float(np.abs(self._gain[gradient]).sum(axis=1).max(initial=0.0))

    def harm(self, gradient: str) -> Array:
        """[recipes]: damage and noise if every site took it, for the order of recipes of equal worth."""
        return np.asarray(self._cost[gradient][:2].sum(axis=(0, 2)))

    def _left(self, gradient: str, prices: Array) -> Array:
        return np.asarray(self._gain[gradient] - np.tensordot(prices, self._cost[gradient], axes=1))


def _apart(options: Sequence[Menu]) -> list[list[Menu]]:
    """The menus, those together that share a role other than the gradient's."""
    parts: list[tuple[set[str], list[Menu]]] = []
    for menu in options:
        roles, together = set(menu.site.roles) - {GRADIENT}, [menu]
        others = []
        for known, found in parts:
            if known & roles:
                roles, together = known | roles, found + together
            else:
                others.append((known, found))
        parts = [*others, (roles, together)]
    return [found for _, found in parts]


def _prices(sites: Sequence[_Sites], rest: Array, gradients: Sequence[str]) -> Array:
    """Prices on the limits at which the best recipe's bound is lowest, by cutting planes (Kelley)."""
    unit = np.where(np.abs(rest) > 0, np.abs(rest), 1.0)
    span = max((part.span(each) for part in sites for each in gradients), default=0.0) or 1.0
    prices, best, best_bound = np.zeros(len(rest)), np.zeros(len(rest)), math.inf
    planes, heights = [], []
    for _ in range(MOST_PLANES):
        worths = {each: [part.worth(each, prices) for part in sites] for each in gradients}
        gradient = max(gradients, key=lambda each: sum(float(worth.max()) for worth in worths[each]))
        chosen = [int(worth.argmax()) for worth in worths[gradient]]
        bound = sum(float(worth.max()) for worth in worths[gradient]) + float(prices @ rest)
        if bound < best_bound:
            best_bound, best = bound, prices
        spent = np.sum([part.spent(gradient, at, prices) for part, at in zip(sites, chosen, strict=True)], axis=0)
        slope = rest - spent
        # Prices in units of span/unit and bounds in units of span: nowhere is the bound below this plane.
        planes.append(np.append(slope / unit, -1.0))
        heights.append(float(slope @ prices - bound) / span)
        relaxed = linprog(
            np.append(np.zeros(len(rest)), 1.0),
            A_ub=np.array(planes),
            b_ub=np.array(heights),
            bounds=[(0.0, HIGHEST_PRICE)] * len(rest) + [(None, None)],
        )
        if relaxed.status != 0 or relaxed.fun * span >= best_bound - 1e-9 * span:
            break
        prices = np.maximum(0.0, relaxed.x[:-1]) * span / unit
    return best


def _joint(sites: Sequence[_Sites], prices: Array, gradients: Sequence[str]) -> list[tuple[float, Recipe]]:
    """Recipes for all sites with their worth, the best first; of equal ones the one that harms least."""
    found = []
    for place, gradient in enumerate(gradients):
        parts = []
        for part in sites:
            worth, harm = part.worth(gradient, prices), part.harm(gradient)
            order = np.lexsort((np.arange(len(worth)), harm, -worth))[:MOST_OF_A_KIND]
            parts.append([(float(worth[at]), float(harm[at]), part.recipes[gradient][at]) for at in order])
        most = max(1, int(4096 ** (1 / max(len(parts), 1))))
        for number, picked in enumerate(itertools.product(*(part[:most] for part in parts))):
            recipe = {role: cast for _, _, one in picked for role, cast in one.items()}
            total = math.fsum(one[0] for one in picked)
            found.append((-total, math.fsum(one[1] for one in picked), place, number, recipe))
    found.sort(key=lambda one: one[:4])
    return [(-one[0], one[4]) for one in found]


def _texts(options: Sequence[Menu]) -> dict[str, list[str]]:
    """The casts that any of the menus has for each role, as it is first."""
    found: dict[str, set[str]] = {}
    for menu in options:
        for role in menu.site.roles:
            found.setdefault(role, set()).update(menu.texts[role])
    return {role: [KEEP, *sorted(texts - {KEEP})] for role, texts in found.items()}
