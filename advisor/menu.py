"""What a site can choose from: every combination of its roles' candidate casts, with gains and costs.

A cast whose damage or noise is unknown, NaN or infinite is no candidate. Every role may stay as it is
(`fp32/none/nearest`) at no damage and no noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.castnames import KEEP, parse_cast
from advisor.cost import (
    Operand,
    enters_gradient,
    operand,
    own_operand,
    product_bits,
    role_bytes,
)
from advisor.errors import InvalidPlan
from advisor.hardware import Hardware
from advisor.knapsack import Group
from probes.casts import Cast
from probes.records import GRADIENT, Site

Array = NDArray[np.float64]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One cast for one slot and what it costs. `row`: its score, None for a tensor left as it is."""

    cast: Cast
    damage: float
    noise_ratio: float
    row: Row | None


@dataclass(frozen=True)
class Limits:
    """`tolerance`: loss units; `max_lost_batch`: share of the batch, from 0 to below 1."""

    tolerance: float
    max_lost_batch: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise InvalidPlan(
                f"tolerance={self.tolerance!r} is not possible: give a finite predicted rise of the loss, "
                "0 or more, in the loss's own units, or None for 0.1% of the window's mean loss"
            )
        if not 0 <= self.max_lost_batch < 1:
            raise InvalidPlan(
                f"max_lost_batch={self.max_lost_batch!r} is not possible: give a share of the batch "
                "from 0 to below 1, for example 0.02"
            )

    @property
    def noise(self) -> float:
        """The largest sum of noise ratios."""
        return self.max_lost_batch / (1 - self.max_lost_batch)


def lost_share(noise_ratio: float) -> float:
    """Share of the batch that is lost to noise of this ratio: 1 - 1/(1 + r)."""
    return 1.0 if math.isinf(noise_ratio) else noise_ratio / (1 + noise_ratio)


