"""Casting by brute force: one tensor of one product at a time, without anything of what predicts the outcome.

The site hook says where a product is; what is done there is written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from probes.casts import Cast
from probes.edges import await_gradient
from probes.records import GRADIENT, Slot
from probes.sites import ProductCall, SiteHook


class Met(NamedTuple):
    """A slot that one step of training meets, and the dotted name of the site's parameter, if it has one."""

    slot: Slot
    parameter: str | None


class Moved(SiteHook):
    """While `at` names a slot, its tensor is x + sign·δ in the forward pass, δ = cast(x) − x."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.at: Slot | None = None
        self.cast = Cast.parse("fp32")
        self.sign = 1

    def on_product(self, call: ProductCall) -> Any:
        """The product, of the moved operand where it is the slot's."""
        if self.at is None or call.site != self.at.site:
            return call.run()
        operands = list(call.operands)
        place = call.roles.index(self.at.role)
        x = operands[place]
        operands[place] = x + self.sign * (self.cast(x) - x)
        return call.run(operands)


class CastBackward(SiteHook):
    """While `at` names a slot, the gradients are made with its tensor cast; the forward pass stays as it is.

    A gradient is cast before both backward products, as in training. An operand is cast in the backward products that
    it enters, and the loss does not change by a bit.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.at: Slot | None = None
        self.cast = Cast.parse("fp32")

    def on_product(self, call: ProductCall) -> Any:
        """The product, prepared so that what is cast is cast in the backward pass."""
        if self.at is None or call.site != self.at.site:
            return call.run()
        if self.at.role == GRADIENT:
            result = call.run()
            for part in call.results(result):
                await_gradient(part, self.cast)
            return result
        operands = list(call.operands)
        place = call.roles.index(self.at.role)
        x = operands[place]
        operands[place] = x + (self.cast(x) - x).detach()
        exact, other = call.run(), call.run(operands)
        return _with_gradients_of(exact, other)


class TrainedWith(SiteHook):
    """Every slot in `casts` is cast in forward and backward, as a plan would have it: for training runs."""

    def __init__(self, model: nn.Module, casts: dict[Slot, Cast]) -> None:
        super().__init__(model)
        self.casts = casts

    def on_product(self, call: ProductCall) -> Any:
        """The product of the cast operands; its gradient is cast when it comes."""
        operands = []
        for role, x in zip(call.roles, call.operands, strict=True):
            cast = self.casts.get(Slot(call.site, role))
            operands.append(x if cast is None else x + (cast(x) - x).detach())
        changed = any(one is not other for one, other in zip(operands, call.operands, strict=True))
        result = call.run(operands) if changed else call.run()
        cast = self.casts.get(Slot(call.site, GRADIENT))
        if cast is not None:
            for part in call.results(result):
                if part.requires_grad:
                    await_gradient(part, cast)
        return result


class _Listed(SiteHook):
    """Which slots there are, and whether their tensors hold anything but zeros."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.met: dict[Slot, Met] = {}

    def on_product(self, call: ProductCall) -> Any:
        """The product; its slots are noted."""
        for role, operand in zip(call.roles, call.operands, strict=True):
            if bool(operand.any()):
                slot = Slot(call.site, role)
                self.met[slot] = Met(slot, call.parameter)
        slot = Slot(call.site, GRADIENT)
        self.met[slot] = Met(slot, call.parameter)
        return call.run()


def slots_of(model: nn.Module, inputs: Tensor) -> list[Met]:
    """Every slot that a forward pass meets, but for tensors of zeros alone (a recurrent layer's first state)."""
    with torch.no_grad(), _Listed(model) as listed:
        model(inputs)
    return list(listed.met.values())


@contextmanager
def casting(hook: Moved | CastBackward, slot: Slot, cast: Cast) -> Iterator[None]:
    """The hook acts at this slot inside the block, and nowhere after it."""
    hook.at, hook.cast = slot, cast
    try:
        yield
    finally:
        hook.at = None


def _with_gradients_of(exact: Any, other: Any) -> Any:
    """A result, or a tuple of them (a recurrent layer's): the one in its values, with the other's gradients."""
    if isinstance(exact, Tensor):
        return exact.detach() + (other - other.detach())
    return tuple(_with_gradients_of(one, two) for one, two in zip(exact, other, strict=True))
