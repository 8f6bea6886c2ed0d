"""Drift: how far the numbers of a window move, from its first half to its second or from one window to another.

Of each slot: its largest value, the middle of its magnitudes, and under each candidate cast its underflow and the error
energy that decides damage and lost batch. Over all slots: whether their order stays, because a plan gives up the worst
slots first. Magnitudes have their loss scale taken out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from advisor.castnames import parse_cast, short_cast
from advisor.confidence import log_error
from advisor.errors import AdvisorError
from advisor.execution import Stepwise
from advisor.grid import Array
from advisor.metrics import Metrics
from advisor.scores import DEFAULT_CASTS
from probes.casts import Cast
from probes.history import SlotHistory
from probes.records import GRADIENT, Slot
from probes.sketch import BIN_EDGES
from probes.window import Window

FEWEST_RANKED = 5  # ours: slots from which on a rank correlation is told


@dataclass(frozen=True)
class SlotDrift:
    """How far one slot moved, later less earlier.

    amax_octaves    log2 of the median largest value; NaN where one part has no non-zero element
    middle_octaves  mean log2 of the non-zero magnitudes; NaN likewise
    underflow       cast → underflow, pooled, of the later part less that of the earlier
    error_octaves   cast → log2 of the mean error energy (an element's in forward roles, over the signal's in others);
                    NaN where both are exact, infinite where one of them is
    """

    site: str
    role: str
    amax_octaves: float
    middle_octaves: float
    underflow: Mapping[str, float]
    error_octaves: Mapping[str, float]


@dataclass(frozen=True)
class Drift:
    """The slots that both parts have, in the earlier window's order, and how well their order by a number was kept.

    between            "halves" of one window, or "windows"
    damage_ranks       cast → Spearman correlation over the forward slots of their damage as the sketches have it (of
                       their error energy, where a window measured no curvature); NaN with fewer than FEWEST_RANKED
    noise_ranks        cast → the same of error over signal, over the other slots. Where all are alike, as under most
                       8-bit casts with a scale of their own, it is low and does not matter
    underflow_ranks    cast → the same of underflow, over the slots that have any
    """

    between: str
    slots: tuple[SlotDrift, ...]
    damage_ranks: Mapping[str, float]
    noise_ranks: Mapping[str, float]
    underflow_ranks: Mapping[str, float]

    def worst(self, count: int = 5) -> list[SlotDrift]:
        """The slots whose error moved most, under whichever cast."""
        return sorted(self.slots, key=_moved, reverse=True)[:count]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The drift in words: ranges, error, underflow and order."""
        what = "from the first half to the second" if self.between == "halves" else "from one window to the other"
        if not self.slots:
            return (f"no tensor can be compared {what}",)
        amax = [abs(slot.amax_octaves) for slot in self.slots if math.isfinite(slot.amax_octaves)]
        told = []
        if amax:
            low, high = np.quantile(amax, [0.5, 0.9])
            told.append(f"largest values moved by {low:.2f} octaves {what} (median; a tenth by more than {high:.2f})")
        errors = [_moved(slot) for slot in self.slots]
        stayed = float(np.mean([error <= 1 for error in errors]))
        told.append(f"under every cast, the error of {stayed:.0%} of the tensors stayed within a factor of two")
        cast, site, role, change = max(
            ((cast, s.site, s.role, change) for s in self.slots for cast, change in s.underflow.items()),
            key=lambda entry: abs(entry[3]) if math.isfinite(entry[3]) else -1.0,
            default=("", "", "", 0.0),
        )
        if change:
            told.append(f"underflow moved most in {site} {role}: {change:+.2%} in {_short(cast)}")
        for name, ranks in (
            ("damage", self.damage_ranks),
            ("gradient noise", self.noise_ranks),
            ("underflow", self.underflow_ranks),
        ):
            known = [f"{_short(cast)} {rank:.2f}" for cast, rank in ranks.items() if math.isfinite(rank)]
            if known:
                told.append(f"rank correlation of the tensors by {name}: {', '.join(known)}")
        return tuple(told)


def drift(window: Window, later: Window | None = None, casts: Sequence[str | Cast] | None = None) -> Drift:
    """Drift from one window to a later one, or within one from its first half of recorded steps to its second.

    `casts`: by default the usual 8-bit and 16-bit ones. Raises AdvisorError for halves of a window with fewer than two
    steps, UnknownFormat, InvalidCast, CastNotScored, and WindowError for a window that is open.
    """
    one = Stepwise(window, casts or DEFAULT_CASTS)
    return drift_within(one) if later is None else drift_between(one, Stepwise(later, casts or DEFAULT_CASTS))


def drift_within(steps: Stepwise) -> Drift:
    """From the first half to the second; the middle step of an odd number is in neither."""
    half = len(steps.window.steps) // 2
    if not half:
        raise AdvisorError("drift within a window needs at least two recorded steps; or give a later window")
    first, second = set(steps.window.steps[:half]), set(steps.window.steps[-half:])
    return _drift("halves", _Side(steps, first), _Side(steps, second))


def drift_between(one: Stepwise, later: Stepwise) -> Drift:
    """From one window to another, all steps of each."""
    return _drift("windows", _Side(one, set(one.window.steps)), _Side(later, set(later.window.steps)))