def by_slot(sites: Sequence[Site], rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by slot and canonical cast, casts in alphabetical order. InvalidPlan for a row of no slot."""
    table: dict[tuple[str, str], dict[str, Row]] = {(site.name, role): {} for site in sites for role in site.roles}
    for row in rows:
        slot = (row["site"], row["role"])
        if slot not in table:
            raise InvalidPlan(f"a score names {slot[0]!r}, {slot[1]!r}, which is no slot of the window")
        table[slot][str(parse_cast(row["cast"]))] = row
    return {slot: dict(sorted(casts.items())) for slot, casts in table.items()}


def candidate(site: Site, role: str, cast: Cast, row: Row) -> Candidate | None:
    """The row as a candidate, or None where its damage or its noise is unknown or not finite."""
    damage = 0.0 if role == GRADIENT else _finite(row.get("damage"))
    noise = _finite(row.get("noise_ratio"))
    if noise is None and row.get("noise_ratio") is None and not enters_gradient(site, role):
        noise = 0.0
    return None if damage is None or noise is None else Candidate(cast, damage, noise, row)


class Menu:
    """What one site can choose from: all combinations of its roles' candidates, with gains and costs."""

    def __init__(self, site: Site, rows: Mapping[str, Mapping[str, Row]], hardware: Hardware) -> None:
        self.site = site
        self.hardware = hardware
        self.candidates = {role: _worth_trying(site, role, rows[role]) for role in site.roles}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Number of candidates of each role."""
        return tuple(len(self.candidates[role]) for role in self.site.roles)

    @cached_property
    def group(self) -> Group:
        """All combinations, the last role's candidate changing fastest.

        Gains: FLOPs in 8 bits, FLOPs in at most 16, minus bytes, minus damage. Costs: damage, noise ratio.
        """
        damage = self._sum(lambda role, option: option.damage)
        noise = self._sum(lambda role, option: option.noise_ratio)
        held = self._sum(lambda role, option: role_bytes(self.site, role, option.cast))
        narrow8, narrow16 = self._flops(8), self._flops(16)
        return Group(
            gains=np.stack([narrow8, narrow16, -held, -damage], axis=1),
            costs=np.stack([damage, noise], axis=1),
        )

    def picked(self, item: int) -> dict[str, Candidate]:
        """The candidates of one combination, by role."""
        indices = np.unravel_index(item, self.shape) if self.shape else ()
        return {role: self.candidates[role][int(index)] for role, index in zip(self.site.roles, indices, strict=True)}

    def most_8bit(self, limits: Limits) -> tuple[float, float, float]:
        """(8-bit FLOPs, damage, noise) of the combination with most 8-bit FLOPs, whatever it costs.

        Of several, the one that takes the smallest part of the limit it comes closest to.
        """
        index = self._fullest(limits)
        flops, costs = self.group.gains[:, 0], self.group.costs
        return float(flops[index]), float(costs[index, 0]), float(costs[index, 1])

    def fullest(self, limits: Limits) -> dict[str, Candidate]:
        """The candidates of that combination, by role."""
        return self.picked(self._fullest(limits))

    def least_for(self, flops: float) -> tuple[float, float]:
        """The least damage, and the least noise, of any combination with so many FLOPs in 8 bits; inf if none has."""
        enough = self.group.costs[self.group.gains[:, 0] >= flops * (1 - 1e-9)]
        damage, noise = enough[:, :2].min(axis=0, initial=math.inf)
        return float(damage), float(noise)

    def _fullest(self, limits: Limits) -> int:
        flops, costs = self.group.gains[:, 0], self.group.costs
        best = np.flatnonzero(flops == flops.max())
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.nan_to_num(costs[best] / np.array([limits.tolerance, limits.noise]), posinf=math.inf)
        return int(best[np.lexsort((costs[best, 1], costs[best, 0], parts.max(axis=1)))[0]])

    def _sum(self, value: Any) -> Array:
        total = np.zeros(self.shape)
        for axis, role in enumerate(self.site.roles):
            column = np.array([value(role, option) for option in self.candidates[role]], dtype=np.float64)
            total = total + self._along(axis, column)
        return total.reshape(-1)

    def _flops(self, most_bits: int) -> Array:
        total = np.zeros(self.shape)
        for product in self.site.products:
            names = [name for name in product.operands if name in self.site.roles]
            if len(names) < 2 or names[0] == names[1]:
                total = total + self._lone_product(product.operands, most_bits) * product.flops
                continue
            left, right = ([operand(self.site, name, c.cast) for c in self.candidates[name]] for name in names)
            fits = np.array(
                [[product_bits(a, b, self.hardware) <= most_bits for b in right] for a in left],
                dtype=np.float64,
            )
            axes = [self.site.roles.index(name) for name in names]
            table = fits if axes[0] < axes[1] else fits.T
            shape = [size if axis in axes else 1 for axis, size in enumerate(self.shape)]
            total = total + table.reshape(shape) * product.flops
        return total.reshape(-1)

    def _lone_product(self, operands: tuple[str, str], most_bits: int) -> Array:
        """A product of a role with itself, or with something that no cast reaches (never narrow then)."""
        left, right = operands
        if left != right or left not in self.site.roles:
            return np.zeros(self.shape)
        seen = [operand(self.site, left, option.cast) for option in self.candidates[left]]
        column = np.array([product_bits(one, one, self.hardware) <= most_bits for one in seen], dtype=np.float64)
        return self._along(self.site.roles.index(left), column)

    def _along(self, axis: int, column: Array) -> Array:
        return column.reshape([-1 if position == axis else 1 for position in range(len(self.site.roles))])


def menus(sites: Sequence[Site], rows: Iterable[Row], hardware: Hardware) -> list[Menu]:
    """One menu a site, in the order of `sites`."""
    table = by_slot(sites, rows)
    return [Menu(site, {role: table[site.name, role] for role in site.roles}, hardware) for site in sites]


def _worth_trying(site: Site, role: str, rows: Mapping[str, Row]) -> list[Candidate]:
    """The tensor left as it is, then the candidates that no other of the same format equals or beats.

    Two casts whose results have the same format run the same products and take the same bytes: only damage
    and noise tell them apart.
    """
    keep = Candidate(parse_cast(KEEP), 0.0, 0.0, None)
    found: dict[Operand, list[Candidate]] = {own_operand(site, role): [keep]}
    for text, row in rows.items():
        option = candidate(site, role, parse_cast(text), row)
        if option is None or text == KEEP:
            continue
        rivals = found.setdefault(operand(site, role, option.cast), [])
        if any(_no_worse(rival, option) for rival in rivals):
            continue
        rivals[:] = [rival for rival in rivals if not _no_worse(option, rival)] + [option]
    return [option for rivals in found.values() for option in rivals]


def _no_worse(one: Candidate, other: Candidate) -> bool:
    return one.damage <= other.damage and one.noise_ratio <= other.noise_ratio


def _finite(value: Any) -> float | None:
    """The number where it is finite, at least 0; None otherwise. An estimate below 0 is noise around 0."""
    if value is None or not math.isfinite(value):
        return None
    return max(0.0, float(value))
