"""The gradient through a cast.

Rounding is flat almost everywhere, so its true gradient is zero and nothing would learn. The straight-through
estimator (Bengio et al. 2013) passes the gradient as if the cast were not there. Two things are left to choose.

A cast of the gradient itself: products in the backward pass read gradients in a format of their own.

What saturated elements get. Clipping is flat too, but for a reason: beyond the largest value nothing the element does
changes the result. `"pass"`, the default, gives them their gradient all the same, as TransformerEngine's and torchao's
training casts do: where scales follow the largest magnitude next to nothing saturates, and where they lag behind it
(delayed, static) an element without a gradient could not come back into range. `"mask"` gives them none, which is the
true gradient of clipping and what quantization-aware training with learned or fixed ranges uses (torch's
fake_quantize). Saturated means: rounds beyond the format's largest value; a NaN is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probes.near import refuse

if TYPE_CHECKING:
    from probes.casts import Cast, CastState

SATURATED = ("pass", "mask")


def straight_through(
    x: Tensor,
    forward: Cast | None,
    backward: Cast | None = None,
    *,
    saturated: str = "pass",
    state: CastState | None = None,
    backward_state: CastState | None = None,
    dimension: int = -1,
) -> Tensor:
    """x after the forward cast; its gradient after the backward cast. None leaves either as it is.

    saturated                what elements that the forward cast saturates are given as gradient: "pass", "mask"
    state, backward_state    of the two casts
    dimension                the one that rows and blocks of scales run along, for both

    Raises InvalidCast for another word for `saturated`, and what the casts raise.
    """
    if torch.compiler.is_compiling():
        return outside_graphs(_straight_through)(x, forward, backward, saturated, state, backward_state, dimension)
    return _straight_through(x, forward, backward, saturated, state, backward_state, dimension)


def outside_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, which torch.compile is not to look into: it would take compiled loops for operations of numpy."""
    disabled: Callable[..., Tensor] = torch.compiler.disable(function)
    return disabled


def _straight_through(
    x: Tensor,
    forward: Cast | None,
    backward: Cast | None,
    saturated: str,
    state: CastState | None,
    backward_state: CastState | None,
    dimension: int,
) -> Tensor:
    if saturated not in SATURATED:
        refuse("way to treat saturated elements", saturated, SATURATED)
    mask = forward is not None and saturated == "mask" and x.requires_grad
    kept = ~forward.saturates(x, state, dimension) if forward is not None and mask else None

    def written(values: Tensor) -> Tensor:
        return values.clone() if forward is None else forward(values, state, dimension)

    def returned(gradient: Tensor) -> Tensor:
        gradient = gradient if kept is None else gradient.where(kept, 0.0)
        return gradient if backward is None else backward(gradient, backward_state, dimension)

    through: Tensor = StraightThrough.apply(x, written, returned)
    return through


class StraightThrough(torch.autograd.Function):
    """One function for the value, another for its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, written: Callable[[Tensor], Tensor], returned: Callable[[Tensor], Tensor]) -> Any:
        return written(x.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.returned = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.returned(gradients[0]), None, None
