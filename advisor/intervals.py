"""Intervals: where a damage lies with 95% probability, and where a plan's total does.

What a damage really comes to in the training that follows is what the window predicts, times factors. Each is taken as
normal in octaves:

    centre        what brute force measures over what is predicted, in the middle of the models tried
    window        draws and drift: what `confidence.py` says of the next window (its chance of staying within a factor
                  of two, turned back into a standard deviation); unknown with fewer than four steps, and taken wide
    common, own   calibration: how far the middle of one model is from that of all, which all its slots of a kind share,
                  and how far a slot is from the middle of its model

    lower, upper = damage · 2^(centre ∓ 1.96·σ),  σ² = window² + common² + own²

Where a damage is not twice its standard error it cannot be told from zero: the interval starts at 0, and its upper end
is a bound, the damage and 1.96·doubt standard errors, times the other factors. Draws are no factor there: what they add
is an amount, and a factor made of it, of an error of four times the damage say, would be one of thousands. A damage of
0 without any error is exactly 0.

A sum's interval: what slots have of their own is independent and shrinks, by the variance of a sum of log-normals; what
they share does not. Shared are the calibration's common parts, of all kinds together, for the kinds of a model err the
same way; and of the window's part the least that any slot has beyond OWN_FLOOR: the loss that falls, and the batches
that happened to be scored, are one and the same for all.

Everything is arrays over slots and casts, so that thousands take no longer than one. The figures are measured by
`benchmarks/intervals.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advisor.confidence import DAMAGE, octaves_of, octaves_of_draws
from probes.records import GRADIENT

Array = NDArray[np.float64]

LEVEL = 0.95
DEVIATIONS = 1.959964  # of a normal, that hold LEVEL of it


@dataclass(frozen=True)
class Calibration:
    """What brute force says of predicted damages of one kind.

    ratio    measured over predicted, the median of the models' medians
    common   standard deviation of a model's median about that, octaves: the same for all its slots
    own      standard deviation of a slot about its model's median, octaves, draws and drift taken out
    """

    ratio: float
    common: float
    own: float


# The one place for it: (role, what the damage is computed from) → figures of ours, from `python benchmarks/intervals.py
# --first-seed 0 --seeds 6 --fit`, rounded up; it finds nothing of a slot's own beyond its window: we keep some.
# "input" stands for every forward role but a weight; "whole batch" is where samples mix behind the site.
CALIBRATION: dict[tuple[str, str], Calibration] = {
    ("input", "directional"): Calibration(ratio=1.25, common=0.5, own=0.2),
    ("input", "sketch"): Calibration(ratio=1.3, common=0.5, own=0.3),
    ("weight", "directional"): Calibration(ratio=1.4, common=0.55, own=0.2),
    ("weight", "sketch"): Calibration(ratio=1.5, common=0.6, own=0.3),
    ("input", "whole batch"): Calibration(ratio=1.25, common=0.6, own=0.2),
    ("weight", "whole batch"): Calibration(ratio=1.3, common=0.65, own=0.2),
}
# Of a gradient's noise ratio, measured at the scored steps or told by other casts' noise. Figures of ours: what `python
# -m benchmarks.advice.noise_calibration` takes of windows with eight scored steps, and `common` of the default two.
NOISE_CALIBRATION: dict[str, Calibration] = {
    "measured": Calibration(ratio=1.1, common=0.4, own=0.15),
    "sketch": Calibration(ratio=1.1, common=0.4, own=0.35),
}
UNKNOWN_WINDOW = 1.5  # octaves, where a window has too few steps for a confidence. Ours
MOST_DRAWS = 1e6  # octaves of draws beyond which float64 does not tell what else there is
OWN_FLOOR = 0.3  # octaves of a window's part that are a slot's own, whatever the others do. Ours

_KINDS = tuple(CALIBRATION)
_CENTRE = np.log2([each.ratio for each in CALIBRATION.values()])
_COMMON = np.array([each.common for each in CALIBRATION.values()])
_OWN = np.array([each.own for each in CALIBRATION.values()])


def kind_of(role: str, damage_from: str | None, whole_batch: bool) -> int:
    """Which calibration a score has, as an index for the functions below."""
    return _KINDS.index(kind_named(role, damage_from, whole_batch))


def kind_named(role: str, damage_from: str | None, whole_batch: bool) -> tuple[str, str]:
    """The same as a key of CALIBRATION."""
    source = "whole batch" if whole_batch else "directional" if damage_from == "directional" else "sketch"
    return ("weight" if role == "weight" else "input", source)


def damage_intervals(damage: ArrayLike, damage_se: ArrayLike, confidence: ArrayLike, kinds: ArrayLike) -> Array:
    """Lower and upper ends, [N, 2] loss units; NaN for a damage that is NaN.

    damage, damage_se   loss units, NaN where unknown; a standard error that is unknown widens nothing by itself
    confidence          of `confidence.py`, 0 to 1, NaN where unknown; with 0 the upper end is infinite
    kinds               of `kind_of`
    """
    value, error, sure = (np.asarray(part, dtype=np.float64) for part in (damage, damage_se, confidence))
    kind = np.asarray(kinds, dtype=np.int64)
    least = np.maximum(value, 0.0)
    told = value > 2 * np.nan_to_num(error)
    window = _window_octaves(sure)
    window = np.where(told, window, _without_draws(window, value, error))
    reach = DEVIATIONS * np.sqrt(window**2 + (_COMMON**2 + _OWN**2)[kind])
    with np.errstate(over="ignore", invalid="ignore"):
        lower = np.where(told, least * np.exp2(_CENTRE[kind] - reach), 0.0)
        highest = np.where(told, least, least + DEVIATIONS * DAMAGE.doubt * np.nan_to_num(error))
        upper = np.where(highest > 0, highest * np.exp2(_CENTRE[kind] + reach), 0.0)
    return np.where(np.isnan(value)[..., None], np.nan, np.stack([lower, upper], axis=-1))


def total_interval(
    damage: ArrayLike, damage_se: ArrayLike, confidence: ArrayLike, kinds: ArrayLike
) -> tuple[float, float]:
    """The ends of the interval of the sum, loss units; arguments as above. NaN where one damage is NaN.

    Slots that cannot be told from zero add to the upper end what they may come to, as independent.
    """
    value, error, sure = (np.asarray(part, dtype=np.float64) for part in (damage, damage_se, confidence))
    kind = np.asarray(kinds, dtype=np.int64)
    if np.isnan(value).any():
        return math.nan, math.nan
    told = value > 2 * np.nan_to_num(error)
    faint = damage_intervals(value[~told], error[~told], sure[~told], kind[~told])[:, 1]
    beyond = float(math.hypot(*faint))
    value, error, sure, kind = value[told], error[told], sure[told], kind[told]
    if not len(value):
        return 0.0, beyond
    total = math.fsum(value.tolist())
    weight = value / total
    window = _window_octaves(sure)
    if np.isinf(window).any():
        return 0.0, math.inf
    draws = octaves_of_draws(error, value)
    shared = math.sqrt(max(float((window**2 - draws**2).min()) - OWN_FLOOR**2, 0.0))
    own = np.maximum(window**2 - shared**2, 0.0) + _OWN[kind] ** 2
    apart = math.log1p(float((weight**2 * np.expm1(np.minimum(own * math.log(2) ** 2, 50.0))).sum())) / math.log(2) ** 2
    reach = DEVIATIONS * math.sqrt(apart + shared**2 + float((weight * _COMMON[kind]).sum()) ** 2)
    centre = float((weight * 2.0 ** _CENTRE[kind]).sum())
    return total * centre * 2.0**-reach, total * centre * 2.0**reach + beyond


def interval_of(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of one score, a row of `Scores.rows`; None where its damage is unknown. A gradient has none."""
    return intervals_of([row])[0]


