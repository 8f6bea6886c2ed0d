"""Two windows side by side, slot by slot and step by step: where do their numerics first differ?

Two runs from one checkpoint on the same data, one of them with a plan or on other hardware, are equal up to some step
and tensor. Two answers are given. *At all*: the first sketch that is not the same, bin by bin. *Beyond noise*: the
first step at which the histograms of a slot are further apart than steps of training are anyway.

The distance is the total variation of the two histograms, zeros and non-finite elements in them: the share of elements
that would have to move to another bin, 0 to 1. Noise is the larger of what two draws of that many elements from one
distribution differ by, and of the median distance from one recorded step to the next, in the steadier of the windows;
beyond it is what exceeds NOISE times that. Steps are matched by their number, and loss scales are taken out to the
nearest bin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from advisor.execution import execution_order
from probes.history import SlotHistory
from probes.layout import BINS
from probes.records import Slot
from probes.window import Window

NOISE = 2.0  # ours: times the noise that a difference must exceed
SUM_TOLERANCE = 1e-9  # sums of squares depend on the order in which they are added
_BINS_AN_OCTAVE = 8
_MARGIN = 2048  # bins on either side, for loss scales to move a histogram into

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SlotDifference:
    """One slot of both windows, over the steps that both recorded.

    first_step             the first at which the sketches are not the same; None if they are at all steps
    first_beyond_noise     the first at which they are further apart than NOISE times the noise; None likewise
    distance               largest total variation of a step, 0 to 1
    noise                  of distances, as the module says
    middle_octaves         largest shift of a step's median log2 magnitude, other less one, by size; NaN if unknown
    amax_octaves           the same of the largest value
    """

    site: str
    role: str
    first_step: int | None
    first_beyond_noise: int | None
    distance: float
    noise: float
    middle_octaves: float
    amax_octaves: float


@dataclass(frozen=True)
class Comparison:
    """The slots of both windows in the order of execution, and those that only one of them has."""

    steps: tuple[int, ...]
    slots: tuple[SlotDifference, ...]
    only_in_one: tuple[Slot, ...]
    only_in_other: tuple[Slot, ...]

    @property
    def first(self) -> SlotDifference | None:
        """The slot whose sketch differs first, by step and then by the order of execution."""
        return min(self._differing, key=lambda slot: slot.first_step or 0, default=None)

    @property
    def first_beyond_noise(self) -> SlotDifference | None:
        """The slot that is first further apart than noise explains."""
        found = [slot for slot in self.slots if slot.first_beyond_noise is not None]
        return min(found, key=lambda slot: slot.first_beyond_noise or 0, default=None)

    @property
    def _differing(self) -> list[SlotDifference]:
        return [slot for slot in self.slots if slot.first_step is not None]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What differs, in words."""
        told = []
        if not self.steps:
            told.append("the two windows have no recorded step in common")
        elif not self.slots:
            told.append("the two windows have no tensor in common")
        elif self.first is None:
            told.append(f"all {len(self.slots)} tensors have the same sketches at all {len(self.steps)} common steps")
        else:
            first = self.first
            told.append(
                f"the first difference is in {first.site} {first.role} at step {first.first_step}; "
                f"{len(self._differing)} of {len(self.slots)} tensors differ at some step"
            )
            beyond = self.first_beyond_noise
            if beyond is None:
                told.append("no tensor differs by more than steps of training differ anyway")
            else:
                count = sum(slot.first_beyond_noise is not None for slot in self.slots)
                told.append(
                    f"beyond noise first in {beyond.site} {beyond.role} at step {beyond.first_beyond_noise}: "
                    f"{beyond.distance:.1%} of its elements in other bins at most, noise {beyond.noise:.1%}; "
                    f"so are {count} tensors at some step"
                )
        for name, only in (("first", self.only_in_one), ("second", self.only_in_other)):
            if only:
                told.append(f"only in the {name} window: {', '.join(f'{slot.site} {slot.role}' for slot in only)}")
        return tuple(told)


def compare(one: Window, other: Window) -> Comparison:
    """Where two windows differ. Raises WindowError for one that is still open.

    Symmetric but for the signs of shifts. Slots are matched by name and taken in the first window's order.
    """
    held = set(other.slots)
    shared = [slot for slot in execution_order(one) if slot in held]
    steps = sorted(set(one.steps) & set(other.steps))
    differences = (_difference(slot, one.history(*slot), other.history(*slot)) for slot in shared)
    return Comparison(
        steps=tuple(steps),
        slots=tuple(difference for difference in differences if difference is not None),
        only_in_one=tuple(slot for slot in one.slots if slot not in held),
        only_in_other=tuple(slot for slot in other.slots if slot not in set(one.slots)),
    )


