"""Gradients that are too small for a format without a scale, and the loss scale that lifts them into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from advisor.castnames import parse_cast, short_cast
from advisor.columns import POOLED, measure_columns
from advisor.diagnosis.findings import HEADROOM_BITS, THRESHOLDS, Finding, Remedy, percent
from advisor.diagnosis.recipes import Recipes
from advisor.metrics import PooledMetrics, measure
from probes.casts import Cast
from probes.parameter_records import WEIGHT_GRADIENT
from probes.records import GRADIENT, Slot
from probes.window import Window

MOST_OCTAVES = 126  # of a loss scale: float32 holds it and its reciprocal


def small_gradients(window: Window, recipes: Recipes) -> Iterator[Finding]:
    """Of each product whose gradient the first unscaled cast flushes (any of them, where they were asked for).

    Severe where most gradients of the model are: those of queries and keys are tiny in healthy trainings, early on.
    A gradient that the training itself has in fp16 is looked at as it is, with the training's own loss scale.
    """
    found = list(_flushed(window, recipes.unscaled))
    gradients = sum(slot.role == GRADIENT for slot in window.product_slots)
    under_first = sum(bitten[0][1] == recipes.unscaled[0] for _, bitten, _ in found)
    most = under_first >= THRESHOLDS.gradient_share * gradients
    scale = loss_scale_for(window)
    lifted = {} if scale is None else _lifted(window, [(slot, bitten[0][1]) for slot, bitten, _ in found], scale)
    for slot, bitten, own in found:
        severe = recipes.asked or (bitten[0][1] == recipes.unscaled[0] and (own or most))
        yield _finding(slot, bitten, scale, lifted.get(slot), severe, own)


def _flushed(window: Window, casts: Sequence[Cast]) -> Iterator[tuple[Slot, list[tuple[PooledMetrics, Cast]], bool]]:
    """Slots with what flushes them, and whether they are looked at in the training's own format."""
    slots = [slot for slot in window.product_slots if slot.role == GRADIENT]
    every = _measured(window, slots, casts)
    for slot, of_slot in zip(slots, every, strict=True):
        own = _is_own(window, slot)
        found = list(zip(of_slot, casts, strict=True))
        if own:  # as it stands in memory: with the loss scale that it was recorded with
            history = window.history(*slot)
            history = replace(history, gain=np.ones_like(history.gain))
            found = [(measure(history, cast, window.dtype(slot)).pooled(), cast) for cast in casts]
        bitten = [pair for pair in found if is_flushed(pair[0])]
        if bitten:
            yield slot, bitten, own


def _is_own(window: Window, slot: Slot) -> bool:
    """Whether the training itself has this gradient in fp16."""
    return window.dtype(slot) == "float16"


def _measured(window: Window, slots: Sequence[Slot], casts: Sequence[Cast]) -> list[list[PooledMetrics]]:
    """`measure(history, cast, dtype).pooled()` of each slot under each cast, all at once; what columns do not have of
    it (`nonfinite`, `error_spread`, `flags`) is NaN and empty."""
    every = np.ones((len(slots), len(casts)), dtype=np.bool_)
    columns = measure_columns(window, slots, casts, every, np.zeros(len(slots), dtype=np.bool_))
    values = {name: getattr(columns, name).tolist() for name in POOLED}
    return [
        [
            PooledMetrics(
                **{name: values[name][p][k] for name in POOLED}, nonfinite=math.nan, error_spread=math.nan, flags=()
            )
            for k in range(len(casts))
        ]
        for p in range(len(slots))
    ]


def _lifted(window: Window, pairs: Sequence[tuple[Slot, Cast]], scale: float) -> dict[Slot, float]:
    """The share of each slot that underflows in the cast's format under a loss scale."""
    found: dict[Slot, float] = {}
    for cast in dict.fromkeys(cast for _, cast in pairs):
        slots = [slot for slot, other in pairs if other == cast]
        under = parse_cast(f"{cast.format.name}/tensor/static={1 / scale!r}")
        measured = _measured(window, slots, [under])
        found |= {slot: metrics.underflow for slot, (metrics,) in zip(slots, measured, strict=True)}
    return found


def is_flushed(metrics: PooledMetrics) -> bool:
    """Whether a cast without a scale loses a gradient for being small: not where values overflow."""
    if not metrics.nonzero or metrics.overflows > 0:
        return False
    small = metrics.underflows + metrics.subnormals > metrics.nonzero / 2
    return small and metrics.sqnr_db <= THRESHOLDS.gradient_sqnr_db


def loss_scale_for(window: Window) -> float | None:
    """The power of two that brings the window's largest gradient 4 octaves below fp16's largest value; None without
    a finite gradient. It is that of the products' gradients and the parameters', on the loss without any scale."""
    largest = 0.0
    for slot in window.slots:
        if slot.role in (GRADIENT, WEIGHT_GRADIENT):
            history = window.history(*slot)
            largest = max(largest, float((history.amax.astype(np.float64) / history.gain).max(initial=0.0)))
    if not 0 < largest < math.inf:
        return None
    octaves = math.floor(math.log2(parse_cast("fp16").format.largest / largest)) - HEADROOM_BITS
    return 2.0 ** max(-MOST_OCTAVES, min(octaves, MOST_OCTAVES))


def _finding(
    slot: Slot,
    bitten: list[tuple[PooledMetrics, Cast]],
    scale: float | None,
    lifted: float | None,
    severe: bool,
    own: bool,
) -> Finding:
    metrics, cast = bitten[0]
    rms = math.sqrt(metrics.signal_energy / metrics.nonzero)
    shares = [f"{percent(each.underflow)} of it in {one.format.name}" for each, one in bitten]
    numbers = {"rms": rms, "amax": metrics.amax, "underflow": metrics.underflow, "sqnr_db": metrics.sqnr_db}
    scaled = "with its loss scale" if own else "without a scale"
    sentence = f"{slot.site} {slot.role}: values around {rms:.0e}, and {scaled} {' and '.join(shares)} "
    sentence += "rounds to zero" if len(shares) == 1 else "round to zero"
    if scale is None or lifted is None:
        return Finding(
            "small_gradients", *slot, str(cast), severe, numbers, sentence, Remedy("cast", "give it a scale")
        )
    numbers["underflow_scaled"] = lifted
    scaled_casts = tuple(str(parse_cast(f"{name}/tensor")) for name in ("e5m2", "e4m3fn"))
    return Finding(
        cause="small_gradients",
        site=slot.site,
        role=slot.role,
        cast=str(cast),
        severe=severe,
        numbers=numbers,
        sentence=sentence,
        remedy=Remedy(
            "loss_scale",
            f"a loss scale of {scale:.0f} (2^{round(math.log2(scale))}) leaves {percent(lifted)} underflow "
            f"in {cast.format.name}, and so does a scale of its own, as {short_cast(parse_cast(scaled_casts[0]))} has",
            scaled_casts,
            scale,
        ),
        size=metrics.underflow,
    )
