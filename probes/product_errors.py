"""Backward error of sampled products, |L·R − Q(L,R)| / (|L|·|R|), after Rasquinha and Tabak (2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from probes.records import text
from probes.sites import ProductCall


@dataclass(frozen=True)
class ProductError:
    """Backward error of one product of a site with one cast."""

    site: str
    product: str
    cast: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProductError:
        return cls(text(data["site"]), text(data["product"]), text(data["cast"]))


def site_backward_errors(call: ProductCall, gradient: Tensor | None) -> list[ProductError]:
    """Errors of the products of one call. None is measured yet."""
    return []


def pooled(errors: Sequence[ProductError]) -> list[ProductError]:
    """One record a site, product and cast."""
    return list(errors)
