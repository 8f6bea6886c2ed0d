"""What a plan saves: the share of matrix FLOPs in 8 and 16 bits, and bytes of weights and saved activations.

FLOPs are counted by product, for time is saved by products and not by tensors. Bytes are those that casts
change: master weights, their narrow copies, and activations kept for the backward pass. Gradients and
optimizer state stay as they were and are left out of both sides. No speed is predicted here.

Approximate, and said so in every plan: an activation that enters several sites is counted at each of them;
the copies of a weight are taken to live as long as the weight; activations of every call of a step are taken
to live at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from advisor.castnames import keeps
from advisor.hardware import Hardware
from probes.casts import Cast
from probes.errors import UnknownFormat
from probes.format_names import format_named
from probes.formats import FORMATS
from probes.records import GRADIENT, Product, Site

WEIGHT = "weight"

APPROXIMATIONS = (
    "bytes: an activation that enters several sites counts at each of them; all calls of a step live at once",
    "bytes: gradients, optimizer state and anything that is no operand of a matrix product are not counted",
)


class Operand(NamedTuple):
    """What the matrix unit is given: a format, and the bits of an element in memory.

    The format is None for what nobody sees outside a fused kernel.
    """

    format: str | None
    bits: int


@dataclass(frozen=True)
class Memory:
    """Bytes, by kind."""

    weights_bytes: int
    copies_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.copies_bytes + self.activations_bytes


@dataclass(frozen=True)
class Shares:
    """Matrix FLOPs a step, forward and backward, in products of at most 8 and of at most 16 bits."""

    flops_8bit: float
    flops_16bit: float


def own_operand(site: Site, role: str) -> Operand:
    """The tensor in the user's own dtype; one that is no format of ours is taken to have 32 bits."""
    return _own(str(site.dtypes.get(role, "fp32")))


@lru_cache(maxsize=256)
def _own(dtype: str) -> Operand:
    try:
        own = format_named(dtype)
    except UnknownFormat:
        return Operand(dtype, 32)
    return Operand(own.name, own.stored_bits)


def operand(site: Site, role: str, cast: Cast) -> Operand:
    """The tensor after `cast`; a cast to a wider format than the tensor's own leaves it as it is."""
    own, wanted = own_operand(site, role), cast.format
    return own if keeps(cast) or wanted.stored_bits > own.bits else Operand(wanted.name, wanted.stored_bits)


def product_bits(left: Operand, right: Operand, hardware: Hardware) -> int:
    """Bits in which the hardware runs a product: those of the wider operand, if it multiplies the pair.

    Two operands that it does not multiply as they are get widened first, to a 16-bit format that holds every value of
    both: so two formats of 8 bits, or 8 bits and bf16, run in 16. What no such format holds runs in 32.
    """
    if left.format is None or right.format is None:
        return max(32, left.bits, right.bits)
    if hardware.takes(left.format, right.format):
        return max(left.bits, right.bits)
    for wide in ("bf16", "fp16"):
        if hardware.takes(wide, wide) and _holds(wide, left.format) and _holds(wide, right.format):
            return FORMATS[wide].bits
    return max(32, left.bits, right.bits)


@lru_cache(maxsize=1024)
def _holds(wide: str, narrow: str) -> bool:
    """Whether every finite value of a format is one of another's."""
    try:
        inner = format_named(narrow)
    except UnknownFormat:
        return False
    outer = FORMATS[wide]
    return (
        inner.mantissa_bits <= outer.mantissa_bits
        and inner.smallest_subnormal >= outer.smallest_subnormal
        and inner.largest <= outer.largest
    )


def product_operands(site: Site, product: Product, casts: Mapping[str, Cast]) -> tuple[Operand, Operand]:
    """Both operands of a product under the casts of the site's roles.

    A name that is no role of the site ("probabilities" inside fused attention) is out of reach of every cast.
    """
    left, right = (
        operand(site, name, casts[name]) if name in site.roles else Operand(None, 32) for name in product.operands
    )
    return left, right


def site_shares(site: Site, casts: Mapping[str, Cast], hardware: Hardware) -> Shares:
    """FLOPs of the site's products in at most 8 and at most 16 bits; `casts` has every role of the site."""
    bits = [
        (product_bits(*product_operands(site, product, casts), hardware), product.flops) for product in site.products
    ]
    return Shares(
        flops_8bit=math.fsum(flops for width, flops in bits if width <= 8),
        flops_16bit=math.fsum(flops for width, flops in bits if width <= 16),
    )


def shares(sites: Iterable[Site], casts: Mapping[tuple[str, str], Cast], hardware: Hardware) -> Shares:
    """The same, of all sites; `casts` by (site, role)."""
    parts = [site_shares(site, {role: casts[site.name, role] for role in site.roles}, hardware) for site in sites]
    return Shares(
        flops_8bit=math.fsum(part.flops_8bit for part in parts),
        flops_16bit=math.fsum(part.flops_16bit for part in parts),
    )


def has_backward(site: Site) -> bool:
    """Whether the site has products in the backward pass."""
    return any(product.backward for product in site.products)


def enters_gradient(site: Site, role: str) -> bool:
    """Whether the role is an operand of a backward product, and so must be kept for it and adds its noise to it.

    The weight of a first layer is in none: nobody needs the gradient of the data.
    """
    return any(product.backward and role in product.operands for product in site.products)


def role_bytes(site: Site, role: str, cast: Cast) -> float:
    """Bytes that the choice of this role's cast decides: the narrow copy of a weight, or a saved activation.

    An activation is saved in the form in which the forward product used it, if a backward product needs it.
    """
    own = own_operand(site, role)
    bits = operand(site, role, cast).bits
    if role == GRADIENT:
        return 0.0
    if role == WEIGHT:
        return _weight_elements(site) * bits / 8 if bits < own.bits else 0.0
    return site.elements.get(role, 0.0) * bits / 8 if enters_gradient(site, role) else 0.0


def memory(sites: Iterable[Site], casts: Mapping[tuple[str, str], Cast]) -> Memory:
    """Bytes under the casts, by (site, role); a parameter that sites share counts once, as do its copies."""
    masters: dict[object, float] = {}
    copies: dict[object, float] = {}
    activations: list[float] = []
    for site in sites:
        for role in site.roles:
            cast = casts[site.name, role]
            if role == WEIGHT:
                key = (site.parameter or site.name, site.shapes.get(role))
                masters[key] = _weight_elements(site) * own_operand(site, role).bits / 8
                copies[key, str(cast)] = role_bytes(site, role, cast)
            else:
                activations.append(role_bytes(site, role, cast))
    return Memory(
        weights_bytes=round(math.fsum(masters.values())),
        copies_bytes=round(math.fsum(copies.values())),
        activations_bytes=round(math.fsum(activations)),
    )


def _weight_elements(site: Site) -> int:
    return math.prod(site.shapes.get(WEIGHT, (0,)))
