"""What a combination of casts brings a site: FLOPs in 8 and 16 bits, bytes, seconds; for all combinations at once.

Casts that the hardware treats alike bring the same: a cast's `Form` is all that matters here. Sites that are alike, as
the layers of a deep model are, share their tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.castnames import KEEP, parse_cast
from advisor.cost import (
    UNSEEN,
    Operand,
    ProductShape,
    cast_times_s,
    is_weight,
    moved_bytes,
    native_refusal,
    operand,
    own_operand,
    product_bits,
    product_shapes,
    product_times_s,
    role_bytes,
    uses,
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

    @cached_property
    def operands(self) -> list[Operand]:
        """The operands that there are among the forms."""
        return list(dict.fromkeys(form.operand for form in self.forms))

    @cached_property
    def operand_of(self) -> NDArray[np.intp]:
        """Each form's."""
        return np.array([self.operands.index(form.operand) for form in self.forms], dtype=np.intp)

    @cached_property
    def widths(self) -> tuple[list[Cast], NDArray[np.intp]]:
        """A cast of each width in bits that there is among the forms, and each form's place in these."""
        bits = [form.operand.bits for form in self.forms]
        distinct = list(dict.fromkeys(bits))
        casts = [self.casts[bits.index(width)] for width in distinct]
        return casts, np.array([distinct.index(width) for width in bits], dtype=np.intp)


OfProduct = Callable[[ProductShape, Sequence[Operand], Sequence[Operand], Hardware], Array]
_UNSEEN = Forms((Form(UNSEEN, "none", None),), (parse_cast(KEEP),), np.zeros(1, dtype=np.intp))


class Consequences:
    """Tables of what combinations of casts bring, each worked out once for sites that are alike."""

    def __init__(self, hardware: Hardware, timed: bool = False, native_only: bool = False) -> None:
        """`timed`: seconds are worked out too, else they are 0. `native_only`: see `possible`."""
        self.hardware = hardware
        self.timed = timed
        self.native_only = native_only
        self._forms: dict[Any, Forms] = {}
        self._of_product: dict[Any, Array] = {}
        self._moved: dict[Any, Array] = {}
        self._bits: dict[Any, Array] = {}
        self._narrow: dict[Any, Array] = {}
        self._parts_of: dict[Any, list[_Part]] = {}
        self._no_worse: dict[Any, NDArray[np.bool_]] = {}
        self._distinct: dict[tuple[tuple[int, ...], bytes], NDArray[np.bool_]] = {}
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
        table = np.zeros((len(MEASURES), *(len(picked[role]) for role in site.roles)))
        for part in self._parts(site, forms):
            table[part.measures] += part.over([picked[role] for role in site.roles])
        return table

    def _parts(self, site: Site, forms: Mapping[str, Forms]) -> list[_Part]:
        """What the site's products and roles bring, each by itself; the same for sites that are alike."""
        key = (self._likeness(site), *(id(forms[role]) for role in site.roles))
        if key not in self._parts_of:
            found = []
            for product in site.products:
                if set(product.operands) <= set(site.roles):  # else out of reach of a cast, and never narrow
                    left, right = product.operands
                    narrow = product.flops * self._is_narrow(forms[left], forms[right])
                    found.append(_Part.of_product(site, product, slice(0, 2), narrow))
            for one in self._shapes(site) if self.timed else ():
                seconds = self._of_forms(site, one, forms, product_times_s)
                found.append(_Part.of_product(site, one.product, slice(3, 4), seconds))
            for axis, role in enumerate(site.roles):
                held = [self._bytes(site, role, forms[role])]
                held += [self._cast_seconds(site, role, forms[role])] if self.timed else []
                found.append(_Part(slice(2, 2 + len(held)), (axis,), len(site.roles), np.stack(held)))
            self._parts_of[key] = found
        return self._parts_of[key]

    def possible(
        self, site: Site, forms: Mapping[str, Forms], picked: Mapping[str, NDArray[np.intp]]
    ) -> NDArray[np.bool_] | None:
        """Which combinations may be chosen, [the picked forms of each role in turn]; None for all.

        Under `native_only` those in which every product is either run in 8 bits by a native kernel, or has no operand
        of 8 bits. A tensor is cast once, so one product that wants it as it was makes the cast of no use.
        """
        if not self.native_only:
            return None
        found = np.ones(tuple(len(picked[role]) for role in site.roles), dtype=bool)
        for one in self._shapes(site):
            fits = _Part.of_product(site, one.product, slice(1), self._of_forms(site, one, forms, _are_native))
            found &= fits.over([picked[role] for role in site.roles])[0] > 0
        return found

    def no_worse(self, site: Site, role: str, forms: Mapping[str, Forms]) -> NDArray[np.bool_]:
        """[forms, forms]: whether a form brings at least what another does, whatever the other roles' casts are.

        The same object where it is the same for several kinds of sites.
        """
        key = (self._likeness(site), role, *(id(forms[name]) for name in site.roles))
        if key not in self._no_worse:
            held = self._bytes(site, role, forms[role])
            found: NDArray[np.bool_] = np.asarray(held[:, None] <= held[None, :])
            for product in site.products:
                if role in product.operands and set(product.operands) <= set(site.roles):
                    found = found & self._runs_no_wider(product, role, forms)
            operands = np.ix_(forms[role].operand_of, forms[role].operand_of)
            for one in self._shapes(site) if self.timed or self.native_only else ():
                if role in one.product.operands:
                    if self.timed:
                        seconds = self._of_operands(site, one, forms, product_times_s)
                        found = found & _no_larger(seconds, one, role)[operands]
                    if self.native_only:
                        fits = self._of_operands(site, one, forms, _are_native)
                        found = found & _no_larger(-fits, one, role)[operands]
            if self.timed:
                seconds = self._cast_seconds(site, role, forms[role])
                found = found & (seconds[:, None] <= seconds[None, :])
            self._no_worse[key] = self._distinct.setdefault((found.shape, found.tobytes()), np.asarray(found))
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

    def _is_narrow(self, lefts: Forms, rights: Forms) -> Array:
        """Whether products run in at most 8 bits, and in at most 16: [2, lefts, rights], 1 or 0."""
        key = (id(lefts), id(rights))
        if key not in self._narrow:
            bits = self._bits_of(lefts, rights)
            self._narrow[key] = np.stack([bits <= 8, bits <= 16]).astype(np.float64)
        return self._narrow[key]

    def _bits_of(self, lefts: Forms, rights: Forms) -> Array:
        key = (id(lefts), id(rights))
        if key not in self._bits:
            self._bits[key] = np.array(
                [[product_bits(a.operand, b.operand, self.hardware) for b in rights.forms] for a in lefts.forms],
                dtype=np.float64,
            )
        return self._bits[key]

    def _bytes(self, site: Site, role: str, forms: Forms) -> Array:
        casts, width_of = forms.widths
        return np.array([role_bytes(site, role, cast) for cast in casts])[width_of]

    def _cast_seconds(self, site: Site, role: str, forms: Forms) -> Array:
        key = (id(forms), uses(site, role), is_weight(role))
        if key not in self._moved:
            self._moved[key] = moved_bytes(site, role, forms.casts, self.hardware)
        return cast_times_s(site, role, self._moved[key], self.hardware)

    def _of_operands(self, site: Site, one: ProductShape, forms: Mapping[str, Forms], value: OfProduct) -> Array:
        """A value of a product for all operands of its two sides; one where no cast reaches the operand."""
        left, right = self._sides(site, one.product, forms)
        key = (self._likeness(site), one.product.name, value, id(left), id(right))
        if key not in self._of_product:
            self._of_product[key] = value(one, left.operands, right.operands, self.hardware)
        return self._of_product[key]

    def _of_forms(self, site: Site, one: ProductShape, forms: Mapping[str, Forms], value: OfProduct) -> Array:
        """The same for all forms of its operands, [1, left, right]."""
        left, right = self._sides(site, one.product, forms)
        return self._of_operands(site, one, forms, value)[None, left.operand_of[:, None], right.operand_of]

    def _sides(self, site: Site, product: Product, forms: Mapping[str, Forms]) -> tuple[Forms, Forms]:
        left, right = (forms[name] if name in site.roles else _UNSEEN for name in product.operands)
        return left, right