@dataclass(frozen=True, eq=False)
class _Side:
    """Some steps of a window."""

    steps: Stepwise
    chosen: set[int]

    def mask(self, slot: Slot) -> NDArray[np.bool_]:
        return np.isin(self.steps.window.history(*slot).steps, list(self.chosen))

    def amax(self, slot: Slot) -> float:
        history, kept = self.steps.window.history(*slot), self.mask(slot)
        kept = kept & (history.amax > 0)
        return float(np.median(history.amax[kept] / history.gain[kept])) if kept.any() else math.nan

    def middle(self, slot: Slot) -> float:
        history = self.steps.window.history(*slot)
        octaves, counts = octaves_of(history)
        kept = np.repeat(self.mask(slot), np.diff(history.offsets))
        return float(np.average(octaves[kept], weights=counts[kept])) if kept.any() else math.nan

    def underflow(self, slot: Slot, cast: str) -> float:
        found, kept = self.steps.of(slot, cast), self.mask(slot)
        total = found.nonzero[kept].sum()
        return float(found.underflows[kept].sum() / total) if total else math.nan

    def error(self, slot: Slot, cast: str) -> float:
        found, kept = self.steps.of(slot, cast), self.mask(slot)
        pooled = Metrics(**{name: _sum(getattr(found, name), kept) for name in _POOLED}, flags=())
        octaves = log_error(pooled, forward=is_forward(self.steps.window, slot))
        return float(octaves[0]) if len(octaves) else math.nan


_POOLED = (
    *("nonzero", "elements", "nonfinite", "underflows", "subnormals", "overflows"),
    *("signal_energy", "error_energy", "bias_energy", "error_spread", "amax", "amin"),
)


def _sum(values: Array, kept: NDArray[np.bool_]) -> Array:
    return np.asarray([values[kept].sum()])


def is_forward(window: Window, slot: Slot) -> bool:
    """Whether a slot has a damage, and not a lost batch share."""
    return window.is_product(slot) and slot.role != GRADIENT


def octaves_of(history: SlotHistory) -> tuple[Array, Array]:
    """log2 of each occupied bin's middle, the loss scale taken out, and its count; steps one after another, [N]."""
    bins = history.bins.astype(np.int64)
    gain = np.repeat(history.gain, np.diff(history.offsets))
    middle = np.log2((BIN_EDGES[bins] + BIN_EDGES[bins + 1]) / 2)
    return middle - np.log2(gain), history.counts.astype(np.float64)


def _drift(between: str, earlier: _Side, later: _Side) -> Drift:
    held = set(later.steps.window.slots)
    shared = [slot for slot in earlier.steps.window.slots if slot in held]
    shared = [slot for slot in shared if earlier.mask(slot).any() and later.mask(slot).any()]
    casts = tuple(earlier.steps.casts)
    errors = {cast: [(earlier.error(slot, cast), later.error(slot, cast)) for slot in shared] for cast in casts}
    underflow = {
        cast: [(earlier.underflow(slot, cast), later.underflow(slot, cast)) for slot in shared] for cast in casts
    }
    forward = np.array([is_forward(earlier.steps.window, slot) for slot in shared], dtype=bool)
    weights = [
        _log_curvatures(side.steps.window, list(itertools.compress(shared, forward))) for side in (earlier, later)
    ]
    curved = all(weights)
    weighed = {
        cast: [
            (one + weights[0][slot], other + weights[1][slot]) if curved and is_one else (one, other)
            for slot, is_one, (one, other) in zip(shared, forward, errors[cast], strict=True)
        ]
        for cast in casts
    }
    slots = [
        SlotDrift(
            *slot,
            amax_octaves=float(np.log2(later.amax(slot) / earlier.amax(slot))),
            middle_octaves=later.middle(slot) - earlier.middle(slot),
            underflow={cast: _change(*underflow[cast][index]) for cast in casts},
            error_octaves={cast: _change(*errors[cast][index]) for cast in casts},
        )
        for index, slot in enumerate(shared)
    ]
    return Drift(
        between,
        tuple(slots),
        damage_ranks={cast: _rank(list(itertools.compress(weighed[cast], forward))) for cast in casts},
        noise_ranks={cast: _rank(list(itertools.compress(errors[cast], ~forward))) for cast in casts},
        underflow_ranks={cast: _rank([pair for pair in underflow[cast] if max(pair) > 0]) for cast in casts},
    )


def _change(before: float, after: float) -> float:
    """after - before; 0 for two equal infinities."""
    return 0.0 if before == after else after - before


def _moved(slot: SlotDrift) -> float:
    """By how many octaves the error moved, under the cast under which it moved most; 0 where nothing is known."""
    return max((abs(change) for change in slot.error_octaves.values() if not math.isnan(change)), default=0.0)


def _log_curvatures(window: Window, slots: Sequence[Slot]) -> dict[Slot, float]:
    """log2 of each slot's curvature; empty where one of them has none."""
    found = {slot: window.evidence(*slot).curvature for slot in slots}
    known = {slot: math.log2(curvature) for slot, curvature in found.items() if curvature}
    return known if len(known) == len(slots) else {}


def _rank(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman correlation of the pairs without NaN; NaN of too few, or where one side is all alike."""
    known = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    known = known[~np.isnan(known).any(axis=1)]
    if len(known) < FEWEST_RANKED or (known == known[0]).all(axis=0).any():
        return math.nan
    return float(spearmanr(known[:, 0], known[:, 1])[0])


def _short(cast: str) -> str:
    return short_cast(parse_cast(cast))
