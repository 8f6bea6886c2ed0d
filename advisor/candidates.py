"""What a slot can be cast to: the scores of all slots in one order, their numbers as columns, and single candidates.

A cast whose damage or noise is unknown, NaN or infinite is no candidate. A plan reads each score many times (to leave
out what is worse, to choose, to explain), so its numbers are worked out once for all scores, as arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.castnames import KEEP, parse_cast
from advisor.cost import enters_gradient
from advisor.errors import InvalidPlan
from advisor.failures import OUTLIER_RATIO
from advisor.product_casts import FOLLOWED
from probes.casts import Cast
from probes.records import GRADIENT, Site

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Row = Mapping[str, Any]
Slot = tuple[str, str]

AS_IT_IS = -1
"""Stands for the tensor left as it is where a score's place is expected."""


@dataclass(frozen=True)
class Candidate:
    """One cast for one slot and what it costs. `row`: its score, None for a tensor left as it is."""

    cast: Cast
    damage: float
    noise_ratio: float
    row: Row | None


def by_slot(sites: Sequence[Site], rows: Iterable[Row]) -> dict[Slot, dict[str, Row]]:
    """Rows by slot and canonical cast, casts in alphabetical order. InvalidPlan for a row of no slot."""
    table: dict[Slot, dict[str, Row]] = {(site.name, role): {} for site in sites for role in site.roles}
    canonical: dict[str, str] = {}
    for row in rows:
        slot, text = (row["site"], row["role"]), row["cast"]
        if slot not in table:
            raise InvalidPlan(f"a score names {slot[0]!r}, {slot[1]!r}, which is no slot of the window")
        if text not in canonical:
            canonical[text] = str(parse_cast(text))
        table[slot][canonical[text]] = row
    return {slot: dict(sorted(casts.items())) for slot, casts in table.items()}


class SlotScores:
    """The scores of all slots: slot after slot, each slot's casts in alphabetical order.

    Columns have a number a score, NaN where it is unknown. `damage` and `noise` are those of a candidate: finite and at
    least 0 where they are known.
    """

    def __init__(self, sites: Sequence[Site], rows: Iterable[Row]) -> None:
        """Raises InvalidPlan for a row of no slot."""
        self.sites = sites
        self.table = by_slot(sites, rows)
        self.rows: list[Row] = list(chain.from_iterable(casts.values() for casts in self.table.values()))
        self.texts: list[str] = list(chain.from_iterable(self.table.values()))
        self._number = {slot: number for number, slot in enumerate(self.table)}
        counts = [len(casts) for casts in self.table.values()]
        self.starts = np.append(0, np.cumsum(counts, dtype=np.intp))
        self.slot_of = np.repeat(np.arange(len(counts)), counts)

    def span(self, slot: Slot) -> range:
        """The places of a slot's scores."""
        number = self._number[slot]
        return range(int(self.starts[number]), int(self.starts[number + 1]))

    def column(self, name: str) -> Array:
        """A number of every score as it is given."""
        return np.array([row.get(name) for row in self.rows], dtype=np.float64)

    def by_slot(self, mask: Mask) -> dict[Slot, NDArray[np.intp]]:
        """The places of a mask, by slot."""
        found = np.flatnonzero(mask)
        bounds = np.searchsorted(found, self.starts)
        return {slot: found[bounds[number] : bounds[number + 1]] for slot, number in self._number.items()}

    def is_any_of(self, casts: Mapping[str, Collection[str]]) -> Mask:
        """The scores of some casts, by role."""
        found = [text in casts[role] for (_, role), of_slot in self.table.items() for text in of_slot]
        return np.array(found, dtype=bool)

    def first_in_slot(self, mask: Mask) -> dict[Slot, int]:
        """The first place of a mask in each slot that has one."""
        return {slot: int(places[0]) for slot, places in self.by_slot(mask).items() if len(places)}

    def candidate(self, place: int) -> Candidate | None:
        """The score at a place as a candidate, None where it is none; for AS_IT_IS the tensor left as it is."""
        if place == AS_IT_IS:
            return Candidate(parse_cast(KEEP), 0.0, 0.0, None)
        if not self.can_be[place]:
            return None
        cast = parse_cast(self.texts[place])
        return Candidate(cast, float(self.damage[place]), float(self.noise[place]), self.rows[place])

    @cached_property
    def damage(self) -> Array:
        """Of gradients 0; an estimate below 0 is noise around 0."""
        return np.where(self._of_slots(lambda site, role: role == GRADIENT), 0.0, _finite_column(self.column("damage")))

    @cached_property
    def noise(self) -> Array:
        """0 where it is not given and the role enters no gradient."""
        given = [row.get("noise_ratio") for row in self.rows]
        found = _finite_column(np.array(given, dtype=np.float64))
        enters = self._of_slots(enters_gradient)
        for place in np.flatnonzero(~enters & np.isnan(found)).tolist():
            if given[place] is None:
                found[place] = 0.0
        return found

    @cached_property
    def costs(self) -> Array:
        """Damage and noise, [2, scores and the tensor as it is]: AS_IT_IS is the last place."""
        return np.pad(np.stack([self.damage, self.noise]), ((0, 0), (0, 1)))

    @cached_property
    def can_be(self) -> Mask:
        """The scores that are candidates; also that of the tensor as it is, if there is one."""
        one_scale = {text: parse_cast(text).has_one_scale for text in set(self.texts)}
        follows = self._of_slots(lambda site, _: site.op in FOLLOWED)
        known = ~np.isnan(self.damage) & ~np.isnan(self.noise)
        return known & (follows | np.array([one_scale[text] for text in self.texts], dtype=bool))

    @cached_property
    def is_candidate(self) -> Mask:
        """The casts that can be chosen beside leaving the tensor as it is."""
        return self.can_be & np.array([text != KEEP for text in self.texts], dtype=bool)

    @cached_property
    def systematic_ratio(self) -> Array:
        """Of gradients, NaN elsewhere."""
        is_gradient = self._of_slots(lambda site, role: role == GRADIENT)
        return np.where(is_gradient, self.column("systematic_ratio"), np.nan)

    @cached_property
    def bits(self) -> NDArray[np.intp]:
        """Bits of each cast's elements."""
        of_text = {text: parse_cast(text).bits for text in set(self.texts)}
        return np.array([of_text[text] for text in self.texts], dtype=np.intp)

    @cached_property
    def first_outlier(self) -> dict[Slot, int]:
        """The first score of each slot whose largest value is told as an outlier."""
        amax, rms = self.column("amax"), self.column("rms")
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            is_far = np.isfinite(amax) & np.isfinite(rms) & (rms > 0) & (amax / rms > OUTLIER_RATIO)
        return self.first_in_slot(is_far)

    def _of_slots(self, value: Any) -> Mask:
        """What is true of a slot's site and role, for each of its scores."""
        of_each = [bool(value(site, role)) for site in self.sites for role in site.roles]
        return np.array(of_each, dtype=bool)[self.slot_of]


def _finite_column(values: Array) -> Array:
    """The numbers where they are finite, at least 0: an estimate below 0 is noise around 0. NaN elsewhere."""
    return np.where(np.isfinite(values), np.where(values > 0, values, 0.0), np.nan)
