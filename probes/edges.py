"""Where in autograd's graph the gradient at a product's result arrives, whatever becomes of the result.

`F.linear` of three dimensions gives a view of a product of two. If that view is changed in place (an activation with
`inplace=True`), autograd writes its history anew: hooks on the view are lost and its node is in no graph. The node of
the product behind the view stays, so for a view of a whole product the gradient is awaited there, and given the view's
shape.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def gradient_edge(result: Tensor) -> GradientEdge:
    """The edge at which the gradient arrives; that of a view is one of its base, to be given the view's shape."""
    return get_gradient_edge(_behind(result))


def await_gradient(result: Tensor, received: Callable[[Tensor], Tensor | None]) -> None:
    """Call `received` with the gradient at this tensor, of its shape, when it arrives.

    What it returns goes on in the gradient's place; None leaves it as it is. The tensor must require a gradient, and
    nothing of it is kept.
    """
    behind = _behind(result)
    if behind is result or behind.grad_fn is None:
        result.register_hook(received)
        return
    shape, place = result.shape, behind.output_nr

    def arrived(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        gradient = gradients[place]
        changed = None if gradient is None else received(gradient.reshape(shape))
        if gradient is None or changed is None:
            return None
        return (*gradients[:place], changed.reshape(gradient.shape), *gradients[place + 1 :])

    behind.grad_fn.register_prehook(arrived)


def _behind(result: Tensor) -> Tensor:
    """The tensor that this one is a whole, reshaped view of; itself if it is none."""
    base = result._base
    if base is None or base.grad_fn is None or base.numel() != result.numel():
        return result
    return base if base.is_contiguous() and result.is_contiguous() else result
