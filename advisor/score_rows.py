"""The rows of a window's scores: dicts made of its columns, and of what is no number."""

from __future__ import annotations

from typing import Any

from advisor.collecting import nothing_collected
from advisor.flags import FLAGS
from advisor.measured import PooledMetrics
from advisor.score_columns import ScoreColumns
from probes.backward_error import ErrorHistogram
from probes.window import Window

TAIL = 0.99  # the quantile of a product's backward errors that stands beside their median

_ORDER = (
    "site",
    "role",
    "cast",
    "underflow",
    "subnormal",
    "overflow",
    "sqnr_db",
    "dynamic_range_bits",
    "exponent_bits",
    "amax",
    "rms",
    "damage",
    "damage_se",
    "damage_interval",
    "damage_from",
    "bias_damage",
    "bias_damage_se",
    "coherence",
    "shrink_coherence",
    "shrinking",
    "noise_ratio",
    "lost_batch_share",
    "lost_batch_interval",
    "noise_from",
    "systematic_ratio",
    "systematic_ratio_se",
    "lost_updates",
    "epsilon_vanishes",
    "bias",
    "backward_error",
    "whole_batch",
    "flags",
    "axis",
    "other_axes",
    "confidence",
)


@nothing_collected()
def rows_of(scored: ScoreColumns) -> list[dict[str, Any]]:
    """One dict a row."""
    lists = {name: column.to_list() for name, column in scored.columns.items()}
    for name in ("damage", "lost_batch"):
        ends = zip(lists.pop(f"{name}_lower"), lists.pop(f"{name}_upper"), strict=True)
        lists[f"{name}_interval"] = [None if low is None else [low, high] for low, high in ends]
    bits = scored.metrics.flags[scored.slot_of, scored.cast_at].tolist()
    lists["flags"] = [_flags(these) if these else [] for these in bits]
    lists["axis"], lists["other_axes"] = [None] * len(scored), [[] for _ in range(len(scored))]
    for place, (p, k) in enumerate(zip(scored.slot_of.tolist(), scored.cast_at.tolist(), strict=True)):
        if (p, k) in scored.metrics.along:
            (axis, _), *others = scored.metrics.along[p, k]
            lists["axis"][place] = str(axis)
            lists["other_axes"][place] = [{"axis": str(one), **_picked(m.pooled())} for one, m in others]
    lists["backward_error"] = _backward_errors(scored)
    names = [name for name in _ORDER if name in lists] + [name for name in lists if name not in _ORDER]
    return [dict(zip(names, values, strict=True)) for values in zip(*(lists[name] for name in names), strict=True)]


def _flags(bits: int) -> list[str]:
    return [flag for i, flag in enumerate(FLAGS) if bits >> i & 1]


def _picked(metrics: PooledMetrics) -> dict[str, Any]:
    """What a row says of an axis that is not its own."""
    rates = {name: float(getattr(metrics, name)) for name in ("underflow", "subnormal", "overflow", "sqnr_db")}
    return {**rates, "flags": list(metrics.flags)}


def _backward_errors(scored: ScoreColumns) -> list[dict[str, dict[str, float]] | None]:
    wanted = {str(cast) for cast in scored.casts}
    known = backward_errors_of(scored.window, wanted)
    if not known:
        return [None] * len(scored)
    sites = [slot.site if scored.window.is_product(slot) else None for slot in scored.slots]
    texts = [str(cast) for cast in scored.casts]
    found = []
    for p, k in zip(scored.slot_of.tolist(), scored.cast_of.tolist(), strict=True):
        of_site = known.get((sites[p], texts[k])) if sites[p] is not None else None
        found.append(None if of_site is None else {product: dict(told) for product, told in of_site.items()})
    return found


def backward_errors_of(window: Window, casts: set[str]) -> dict[tuple[str | None, str], dict[str, dict[str, float]]]:
    """(site, cast) → product → its backward error's median and 99th percentile; NaN where nothing was measured."""
    found: dict[tuple[str | None, str], dict[str, dict[str, float]]] = {}
    for error in window.backward_errors:
        if error.cast in casts:
            found.setdefault((error.site, error.cast), {})[error.product] = _told(error.errors)
    return found


def _told(errors: ErrorHistogram) -> dict[str, float]:
    return {"median": errors.quantile(0.5), "p99": errors.quantile(TAIL)}
