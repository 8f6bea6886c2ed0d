"""The loss scale: by what the training multiplies its loss so that small gradients survive.

Gradients are recorded as they are, scaled, and scored with the scale taken out. Four ways to know it, in this order:

- given by the user;
- a GradScaler's: while a window is open, `scale` and `update` of torch's class tell the window of their calls. That
  also shows the steps that a GradScaler skips, which no optimizer hook sees;
- told, by what scales the gradient that backward starts from (`tell`), as `advisor.apply` does;
- found: what backward starts from, over the results of the loss functions before it. At 2 or more it is taken for a
  constant scale (1,024 times the loss); below, for what accumulation and averaging do.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from probes.errors import WindowError

SMALLEST = 2.0
"""From here on a factor is a loss scale. Ours: no common practice multiplies a loss by that much for another reason."""


class LossScale:
    """Finds the loss scale of each step."""

    def __init__(self, given: float | None = None) -> None:
        if given is not None and not 0 < given < float("inf"):
            raise WindowError(f"loss_scale={given}: a finite factor above 0, or None to find it")
        self.given = given
        self.on_update: Callable[[], None] | None = None
        self._scaler: Tensor | None = None
        self._losses: list[Tensor] = []
        self._ratios: list[tuple[Tensor, list[Tensor]]] = []

    def met_loss(self, result: Any) -> None:
        """A known loss function has returned this."""
        if isinstance(result, Tensor) and result.numel() == 1:
            self._losses.append(result.detach())

    def backward_from(self, root: Tensor) -> None:
        """A backward pass starts here."""
        if self._losses:
            self._ratios.append((root.detach(), self._losses))
            self._losses = []

    def end_step(self) -> StepScale:
        """The scale of the step that ends. Nothing is read from the device before its value is asked."""
        ended = StepScale(self.given, self._scaler, tuple(self._ratios))
        self._scaler, self._losses, self._ratios = None, [], []
        return ended

    def scaled_by(self, scaler: GradScaler) -> None:
        """A GradScaler has scaled something."""
        if scaler.is_enabled() and scaler._scale is not None:
            self._scaler = scaler._scale.detach().clone()

    def multiplied_by(self, scale: float) -> None:
        """Something else than a GradScaler has scaled what a backward pass starts from."""
        self._scaler = torch.tensor(scale)

    def updated_by(self, _: GradScaler) -> None:
        """A GradScaler has ended its step, which it may have skipped."""
        if self.on_update is not None:
            self.on_update()

    @contextmanager
    def watching_scalers(self) -> Iterator[None]:
        """While entered, every GradScaler of this process tells of its calls."""
        with _lock:
            _watching.append(self)
            if len(_watching) == 1:
                _put_in()
        try:
            yield
        finally:
            with _lock:
                _watching.remove(self)
                if not _watching:
                    _take_out()


@dataclass(frozen=True)
class StepScale:
    """What is known of one step's loss scale, perhaps still on its way from the device."""

    given: float | None
    scaler: Tensor | None
    ratios: tuple[tuple[Tensor, list[Tensor]], ...]

    @property
    def value(self) -> float:
        """The factor, 1.0 where the loss has none."""
        if self.given is not None:
            return self.given
        if self.scaler is not None:
            return float(self.scaler)
        found = (_constant(float(root), [float(part) for part in parts]) for root, parts in self.ratios)
        return max(found, default=1.0)


def _constant(root: float, losses: list[float]) -> float:
    """The factor between what backward starts from and the losses behind it, 1.0 where that is no loss scale.

    Of several losses, each may have a weight of its own: there only a power of two is believed.
    """
    total = sum(losses)
    found = root / total if total else 0.0
    if not SMALLEST <= found < math.inf:
        return 1.0
    if len(losses) > 1:
        power = 2.0 ** round(math.log2(found))
        return power if abs(found / power - 1) < 1e-5 else 1.0
    return found


def tell(scale: float) -> None:
    """Tell every open window of this process that the backward pass which now starts is scaled by this factor."""
    for watcher in tuple(_watching):
        watcher.multiplied_by(scale)


_lock = threading.Lock()
_watching: list[LossScale] = []
_originals: dict[str, Callable[..., Any]] = {}


def _put_in() -> None:
    for name in ("scale", "update"):
        _originals[name] = getattr(GradScaler, name)
    telling = {"scale": LossScale.scaled_by, "update": LossScale.updated_by}
    for name, tell in telling.items():
        setattr(GradScaler, name, _telling(_originals[name], tell))


def _take_out() -> None:
    for name, original in _originals.items():
        setattr(GradScaler, name, original)
    _originals.clear()


def _telling(original: Callable[..., Any], tell: Callable[[LossScale, GradScaler], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def called(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
        result = original(scaler, *args, **kwargs)
        with torch._C.DisableTorchFunction():
            for watcher in tuple(_watching):
                tell(watcher, scaler)
        return result

    return called
