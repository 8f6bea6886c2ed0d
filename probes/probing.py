"""Watching a stretch of real training.

    with probe(model, optimizer, steps=20) as window:
        for batch in loader:
            train_one_step(batch)
            if window.done:
                break

While the block runs, a Recorder meets the model's products; when it is left, what was recorded becomes the window.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from probes.casts import Cast
from probes.errors import WindowError
from probes.history import history_of
from probes.measurable import why_not_measurable
from probes.recorder import Clock, Recorder
from probes.records import GRADIENT, Evidence, Product, Site, Slot
from probes.window import Window

USUAL_CASTS = ("e4m3fn", "e5m2", "int8", "bf16", "fp16")  # the candidates of the directional products


class probe(AbstractContextManager[Window]):  # noqa: N801 - used as a function, like torch.no_grad
    """Watch a model's training for some optimizer steps; the Window it gives is filled when the block is left.

    model, optimizer   those that are being trained; any torch.optim.Optimizer
    steps              optimizer steps until the window ends itself, at least 1
    every              record each k-th step
    overhead           let the watching take this share of the time (0.05 is a twentieth), and record fewer steps
                       for it; None records as `every` says
    curvature_steps    recorded steps on which damage and gradient noise are measured by extra backward passes; 0: none
    casts              candidates for those measurements, as strings or Casts, each with one scale a tensor or none; a
                       delayed one is measured with its own tensor's scale

    An exception inside leaves the model without a hook; the steps that were complete stay in the window. Raises
    WindowError for arguments that make no window, casts with scales by row, column or block among them; UnknownFormat
    and InvalidCast for a cast that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int = 20,
        *,
        every: int = 1,
        overhead: float | None = None,
        curvature_steps: int = 2,
        casts: Sequence[str | Cast] | None = None,
    ) -> None:
        _check(model, optimizer, steps, every, overhead, curvature_steps)
        self._model, self._optimizer = model, optimizer
        self._total, self._every, self._overhead = steps, every, overhead
        self._recorder = Recorder(
            model, candidates(casts or USUAL_CASTS), adaptive=not isinstance(optimizer, torch.optim.SGD)
        )
        self._scored = _spread(curvature_steps, range(0, steps, every))
        self._clock: Clock | None = None
        self.window = Window()
        self._handles: list[Any] = []
        self._entered = False

    def __enter__(self) -> Window:
        if self._entered:
            raise WindowError("a window can be opened once; call probe(...) again for another")
        self._entered = True
        self._clock = None if self._overhead is None else Clock(self._overhead)
        self._recorder.__enter__()
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._plan_step(allowed=self._clock is None)
        return self.window

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._stop()
        self._recorder.__exit__(kind, *error)
        notes = list(self._recorder.notes)
        if self._recorder.step < self._total and kind is None:
            notes.append(f"the window was left after {self._recorder.step} of {self._total} optimizer steps")
        if kind is not None:
            notes.append(f"the window was cut short by {kind.__name__} in step {self._recorder.step}")
        self.window.done = True
        _close(self.window, self._recorder, self._model, self._optimizer, notes)

    def _before_step(self, *_: Any) -> None:
        self._recorder.stop_counting()
        self._recorder.follow_gradients()

    def _after_step(self, *_: Any) -> None:
        recorder = self._recorder
        recorded = recorder.recording
        recorder.end_step()
        if recorder.step >= self._total:
            self._stop()
            self.window.done = True
            return
        allowed = True if self._clock is None else self._clock.lap(recorded)
        self._plan_step(allowed)

    def _plan_step(self, allowed: bool) -> None:
        step = self._recorder.step
        self._recorder.recording = allowed and step % self._every == 0
        if self._recorder.recording:
            self._recorder.count_beneath()
        due = len([s for s in self._scored if s <= step])
        self._recorder.scoring = self._recorder.recording and len(self._recorder.scored) < due

    def _stop(self) -> None:
        """Stop watching: hooks off. The override mode itself is left when the `with` block is."""
        self._recorder.recording = self._recorder.scoring = False
        self._recorder.stop_counting()
        self._recorder.stack.detach()
        while self._handles:
            self._handles.pop().remove()


def candidates(casts: Sequence[str | Cast]) -> list[Cast]:
    """The casts, read. Raises UnknownFormat, InvalidCast, and WindowError for one that no window can measure."""
    chosen = [Cast.parse(cast) if isinstance(cast, str) else cast for cast in casts]
    for cast in chosen:
        if reason := why_not_measurable(cast):
            raise WindowError(reason)
    return chosen


