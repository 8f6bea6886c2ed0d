"""Backward error of a matrix product: |L·R − Q(L)·Q(R)| / (|L|·|R|), elementwise (Rasquinha and Tabak 2024, sec. IV-A).

Below the line stands the product of magnitudes, so that cancellation in L·R does not count against a format. Both
products are summed in float64, so that only the cast's error shows. Of random errors it falls with the square root of
the inner dimension.

Values are kept as a histogram of their logarithm, 4 bins an octave: histograms add, over calls, steps and processes,
and any quantile can be asked of them later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.casts import Cast, CastState
from probes.contractions.contraction import Extent
from probes.errors import InvalidCast
from probes.numbers import from_json
from probes.scaling import Scale

BINS_AN_OCTAVE = 4
FIRST_BIN, LAST_BIN = -40 * BINS_AN_OCTAVE, 16 * BINS_AN_OCTAVE - 1
"""What lies outside 2^-40 and 2^16 is counted in the first or last bin. Rounding to nearest with saturation at most
doubles a value or makes it 0, so that its error is 3 at most; stochastic rounding may raise small values more."""

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def backward_errors(left: Tensor, right: Tensor, cast: Cast, extents: tuple[Extent, Extent] | None = None) -> Tensor:
    """float64 [.., M, N] for left [.., M, K] and right [.., N, K], float32: columns stand as rows.

    extents  of the whole tensors of which left and right are a part, for a scale of the tensor; by default their own

    Scales of rows and blocks run along K. NaN where the exact product is NaN or Inf, and where both products are 0;
    Inf where the cast made Inf or NaN of a finite product. Stochastic rounding is the same for the same tensors.
    Raises InvalidCast for scales that a sample of rows does not tell (`refuse_unsampled`).
    """
    exact, magnitudes = product_and_magnitudes(left, right)
    (product,) = cast_products(left, right, [cast], extents)
    return relative_to(magnitudes, exact, product, left.shape[-1])


def product_and_magnitudes(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L·R and |L|·|R|, float64 [.., M, N]: what all casts of one product are held against."""
    wide, across = left.double(), right.double().transpose(-1, -2)
    return wide @ across, wide.abs() @ across.abs()


AT_ONCE = 1 << 20  # float64 numbers of cast operands that are multiplied together


