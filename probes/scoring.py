"""The scored steps of a window: curvature, gradient noise and backward errors, measured by work of our own.

A scored step is one of the user's training steps in which, beside the sketches, every product is kept until the loss
function is called. There the curvature backward runs (`curvature.py`); when the training's own gradients arrive, the
candidate casts' noise in them and the products' backward errors are measured. Whatever fails becomes a note: the
training goes on.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from probes.casts import Cast
from probes.curvature import Met, Sums, curvature_sums, noise_ratios, unchanged, undisturbed
from probes.losses import LossCall
from probes.product_errors import ProductError, pooled, site_backward_errors
from probes.records import Evidence, Slot
from probes.sites import ProductCall


@dataclass
class Pending:
    """One loss call's sums, waiting for the gradient that reaches the loss: d(total)/d(result) times its scale."""

    sums: dict[Slot, Sums]
    scale: float = 0.0


class Scoring:
    """Measures in scored steps, and keeps what it found of each slot."""

    def __init__(self, model: nn.Module, casts: Sequence[Cast], adaptive: bool, seed: int, note: Callable[[str], None]):
        self.casts = tuple(casts)
        self.drawing = False
        self.tried = 0
        self.steps: list[int] = []
        self.knew_the_loss = False
        self.whole_batch: set[str] = set()
        self._model, self._adaptive, self._seed, self._note = model, adaptive, seed, note
        self._curvature: dict[Slot, list[Sums]] = defaultdict(list)
        self._noise: dict[Slot, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._errors: list[ProductError] = []
        self._met: list[Met] = []
        self._pending: list[Pending] = []

    def meet(self, call: ProductCall, result: Tensor, batch: int | None) -> Met:
        """Keep a product of this step, for the curvature backward."""
        met = Met.of(call, result, batch)
        self._met.append(met)
        return met

    def mix_samples(self) -> None:
        """Samples mix from here on (BatchNorm): everything before it sees the whole batch as one."""
        for met in self._met:
            met.whole_batch = True
            self.whole_batch.add(met.call.site)

    def on_loss(self, loss: LossCall, result: Tensor, step: int) -> None:
        """A loss function with a known curvature has returned: the graph to every product behind it stands now."""
        self.knew_the_loss = True
        if not self._met:
            return
        self.drawing = True
        try:
            draw = self._seed + 1_000_003 * step + len(self._pending)
            with unchanged(self._model):
                sums = curvature_sums(loss, self._met, self.casts, seed=draw)
        except Exception as error:  # whatever it was, the user's training goes on, and the window says so
            self._note(f"no curvature: the extra backward pass failed with {type(error).__name__}: {error}")
            return
        finally:
            self.drawing = False
        pending = Pending(sums)
        self._pending.append(pending)

        def reached(gradient: Tensor) -> None:
            pending.scale += float(gradient) * loss.scale
            self._met = []  # the graph is about to be freed, and the operands with it

        result.register_hook(reached)

    def on_gradient(self, met: Met, gradient: Tensor) -> None:
        """The training's gradient has arrived at a product of this step."""
        if not met.intact:
            return
        call = met.call
        try:
            for slot, ratios in noise_ratios(call, gradient, self.casts, self._adaptive).items():
                for cast, ratio in ratios.items():
                    self._noise[slot][cast].append(ratio)
            with undisturbed():
                self._errors += site_backward_errors(call, gradient)
        except Exception as error:  # as in `on_loss`
            self._note(f"no gradient noise at {call.site}: {type(error).__name__}: {error}")

    def end_step(self, step: int, loss_scale: float) -> None:
        """Settle a scored step: curvature in units of the loss without its scale."""
        self.tried += 1
        total: dict[Slot, Sums] = defaultdict(Sums)
        for pending in self._pending:
            if pending.scale > 0:
                for slot, sums in pending.sums.items():
                    total[slot].add(sums, pending.scale / loss_scale)
        for slot, sums in total.items():
            self._curvature[slot].append(sums)
        if total:
            self.steps.append(step)
        self.forget()

    def forget(self) -> None:
        """Let go of every tensor of the step."""
        self._met, self._pending = [], []

    @property
    def curvature_from(self) -> str | None:
        """ "loss" where its curvature was known and reached the products; None where nothing was."""
        return "loss" if self._curvature else None

    @property
    def backward_errors(self) -> tuple[ProductError, ...]:
        """One record a site, product and cast, over all scored steps."""
        return tuple(pooled(self._errors))

    def evidence(self, slot: Slot, batch_noise: float | None) -> Evidence:
        """What was measured of a slot."""
        sums = self._curvature.get(slot, [])
        steps = len(sums)
        directional: dict[str, float] = {}
        spread: dict[str, float] = {}
        for cast in sums[0].directional if sums else ():
            directional[cast] = sum(part.directional[cast] for part in sums) / steps
            # For a normal a, the variance of a² is two thirds of E[a⁴].
            spread[cast] = (2 / 3 * sum(part.squares[cast] for part in sums)) ** 0.5 / steps
        return Evidence(
            curvature=sum(part.curvature for part in sums) / steps if sums else None,
            directional=directional,
            directional_se=spread,
            relative_noise={cast: statistics.fmean(found) for cast, found in self._noise.get(slot, {}).items()},
            batch_noise=batch_noise,
            whole_batch=slot.site in self.whole_batch,
        )
