"""All scores of a window as columns: what `Scores.rows` is made of. `scores.py` says what each column is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.columns import POOLED, MetricColumns, measure_columns
from advisor.confidence import loss_octaves
from advisor.estimates import Estimates, NoiseEstimates, row_medians, table_of
from advisor.grid import Array
from advisor.intervals import damage_intervals, kind_of, lost_shares, noise_intervals
from advisor.lost_updates import epsilon_vanishes, lost_of
from advisor.measured import Measured
from advisor.metrics import has_tiles
from probes.casts import Cast
from probes.measurable import why_not_measurable
from probes.parameter_records import MASTER, WEIGHT_GRADIENT
from probes.records import GRADIENT, Evidence, Slot
from probes.window import Window

LOST = 0.5  # error energy over the tensor's own, from which on a cast loses the tensor: 3 dB. Ours
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Column:
    """One column: an array [rows], and where it is None (None where it never is)."""

    array: NDArray[Any]
    missing: Mask | None = None

    def read_only(self) -> NDArray[Any]:
        """The array, with None or NaN where it is None; not to be written to."""
        found = self.array.view()
        if self.missing is not None and self.missing.any():
            found = self.array.astype(float if self.array.dtype.kind == "f" else object)
            found[self.missing] = np.nan if found.dtype.kind == "f" else None
        found.flags.writeable = False
        return found

    def to_list(self) -> list[Any]:
        """Python's own values."""
        if self.missing is None:
            listed: list[Any] = self.array.tolist()
            return listed
        values = self.array.astype(object)
        values[self.missing] = None
        return list(values)


@dataclass(frozen=True, eq=False)
class ScoreColumns:
    """Columns by name, each with a value a row; rows are pairs of a slot and a cast.

    slots, casts  what was scored; slot_of, cast_of  int64 [rows]: which of them a row is of
    cast_at       int64 [rows]: that cast's column in `metrics`
    """

    window: Window
    slots: Sequence[Slot]
    casts: Sequence[Cast]
    slot_of: NDArray[np.int64]
    cast_of: NDArray[np.int64]
    cast_at: NDArray[np.int64]
    metrics: MetricColumns
    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.slot_of)

    @classmethod
    def of(cls, window: Window, slots: Sequence[Slot], casts: Sequence[Cast]) -> ScoreColumns:
        """Score casts on slots. Raises CastNotScored."""
        evidence = window.all_evidence(slots)
        measured = _measured_casts(evidence)
        every = list(dict.fromkeys([*casts, *measured]))
        places = {str(cast): k for k, cast in enumerate(every)}
        is_product = np.array([window.is_product(slot) for slot in slots], dtype=np.bool_)
        # Where the loss's curvature was not known, the training gradient stands in its place: off by up to 100 times,
        # it is no prediction, and stays in the window's evidence.
        known = window.curvature_from != "gradient"
        forward = is_product & np.array([slot.role != GRADIENT and known for slot in slots], dtype=np.bool_)

        tiled = np.array([has_tiles(cast) for cast in every], dtype=np.bool_)
        has_row = is_product[:, None] | ~tiled
        chosen = set(casts)
        asked = np.array([cast in chosen for cast in every], dtype=np.bool_)
        directional, noise = (table_of([getattr(e, name) for e in evidence], places) for name in _EVIDENCE)
        wanted = has_row & (asked | ~np.isnan(directional) | ~np.isnan(noise))
        metrics = measure_columns(window, slots, every, wanted, forward)

        cast_at = np.array([places[str(cast)] for cast in casts], dtype=np.int64)
        slot_of, cast_of = np.nonzero(has_row[:, cast_at])
        rows = slot_of, cast_at[cast_of]
        columns = {
            "site": _named([slot.site for slot in slots], slot_of),
            "role": _named([slot.role for slot in slots], slot_of),
            "cast": _named([str(cast) for cast in casts], cast_of),
            **_of_metrics(metrics, rows),
            **_of_damage(metrics, directional, forward, evidence, places, rows),
            **_of_noise(metrics, noise, slots, is_product, every, evidence, places, rows),
            **_of_parameters(window, slots, is_product, casts, slot_of, cast_of),
            "bias": Column(_ratio(metrics.bias_energy, metrics.signal_energy)[rows]),
            **_of_first_order(evidence, places, rows),
            "whole_batch": Column(np.array([e.whole_batch for e in evidence], dtype=np.bool_)[slot_of]),
        }
        known_se = columns["damage_se"].array / np.where(columns["damage"].array != 0, columns["damage"].array, np.nan)
        relative_se = np.full((len(slots), len(every)), np.nan)
        relative_se[rows] = known_se
        confidence = metrics.moments.confidence(forward, relative_se, loss_octaves(window.losses))[rows]
        columns["confidence"] = Column(confidence, np.isnan(confidence))
        columns |= _of_intervals(columns, slots, slot_of)
        return cls(window, slots, casts, slot_of, cast_of, cast_at[cast_of], metrics, columns)