def intervals_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float] | None]:
    """The same of many, in their order, at little more than the price of one."""
    if not rows:
        return []
    ends = damage_intervals(*_columns(rows)).tolist()
    return [None if math.isnan(lower) else (lower, upper) for lower, upper in ends]


def noise_intervals(noise_ratio: ArrayLike, confidence: ArrayLike, is_measured: ArrayLike) -> Array:
    """Where gradients' noise ratios lie with 95% probability, [N, 2]; NaN for one that is NaN.

    confidence    of `confidence.py`, 0 to 1, NaN where unknown; with 0 the interval is from 0 to infinity
    is_measured   the cast's noise was measured; otherwise other casts' tells of it
    """
    ratio, sure = (np.asarray(part, dtype=np.float64) for part in (noise_ratio, confidence))
    kinds = [NOISE_CALIBRATION[name] for name in ("sketch", "measured")]
    centre, common, own = (
        np.array([getattr(kind, name) for kind in kinds])[np.asarray(is_measured, dtype=np.intp)]
        for name in ("ratio", "common", "own")
    )
    reach = DEVIATIONS * np.sqrt(_window_octaves(sure) ** 2 + common**2 + own**2)
    with np.errstate(over="ignore", invalid="ignore"):
        ends = [np.where(ratio > 0, ratio * centre * np.exp2(side), ratio) for side in (-reach, reach)]
    return np.stack(ends, axis=-1)


