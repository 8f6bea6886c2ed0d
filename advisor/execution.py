"""In which order a training step meets a window's slots, and their metrics step by step, each worked out once."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.metrics import Metrics, measure
from probes.casts import Cast
from probes.parameter_records import MASTER, WEIGHT_GRADIENT
from probes.records import GRADIENT, Slot
from probes.window import Window


def execution_order(window: Window) -> list[Slot]:
    """Every slot of a window, by when a step meets it.

    Parameters that are no product's weight, which are there before the step; the operands of the products, sites in
    the order first met; the products' gradients, last site first; then what the optimizer sees: weight gradients, and
    states, updates and the remaining parameters. Micro-batches and sites that are entered several times count once, at
    their first.
    """
    sites = {site.name: place for place, site in enumerate(window.sites)}
    weights = {site.parameter for site in window.sites}

    def place(slot: Slot) -> tuple[int, int, int]:
        if window.is_product(slot):
            at = sites[slot.site]
            return (2, -at, 0) if slot.role == GRADIENT else (1, at, window.site(slot.site).roles.index(slot.role))
        if slot.role == MASTER and slot.site not in weights:
            return (0, 0, 0)
        return (3 if slot.role == WEIGHT_GRADIENT else 4, 0, 0)

    return sorted(window.slots, key=place)


class Stepwise:
    """The metrics of a window's slots, step by step, under the casts that are asked for."""

    def __init__(self, window: Window, casts: Sequence[str | Cast]) -> None:
        self.window = window
        self.casts = {str(cast): cast for cast in (Cast.parse(c) if isinstance(c, str) else c for c in casts)}
        self._found: dict[tuple[Slot, str], Metrics] = {}

    def of(self, slot: Slot, cast: str) -> Metrics:
        """Metrics of one slot, arrays [S] over its recorded steps. Raises CastNotScored."""
        key = (slot, cast)
        if key not in self._found:
            self._found[key] = measure(self.window.history(*slot), self.casts[cast], self.window.dtype(slot))
        return self._found[key]
