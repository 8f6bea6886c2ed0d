"""What a combination of casts brings a site: FLOPs in 8 and 16 bits, bytes, seconds; for all combinations at once.

Casts that the hardware treats alike bring the same: a cast's `Form` is all that matters here. Sites that are alike, as
the layers of a deep model are, share their tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.castnames import KEEP, parse_cast
from advisor.cost import (
    Operand,
    ProductShape,
    cast_times_s,
    native_refusal,
    operand,
    own_operand,
    product_bits,
    product_shapes,
    product_times_s,
    role_bytes,
)
from advisor.hardware import Hardware
from probes.casts import Cast
from probes.records import Product, Site

Array = NDArray[np.float64]

# The tables' measures, in this order.
MEASURES = ("flops_8bit", "flops_16bit", "bytes", "time_s")


class Form(NamedTuple):
    """What the hardware sees of a cast: the operand that the matrix unit is given, and how its scale is found."""

    operand: Operand
    granularity: str
    rule: str | None


@dataclass(frozen=True, eq=False)
class Forms:
    """The forms of some casts of one kind of tensor: `cast` has one for each form, `place` each cast's form."""

    forms: tuple[Form, ...]
    casts: tuple[Cast, ...]
    place: NDArray[np.intp]


OfProduct = Callable[[ProductShape, Sequence[Operand], Sequence[Operand], Hardware], Array]
# An operand that nobody sees outside a fused kernel.
_UNSEEN = Forms((Form(Operand(None, 32), "none", None),), (parse_cast(KEEP),), np.zeros(1, dtype=np.intp))


