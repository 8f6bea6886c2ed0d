"""What a plan saves: the share of matrix FLOPs in 8 and 16 bits, time (`roofline.py`) and memory (`memory.py`).

FLOPs are counted by product, for time is saved by products and not by tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from advisor.device import Hardware
from advisor.memory import APPROXIMATIONS, RECORDED_APPROXIMATIONS, Memory, memory, role_bytes
from advisor.native import native_refusal
from advisor.operands import (
    UNSEEN,
    WEIGHT,
    Operand,
    enters_gradient,
    has_backward,
    is_weight,
    operand,
    own_operand,
    product_bits,
    product_operands,
)
from advisor.product_shapes import ProductShape, product_shapes
from advisor.roofline import APPROXIMATIONS as TIME_APPROXIMATIONS
from advisor.roofline import (
    cast_time_s,
    cast_times_s,
    moved_bytes,
    product_time_s,
    product_times_s,
    site_time_s,
    step_speedup,
    time_s,
    times_s,
    uses,
)
from advisor.sharing import shared_tensors
from probes.casts import Cast
from probes.records import Site

__all__ = [
    "APPROXIMATIONS",
    "RECORDED_APPROXIMATIONS",
    "TIME_APPROXIMATIONS",
    "UNSEEN",
    "WEIGHT",
    "Memory",
    "Operand",
    "ProductShape",
    "Shares",
    "cast_time_s",
    "cast_times_s",
    "enters_gradient",
    "has_backward",
    "is_weight",
    "memory",
    "moved_bytes",
    "native_refusal",
    "operand",
    "own_operand",
    "product_bits",
    "product_operands",
    "product_shapes",
    "product_time_s",
    "product_times_s",
    "role_bytes",
    "shared_tensors",
    "shares",
    "shares_of_operands",
    "site_shares",
    "site_time_s",
    "step_speedup",
    "time_s",
    "times_s",
    "uses",
]


@dataclass(frozen=True)
class Shares:
    """Matrix FLOPs a step, forward and backward, in products of at most 8 and of at most 16 bits."""

    flops_8bit: float
    flops_16bit: float


def site_shares(site: Site, casts: Mapping[str, Cast], hardware: Hardware) -> Shares:
    """FLOPs of the site's products in at most 8 and at most 16 bits; `casts` has every role of the site."""
    return shares_of_operands(site, {role: operand(site, role, casts[role]) for role in site.roles}, hardware)


def shares_of_operands(site: Site, operands: Mapping[str, Operand], hardware: Hardware) -> Shares:
    """The same for the operands that the roles' casts make."""
    narrow: list[float] = []
    narrower: list[float] = []
    for product in site.products:
        left, right = (operands.get(name, UNSEEN) for name in product.operands)
        bits = product_bits(left, right, hardware)
        if bits <= 16:
            narrow.append(product.flops)
        if bits <= 8:
            narrower.append(product.flops)
    return Shares(flops_8bit=math.fsum(narrower), flops_16bit=math.fsum(narrow))


def shares(sites: Iterable[Site], casts: Mapping[tuple[str, str], Cast], hardware: Hardware) -> Shares:
    """The same, of all sites; `casts` by (site, role)."""
    parts = [site_shares(site, {role: casts[site.name, role] for role in site.roles}, hardware) for site in sites]
    return Shares(
        flops_8bit=math.fsum(part.flops_8bit for part in parts),
        flops_16bit=math.fsum(part.flops_16bit for part in parts),
    )