@dataclass(frozen=True, eq=False)
class _Part:
    """What one or two roles' forms bring of some measures, whatever the other roles' are.

    axes    of the roles, rising; none where no cast reaches the product
    values  [measures, the forms of each axis]
    """

    measures: slice
    axes: tuple[int, ...]
    dimensions: int
    values: Array

    @classmethod
    def of_product(cls, site: Site, product: Product, measures: slice, values: Array) -> _Part:
        """`values` [measures, left, right]; an operand that is no role of the site has one form."""
        left, right = product.operands
        axes = [site.roles.index(name) if name in site.roles else -1 for name in (left, right)]
        if left == right and left in site.roles:
            values, axes = np.diagonal(values, axis1=1, axis2=2), axes[:1]
        elif axes[0] > axes[1]:
            values, axes = values.transpose(0, 2, 1), axes[::-1]
        seen = tuple(axis for axis in axes if axis >= 0)
        shape = values.shape[len(values.shape) - len(seen) :]
        return cls(measures, seen, len(site.roles), np.ascontiguousarray(values).reshape(len(values), *shape))

    def over(self, picked: Sequence[NDArray[np.intp]]) -> Array:
        """For the picked forms of each role, reshaped so that it broadcasts over all of the site's roles."""
        values = self.values
        for number, axis in enumerate(self.axes):
            values = values.take(picked[axis], axis=number + 1)
        sizes = [1] * self.dimensions
        for number, axis in enumerate(self.axes):
            sizes[axis] = values.shape[number + 1]
        return values.reshape(len(values), *sizes)


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
    """[operands, operands] of a role: whether a product's values are at most another's, whatever the other side is."""
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


def spread(values: Array, dimensions: int, axis: int) -> Array:
    """A vector, reshaped so that it runs along one of some dimensions."""
    return values.reshape([-1 if one == axis else 1 for one in range(dimensions)])
