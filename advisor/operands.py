"""What the matrix unit is given for an operand, and the format in which a product of two of them runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from advisor.castnames import keeps
from advisor.device import Hardware
from probes.casts import Cast
from probes.errors import UnknownFormat
from probes.format_names import format_named
from probes.formats import FORMATS
from probes.records import Product, Site

WEIGHT = "weight"


class Operand(NamedTuple):
    """What the matrix unit is given: a format, the bits of an element in memory, and what shares a scale.

    The format is None for what nobody sees outside a fused kernel. No scale at all counts as one of the tensor.
    """

    format: str | None
    bits: int
    granularity: str = "tensor"


UNSEEN = Operand(None, 32)
"""What nobody sees outside a fused kernel, and no cast reaches."""


def is_weight(role: str) -> bool:
    """Whether a role is a parameter: `weight`, or a recurrent layer's `weight_ih_l0` and so on."""
    return role == WEIGHT or role.startswith(f"{WEIGHT}_")


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
    return cast_operand(own_operand(site, role), cast)


def cast_operand(own: Operand, cast: Cast) -> Operand:
    """The same for any tensor whose own operand is known."""
    wanted = cast.format
    if keeps(cast) or wanted.stored_bits > own.bits:
        return own
    return Operand(wanted.name, wanted.stored_bits, "tensor" if cast.granularity == "none" else cast.granularity)


def is_taken(left: Operand, right: Operand, hardware: Hardware) -> bool:
    """Whether the hardware multiplies two operands as they are: their formats, and below 16 bits their scales."""
    if left.format is None or right.format is None or not hardware.takes(left.format, right.format):
        return False
    return max(left.bits, right.bits) > 8 or hardware.takes_scales(left.granularity, right.granularity)


@lru_cache(maxsize=65536)
def product_bits(left: Operand, right: Operand, hardware: Hardware) -> int:
    """Bits in which the hardware runs a product: those of the wider operand, if it multiplies the pair.

    Two operands that it does not multiply as they are get widened first, to a 16-bit format that holds every value of
    both: so two formats of 8 bits, or 8 bits and bf16, run in 16. What no such format holds runs in 32.
    """
    if left.format is None or right.format is None:
        return max(32, left.bits, right.bits)
    if is_taken(left, right, hardware):
        return max(left.bits, right.bits)
    wide = widened_format(left.format, right.format, hardware)
    return max(32, left.bits, right.bits) if wide is None else FORMATS[wide].bits


def widened_format(left: str, right: str, hardware: Hardware) -> str | None:
    """The 16-bit format that holds every value of both and that the hardware multiplies; None where there is none."""
    for wide in ("bf16", "fp16"):
        if hardware.takes(wide, wide) and _holds(wide, left) and _holds(wide, right):
            return wide
    return None


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
    left, right = (operand(site, name, casts[name]) if name in site.roles else UNSEEN for name in product.operands)
    return left, right


def has_backward(site: Site) -> bool:
    """Whether the site has products in the backward pass."""
    return any(product.backward for product in site.products)


def enters_gradient(site: Site, role: str) -> bool:
    """Whether the role is an operand of a backward product, and so must be kept for it and adds its noise to it.

    The weight of a first layer is in none: nobody needs the gradient of the data.
    """
    return any(product.backward and role in product.operands for product in site.products)