def lost_shares(noise_ratio: ArrayLike) -> Array:
    """Shares of the batch that are lost to noise of these ratios: 1 - 1/(1 + r), 1 for an infinite one."""
    with np.errstate(divide="ignore"):
        return np.asarray(1 - 1 / (1 + np.asarray(noise_ratio, dtype=np.float64)))


def noise_interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Where a gradient's noise ratio lies with 95% probability; None where it is unknown.

    Of an operand, whose confidence is that of its damage, none is told.
    """
    ratio = row.get("noise_ratio")
    if ratio is None or math.isnan(ratio) or row["role"] != GRADIENT:
        return None
    confidence = _columns([row])[2]
    low, high = noise_intervals([ratio], confidence, [row.get("noise_from") != "sketch"])[0].tolist()
    return low, high


def interval_of_sum(rows: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The interval of the sum of these rows' damages, each of another slot; None where one is unknown."""
    table = list(rows)
    if any(row.get("damage") is None for row in table):
        return None
    lower, upper = total_interval(*_columns(table))
    return None if math.isnan(lower) else (lower, upper)


def centred(row: Mapping[str, Any]) -> float:
    """The middle of a score's interval, on the scale of factors: its damage, calibrated."""
    return float(row["damage"] * 2.0 ** _CENTRE[_kind(row)])


def spread_of(row: Mapping[str, Any]) -> float:
    """The σ of a score's interval, octaves."""
    kind, confidence = _kind(row), row.get("confidence")
    window = _window_octaves(np.array(math.nan if confidence is None else confidence))
    return float(np.sqrt(window**2 + _COMMON[kind] ** 2 + _OWN[kind] ** 2))


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    numbers = [
        np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
        for name in ("damage", "damage_se", "confidence")
    ]
    return numbers[0], numbers[1], numbers[2], np.array([_kind(row) for row in rows], dtype=np.int64)


def _kind(row: Mapping[str, Any]) -> int:
    return kind_of(row["role"], row.get("damage_from"), bool(row.get("whole_batch")))


def _window_octaves(confidence: Array) -> Array:
    return np.where(np.isnan(confidence), UNKNOWN_WINDOW, octaves_of(confidence))


def _without_draws(window: Array, value: Array, error: Array) -> Array:
    """The window's σ but for what draws add to it, octaves. Where they are nearly all of it, the rest is unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(value == 0, 0.0, octaves_of_draws(error, value))
        rest = np.sqrt(np.maximum(window**2 - draws**2, 0.0))
    return np.where(np.isinf(window), window, np.where(np.abs(draws) > MOST_DRAWS, UNKNOWN_WINDOW, rest))
