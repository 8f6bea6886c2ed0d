"""What a site can choose from: combinations of its roles' candidate casts, with gains and costs.

Every role may stay as it is (`fp32/none/nearest`) at no damage and no noise; what else it can be is in `candidates.py`.

What cannot be in a best plan is left out before anything is solved, in two steps. Of a role's casts: one that another
equals or beats in damage and noise, and in what it brings whatever the other roles are (`consequences.py`). Of a site's
combinations: one that another equals or beats in every goal and every cost. Of 40 casts about 8 stay a role, and of
their combinations about 50 a site.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from advisor.candidates import AS_IT_IS, Candidate, Mask, Row, Slot, SlotScores
from advisor.castnames import KEEP
from advisor.consequences import MEASURES, Consequences, Forms, spread
from advisor.errors import InvalidPlan
from advisor.hardware import Hardware
from advisor.knapsack import Group
from advisor.objectives import LARGER_IS_BETTER, Task
from advisor.pruning import undominated
from probes.records import GRADIENT, Site

Array = NDArray[np.float64]
Places = NDArray[np.intp]

SHARE_8BIT = Task()

SYSTEMATIC_SHARE = 0.025
"""Of the noise that gradients may have, how much may be alike in every batch, a cast. Ours. Noise of ratio r is as
good as a smaller batch; what is alike stays while the minibatch's own noise averages out, and outweighs it after 1/r
steps: at the default limit of 2% on lost batch, after 2,000. Chosen on whole trainings of two models with one gradient
cast; `docs/advice.md` has those of six.
"""


@dataclass(frozen=True)
class Limits:
    """`tolerance`: loss units, infinite for none; `max_lost_batch`: share of the batch, from 0 to below 1."""

    tolerance: float
    max_lost_batch: float

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise InvalidPlan(_impossible(self.tolerance))
        if not 0 <= self.max_lost_batch < 1:
            raise InvalidPlan(
                f"max_lost_batch={self.max_lost_batch!r} is not possible: give a share of the batch "
                "from 0 to below 1, for example 0.02"
            )

    @classmethod
    def of(cls, tolerance: float | None, max_lost_batch: float) -> Limits:
        """Of a user's numbers, None for no tolerance. Raises InvalidPlan for those that are not possible."""
        if tolerance is not None and math.isinf(tolerance):
            raise InvalidPlan(_impossible(tolerance))
        return cls(math.inf if tolerance is None else tolerance, max_lost_batch)

    @property
    def noise(self) -> float:
        """The largest sum of noise ratios."""
        return self.max_lost_batch / (1 - self.max_lost_batch)

    @property
    def systematic(self) -> float:
        """The largest `systematic_ratio` of a single cast."""
        return SYSTEMATIC_SHARE * self.noise

    @staticmethod
    def noise_for(systematic_ratio: float) -> float:
        """The limit on the sum of noise ratios under which a cast may have this `systematic_ratio`."""
        return systematic_ratio / SYSTEMATIC_SHARE


def _impossible(tolerance: float) -> str:
    return (
        f"tolerance={tolerance!r} is not possible: give a finite predicted rise of the loss, "
        "0 or more, in the loss's own units, or None for 0.1% of the window's mean loss"
    )


def lost_share(noise_ratio: float) -> float:
    """Share of the batch that is lost to noise of this ratio: 1 - 1/(1 + r)."""
    return 1.0 if math.isinf(noise_ratio) else noise_ratio / (1 + noise_ratio)


def errs_alike(row: Row, limits: Limits) -> bool:
    """Whether more of the error that a cast puts into a gradient is the same in every batch than the limits allow."""
    ratio = row.get("systematic_ratio")
    return row["role"] == GRADIENT and ratio is not None and ratio > limits.systematic


def may_err_alike(row: Row, limits: Limits) -> bool:
    """Whether the window leaves open that a gradient's cast passes that limit: within two standard errors."""
    ratio, error = row.get("systematic_ratio"), row.get("systematic_ratio_se")
    if row["role"] != GRADIENT or ratio is None or error is None:
        return False
    return bool(ratio + 2 * error > limits.systematic)


# Slots whose casts are compared at once: some 100 kB, which stay in a cache. Damage and noise in a menu's sums.
AT_ONCE = 64
COSTS = ("damage", "noise")