def cast_products(
    left: Tensor, right: Tensor, casts: Sequence[Cast], extents: tuple[Extent, Extent] | None = None
) -> Tensor:
    """Q(L)·Q(R) for each cast, float64 [casts, .., M, N]. See `backward_errors`.

    Several at once: where threads outnumber cores, each call into the matrix library may wait for one that is off.
    """
    if extents is not None:
        for cast in casts:
            refuse_unsampled(cast)
    at_once, products = max(1, AT_ONCE // max(left.numel(), right.numel(), 1)), []
    for start in range(0, len(casts), at_once):
        first, second = (
            torch.stack([with_scale_of(cast, extent)(one, CastState(seed)) for cast in casts[start : start + at_once]])
            for seed, (one, extent) in enumerate(zip((left, right), extents or (None, None), strict=True))
        )
        products.append(first.double() @ second.double().transpose(-1, -2))
    return torch.cat(products)


def relative_to(magnitudes: Tensor, exact: Tensor, cast: Tensor, terms: int) -> Tensor:
    """|exact − cast| / magnitudes, for casts' products [.., M, N] or [casts, .., M, N] of so many terms.

    See `backward_errors` for what is no number. What float64's own summing may have done is 0.
    """
    errors = (exact - cast).abs() / magnitudes  # 0/0 is NaN: nothing was multiplied, nothing lost
    errors = errors.masked_fill(errors < terms * 2.0**-52, 0.0)
    errors = errors.masked_fill(~cast.isfinite(), math.inf)
    return errors.masked_fill(~exact.isfinite(), math.nan)


def with_scale_of(cast: Cast, extent: Extent | None) -> Cast:
    """The cast as it is for the whole tensor, to be called with a part of it."""
    if extent is None or cast.granularity != "tensor" or cast.needs_no_scale or cast.is_static:
        return cast
    return replace(cast, scale=Scale("static", value=cast.scale_for(extent.largest)))


def refuse_unsampled(cast: Cast) -> None:
    """Raises InvalidCast for scales that come from more than a row and less than the tensor, or from both."""
    if cast.granularity in ("column", "block128x128") or (cast.scale is not None and cast.scale.rule == "nvfp4"):
        raise InvalidCast(
            f"the backward error of {cast} cannot be sampled: its scales depend on rows that are not looked at; "
            "take a scale by tensor, by row or by block within a row"
        )


@dataclass(frozen=True)
class ErrorHistogram:
    """How backward errors are distributed. Histograms of one product add.

    counts      of the bins from `first` on; bin b holds errors from 2^(b/4) to 2^((b+1)/4)
    exact       errors of 0
    idle        elements where nothing was multiplied: 0/0, no part of the distribution
    non_finite  elements whose exact product is NaN or Inf, no part of it either
    largest     error of all, 0 where there is none; Inf where a cast made Inf or NaN of a finite product
    """

    first: int = 0
    counts: tuple[int, ...] = ()
    exact: int = 0
    idle: int = 0
    non_finite: int = 0
    largest: float = 0.0

    @property
    def sampled(self) -> int:
        """Elements of the product that were looked at."""
        return self.measured + self.idle + self.non_finite

    @property
    def measured(self) -> int:
        """Elements that have a backward error."""
        return sum(self.counts) + self.exact

    def plus(self, other: ErrorHistogram) -> ErrorHistogram:
        """Of the elements of both."""
        parts = [part for part in (self, other) if part.counts]
        first = min((part.first for part in parts), default=0)
        counts = [0] * max((part.first - first + len(part.counts) for part in parts), default=0)
        for part in parts:
            for place, count in enumerate(part.counts, part.first - first):
                counts[place] += count
        return ErrorHistogram(
            first,
            tuple(counts),
            self.exact + other.exact,
            self.idle + other.idle,
            self.non_finite + other.non_finite,
            max(self.largest, other.largest),
        )

    def quantile(self, share: float) -> float:
        """The error that this share of the measured elements do not exceed; NaN where none was measured.

        Interpolated within a bin, on the logarithm: off by a bin's width at most, a factor of 1.19. The quantile of 1
        is the largest error itself. Raises ValueError for a share outside 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"a quantile is of a share from 0 to 1, got {share!r}")
        if not self.measured:
            return math.nan
        wanted = share * self.measured - self.exact
        if share == 1 or not self.counts:
            return self.largest
        if wanted <= 0:
            return 0.0
        for place, count in enumerate(self.counts, self.first):
            if wanted <= count:
                within = 2.0 ** ((place + wanted / count) / BINS_AN_OCTAVE)
                return min(within, self.largest)
            wanted -= count
        return self.largest

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ErrorHistogram:
        """What `numbers.plain` wrote. Raises KeyError, TypeError or ValueError for what cannot be."""
        first, counts = _whole(data["first"], FIRST_BIN), [_whole(count) for count in _list(data["counts"])]
        if counts and first + len(counts) - 1 > LAST_BIN:
            raise ValueError(f"{len(counts)} bins from {first} on go beyond {LAST_BIN}")
        largest = float(from_json(data["largest"]))
        if not largest >= 0 or (largest > 0) != any(counts):
            raise ValueError(f"a largest error of {largest!r} does not fit {sum(counts)} errors that are not 0")
        exact, idle, non_finite = (_whole(data[name]) for name in ("exact", "idle", "non_finite"))
        return cls(first, tuple(counts), exact, idle, non_finite, largest)


def histograms(errors: Tensor, exact: Tensor) -> list[ErrorHistogram]:
    """One for each cast, of `relative_to`'s errors [casts, ..] and the exact product [..] that they are of.

    The exact product tells elements with nothing to measure (0/0) from those that are NaN or Inf.
    """
    non_finite = int((~exact.isfinite()).sum())
    values = errors.flatten(1).cpu().numpy()
    with np.errstate(divide="ignore"):
        octaves = np.log2(values)
    found = []
    for row, logarithms in zip(values, octaves, strict=True):
        positive, zeros = row > 0, int((row == 0).sum())
        inside = np.clip(np.floor(BINS_AN_OCTAVE * logarithms[positive]), FIRST_BIN, LAST_BIN).astype(np.int64)
        idle = len(row) - len(inside) - zeros - non_finite
        if not len(inside):
            found.append(ErrorHistogram(exact=zeros, idle=idle, non_finite=non_finite))
            continue
        first = int(inside.min())
        counts = tuple(np.bincount(inside - first).tolist())
        found.append(ErrorHistogram(first, counts, zeros, idle, non_finite, float(row[positive].max())))
    return found


MOST = 2**53
"""No count comes near this."""


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MOST:
        raise ValueError(f"{value!r} is no whole number from {least} to {MOST}")
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is no list")
    return value
