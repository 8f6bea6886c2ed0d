"""What a site can choose from: combinations of its roles' candidate casts, with gains and costs.

A cast whose damage or noise is unknown, NaN or infinite is no candidate. Every role may stay as it is
(`fp32/none/nearest`) at no damage and no noise.

What cannot be in a best plan is left out before anything is solved, in two steps. Of a role's casts: one that another
equals or beats in damage and noise, and in what it brings whatever the other roles are (`consequences.py`). Of a site's
combinations: one that another equals or beats in every goal and every cost. Of 40 casts about 8 stay a role, and of
their combinations about 50 a site.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.castnames import KEEP, parse_cast
from advisor.consequences import MEASURES, Consequences, Forms, along
from advisor.cost import enters_gradient
from advisor.errors import InvalidPlan
from advisor.hardware import Hardware
from advisor.knapsack import Group
from advisor.objectives import LARGER_IS_BETTER, Task
from advisor.product_casts import FOLLOWED
from advisor.pruning import undominated
from probes.casts import Cast
from probes.records import GRADIENT, Site

Array = NDArray[np.float64]
Row = Mapping[str, Any]

SHARE_8BIT = Task()

SYSTEMATIC_SHARE = 0.025
"""Of the noise that gradients may have, how much may be alike in every batch, a cast. Ours. Noise of ratio r is as
good as a smaller batch; what is alike stays while the minibatch's own noise averages out, and outweighs it after 1/r
steps: at the default limit of 2% on lost batch, after 2,000. Chosen on whole trainings of two models with one gradient
cast; `docs/advice.md` has those of six.
"""


@dataclass(frozen=True)
class Candidate:
    """One cast for one slot and what it costs. `row`: its score, None for a tensor left as it is."""

    cast: Cast
    damage: float
    noise_ratio: float
    row: Row | None


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


def by_slot(sites: Sequence[Site], rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by slot and canonical cast, casts in alphabetical order. InvalidPlan for a row of no slot."""
    table: dict[tuple[str, str], dict[str, Row]] = {(site.name, role): {} for site in sites for role in site.roles}
    canonical: dict[str, str] = {}
    for row in rows:
        slot, text = (row["site"], row["role"]), row["cast"]
        if slot not in table:
            raise InvalidPlan(f"a score names {slot[0]!r}, {slot[1]!r}, which is no slot of the window")
        if text not in canonical:
            canonical[text] = str(parse_cast(text))
        table[slot][canonical[text]] = row
    return {slot: dict(sorted(casts.items())) for slot, casts in table.items()}


def candidate(site: Site, role: str, cast: Cast, row: Row) -> Candidate | None:
    """The row as a candidate, or None where its damage or its noise is unknown or not finite.

    None too for scales by row or block where the products cannot be cast one by one.
    """
    if not cast.has_one_scale and site.op not in FOLLOWED:
        return None
    damage = 0.0 if role == GRADIENT else _finite(row.get("damage"))
    noise = _finite(row.get("noise_ratio"))
    if noise is None and row.get("noise_ratio") is None and not enters_gradient(site, role):
        noise = 0.0
    return None if damage is None or noise is None else Candidate(cast, damage, noise, row)