_EVIDENCE = "directional", "relative_noise"
_SYSTEMATIC = "systematic_noise", "systematic_noise_se"

Rows = tuple[NDArray[np.int64], NDArray[np.int64]]


def _measured_casts(evidence: Sequence[Evidence]) -> list[Cast]:
    """The casts that scored steps have measured anything of, in the order met; those that cannot be are left aside."""
    alike = dict.fromkeys((*one.directional, *one.relative_noise) for one in evidence)  # most slots have the same
    names = dict.fromkeys(name for names in alike for name in names)
    return [cast for cast in map(Cast.parse, names) if why_not_measurable(cast) is None]


def _named(names: Sequence[str], of: NDArray[np.int64]) -> Column:
    return Column(np.array(names, dtype=object)[of])


def _of_metrics(metrics: MetricColumns, rows: Rows) -> dict[str, Column]:
    held = Measured(
        **{name: getattr(metrics, name)[rows] for name in POOLED},
        nonfinite=np.zeros(len(rows[0])),
        error_spread=np.zeros(len(rows[0])),
        flags=(),
    )
    found = {name: Column(np.asarray(getattr(held, name), dtype=np.float64)) for name in _TOLD}
    return {**found, "rms": Column(_ratio(held.signal_energy, held.elements) ** 0.5)}


_TOLD = ("underflow", "subnormal", "overflow", "sqnr_db", "dynamic_range_bits", "exponent_bits", "amax")


def _of_damage(
    metrics: MetricColumns,
    directional: Array,
    forward: Mask,
    evidence: Sequence[Evidence],
    places: Mapping[str, int],
    rows: Rows,
) -> dict[str, Column]:
    curvature = np.array([np.nan if e.curvature is None else e.curvature for e in evidence], dtype=np.float64)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        sketched = np.where(metrics.elements > 0, 0.5 * curvature * metrics.error_energy / metrics.elements, np.nan)
    here = forward[:, None]
    measured, sketched = np.where(here, directional, np.nan), np.where(here, sketched, np.nan)
    shrinking = _shrinking(metrics)
    estimates = Estimates(measured, sketched, shrinking, metrics.error_energy)
    floor = _least_of_what_is_lost(estimates, metrics)
    with np.errstate(invalid="ignore"):
        lost = floor > np.where(np.isnan(estimates.values), np.inf, estimates.values)
    damage, is_measured = np.where(lost, floor, estimates.values), estimates.is_measured & ~lost
    spread = table_of([e.directional_se for e in evidence], places)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = row_medians(np.where(directional > 0, spread / directional, np.nan))[:, None]
        spread = np.where(is_measured, estimates.of_measured(spread), damage * relative)
    coherence, shrink = estimates.coherence[rows[0]], estimates.shrink_coherence[rows[0]]
    return {
        "damage": _nullable(damage[rows], ~np.isnan(sketched[rows]) | is_measured[rows], forward[rows[0]]),
        "damage_se": _nullable(spread[rows], ~np.isnan(spread[rows]), forward[rows[0]], estimates.is_told[rows]),
        "damage_from": _either("sketch", "directional", is_measured[rows], np.isnan(damage[rows])),
        "coherence": Column(coherence, np.isnan(coherence)),
        "shrink_coherence": Column(shrink, np.isnan(shrink)),
        "shrinking": Column(shrinking[rows]),
    }


def _of_first_order(evidence: Sequence[Evidence], places: Mapping[str, int], rows: Rows) -> dict[str, Column]:
    slopes = {"bias_damage": "first_order", "bias_damage_se": "first_order_se"}
    tables = {name: table_of([getattr(e, held) for e in evidence], places)[rows] for name, held in slopes.items()}
    return {name: Column(table, np.isnan(table)) for name, table in tables.items()}


def _shrinking(metrics: MetricColumns) -> Array:
    """Share of the error energy in the part of the error that is a multiple of the tensor, [P, K]; 0 without error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = metrics.bias_energy / metrics.error_energy * (metrics.bias_energy / metrics.signal_energy)
    return np.where(metrics.error_energy > 0, np.minimum(np.nan_to_num(share), 1.0), 0.0)


_KIND_OF = np.array(
    [[[kind_of(*key, whole) for whole in (False, True)] for key in ((role, "sketch"), (role, "directional"))]
     for role in ("input", "weight")]
)  # fmt: skip


def _of_intervals(
    columns: Mapping[str, Column], slots: Sequence[Slot], slot_of: NDArray[np.int64]
) -> dict[str, Column]:
    """The ends of the damages' intervals, and of lost batch shares, NaN where these are unknown."""
    weight, gradient = (
        np.array([slot.role == role for slot in slots], dtype=np.bool_)[slot_of] for role in ("weight", GRADIENT)
    )
    directional, whole = columns["damage_from"].array == "directional", columns["whole_batch"].array
    kinds = _KIND_OF[weight.astype(np.intp), directional.astype(np.intp), whole.astype(np.intp)]
    damage, error, confidence = (columns[name].array for name in ("damage", "damage_se", "confidence"))
    ends = damage_intervals(damage, error, confidence, kinds)
    noise, source = (columns[name].read_only()[gradient] for name in ("noise_ratio", "noise_from"))
    lost = np.full(ends.shape, np.nan)
    lost[gradient] = lost_shares(noise_intervals(noise, confidence[gradient], source == "measured"))
    found = {"damage_lower": ends[:, 0], "damage_upper": ends[:, 1]}
    found |= {"lost_batch_lower": lost[:, 0], "lost_batch_upper": lost[:, 1]}
    return {name: Column(values, np.isnan(values)) for name, values in found.items()}


