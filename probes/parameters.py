"""What the optimizer's steps show of each parameter: its gradient and how noisy that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes.records import list_of, text
from probes.rows import SlotRows

NOISE_SAMPLE = 4096  # elements of each weight gradient that are followed from step to step


@dataclass(frozen=True)
class ParameterRecord:
    """One parameter as the optimizer sees it. `roles`: which of its tensors have sketches, under its dotted name."""

    name: str
    dtype: str
    roles: tuple[str, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParameterRecord:
        return cls(text(data["name"]), text(data["dtype"]), tuple(map(text, list_of(data["roles"]))))


@dataclass
class GradientNoise:
    """Minibatch noise of one parameter's gradient, from successive differences, which a slow drift hardly moves."""

    last: Tensor | None = None
    differences: float = 0.0
    energy: float = 0.0

    def add(self, sample: Tensor) -> None:
        if self.last is not None:
            self.differences += float((sample - self.last).square().sum()) / 2
            self.energy += float(sample.square().sum() + self.last.square().sum()) / 2
        self.last = sample


class ParameterWatch:
    """Follows the parameters of a model through the optimizer's steps."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: SlotRows, note: Callable[[str], None]
    ) -> None:
        self._model, self._optimizer, self._rows, self._note = model, optimizer, rows, note
        self._noise: dict[str, GradientNoise] = defaultdict(GradientNoise)
        self.steps: list[int] = []

    def before_step(self, step: int, recorded: bool, followed: bool) -> None:
        """The optimizer is about to step: gradients are as it will use them."""
        for name, parameter in self._model.named_parameters():
            gradient = parameter.grad
            if gradient is None or gradient.layout != torch.strided or parameter.dim() < 2:
                continue
            flat = gradient.detach().reshape(-1)
            stride = max(1, -(-flat.numel() // NOISE_SAMPLE))
            self._noise[name].add(flat[::stride].float().clone())

    def after_step(self, step: int, recorded: bool, followed: bool) -> None:
        """The optimizer has stepped."""
        if followed:
            self.steps.append(step)

    def forget(self) -> None:
        """Let go of every tensor."""
        for noise in self._noise.values():
            noise.last = None

    def records(self) -> tuple[ParameterRecord, ...]:
        """What was found, one record a parameter."""
        return ()

    def batch_noise(self, parameter: str | None) -> float | None:
        """Minibatch noise over gradient energy: of this parameter, or of all together where it is unknown or None."""
        followed = [self._noise[parameter]] if parameter in self._noise else list(self._noise.values())
        energy = sum(noise.energy for noise in followed)
        return sum(noise.differences for noise in followed) / energy if energy else None