class Menu:
    """What one site can choose from: combinations of its roles' candidates, with gains and costs."""

    def __init__(
        self,
        site: Site,
        scores: SlotScores,
        consequences: Consequences,
        task: Task,
        places: Mapping[str, Places],
        forms: Mapping[str, Forms],
        picked: Mapping[str, Places],
        whole: bool = False,
    ) -> None:
        """
        places   of each role's candidates in the scores; AS_IT_IS for the tensor as it is, which comes first
        picked   the place of each candidate's form in `forms`
        whole    nothing is left out of the combinations of what is possible
        """
        self.site = site
        self.hardware = consequences.hardware
        self.task = task
        self.places = places
        self._scores, self._consequences = scores, consequences
        self._forms, self._picked = forms, picked
        self._is_whole = whole

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Number of candidates of each role."""
        return tuple(len(self.places[role]) for role in self.site.roles)

    @cached_property
    def candidates(self) -> dict[str, list[Candidate]]:
        """By role."""
        return {role: [self._option(place) for place in places.tolist()] for role, places in self.places.items()}

    @cached_property
    def bits(self) -> dict[str, list[int]]:
        """Bits of the operand that each candidate makes, by role."""
        return {
            role: [self._forms[role].forms[form].operand.bits for form in picked.tolist()]
            for role, picked in self._picked.items()
        }

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """The canonical casts of the candidates, by role."""
        return {
            role: [KEEP, *[self._scores.texts[place] for place in places[1:].tolist()]]
            for role, places in self.places.items()
        }

    @cached_property
    def _whole(self) -> Array:
        """Every measure of all combinations, [MEASURES and COSTS, combinations]: the last role changes fastest."""
        found = np.empty((len(MEASURES) + len(COSTS), *self.shape))
        found[: len(MEASURES)] = self._consequences.table(self.site, self._forms, self._picked)
        for number, column in enumerate(self._scores.costs, len(MEASURES)):
            found[number] = self._sum(column)
        return found.reshape(len(found), -1)

    @cached_property
    def combinations(self) -> Places:
        """Of all combinations that are possible, those that no other equals or beats."""
        found, possible = self._whole, self._consequences.possible(self.site, self._forms, self._picked)
        everything = np.arange(found.shape[1]) if possible is None else np.flatnonzero(possible.reshape(-1))
        if self._is_whole:
            return everything
        if possible is not None:
            found = found[:, everything]
        gains, costs = self._columns(_named(found))
        return everything[undominated(np.stack([*(-gain for gain in gains), *costs]))]

    @cached_property
    def measures(self) -> dict[str, Array]:
        """Every measure of the combinations: `MEASURES`, damage and noise."""
        return _named(self._whole[:, self.combinations])

    @cached_property
    def group(self) -> Group:
        """The combinations.

        Gains: the task's goals, minus what should be small. Costs: damage, noise ratio, and one for each budget, of
        which those for the 8-bit share are what is missing of the most.
        """
        gains, costs = self._columns(self.measures)
        return Group(np.stack(gains, axis=1), np.stack(costs, axis=1))

    @cached_property
    def most_flops_8bit(self) -> float:
        """8-bit FLOPs of the combination that has most, whatever it costs."""
        return float(self.measures["flops_8bit"].max())

    def _columns(self, found: Mapping[str, Array]) -> tuple[list[Array], list[Array]]:
        gains = [found[name] if name in LARGER_IS_BETTER else -found[name] for name in self.task.goals]
        costs = [found["damage"], found["noise"]]
        for name, _ in self.task.budget.given:
            if name == "share_8bit":
                costs.append(found["flops_8bit"].max() - found["flops_8bit"])
            else:
                costs.append(found["bytes" if name == "memory_bytes" else name])
        return gains, costs

    def picked(self, item: int) -> dict[str, Candidate]:
        """The candidates of one combination, by role."""
        indices = np.unravel_index(int(self.combinations[item]), self.shape) if self.shape else ()
        return {
            role: self._option(int(self.places[role][int(index)]))
            for role, index in zip(self.site.roles, indices, strict=True)
        }

    def most_8bit(self, limits: Limits) -> tuple[float, float, float]:
        """(8-bit FLOPs, damage, noise) of the combination with most 8-bit FLOPs, whatever it costs.

        Of several, the one that takes the smallest part of the limit it comes closest to.
        """
        item, found = self._fullest(limits), self.measures
        return float(found["flops_8bit"][item]), float(found["damage"][item]), float(found["noise"][item])

    def fullest(self, limits: Limits) -> dict[str, Candidate]:
        """The casts of that combination, by role."""
        return self.picked(self._fullest(limits))

    def least_for(self, flops: float) -> tuple[float, float]:
        """The least damage and the least noise, each by itself, of any combination with so many 8-bit FLOPs or more.

        Infinite where there is none.
        """
        enough = self.measures["flops_8bit"] >= flops * (1 - 1e-9)
        least = (float(self.measures[name][enough].min(initial=math.inf)) for name in COSTS)
        return next(least), next(least)

    def _fullest(self, limits: Limits) -> int:
        flops = self.measures["flops_8bit"]
        best = np.flatnonzero(flops == flops.max()).tolist()
        damage, noise = (self.measures[name][best].tolist() for name in COSTS)
        parts = [
            (max(part_of(one, limits.tolerance), part_of(other, limits.noise)), one, other)
            for one, other in zip(damage, noise, strict=True)
        ]
        return int(best[parts.index(min(parts))])

    def _option(self, place: int) -> Candidate:
        found = self._scores.candidate(place)
        assert found is not None, "menus are made of candidates"
        return found

    def _sum(self, column: Array) -> Array:
        """The sum of the roles' costs, [combinations of the roles' candidates]."""
        total: Array | None = None
        for axis, role in enumerate(self.site.roles):
            costs = spread(column[self.places[role]], len(self.shape), axis)
            total = costs if total is None else total + costs
        return np.zeros(()) if total is None else total


def _named(measures: Array) -> dict[str, Array]:
    return dict(zip((*MEASURES, *COSTS), measures, strict=True))


def part_of(cost: float, limit: float) -> float:
    """The share that a cost takes of a limit; infinite for any of one that is 0."""
    if limit > 0:
        return cost / limit
    return math.inf if cost > 0 else 0.0


def menus(
    scores: SlotScores,
    hardware: Hardware,
    task: Task = SHARE_8BIT,
    *,
    sites: Sequence[Site] | None = None,
    within: Mask | None = None,
    kept: Collection[str] = (),
    native_only: bool = False,
    whole: bool = False,
) -> list[Menu]:
    """One menu a site, in the order of `sites`: all of the scores' if not given.

    within       which of the scores can be chosen; all candidates if not given
    kept         names of sites that have nothing to choose: they stay as they are
    native_only  only combinations whose products are all run by native kernels, as they are given
    whole        leave out none of them
    """
    sites = scores.sites if sites is None else sites
    consequences = Consequences(hardware, task.is_timed, native_only)
    usable = scores.by_slot(scores.is_candidate if within is None else scores.is_candidate & within)
    nothing = np.zeros(0, dtype=np.intp)
    places = {
        (site.name, role): np.append(AS_IT_IS, nothing if site.name in kept else usable[site.name, role])
        for site in sites
        for role in site.roles
    }
    forms = {
        site.name: {role: _forms(scores, consequences, site, role, places[site.name, role]) for role in site.roles}
        for site in sites
    }
    tried = {slot: np.arange(len(found)) for slot, found in places.items()}
    if not whole:
        tried = _worth_trying(scores, consequences, sites, places, forms)
    return [
        Menu(
            site,
            scores,
            consequences,
            task,
            {role: places[site.name, role][tried[site.name, role]] for role in site.roles},
            forms[site.name],
            {role: forms[site.name][role].place[tried[site.name, role]] for role in site.roles},
            whole,
        )
        for site in sites
    ]


def _forms(scores: SlotScores, consequences: Consequences, site: Site, role: str, places: Places) -> Forms:
    return consequences.forms(site, role, (KEEP, *[scores.texts[place] for place in places[1:].tolist()]))


def _worth_trying(
    scores: SlotScores,
    consequences: Consequences,
    sites: Sequence[Site],
    places: Mapping[Slot, Places],
    forms: Mapping[str, Mapping[str, Forms]],
) -> dict[Slot, Places]:
    """Which candidates no other equals or beats in what it brings, in damage and in noise; of equals the first.

    Slots with the same forms, which bring them the same, are looked at together.
    """
    alike: dict[tuple[int, int], tuple[Mask, list[Slot]]] = {}
    for site in sites:
        for role in site.roles:
            own, no_worse = forms[site.name][role], consequences.no_worse(site, role, forms[site.name])
            key = (id(own), id(no_worse))
            if key not in alike:
                alike[key] = no_worse[np.ix_(own.place, own.place)], []
            alike[key][1].append((site.name, role))
    found = {}
    for no_worse, slots in alike.values():
        for start in range(0, len(slots), AT_ONCE):
            some = slots[start : start + AT_ONCE]
            damage, noise = scores.costs[:, np.stack([places[slot] for slot in some])]
            for slot, beaten in zip(some, _beaten(damage, noise, no_worse), strict=True):
                found[slot] = np.flatnonzero(~beaten)
    return found


def _beaten(damage: Array, noise: Array, no_worse: Mask) -> Mask:
    """Which of each slot's candidates another equals or beats, of equals all but the first.

    damage, noise [slots, candidates]; no_worse [candidates, candidates]: whether one brings at least what another does.
    """
    beats = (damage[:, :, None] <= damage[:, None, :]) & (noise[:, :, None] <= noise[:, None, :]) & no_worse
    first = np.arange(len(no_worse))
    beats &= ~(beats.transpose(0, 2, 1) & (first[:, None] >= first))
    return np.asarray(beats.any(axis=1))
