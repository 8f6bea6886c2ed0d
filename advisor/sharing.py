"""Which slots of a window hold the same tensor: the input of q, k and v, or of a gate and what it gates.

A window keeps no tensors, but two slots whose sketches agree in every bin's count, in the zeros and in the exact
largest and smallest magnitudes of every recorded step were one tensor, or copies of one. What is saved of it for the
backward pass counts once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from advisor.operands import is_weight
from probes.records import GRADIENT, Slot

if TYPE_CHECKING:
    from probes.history import SlotHistory
    from probes.window import Window


def shared_tensors(window: Window) -> Mapping[tuple[str, str], tuple[str, str]]:
    """Slot → the first slot with the same tensor, itself where there is none; of inputs of products alone.

    Weights are told by their parameter and gradients are not saved: neither is in it. Slots without a recorded step
    stand for themselves.
    """
    first: dict[bytes, tuple[str, str]] = {}
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for site in window.sites:
        for role in site.roles:
            if is_weight(role) or role == GRADIENT or Slot(site.name, role) not in window.product_slots:
                continue
            slot = (site.name, role)
            history = window.history(*slot)
            key = _likeness(history) + site.dtypes.get(role, "").encode()
            found[slot] = first.setdefault(key, slot) if len(history.steps) and history.elements.sum() else slot
    return found


def _likeness(history: SlotHistory) -> bytes:
    """Sums of squares are left out: their last bit depends on the order of summation."""
    parts = (
        history.steps,
        history.offsets,
        history.bins,
        history.counts,
        history.zeros,
        history.nans,
        history.positive_infs,
        history.negative_infs,
        history.amax,
        history.amin,
        history.gain,
    )
    return b"".join(part.tobytes() for part in parts)
