"""What a plan does around each step of the optimizer: skip it, lend it an epsilon, round what it has updated.

By the optimizer's own step hooks, so that wrappers that call its step and fused, foreach and closure steps are met
alike. A step is skipped by showing the optimizer no gradients: torch's pass over such parameters, decay, moments and
counts included. They are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from advisor.loss_scaling import LossScaler
from advisor.stored import StoredTensors


class Steps:
    """Carries out stored tensors and loss scaling around the steps of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, stored: StoredTensors, scaler: LossScaler | None):
        self._optimizer = optimizer
        self._stored, self._scaler = stored, scaler
        self._hooks: list[Any] = []
        self._within: list[int] = []  # backward passes met when each of the steps that are under way began
        self._backwards = 0
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._had_gradients: set[int] = set()
        self._skipped = False

    def enter(self) -> None:
        """Put the hooks on."""
        if self._optimizer is not None and (self._scaler is not None or self._stored.casts):
            self._hooks.append(self._optimizer.register_step_pre_hook(self._before))
            self._hooks.append(self._optimizer.register_step_post_hook(self._after))

    def leave(self) -> None:
        """Take them off, and give back what a step that raised has left."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._within.clear()
        self._shown()

    def backward(self) -> None:
        """A backward pass has been met."""
        self._backwards += 1

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._within and self._within[-1] != self._backwards:
            self._within.clear()  # that step has raised
        self._within.append(self._backwards)
        if len(self._within) > 1:  # an optimizer whose step calls its parent's
            return None
        self._shown()
        self._skipped, self._had_gradients = False, set()
        self._stored.before_step()
        # torch 2.9 to 2.13 pass the optimizer itself as the first of `args`.
        new = tuple(self._judging(one) if n and callable(one) else one for n, one in enumerate(args))
        named = {name: self._judging(one) if callable(one) else one for name, one in kwargs.items()}
        if not any(map(callable, (*args[1:], *kwargs.values()))):
            self._judge()
        return new, named

    def _after(self, *_: Any) -> None:
        if self._within:
            self._within.pop()
        if self._within:
            return
        self._shown()
        if self._skipped:
            self._stored.after_step_alone()
        else:
            self._stored.after_step(lambda parameter: id(parameter) in self._had_gradients)
        if self._scaler is not None:
            self._scaler.after_step(self._skipped, bool(self._had_gradients))

    def _judging(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, after which it is judged whether the gradients that it made are to be used."""

        def judged(*args: Any, **kwargs: Any) -> Any:
            self._shown()
            result = closure(*args, **kwargs)
            self._judge()
            return result

        return judged

    def _judge(self) -> None:
        """Hide the gradients of a step that is to be skipped."""
        assert self._optimizer is not None
        found = [
            (parameter, parameter.grad)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self._had_gradients |= {id(parameter) for parameter, _ in found}
        if self._scaler is not None and self._scaler.overflowed(gradient for _, gradient in found):
            self._skipped, self._hidden = True, found
            for parameter, _ in found:
                parameter.grad = None

    def _shown(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []
