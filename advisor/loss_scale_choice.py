"""The loss scale for gradients that are cast without a scale of their own, from their sketches.

fp16 ends at 2^-24 and e5m2 at 2^-16: gradients below that are flushed to zero unless the loss, and with it every
gradient, is multiplied with a power of two first and divided by it before the update. One factor serves all gradients:

- no gradient of the window may come closer to its format's largest value than HEADROOM, for largest values grow;
- among the factors that this allows, the smallest that flushes no gradient's elements beyond what the largest factor
  would, nor rounds it noticeably worse: what is left of the range stays headroom.

A cast to `fp16/none` under a loss scale of S is a cast to `fp16/tensor/static=1/S`, and is scored as that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from advisor.metrics import PooledMetrics, measure
from probes.casts import Cast
from probes.records import GRADIENT, Slot
from probes.scaling import Scale
from probes.window import Window

# All ours. Between a gradient's largest value and the format's: four octaves.
HEADROOM = 16.0
# What counts as the same: underflow, as a share of the elements, and the error's energy, as a ratio.
UNDERFLOW_APART = 1e-3
ERROR_APART = 1.1
# Exponents that are tried: float32 gradients have to stay float32 numbers.
MOST_OCTAVES = 64


@dataclass(frozen=True)
class LossScale:
    """A factor for the loss, a power of two, and what it does to the gradient that needs it most.

    slot, cast        the gradient, and the cast without a scale
    amax              its largest magnitude in the windows, unscaled; 0 where there is none
    unscaled, scaled  share of its non-zero elements that underflow without and with the factor
    """

    factor: float
    slot: Slot
    cast: str
    amax: float
    unscaled: float
    scaled: float

    def told(self, gradients: int) -> str:
        """Why the loss is scaled, for a plan that casts so many gradients without a scale."""
        return (
            f"{gradients} gradients are cast without a scale of their own; as {self.cast.split('/')[0]}, "
            f"{self.slot.site}'s (largest value {self.amax:.1e}) would lose {100 * self.unscaled:.2g}% of its elements "
            f"to underflow, and with the loss multiplied by 2^{round(math.log2(self.factor))} loses "
            f"{100 * self.scaled:.2g}%; no gradient comes closer than {HEADROOM:.0f}× to the format's largest value"
        )


def is_bare(cast: Cast) -> bool:
    """Whether a cast has no scale and fewer exponents than fp32, so that a loss scale helps it."""
    return cast.scale is None and cast.format.exponent_bits < 8


def under(cast: Cast, factor: float) -> Cast:
    """What a bare cast is to the unscaled gradient when the loss is multiplied with `factor`."""
    return Cast(cast.format, "tensor", Scale.parse(f"static={1 / factor!r}"), cast.rounding, cast.saturate)


def loss_scale_for(windows: Sequence[Window], casts: Iterable[Cast]) -> LossScale | None:
    """The factor for all bare casts among these on every gradient of the windows' products.

    None where there is no bare cast or no gradient that a factor would change for the better: the loss stays as it is.
    """
    bare = [cast for cast in casts if is_bare(cast)]
    found = [
        _Gradient(window, slot, cast)
        for window in windows
        for slot in window.product_slots
        if slot.role == GRADIENT
        for cast in bare
    ]
    found = [gradient for gradient in found if gradient.amax > 0]
    if not found:
        return None
    highest = min(gradient.highest for gradient in found)
    if highest <= 0 and not any(gradient.amax > gradient.cast.format.largest for gradient in found):
        return None  # little headroom is no reason to give up small values
    if highest > 0:
        # Nothing is gained where all is as good without a factor: one measurement of most gradients.
        found = [gradient for gradient in found if not gradient.as_good(0, highest)]
        if not found:
            return None
    low, high = min(0, highest), highest
    while low < high:
        middle = (low + high) // 2
        short = [gradient for gradient in found if not gradient.as_good(middle, highest)]
        low, high = (middle + 1, high) if short else (low, middle)
    if high == 0:
        return None
    worst = max(found, key=lambda gradient: (gradient.at(0).underflow, gradient.amax, gradient.slot))
    return LossScale(
        factor=2.0**high,
        slot=worst.slot,
        cast=str(worst.cast),
        amax=worst.amax,
        unscaled=float(worst.at(0).underflow),
        scaled=float(worst.at(high).underflow),
    )


def scaled_rows(rows: Sequence[Mapping[str, object]], factor: float) -> list[dict[str, object]]:
    """Scores of casts `under` a factor, named after the bare casts that they stand for."""
    named = []
    for row in rows:
        cast = Cast.parse(str(row["cast"]))
        bare = Cast(cast.format, rounding=cast.rounding, saturate=cast.saturate)
        named.append({**row, "cast": str(bare), "loss_scale": factor})
    return named


class _Gradient:
    """One gradient under one bare cast, measured at the exponents that are asked for."""

    def __init__(self, window: Window, slot: Slot, cast: Cast) -> None:
        self.slot, self.cast = slot, cast
        self._history, self._dtype = window.history(*slot), window.dtype(slot)
        self._found: dict[int, PooledMetrics] = {}
        unscaled = self._history.amax / self._history.gain
        self.amax = float(unscaled.max(initial=0.0))

    @property
    def highest(self) -> int:
        """The largest exponent that keeps the headroom."""
        room = math.log2(self.cast.format.largest / HEADROOM / self.amax)
        return max(-MOST_OCTAVES, min(math.floor(room), MOST_OCTAVES))

    def at(self, exponent: int) -> PooledMetrics:
        """The metrics under a factor of 2^exponent."""
        if exponent not in self._found:
            self._found[exponent] = measure(self._history, under(self.cast, 2.0**exponent), self._dtype).pooled()
        return self._found[exponent]

    def as_good(self, exponent: int, best: int) -> bool:
        """Whether one exponent flushes and rounds no worse than another."""
        if exponent == best:
            return True
        here, there = self.at(exponent), self.at(best)
        return (
            here.underflow <= there.underflow + UNDERFLOW_APART
            and here.error_energy <= ERROR_APART * there.error_energy
            and here.overflow <= there.overflow
        )