def _check(model: Any, optimizer: Any, steps: int, every: int, overhead: float | None, curvature_steps: int) -> None:
    if not isinstance(model, nn.Module):
        raise WindowError(f"probe needs a torch.nn.Module, got {type(model).__name__}")
    if not hasattr(optimizer, "register_step_post_hook"):
        raise WindowError(
            f"probe needs an optimizer with step hooks (any torch.optim.Optimizer), got {type(optimizer).__name__}"
        )
    if steps < 1:
        raise WindowError(f"a window of {steps} steps records nothing; give steps=1 or more (20 is usual)")
    if every < 1:
        raise WindowError(f"every={every}: record each k-th step, k at least 1")
    if overhead is not None and not 0 < overhead <= 1:
        raise WindowError(f"overhead={overhead}: a share of the training time, above 0 and at most 1, or None")
    if curvature_steps < 0:
        raise WindowError(f"curvature_steps={curvature_steps}: 0 turns it off, 2 is usual")


def _spread(count: int, steps: range) -> list[int]:
    """`count` of these steps, evenly over the window."""
    count = min(count, len(steps))
    return [steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)]


def _close(
    window: Window,
    recorder: Recorder,
    model: nn.Module,
    optimizer: Any,
    notes: list[str],
) -> None:
    steps = max(len(recorder.recorded), 1)
    rows = {slot: rows for slot, rows in recorder.rows.items() if rows}
    sites = [
        Site(
            name=name,
            op=tally.op,
            roles=(*tally.roles, *([GRADIENT] if Slot(name, GRADIENT) in rows else [])),
            shapes=dict(tally.shapes),
            dtypes=dict(tally.dtypes),
            elements={role: count / steps for role, count in tally.elements.items()},
            products=tuple(
                Product(product, operands, flops / steps) for (product, operands), flops in tally.products.items()
            ),
            parameter=tally.parameter,
            parameter_shape=None if tally.parameter is None else tuple(model.get_parameter(tally.parameter).shape),
            calls=tally.calls / steps,
        )
        for name, tally in recorder.tallies.items()
        if any(slot.site == name for slot in rows)
    ]
    if recorder.recorded and not sites:
        notes.append(
            "no matrix product was met: the hook sees torch's own functions, and not what a fused kernel "
            "(nn.LSTM, say) multiplies inside"
        )
    elif recorder.tried and not recorder.knew_the_loss:
        notes.append(
            "no loss function with a known curvature was met (F.cross_entropy, F.mse_loss), so damage is not predicted"
        )
    window.fill(
        model_name=type(model).__name__,
        optimizer_name=type(optimizer).__name__,
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        steps=recorder.recorded,
        losses=recorder.losses,
        sites=sites,
        coverage=recorder.coverage(sites),
        histories={slot: history_of(found) for slot, found in rows.items()},
        evidence={slot: _evidence(slot, recorder) for slot in rows},
        notes=notes,
    )


def _evidence(slot: Slot, recorder: Recorder) -> Evidence:
    sums = recorder.curvature.get(slot, [])
    steps = len(sums)
    directional: dict[str, float] = {}
    spread: dict[str, float] = {}
    for cast in sums[0].directional if sums else ():
        directional[cast] = sum(part.directional[cast] for part in sums) / steps
        # For a normal a, the variance of a² is two thirds of E[a⁴].
        spread[cast] = (2 / 3 * sum(part.squares[cast] for part in sums)) ** 0.5 / steps
    parameter = recorder.tallies[slot.site].parameter
    return Evidence(
        curvature=sum(part.curvature for part in sums) / steps if sums else None,
        directional=directional,
        directional_se=spread,
        relative_noise={cast: statistics.fmean(ratios) for cast, ratios in recorder.noise_ratios.get(slot, {}).items()},
        batch_noise=_batch_noise(parameter, recorder),
        whole_batch=slot.site in recorder.whole_batch,
    )


def _batch_noise(parameter: str | None, recorder: Recorder) -> float | None:
    """Minibatch noise over gradient energy: of the site's parameter, or of all together where it has none."""
    followed = [recorder.gradient_noise[parameter]] if parameter in recorder.gradient_noise else []
    followed = followed or list(recorder.gradient_noise.values())
    energy = sum(noise.energy for noise in followed)
    return sum(noise.differences for noise in followed) / energy if energy else None
