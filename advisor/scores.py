"""The score: what each candidate cast would do to each slot of a window.

Metrics come from the sketches (`metrics.py`), for any cast. Damage and gradient noise come from the scored steps
where the cast was a candidate there; for any other cast they are estimated from the sketches and brought to scale by
the slot's coherence, the ratio of the two estimates for the casts that have both:

    damage (forward roles)  directional: ½·Σ_samples (g·δ)²          from sketches: ½·Σg²·mean(δ²) × coherence
    noise (all roles)       measured in the gradient products        from sketches: error/signal energy × coherence

Noise is divided by the minibatch's own: `lost_batch_share` = 1 − 1/(1 + ratio). What is approximate: Gauss-Newton for
the Hessian, a few draws of it, second order in δ, and the weight gradient's noise standing for all that lies upstream.
A delayed cast's metrics follow the window's steps, but what was measured of it was measured with the scale of the
scored step's own tensor.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from advisor.confidence import confidence_of, loss_octaves
from advisor.intervals import interval_of
from advisor.lost_updates import epsilon_vanishes, lost_of
from advisor.metrics import Metrics, PooledMetrics, has_tiles, measure, require_scored
from probes.casts import Cast
from probes.measurable import why_not_measurable
from probes.parameter_records import MASTER, WEIGHT_GRADIENT
from probes.records import GRADIENT, Evidence, Slot
from probes.step_table import data_frame
from probes.tiles import Axis, axes_of, tiling_for
from probes.window import Window

DEFAULT_CASTS = tuple(map(Cast.parse, ("e4m3fn", "e5m2", "int8", "bf16", "fp16")))


@dataclass(frozen=True)
class Scores:
    """`rows`: one dict a slot and cast, in the window's order.

    site, role, cast           the slot, and the cast's canonical string
    underflow, subnormal, overflow  shares of the non-zero elements, pooled over the window
    sqnr_db, dynamic_range_bits, exponent_bits, amax, rms
    damage, damage_se          predicted rise of the loss and its standard error; None for gradients, and where no
                               known loss was met (`window.curvature_from` is not "loss")
    damage_interval            [lower, upper]: where the damage lies with 95% probability (`intervals.py`), or None
    damage_from                "directional" (measured at the scored steps) or "sketch" (estimated)
    noise_ratio                noise energy that the cast adds to gradients, over the minibatch's own
    lost_batch_share           1 − 1/(1 + noise_ratio)
    lost_updates               of a parameter's master weight: share of the updates that it would not take
                               (`lost_updates.py`); None for other slots, and where nothing can be said
    epsilon_vanishes           of an optimizer's state: whether its epsilon is zero in the cast's format; or None
    confidence                 the chance that the next window gives this damage, or this noise, within a factor of two
                               (`confidence.py`); None with fewer than four steps
    bias                       Σx·δ/Σx²: what clipping and flushing to zero take off systematically
    flags                      why the metrics may be less exact than they look
    axis                       for scales by row, column or block: the dimensions that they run along, which are those
                               of the forward product (of a gradient: of the product that gives the input's), as
                               `along -1`; None for any other cast
    other_axes                 dicts of axis, underflow, subnormal, overflow, sqnr_db, flags: the other products
    """

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame. Raises MissingPackage without pandas."""
        return data_frame(self.rows)

    def of(self, site: str, role: str | None = None) -> list[dict[str, Any]]:
        """The rows of one site, or of one slot."""
        return [row for row in self.rows if row["site"] == site and role in (None, row["role"])]


def score(window: Window, casts: Sequence[str | Cast] | None = None, *, slots: Sequence[Slot] | None = None) -> Scores:
    """Score casts (default: the usual 8-bit and 16-bit ones) on every slot of a window; no training, no tensors.

    Scales by row, column and block are for tensors of products: a parameter's own slots get no rows for them.

    `slots`: score these alone, as `window.product_slots` for what a plan can choose from.

    Raises UnknownFormat or InvalidCast for a cast that is none, CastNotScored for one of which sketches do not tell
    enough (scales by row, column or block, where it was not opened with `finer`), WindowError for one still open.
    """
    chosen = [Cast.parse(cast) if isinstance(cast, str) else cast for cast in casts or DEFAULT_CASTS]
    require_scored(*chosen)
    return Scores(
        [row for slot in (window.slots if slots is None else slots) for row in _slot_rows(window, slot, chosen)]
    )


def _slot_rows(window: Window, slot: Slot, casts: Sequence[Cast]) -> list[dict[str, Any]]:
    history, evidence = window.history(*slot), window.evidence(*slot)
    dtype, is_product = window.dtype(slot), window.is_product(slot)
    axes, dimensions = _axes(window, slot)
    casts = [cast for cast in casts if is_product or not has_tiles(cast)]

    def measured_along(cast: Cast, which: int = 0) -> Metrics:
        tiling = tiling_for(cast, axes[which], axes, dimensions) if has_tiles(cast) else None
        return measure(history, cast, dtype, tiling)

    def by_axis(cast: Cast) -> dict[str, Any]:
        if not has_tiles(cast):
            return {"axis": None, "other_axes": []}
        others = [
            {"axis": str(axis), **_pick(measured_along(cast, which).pooled())}
            for which, axis in enumerate(axes)
            if which
        ]
        return {"axis": str(axes[0]), "other_axes": others}

    measured = map(Cast.parse, {*evidence.directional, *evidence.relative_noise})
    known = {str(cast): cast for cast in measured if why_not_measurable(cast) is None}
    known |= {str(cast): cast for cast in casts}
    steps = {name: measured_along(cast) for name, cast in known.items()}
    metrics = {name: found.pooled() for name, found in steps.items()}
    # Where the loss's curvature was not known, the training gradient stands in its place: off by up to 100 times, it
    # is no prediction, and stays in the window's evidence.
    moves = loss_octaves(window.losses)
    forward = is_product and slot.role != GRADIENT and window.curvature_from != "gradient"
    damage = _Estimate(
        evidence.directional if forward else {},
        {name: _damage_from_sketch(found, evidence) for name, found in metrics.items()} if forward else {},
    )
    noise = _Estimate(
        evidence.relative_noise,
        {name: _ratio(found.error_energy, found.signal_energy) for name, found in metrics.items()},
    )
    is_gradient = slot.role == WEIGHT_GRADIENT and not is_product
    rows = [_row(slot, str(cast), metrics[str(cast)], evidence, damage, noise, is_gradient) for cast in casts]
    for row, cast in zip(rows, casts, strict=True):
        row |= by_axis(cast)
        row["confidence"] = _confidence(row, steps[row["cast"]], forward, moves)
        ends = interval_of(row)
        row["damage_interval"] = None if ends is None else list(ends)
    if not is_product:
        _add_parameter(rows, window, slot, casts)
    return rows


def _add_parameter(rows: Sequence[dict[str, Any]], window: Window, slot: Slot, casts: Sequence[Cast]) -> None:
    """What only slots of parameters have."""
    record = window.parameter_record(slot.site)
    if record is None:
        return
    lost = lost_of(window, slot.site, casts) if slot.role == MASTER else {}
    for row, cast in zip(rows, casts, strict=True):
        row["lost_updates"] = lost.get(str(cast))
        if slot.role in record.states:
            row["epsilon_vanishes"] = epsilon_vanishes(record, cast.format)


def _confidence(row: dict[str, Any], steps: Metrics, forward: bool, moves: float) -> float | None:
    known = row["damage"] and row["damage_se"] is not None
    return confidence_of(steps, forward, row["damage_se"] / row["damage"] if known else None, moves)


def _axes(window: Window, slot: Slot) -> tuple[tuple[Axis, ...], int]:
    """The axes of a slot's tensor in its products, and its number of dimensions; none for what is no operand."""
    if not window.is_product(slot):
        return (), 0
    site = window.site(slot.site)
    dimensions = len(site.shapes[slot.role])
    return axes_of(site.op, site.roles, slot.role, dimensions), dimensions


def _pick(metrics: PooledMetrics) -> dict[str, Any]:
    """What a row says of an axis that is not its own."""
    rates = {name: float(getattr(metrics, name)) for name in ("underflow", "subnormal", "overflow", "sqnr_db")}
    return {**rates, "flags": list(metrics.flags)}


@dataclass(frozen=True)
class _Estimate:
    """A measured value where there is one, otherwise the sketch's, times the coherence of those that have both."""

    measured: dict[str, float]
    sketched: dict[str, float | None]

    @property
    def coherence(self) -> float | None:
        pairs = [(value, self.sketched.get(cast)) for cast, value in self.measured.items()]
        ratios = [value / sketched for value, sketched in pairs if sketched and value > 0]
        return statistics.median(ratios) if ratios else None

    def of(self, cast: str) -> tuple[float | None, str | None]:
        if cast in self.measured:
            return self.measured[cast], "directional"
        sketched = self.sketched.get(cast)
        if sketched is None:
            return None, None
        return sketched * (1.0 if self.coherence is None else self.coherence), "sketch"


def _row(
    slot: Slot,
    cast: str,
    metrics: PooledMetrics,
    evidence: Evidence,
    damage: _Estimate,
    noise: _Estimate,
    is_weight_gradient: bool,
) -> dict[str, Any]:
    predicted, source = damage.of(cast)
    # A weight's gradient that is itself cast has the cast's own error in it; other gradients were measured.
    relative = noise.of(cast)[0] if evidence.relative_noise or is_weight_gradient else None
    ratio = None if relative is None or not evidence.batch_noise else relative / evidence.batch_noise
    return {
        "site": slot.site,
        "role": slot.role,
        "cast": cast,
        "underflow": float(metrics.underflow),
        "subnormal": float(metrics.subnormal),
        "overflow": float(metrics.overflow),
        "sqnr_db": float(metrics.sqnr_db),
        "dynamic_range_bits": float(metrics.dynamic_range_bits),
        "exponent_bits": float(metrics.exponent_bits),
        "amax": float(metrics.amax),
        "rms": _ratio(metrics.signal_energy, metrics.elements, power=0.5),
        "damage": predicted,
        "damage_se": _spread(cast, predicted, source, evidence),
        "damage_from": source,
        "coherence": damage.coherence,
        "noise_ratio": ratio,
        "lost_batch_share": None if ratio is None else ratio / (1 + ratio),
        "lost_updates": None,
        "epsilon_vanishes": None,
        "bias": _ratio(metrics.bias_energy, metrics.signal_energy),
        "whole_batch": evidence.whole_batch,
        "flags": list(metrics.flags),
    }


def _damage_from_sketch(metrics: PooledMetrics, evidence: Evidence) -> float | None:
    if evidence.curvature is None or not metrics.elements:
        return None
    return 0.5 * evidence.curvature * metrics.error_energy / metrics.elements


def _spread(cast: str, predicted: float | None, source: str | None, evidence: Evidence) -> float | None:
    """Standard error: measured, or the relative one of the measured casts taken over."""
    if predicted is None:
        return None
    if source == "directional":
        return evidence.directional_se[cast]
    relative = [evidence.directional_se[name] / value for name, value in evidence.directional.items() if value > 0]
    return predicted * statistics.median(relative) if relative else None


def _ratio(part: float, whole: float, power: float = 1.0) -> float:
    """(part/whole)^power; NaN where the whole is nothing."""
    return float((part / whole) ** power) if whole else float("nan")