class Consequences:
    """Tables of what combinations of casts bring, each worked out once for sites that are alike."""

    def __init__(self, hardware: Hardware, timed: bool = False, native_only: bool = False) -> None:
        """`timed`: seconds are worked out too, else they are 0. `native_only`: see `possible`."""
        self.hardware = hardware
        self.timed = timed
        self.native_only = native_only
        self._forms: dict[Any, Forms] = {}
        self._tables: dict[Any, Array] = {}
        self._bits: dict[Any, Array] = {}
        self._no_worse: dict[Any, NDArray[np.bool_]] = {}
        self._kinds: dict[tuple[object, ...], int] = {}
        self._of_site: dict[int, tuple[Site, int]] = {}  # by id: the site is kept, so that no other gets its id
        self._shapes_of: dict[int, tuple[ProductShape, ...]] = {}

    def forms(self, site: Site, role: str, casts: tuple[str, ...]) -> Forms:
        """The forms of canonical casts on a role's tensor; the same object for the same dtype and casts."""
        key = (site.dtypes.get(role), casts)
        if key not in self._forms:
            parsed = [parse_cast(text) for text in casts]
            found = [form_of(site, role, cast) for cast in parsed]
            distinct = list(dict.fromkeys(found))
            self._forms[key] = Forms(
                tuple(distinct),
                tuple(parsed[found.index(form)] for form in distinct),
                np.array([distinct.index(form) for form in found], dtype=np.intp),
            )
        return self._forms[key]

    def table(self, site: Site, forms: Mapping[str, Forms], picked: Mapping[str, NDArray[np.intp]]) -> Array:
        """What every combination of some of the forms brings: [measures, the picked forms of each role in turn]."""
        key = (self._likeness(site), *((id(forms[role]), picked[role].tobytes()) for role in site.roles))
        if key not in self._tables:
            shape = tuple(len(picked[role]) for role in site.roles)
            table = np.zeros((len(MEASURES), *shape))
            for product in site.products:
                bits = self._bits_over(site, product, forms, picked)
                table[0] += product.flops * (bits <= 8)
                table[1] += product.flops * (bits <= 16)
            for role in site.roles:
                table[2] += along(site, self._bytes(site, role, forms[role])[picked[role]], role)
            for one in self._shapes(site) if self.timed else ():
                seconds = self._of_operands(site, one, forms, product_times_s)
                table[3] += self._over(site, one.product, seconds, picked)
            for role in site.roles if self.timed else ():
                table[3] += along(site, self._cast_seconds(site, role, forms[role])[picked[role]], role)
            self._tables[key] = table
        return self._tables[key]

    def possible(
        self, site: Site, forms: Mapping[str, Forms], picked: Mapping[str, NDArray[np.intp]]
    ) -> NDArray[np.bool_]:
        """Which combinations may be chosen, [the picked forms of each role in turn].

        Under `native_only` those in which every product is either run in 8 bits by a native kernel, or has no operand
        of 8 bits. A tensor is cast once, so one product that wants it as it was makes the cast of no use.
        """
        found = np.ones(tuple(len(picked[role]) for role in site.roles), dtype=bool)
        for one in self._shapes(site) if self.native_only else ():
            fits = self._of_operands(site, one, forms, _are_native)
            found &= self._over(site, one.product, fits, picked) > 0
        return found

    def no_worse(self, site: Site, role: str, forms: Mapping[str, Forms]) -> NDArray[np.bool_]:
        """[forms, forms]: whether a form brings at least what another does, whatever the other roles' casts are."""
        key = (self._likeness(site), role, *(id(forms[name]) for name in site.roles))
        if key not in self._no_worse:
            held = self._bytes(site, role, forms[role])
            found: NDArray[np.bool_] = np.asarray(held[:, None] <= held[None, :])
            for product in site.products:
                if role in product.operands and set(product.operands) <= set(site.roles):
                    found = found & self._runs_no_wider(product, role, forms)
            for one in self._shapes(site) if self.timed or self.native_only else ():
                if role in one.product.operands:
                    if self.timed:
                        found = found & _no_larger(self._of_operands(site, one, forms, product_times_s), one, role)
                    if self.native_only:
                        found = found & _no_larger(-self._of_operands(site, one, forms, _are_native), one, role)
            if self.timed:
                seconds = self._cast_seconds(site, role, forms[role])
                found = found & (seconds[:, None] <= seconds[None, :])
            self._no_worse[key] = np.asarray(found)
        return self._no_worse[key]

    def _likeness(self, site: Site) -> int:
        """The same number for sites whose tables are the same."""
        if id(site) not in self._of_site:
            kind = self._kinds.setdefault(_what_counts(site), len(self._kinds))
            self._of_site[id(site)] = site, kind
        return self._of_site[id(site)][1]

    def _shapes(self, site: Site) -> tuple[ProductShape, ...]:
        kind = self._likeness(site)
        if kind not in self._shapes_of:
            self._shapes_of[kind] = product_shapes(site)
        return self._shapes_of[kind]

    def _runs_no_wider(self, product: Product, role: str, forms: Mapping[str, Forms]) -> NDArray[np.bool_]:
        left, right = product.operands
        key = (id(forms[left]), id(forms[right]), left == right, role == left)
        if key not in self._no_worse:
            bits = self._bits_of(forms[left], forms[right])
            if left == right:
                bits = np.diagonal(bits)[:, None]
            elif role == right:
                bits = bits.T
            # Narrower than 8 bits is no gain, nor is 12 over 16.
            width = np.where(bits <= 8, 8, np.where(bits <= 16, 16, 32))
            self._no_worse[key] = np.asarray((width[:, None, :] <= width[None, :, :]).all(axis=2))
        return self._no_worse[key]

    def _bits_over(
        self, site: Site, product: Product, forms: Mapping[str, Forms], picked: Mapping[str, NDArray[np.intp]]
    ) -> Array:
        """Bits in which a product runs, over its own roles' dimensions; the site's others have length 1.

        A name that is no role of the site is out of reach of every cast, and its product never narrow.
        """
        left, right = product.operands
        if not {left, right} <= set(site.roles):
            return np.full((1,) * len(site.roles), 32.0)
        bits = self._bits_of(forms[left], forms[right])[np.ix_(picked[left], picked[right])]
        return along(site, np.diagonal(bits), left) if left == right else along(site, bits, left, right)

    def _bits_of(self, lefts: Forms, rights: Forms) -> Array:
        key = (id(lefts), id(rights))
        if key not in self._bits:
            self._bits[key] = np.array(
                [[product_bits(a.operand, b.operand, self.hardware) for b in rights.forms] for a in lefts.forms],
                dtype=np.float64,
            )
        return self._bits[key]

    def _bytes(self, site: Site, role: str, forms: Forms) -> Array:
        key = (self._likeness(site), role, id(forms), "bytes")
        if key not in self._tables:
            bits = np.array([form.operand.bits for form in forms.forms])
            held = np.zeros(len(bits))
            for width in np.unique(bits):
                held[bits == width] = role_bytes(site, role, forms.casts[int((bits == width).argmax())])
            self._tables[key] = held
        return self._tables[key]

    def _cast_seconds(self, site: Site, role: str, forms: Forms) -> Array:
        key = (self._likeness(site), role, id(forms))
        if key not in self._tables:
            self._tables[key] = cast_times_s(site, role, forms.casts, self.hardware)
        return self._tables[key]

    def _of_operands(self, site: Site, one: ProductShape, forms: Mapping[str, Forms], value: OfProduct) -> Array:
        """A value of a product for all forms of its operands, [left, right]; one where no cast reaches the operand."""
        sides = [forms[name] if name in site.roles else _UNSEEN for name in one.product.operands]
        key = (self._likeness(site), one.product.name, value, *map(id, sides))
        if key not in self._tables:
            operands = [list(dict.fromkeys(form.operand for form in side.forms)) for side in sides]
            at = [
                [known.index(form.operand) for form in side.forms] for side, known in zip(sides, operands, strict=True)
            ]
            self._tables[key] = value(one, operands[0], operands[1], self.hardware)[np.ix_(*at)]
        return self._tables[key]

    def _over(self, site: Site, product: Product, values: Array, picked: Mapping[str, NDArray[np.intp]]) -> Array:
        """A product's values for the picked forms, reshaped so that they broadcast over all of the site's roles."""
        left, right = product.operands
        if left == right:
            return along(site, np.diagonal(values)[picked[left]], left)
        for axis, name in enumerate((left, right)):
            if name in site.roles:
                values = np.take(values, picked[name], axis=axis)
        if left in site.roles and right in site.roles:
            return along(site, values, left, right)
        seen = [name for name in (left, right) if name in site.roles]
        return along(site, values.reshape(-1), *seen) if seen else values.reshape([1] * len(site.roles))