def _difference(slot: Slot, one: SlotHistory, other: SlotHistory) -> SlotDifference | None:
    """None without a step in common."""
    left, right = _Steps(one), _Steps(other)
    common = [step for step in left.place if step in right.place]
    if not common:
        return None
    pairs = [(left.place[step], right.place[step]) for step in common]
    distances = [_distance(left.shares[i], right.shares[j]) for i, j in pairs]
    unrest = [side.unrest for side in (left, right) if side.unrest is not None]
    noise = max(_chance(left, right, *pairs[0]), min(unrest, default=0.0))
    same = [_is_same(left, i, right, j) for i, j in pairs]
    return SlotDifference(
        *slot,
        first_step=next((step for step, equal in zip(common, same, strict=True) if not equal), None),
        first_beyond_noise=next((s for s, d in zip(common, distances, strict=True) if d > NOISE * noise), None),
        distance=max(distances),
        noise=noise,
        middle_octaves=_largest([right.middle(j) - left.middle(i) for i, j in pairs]),
        amax_octaves=_largest([right.amax_octaves[j] - left.amax_octaves[i] for i, j in pairs]),
    )


@dataclass(frozen=True, eq=False)
class _Steps:
    """A history's steps as shares of the elements by bin, the loss scale taken out."""

    history: SlotHistory

    @cached_property
    def place(self) -> Mapping[int, int]:
        """Step → its index."""
        return {step: index for index, step in enumerate(self.history.steps.tolist())}

    @cached_property
    def shift(self) -> NDArray[np.int64]:
        """Bins by which the loss scale moved each step's histogram."""
        return np.rint(_BINS_AN_OCTAVE * np.log2(self.history.gain)).astype(np.int64)

    @cached_property
    def shares(self) -> Array:
        """[S, bins]: zeros, NaN, +Inf and -Inf first."""
        history = self.history
        found = np.zeros((len(history.steps), 4 + BINS + 2 * _MARGIN))
        step = np.repeat(np.arange(len(history.steps)), np.diff(history.offsets))
        at = np.clip(history.bins.astype(np.int64) - self.shift[step] + _MARGIN, 0, BINS + 2 * _MARGIN - 1)
        np.add.at(found, (step, 4 + at), history.counts)
        found[:, :4] = np.stack([history.zeros, history.nans, history.positive_infs, history.negative_infs], axis=1)
        return found / np.maximum(history.elements, 1)[:, None]

    @cached_property
    def unrest(self) -> float | None:
        """Median distance from a step to the next; None with a single one."""
        distances = [_distance(*pair) for pair in zip(self.shares, self.shares[1:], strict=False)]
        return float(np.median(distances)) if distances else None

    @cached_property
    def amax_octaves(self) -> Array:
        """log2 of each step's largest value; NaN where there is none."""
        return np.log2(np.where(self.history.amax > 0, self.history.amax / self.history.gain, np.nan))

    def middle(self, index: int) -> float:
        """Median log2 magnitude of a step, to a bin; NaN without a non-zero element."""
        running = np.cumsum(self.shares[index, 4:])
        if not running[-1]:
            return math.nan
        return float(np.searchsorted(running, running[-1] / 2)) / _BINS_AN_OCTAVE


def _distance(one: Array, other: Array) -> float:
    """Total variation of two rows of shares; 1 where one of them is empty and the other is not."""
    if bool(one.any()) != bool(other.any()):
        return 1.0
    return float(np.abs(one - other).sum() / 2)


def _chance(left: _Steps, right: _Steps, i: int, j: int) -> float:
    """Expected distance of two independent draws, of as many elements as the two steps have, from their mean."""
    mean = (left.shares[i] + right.shares[j]) / 2
    elements = max(int(left.history.elements[i]), 1), max(int(right.history.elements[j]), 1)
    variance = mean * (1 - mean) * (1 / elements[0] + 1 / elements[1])
    return float(np.sqrt(2 / math.pi * variance).sum() / 2)


def _is_same(left: _Steps, i: int, right: _Steps, j: int) -> bool:
    one, other = left.history, right.history
    energies = one.sum_of_squares[i] / one.gain[i] ** 2, other.sum_of_squares[j] / other.gain[j] ** 2
    return bool(
        one.elements[i] == other.elements[j]
        and np.array_equal(left.shares[i], right.shares[j])
        and one.amax[i] / one.gain[i] == other.amax[j] / other.gain[j]
        and one.amin[i] / one.gain[i] == other.amin[j] / other.gain[j]
        and one.significant_bits[i] == other.significant_bits[j]
        and math.isclose(*energies, rel_tol=SUM_TOLERANCE)
    )


def _largest(shifts: list[float]) -> float:
    """The largest by size, with its sign; NaN if none is known."""
    return float(max((shift for shift in shifts if not math.isnan(shift)), key=abs, default=math.nan))
