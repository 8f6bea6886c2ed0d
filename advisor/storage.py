"""The same storage for every tensor of a role, as a recipe has it: what a rule of thumb would keep in 16 bits.

    storage_of(window, master="bf16", exp_avg="bf16", exp_avg_sq="bf16")

The rows are a plan's `storage`; `advisor.uniform(..., storage=rows)` puts them into one.
"""

from __future__ import annotations

from collections.abc import Iterable

from advisor.errors import InvalidPlan
from advisor.plan import Stored
from advisor.stored import BUFFER, EPSILON
from probes.casts import Cast
from probes.parameter_records import MASTER
from probes.window import Window

_NOT_STORED = frozenset({"update"})  # of a parameter too, and nowhere kept


def storage_of(
    window: Window, *, buffers: Iterable[str] = (), reason: str = "a recipe that was given", **casts_by_role: str | Cast
) -> tuple[Stored, ...]:
    """A row for each tensor of the roles that are given, in the window's order.

    casts_by_role  `master`, `weight_grad`, an optimizer state's name, `epsilon` (of every parameter) or `buffer`
    buffers        dotted names of those that `buffer` is for, which no window knows

    Raises InvalidPlan for a role that no parameter of the window has; UnknownFormat or InvalidCast.
    """
    products = set(window.product_slots)
    slots = [slot for slot in window.slots if slot not in products and slot.role not in _NOT_STORED]
    names = {role: [slot.site for slot in slots if slot.role == role] for role in {slot.role for slot in slots}}
    names |= {EPSILON: names.get(MASTER, []), BUFFER: list(buffers)}
    rows = []
    for role, cast in casts_by_role.items():
        if not names.get(role):
            known = ", ".join(sorted(role for role, found in names.items() if found)) or "none"
            raise InvalidPlan(f"the window has no parameter with {role!r}; it has {known}")
        text = str(Cast.parse(cast) if isinstance(cast, str) else cast)
        rows += [Stored(name=name, role=role, cast=text, reason=reason) for name in names[role]]
    return tuple(rows)