class Menu:
    """What one site can choose from: combinations of its roles' candidates, with gains and costs."""

    def __init__(
        self,
        site: Site,
        rows: Mapping[str, Mapping[str, Row]],
        hardware: Hardware,
        consequences: Consequences | None = None,
        task: Task = SHARE_8BIT,
        whole: bool = False,
    ) -> None:
        """`whole`: nothing is left out of the combinations of what is possible."""
        self.site = site
        self._is_whole = whole
        self.hardware = hardware
        self.task = task
        consequences = consequences or Consequences(hardware, task.is_timed)
        every = {role: _every(site, role, rows[role]) for role in site.roles}
        forms = {role: consequences.forms(site, role, tuple(text for text, _ in every[role])) for role in site.roles}
        kept = {
            role: np.arange(len(every[role]))
            if whole
            else _worth_trying(
                [option for _, option in every[role]], forms[role], consequences.no_worse(site, role, forms)
            )
            for role in site.roles
        }
        self.candidates = {role: [every[role][place][1] for place in kept[role]] for role in site.roles}
        picked = {role: forms[role].place[kept[role]] for role in site.roles}
        self._table = consequences.table(site, forms, picked)
        self._possible = consequences.possible(site, forms, picked)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Number of candidates of each role."""
        return tuple(len(self.candidates[role]) for role in self.site.roles)

    @cached_property
    def _whole(self) -> dict[str, Array]:
        """Every measure of all combinations, [combinations]: the last role's candidate changes fastest."""
        found = dict(zip(MEASURES, self._table, strict=True))
        found |= {"damage": self._sum("damage"), "noise": self._sum("noise_ratio")}
        return {name: values.reshape(-1) for name, values in found.items()}

    @cached_property
    def combinations(self) -> NDArray[np.intp]:
        """Of all combinations that are possible, those that no other equals or beats."""
        possible = np.flatnonzero(self._possible.reshape(-1))
        if self._is_whole:
            return possible
        goals, costs = self._columns(possible)
        return possible[undominated(goals, costs)]

    @cached_property
    def measures(self) -> dict[str, Array]:
        """Every measure of the combinations: `MEASURES`, damage and noise."""
        return {name: values[self.combinations] for name, values in self._whole.items()}

    @cached_property
    def group(self) -> Group:
        """The combinations.

        Gains: the task's goals, minus what should be small. Costs: damage, noise ratio, and one for each budget, of
        which those for the 8-bit share are what is missing of the most.
        """
        return Group(*self._columns(self.combinations))

    @cached_property
    def most_flops_8bit(self) -> float:
        """8-bit FLOPs of the combination that has most, whatever it costs."""
        return float(self.measures["flops_8bit"].max())

    def _columns(self, chosen: NDArray[np.intp]) -> tuple[Array, Array]:
        found = {name: values[chosen] for name, values in self._whole.items()}
        gains = [found[name] if name in LARGER_IS_BETTER else -found[name] for name in self.task.goals]
        costs = [found["damage"], found["noise"]]
        for name, _ in self.task.budget.given:
            if name == "share_8bit":
                costs.append(found["flops_8bit"].max() - found["flops_8bit"])
            else:
                costs.append(found["bytes" if name == "memory_bytes" else name])
        return np.stack(gains, axis=1), np.stack(costs, axis=1)

    def picked(self, item: int) -> dict[str, Candidate]:
        """The candidates of one combination, by role."""
        indices = np.unravel_index(int(self.combinations[item]), self.shape) if self.shape else ()
        return {role: self.candidates[role][int(index)] for role, index in zip(self.site.roles, indices, strict=True)}

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
        least = (float(self.measures[name][enough].min(initial=math.inf)) for name in ("damage", "noise"))
        return next(least), next(least)

    def _fullest(self, limits: Limits) -> int:
        flops = self.measures["flops_8bit"]
        best = np.flatnonzero(flops == flops.max())
        damage, noise = self.measures["damage"][best], self.measures["noise"][best]
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.stack([damage / limits.tolerance, noise / limits.noise])
            parts = np.nan_to_num(parts, posinf=math.inf)
        return int(best[np.lexsort((noise, damage, parts.max(axis=0)))[0]])

    def _sum(self, what: str) -> Array:
        total = np.zeros(self.shape)
        for role in self.site.roles:
            column = np.array([getattr(option, what) for option in self.candidates[role]], dtype=np.float64)
            total = total + along(self.site, column, role)
        return total


def menus(
    sites: Sequence[Site],
    rows: Iterable[Row],
    hardware: Hardware,
    task: Task = SHARE_8BIT,
    *,
    kept: Collection[str] = (),
    native_only: bool = False,
    whole: bool = False,
) -> list[Menu]:
    """One menu a site, in the order of `sites`.

    kept         names of sites that have nothing to choose: they stay as they are
    native_only  only combinations whose products are all run by native kernels, as they are given
    whole        leave out none of them
    """
    table, consequences = by_slot(sites, rows), Consequences(hardware, task.is_timed, native_only)
    nothing: Mapping[str, Row] = {}
    return [
        Menu(
            site,
            {role: nothing if site.name in kept else table[site.name, role] for role in site.roles},
            hardware,
            consequences,
            task,
            whole,
        )
        for site in sites
    ]


def _every(site: Site, role: str, rows: Mapping[str, Row]) -> list[tuple[str, Candidate]]:
    """The tensor left as it is, then every cast that can be chosen, each with its canonical text."""
    found = [(text, candidate(site, role, parse_cast(text), row)) for text, row in rows.items() if text != KEEP]
    return [(KEEP, Candidate(parse_cast(KEEP), 0.0, 0.0, None)), *((text, one) for text, one in found if one)]


def _worth_trying(options: Sequence[Candidate], forms: Forms, no_worse: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The candidates that no other equals or beats in what it brings, in damage and in noise; of equals the first."""
    damage = np.array([option.damage for option in options])
    noise = np.array([option.noise_ratio for option in options])
    beats = (damage[:, None] <= damage) & (noise[:, None] <= noise) & no_worse[np.ix_(forms.place, forms.place)]
    first = np.arange(len(options))
    beats &= ~(beats.T & (first[:, None] >= first))
    return np.flatnonzero(~beats.any(axis=0))


def _finite(value: Any) -> float | None:
    """The number where it is finite, at least 0; None otherwise. An estimate below 0 is noise around 0."""
    if value is None or not math.isfinite(value):
        return None
    return max(0.0, float(value))