def _least_of_what_is_lost(estimates: Estimates, metrics: MetricColumns) -> Array:
    """What a cast that loses the tensor costs at least, [P, K]; NaN for one that does not.

    δ = -x is no small step: the second order along it can be zero (a weight before a BatchNorm, which its size is
    nothing to) and the loss still rises by tenths. An error of its energy in any other direction is the least that is
    to be expected.
    """
    coherence = np.where(np.isnan(estimates.coherence), 1.0, estimates.coherence)[:, None]
    with np.errstate(invalid="ignore"):
        loses = metrics.error_energy > LOST * metrics.signal_energy
    return np.where(loses, coherence * estimates.sketched, np.nan)


def _of_noise(
    metrics: MetricColumns,
    measured: Array,
    slots: Sequence[Slot],
    is_product: Mask,
    casts: Sequence[Cast],
    evidence: Sequence[Evidence],
    places: Mapping[str, int],
    rows: Rows,
) -> dict[str, Column]:
    random = np.array([cast.rounding == "stochastic" for cast in casts], dtype=np.bool_)
    error, flushed = _ratio(metrics.error_energy, metrics.signal_energy), _ratio(metrics.underflows, metrics.nonzero)
    systematic, systematic_se = (table_of([getattr(e, name) for e in evidence], places) for name in _SYSTEMATIC)
    estimates, alike = (
        NoiseEstimates(found, error, _shrinking(metrics), flushed, random)
        for found in (measured, np.maximum(systematic, 0.0))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        # What was not measured is as unsure as what was, in proportion.
        unsure = row_medians(systematic_se / np.maximum(systematic, systematic_se))[:, None] * alike.values
    alike_se = np.where(alike.is_measured, alike.of_measured(systematic_se), unsure)
    batch = np.array([np.nan if not e.batch_noise else e.batch_noise for e in evidence], dtype=np.float64)
    # A weight's gradient that is itself cast has the cast's own error in it; other gradients were measured.
    own = ~is_product & np.array([slot.role == WEIGHT_GRADIENT for slot in slots], dtype=np.bool_)
    told = (own | np.array([bool(e.relative_noise) for e in evidence], dtype=np.bool_)) & ~np.isnan(batch)
    with np.errstate(invalid="ignore"):
        ratio, systematic_ratio, systematic_se = (
            (values / batch[:, None])[rows] for values in (estimates.values, alike.values, alike_se)
        )
        share = ratio / (1 + ratio)
    missing = ~told[rows[0]]
    unknown = np.asarray(np.isnan(systematic).all(axis=1))[rows[0]]
    return {
        "noise_ratio": Column(ratio, missing),
        "lost_batch_share": Column(share, missing),
        "noise_from": _either("sketch", "measured", estimates.is_measured[rows], missing),
        "systematic_ratio": Column(systematic_ratio, missing | unknown),
        "systematic_ratio_se": Column(systematic_se, missing | unknown | np.isnan(systematic_se)),
    }


def _of_parameters(
    window: Window,
    slots: Sequence[Slot],
    is_product: Mask,
    casts: Sequence[Cast],
    slot_of: NDArray[np.int64],
    cast_of: NDArray[np.int64],
) -> dict[str, Column]:
    """What only slots of parameters have."""
    lost, vanishes = np.full((len(slots), len(casts)), np.nan), np.full((len(slots), len(casts)), None, dtype=object)
    for p, slot in enumerate(slots):
        record = None if is_product[p] else window.parameter_record(slot.site)
        if record is None:
            continue
        if slot.role == MASTER:
            found = lost_of(window, slot.site, casts)
            lost[p] = [found.get(str(cast), np.nan) for cast in casts]
        if slot.role in record.states:
            vanishes[p] = [epsilon_vanishes(record, cast.format) for cast in casts]
    told = lost[slot_of, cast_of]
    return {
        "lost_updates": Column(told, np.isnan(told)),
        "epsilon_vanishes": Column(vanishes[slot_of, cast_of]),
    }


def _either(first: str, second: str, is_second: Mask, missing: Mask) -> Column:
    """A column of two texts."""
    return Column(np.array([first, second], dtype=object)[is_second.astype(np.intp)], missing)


def _nullable(values: Array, *known: Mask) -> Column:
    missing = ~np.logical_and.reduce(known)
    return Column(np.where(missing, np.nan, values), missing)


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole; NaN where the whole is nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole != 0, part / whole, np.nan)
