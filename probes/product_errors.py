"""Backward errors of a site's products in a scored step: sampled, cast by cast, with the tails that explain them.

Of each product of the call, forward and backward, some rows of the left operand and some columns of the right one are
taken over the full inner dimension (`contractions/`), and each cast's errors on them are kept as a histogram
(`backward_error.py`). A cast is scaled as it would be in training: one scale a tensor comes from the whole tensor, of
which only the sample is cast; scales of rows run along the product's inner dimension.

What explains them is the crest of an operand, its largest magnitude over its root mean square. A scaled integer's
error is proportional to it, a float's hardly depends on it until small values are flushed; and scales by row help by as
much as the rows' crest is below the tensor's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.backward_error import (
    QUANTILES,
    ErrorHistogram,
    cast_products,
    histograms,
    product_and_magnitudes,
    refuse_unsampled,
    relative_to,
)
from probes.casts import Cast
from probes.contractions import contractions
from probes.contractions.contraction import Extent
from probes.contractions.sampling import sampled
from probes.numbers import from_json
from probes.records import text
from probes.sites import ProductCall

FORMATS = ("int8", "e4m3fn", "e5m2", "fp16", "bf16")
CASTS = (
    *(Cast.parse(f"{name}/{granularity}/current/nearest") for name in FORMATS for granularity in ("tensor", "row")),
    *(Cast.parse(f"{name}/none/nearest") for name in ("fp16", "bf16")),
)
"""Measured by default: what the design compares, and the two that are mostly used without a scale."""


@dataclass(frozen=True)
class Crest:
    """Largest magnitude over root mean square; 1 where all magnitudes are alike, 4 or 5 for large normal tensors.

    tensor  of the whole tensor, NaN where it has no finite value but zeros
    row     median of the sampled rows (columns, of the right operand) along the inner dimension, likewise
    """

    tensor: float
    row: float

    @classmethod
    def of(cls, extent: Extent, rows: Tensor) -> Crest:
        """Of a tensor's extent and its sampled rows [.., K]; elements that are not finite do not count."""
        finite = rows.isfinite()
        magnitudes = torch.where(finite, rows, 0.0).abs().double()
        rms = (magnitudes.square().sum(-1) / finite.sum(-1)).sqrt()
        return cls(
            extent.largest / extent.rms if extent.rms > 0 else math.nan,
            float((magnitudes.amax(-1) / rms).nanmedian()),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Crest:
        """What `numbers.plain` wrote. Raises KeyError, TypeError or ValueError for what cannot be."""
        crests = [float(from_json(data[name])) for name in ("tensor", "row")]
        for crest in crests:
            if crest < 0.999 or crest == math.inf:  # 1 but for rounding is the least that there is
                raise ValueError(f"{crest!r} is no largest magnitude over a root mean square")
        return cls(*crests)


@dataclass(frozen=True)
class ProductError:
    """Backward errors of one product of a site under one cast of both operands.

    product      the name that `Product` has for it: "forward", "weight_grad", "scores"
    cast         the canonical text, str(Cast)
    errors       of all sampled elements
    left, right  crests of the product's two operands, in the order in which `Product` names them
    """

    site: str
    product: str
    cast: str
    errors: ErrorHistogram
    left: Crest
    right: Crest

    @property
    def sampled(self) -> int:
        """Elements of the product that were looked at."""
        return self.errors.sampled

    @property
    def quantiles(self) -> dict[float, float]:
        """Share of the elements → the backward error that they do not exceed, for the shares of QUANTILES."""
        return {share: self.errors.quantile(share) for share in QUANTILES}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProductError:
        """What `numbers.plain` wrote. Raises KeyError, TypeError or ValueError for what cannot be."""
        cast = text(data["cast"])
        if str(Cast.parse(cast)) != cast:
            raise ValueError(f"{cast!r} is not how a cast is written in full: {Cast.parse(cast)}")
        return cls(
            text(data["site"]),
            text(data["product"]),
            cast,
            ErrorHistogram.from_dict(data["errors"]),
            Crest.from_dict(data["left"]),
            Crest.from_dict(data["right"]),
        )


def site_backward_errors(
    call: ProductCall, gradient: Tensor | None, casts: Sequence[Cast] = CASTS, seed: int = 0
) -> list[ProductError]:
    """One record a product and cast, for one call.

    gradient  at the call's result; without one, of the forward products alone. Gradients of operands that ask for none
              have no record either, as in `Operation.products`
    seed      of the choice of rows and columns; another step should have another one

    Reads the operands where they are, leaves no reference to them and draws from no generator but its own. A product
    without elements or terms has no record. Raises WindowError for an operation, or an arrangement of operands, that
    is not followed product by product; InvalidCast for casts whose scales a sample cannot tell.
    """
    if not casts:
        return []
    for cast in casts:
        refuse_unsampled(cast)
    generator = np.random.default_rng(seed)
    found = []
    with _unseen():
        for contraction in contractions(call, gradient, generator):
            left, right = sampled(contraction, generator)
            extents = contraction.left.extent, contraction.right.extent
            crests = [Crest.of(extent, rows) for extent, rows in zip(extents, (left, right), strict=True)]
            exact, magnitudes = product_and_magnitudes(left, right)
            products = cast_products(left, right, casts, extents)
            for cast, errors in zip(
                casts, histograms(relative_to(magnitudes, exact, products, left.shape[-1]), exact), strict=True
            ):
                found.append(ProductError(call.site, contraction.name, str(cast), errors, *crests))
    return found


def pooled(errors: Iterable[ProductError]) -> list[ProductError]:
    """One record a site, product and cast, in the order in which they were first met.

    Histograms add; a crest is the mean over the records, each counted by its sampled elements.
    """
    groups: dict[tuple[str, str, str], list[ProductError]] = {}
    for error in errors:
        groups.setdefault((error.site, error.product, error.cast), []).append(error)
    return [_joined(group) for group in groups.values()]


def _joined(group: Sequence[ProductError]) -> ProductError:
    first = group[0]
    total = first.errors
    for other in group[1:]:
        total = total.plus(other.errors)

    def mean(crests: Sequence[float]) -> float:
        known = [(crest, one.sampled) for crest, one in zip(crests, group, strict=True) if not math.isnan(crest)]
        weight = sum(count for _, count in known)
        return sum(crest * count for crest, count in known) / weight if weight else math.nan

    crests = [
        Crest(mean([crest.tensor for crest in side]), mean([crest.row for crest in side]))
        for side in ([one.left for one in group], [one.right for one in group])
    ]
    return ProductError(first.site, first.product, first.cast, total, *crests)


@contextmanager
def _unseen() -> Iterator[None]:
    """No overrides, so that nothing here is met as a product of the model; no autocast and no graph."""
    with (
        torch._C.DisableTorchFunction(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.no_grad(),
    ):
        yield
