"""What a step holds in memory: weights, their narrow copies, gradients, optimizer state, saved activations.

Weights, gradients and state are counted for every parameter that the window followed (`window.parameter_records`), in
their own dtypes or the cast that the plan keeps them in. Without records only the weights of products are known.

Approximate, and said so in every plan: the copies of a weight are taken to live as long as the weight; activations of
every call of a step are taken to live at once; what is saved for operations that are no matrix product is not known. An
activation that enters several sites (the input of q, k and v) counts at each of them, unless `shared` says which slots
hold the same tensor: `sharing.shared_tensors` reads that from a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from advisor.castnames import keeps
from advisor.operands import WEIGHT, enters_gradient, is_weight, operand, own_operand
from probes.casts import Cast
from probes.errors import UnknownFormat
from probes.format_names import format_named
from probes.parameter_records import MASTER, ParameterRecord
from probes.records import GRADIENT, Site

APPROXIMATIONS = (  # without the records of parameters and without `shared`
    "bytes: an activation that enters several sites counts at each of them; all calls of a step live at once",
    "bytes: gradients, optimizer state and anything that is no operand of a matrix product are not counted",
)

RECORDED_APPROXIMATIONS = (  # with them
    "bytes: saved activations are those of matrix products, of all calls of a step; two with equal sketches are one",
    (
        "bytes: gradients, in their parameter's dtype, and optimizer state are those that the window followed; "
        "buffers, workspaces and whatever else is no operand are not counted"
    ),
)

Slot = tuple[str, str]


@dataclass(frozen=True)
class Memory:
    """Bytes, by kind."""

    weights_bytes: int
    copies_bytes: int
    activations_bytes: int
    gradients_bytes: int = 0
    states_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes + self.copies_bytes + self.activations_bytes + self.gradients_bytes + self.states_bytes
        )


def role_bytes(site: Site, role: str, cast: Cast) -> float:
    """Bytes that the choice of this role's cast decides: the narrow copy of a weight, or a saved activation.

    An activation is saved in the form in which the forward product used it, if a backward product needs it.
    """
    own = own_operand(site, role)
    bits = operand(site, role, cast).bits
    if role == GRADIENT:
        return 0.0
    if is_weight(role):
        return _weight_elements(site, role) * bits / 8 if bits < own.bits else 0.0
    return site.elements.get(role, 0.0) * bits / 8 if enters_gradient(site, role) else 0.0


def memory(
    sites: Iterable[Site],
    casts: Mapping[Slot, Cast],
    records: Sequence[ParameterRecord] = (),
    storage: Mapping[Slot, Cast] | None = None,
    shared: Mapping[Slot, Slot] | None = None,
) -> Memory:
    """Bytes under the casts, by (site, role); a parameter that sites share counts once, as do its copies.

    records   of the parameters: their weights, gradients and states are counted too
    storage   (parameter, "master" or a state's name) → the cast in which it is kept; others as they are
    shared    slot → the slot that stands for the tensor that both hold; others stand for themselves
    """
    kept = storage or {}
    masters: dict[object, float] = {
        record.name: record.elements * _kept_bytes(record.dtype, kept.get((record.name, MASTER))) for record in records
    }
    copies: dict[object, float] = {}
    activations: dict[object, float] = {}
    for site in sites:
        for role in site.roles:
            cast = casts[site.name, role]
            if is_weight(role):
                whole = site.parameter_shape in (None, site.shapes.get(role))  # and no view of a part
                key = (site.parameter if site.parameter and whole else site.name, role)
                if _parameter(site, role) not in masters:
                    masters[key] = _weight_elements(site, role) * own_operand(site, role).bits / 8
                copies[key, str(cast)] = role_bytes(site, role, cast)
            else:
                slot = (site.name, role)
                tensor = (shared or {}).get(slot, slot)
                held = role_bytes(site, role, cast)
                written = operand(site, role, cast)
                activations[tensor, written] = max(held, activations.get((tensor, written), 0.0))
    return Memory(
        weights_bytes=round(math.fsum(masters.values())),
        copies_bytes=round(math.fsum(copies.values())),
        activations_bytes=round(math.fsum(activations.values())),
        gradients_bytes=round(math.fsum(record.elements * _kept_bytes(record.dtype, None) for record in records)),
        states_bytes=round(
            math.fsum(
                record.elements * _kept_bytes(kind, kept.get((record.name, state)))
                for record in records
                for state, kind in record.states.items()
            )
        ),
    )


def _parameter(site: Site, role: str) -> str | None:
    """Dotted name of the parameter that a weight is; a recurrent layer's are called as its roles."""
    if role == WEIGHT:
        return site.parameter
    return role if site.name == "(root)" else f"{site.name}.{role}"


def _kept_bytes(dtype: str, cast: Cast | None) -> float:
    """Bytes an element in a dtype, or in the cast that it is kept in where that is narrower."""
    try:
        own = format_named(dtype).stored_bits
    except UnknownFormat:
        own = 8 if dtype in ("uint8", "bool") else 32
    return (own if cast is None or keeps(cast) else min(own, cast.format.stored_bits)) / 8


def _weight_elements(site: Site, role: str) -> int:
    return math.prod(site.shapes.get(role, (0,)))
