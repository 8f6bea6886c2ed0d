"""What a diagnosis says: findings, each with a cause, a place, its numbers and what mends it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from advisor.castnames import parse_cast, short_cast

CAUSES: Mapping[str, str] = MappingProxyType(
    {
        "channel_outliers": "a few channels hold values far above all others",
        "heavy_tails": "a few elements, or a few rows, hold values far above all others",
        "small_gradients": "gradients too small for a format without a scale",
        "growing_amax": "a largest value that keeps growing, so that a delayed scale clips it",
        "epsilon_vanishes": "the optimizer's epsilon and small second moments are zero in the state's format",
        "lost_updates": "updates below half a step of the master weights' format",
        "narrow_buffer": "a running statistic that overflows its format, or does not take its moves",
        "tied_parameter": "one parameter with two uses that need different formats",
    }
)
"""Slug → what it means."""


@dataclass(frozen=True)
class Remedy:
    """What choice of a plan mends it.

    kind        "cast" (another cast for the slot), "loss_scale", "storage" (another format of a stored tensor)
    casts       canonical casts that keep the tensor, the narrowest first; of "loss_scale", with that scale
    loss_scale  the power of two to multiply the loss with, else None
    says        the same in words
    """

    kind: str
    says: str
    casts: tuple[str, ...] = ()
    loss_scale: float | None = None


@dataclass(frozen=True)
class Finding:
    """One cause at one place.

    cause      a name of `CAUSES`
    site       the product's, or the dotted name of the parameter or buffer
    role       the slot's; of a tied parameter, the role that it has in the product
    cast       under which it bites, canonical
    severe     whether it bites in the training as it is, under a usual recipe or under a cast that was asked for, by
               more than is harmless; False: it would under a recipe that few would choose, or it costs little
    numbers    what the sentence is made of: shares 0 to 1, ratios, dB
    """

    cause: str
    site: str
    role: str
    cast: str
    severe: bool
    numbers: Mapping[str, float]
    sentence: str
    remedy: Remedy
    size: float = field(default=0.0, compare=False)  # sorts findings of one cause, the largest first

    def __str__(self) -> str:
        return f"{self.sentence}; {self.remedy.says}"

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Finding:
        """Of what `to_dict` gives; what a later version says beside it is left out."""
        remedy = Remedy(**{one.name: told["remedy"][one.name] for one in fields(Remedy) if one.name in told["remedy"]})
        known = {one.name: told[one.name] for one in fields(cls) if one.name in told}
        return cls(**{**known, "remedy": replace(remedy, casts=tuple(remedy.casts))})

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        held = {name: value for name, value in vars(self).items() if name != "size"}
        remedy = {**vars(self.remedy), "casts": list(self.remedy.casts)}
        return {**held, "numbers": dict(self.numbers), "remedy": remedy}


def by_cause(finding: Finding) -> tuple[bool, int, float]:
    """Sorts findings: severe ones first, then by cause, each cause's largest first."""
    return not finding.severe, list(CAUSES).index(finding.cause), -finding.size


def worst_of_each_cause(findings: Iterable[Finding]) -> list[str]:
    """A sentence a cause among the severe findings, of the one that stands first, with how many more there are."""
    of_cause: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.severe:
            of_cause.setdefault(finding.cause, []).append(finding)
    return [
        f"{found[0]}{f' ({len(found) - 1} more of the cause {cause})' if len(found) > 1 else ''}"
        for cause, found in of_cause.items()
    ]


@dataclass(frozen=True)
class Thresholds:
    """From where on something is a finding. All ours."""

    bulk: float = 0.9
    """Of the non-zero elements, the share that is the bulk of a tensor: the rest may be outliers."""
    bulk_sqnr_db: float = 20.0
    """A cast that writes the bulk with less is no better there than 4 bits of their own, which reach 20 dB."""
    kept_sqnr_db: float = 23.0
    """A cast that keeps the bulk: e5m2, the coarsest of the usual ones, reaches 25 where it flushes nothing."""
    channel_ratio: float = 8.0
    """Largest value of an outlying channel over that of the median channel: three of int8's seven bits."""
    channel_share: float = 0.1
    """Channels that may be outlying; where more are, they are not the exception."""
    gain_db: float = 10.0
    """What a scale for each channel, or row, must gain for the bulk to be told as its cause, if it does not keep it."""
    effective: float = 3.0
    """An outlying channel's energy is that of at least as many elements at its largest value: one spike is none."""
    flushed: float = 0.25
    """Share of a bulk from which on it is told as flushed, not by its SQNR."""
    gradient_sqnr_db: float = 20.0
    """What an unscaled cast leaves of a gradient most of which is below its normal numbers: an error of a tenth.
    Normal values of RMS 1e-7 have 15 dB in fp16 and 24% that round to zero; of RMS 3e-7, 25 dB."""
    gradient_share: float = 0.5
    """Of the products' gradients, the share that is to be flushed for that to be severe."""
    growth: float = 4.0
    """Times a largest value grows from the first to the last quarter of the window."""
    records: float = 0.25
    """Share of the steps, at least, at which it exceeds all earlier ones, and so clips under any history."""
    steady: float = 0.8
    """R² of the straight line through log2 of the largest value: a growth that goes on, and no jump."""
    delayed_error: float = 1.5
    """Error energy of the delayed scale over that of the current one."""
    steps: int = 8
    """Recorded steps before growth is told from chance."""
    lost: float = 0.5
    """Share of the updates, by size, that a format does not take."""
    lost_severe: float = 0.9
    """The same where it is severe, in the weight of a product: what is left moves it at a tenth of its speed."""
    empty_denominators: float = 1e-3
    """Share of a parameter's elements whose denominator would be zero."""
    epsilon_share: float = 0.01
    """Of what a step divides by, the share that a larger epsilon may be to be told as a remedy."""
    tolerance_share: float = 1e-3
    """Damage that is harmless, over the window's mean loss: the planner's default."""
    lost_batch: float = 0.02
    """Lost batch share that is harmless: the planner's default."""


THRESHOLDS = Thresholds()
HEADROOM_BITS = 4
"""Ours: octaves between the largest gradient of the window, times the loss scale, and the format's largest value."""


def percent(share: float) -> str:
    """0.973 → 97%; what is not all is not told as 100%."""
    if math.isnan(share):
        return "an unknown share"
    if 0.995 <= share < 1:
        return f"{100 * min(share, 0.9999):.2f}%"
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def times(ratio: float) -> str:
    """8.234 → 8.2×, 80.3 → 80×."""
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def named(cast: str) -> str:
    """A cast in as few letters as tell it: int8/row for int8/row/current/nearest."""
    return short_cast(parse_cast(cast)).removesuffix("/nearest").removesuffix("/current")


def either(names: tuple[str, ...], most: int = 3) -> str:
    """a, b or c."""
    shown = names[:most]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}" if shown else ""
