"""Where in autograd's graph the gradient at a product's result arrives, whatever becomes of the result.

`F.linear` of three dimensions gives a view of a product of two, and `einsum` one whose dimensions are put in order. If
that view is changed in place (an activation with `inplace=True`, a mask), autograd writes its history anew: hooks on
the view are lost and its node is in no graph. The node of the product behind the view stays, so for a view of a whole
product the gradient is awaited there, and brought to the view's shape and order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Order = tuple[int, ...] | None
"""A view's dimensions in the order in which the tensor behind it has them in memory; None where nothing is behind."""


def gradient_edge(result: Tensor) -> GradientEdge:
    """The edge at which the gradient arrives; that of a view is one of its base (`as_the_view`)."""
    return get_gradient_edge(_behind(result)[0])


def order_behind(result: Tensor) -> Order:
    """What `as_the_view` and `as_the_base` need to know of a result."""
    return _behind(result)[1]


def as_the_view(gradient: Tensor, shape: torch.Size, order: Order) -> Tensor:
    """What has arrived at the edge of a result of this shape, as the result has it."""
    if order is None:
        return gradient.reshape(shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    return gradient.reshape([shape[i] for i in order]).permute(back)


def as_the_base(values: Tensor, order: Order) -> Tensor:
    """The reverse, to be given the shape of what has arrived."""
    return values if order is None else values.permute(order)


def await_gradient(result: Tensor, received: Callable[[Tensor], Tensor | None]) -> None:
    """Call `received` with the gradient at this tensor, of its shape, when it arrives.

    What it returns goes on in the gradient's place; None leaves it as it is. The tensor must require a gradient, and
    nothing of it is kept.
    """
    behind, order = _behind(result)
    if order is None or behind.grad_fn is None:
        result.register_hook(received)
        return
    shape, place = result.shape, behind.output_nr

    def arrived(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        gradient = gradients[place]
        changed = None if gradient is None else received(as_the_view(gradient, shape, order))
        if gradient is None or changed is None:
            return None
        changed = as_the_base(changed, order).reshape(gradient.shape)
        return (*gradients[:place], changed, *gradients[place + 1 :])

    behind.grad_fn.register_prehook(arrived)


def _behind(result: Tensor) -> tuple[Tensor, Order]:
    """The tensor that this one is a whole view of, reshaped and with its dimensions in some order; itself if none."""
    base = result._base
    if base is None or base.grad_fn is None or base.numel() != result.numel() or not base.is_contiguous():
        return result, None
    if result.is_contiguous():
        return base, tuple(range(result.dim()))
    order = tuple(sorted(range(result.dim()), key=result.stride().__getitem__, reverse=True))
    return (base, order) if result.permute(order).is_contiguous() else (result, None)