def form_of(site: Site, role: str, cast: Cast) -> Form:
    """The form of a role's tensor under a cast; one that a cast leaves as it is has neither granularity nor rule."""
    found = operand(site, role, cast)
    if cast.scale is None or found == own_operand(site, role):
        return Form(found, "none", None)
    return Form(found, cast.granularity, cast.scale.rule)


def _what_counts(site: Site) -> tuple[object, ...]:
    """What sites have in common whose tables are the same."""
    return (
        site.op,
        site.roles,
        tuple((product.name, product.operands, product.flops) for product in site.products),
        tuple((site.shapes.get(role), site.elements.get(role)) for role in site.roles),
        site.calls,
        tuple(site.dtypes.get(role) for role in site.roles),
    )


def _no_larger(values: Array, one: ProductShape, role: str) -> NDArray[np.bool_]:
    """[forms, forms] of a role: whether a product's values are at most another's, whatever the other operand is."""
    left, right = one.product.operands
    of_role = np.diagonal(values)[:, None] if left == right else values if role == left else values.T
    return np.asarray((of_role[:, None, :] <= of_role[None, :, :]).all(axis=2))


def _are_native(shape: ProductShape, lefts: Sequence[Operand], rights: Sequence[Operand], hardware: Hardware) -> Array:
    """[left operands, right operands]: 1 where a native kernel runs the product as it is, or nothing has 8 bits."""
    return np.array(
        [[_is_native(shape, left, right, hardware) for right in rights] for left in lefts], dtype=np.float64
    )


def _is_native(shape: ProductShape, left: Operand, right: Operand, hardware: Hardware) -> bool:
    if left.format is None or right.format is None or min(left.bits, right.bits) > 8:
        return True
    return max(left.bits, right.bits) <= 8 and native_refusal(shape, left, right, hardware) is None


def along(site: Site, values: Array, *roles: str) -> Array:
    """An array over one or two roles, reshaped so that it broadcasts over all of the site's."""
    axes = [site.roles.index(role) for role in roles]
    if axes != sorted(axes):
        values, axes = values.T, sorted(axes)
    sizes = dict(zip(axes, values.shape, strict=True))
    return values.reshape([sizes.get(axis, 1) for axis in range(len(site.roles))])
