"""Second derivatives that autograd's nodes do not have, given to them for the time of one backward pass.

A backward pass with a graph of its own (`create_graph=True`) can be gone through again, and gives the product of a
network's second derivative with a vector. Two kinds of node stand in the way (torch 2.9 to 2.13):

- Fused attention: its backward kernel has no derivative. The gradients are replaced by those of the same attention
  written out, whose graph is whole.
- Kinks (ReLU, clipping, absolute value): their second derivative is zero wherever there is one, and yet the mean loss
  over noise does rise with the share of values near the kink: max(z, 0) with ±e is higher by (|e| − |z|)₊ / 2. For
  noise that is small beside the spread of z this is ½·e² times the density of z at the kink. So the slope is given a
  derivative of 1/width within a narrow band around the kink, whose mean is that density. Without it the damage before a
  ReLU that nothing normalises was 3 to 14 times too low (a shortcut of the built-in ConvNet).

Both are hooks on nodes that already stand in the graph, which add exactly nothing to a gradient's value and are taken
off again: the training's own backward pass, which runs later, meets none. Max pooling has kinks as well, where two
values tie; they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from probes.errors import WindowError

BAND = 0.25  # the width of a kink's band over the root mean square of the values; 0.15 to 0.35 gave the same damage
MOST_SCORES = 2**28  # attention scores that may be written out, a call: 1 GiB


@contextmanager
def second_derivatives(starts: Sequence[GradientEdge]) -> Iterator[None]:
    """Every node behind `starts` has a second derivative inside, if it is of a known kind.

    Raises WindowError, when the backward pass reaches it, for fused attention that cannot be written out.
    """
    hooks = []
    try:
        for node in _behind([edge.node for edge in starts]):
            changed = _changed(node)
            if changed is not None:
                hooks.append(node.register_hook(changed))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_whole(gradients: Sequence[Tensor | None]) -> None:
    """Raises WindowError where the graph of a backward pass ends at a function that can be gone back through once.

    Autograd says so only on the way to what lies behind it (torch 2.13), and counts it as constant otherwise.
    """
    nodes = [one.grad_fn for one in gradients if one is not None and one.grad_fn is not None]
    if any(node.name().endswith("Error") for node in _behind(nodes)):
        raise WindowError("a custom function can be gone back through once only")


Gradients = tuple[Any, ...]
Changed = Callable[[Gradients, Gradients], Gradients | None]


def _changed(node: Node) -> Changed | None:
    """What the node's gradients become, given those at its inputs and at its result."""
    name = node.name()
    if name.startswith("ScaledDotProduct"):
        return lambda at_inputs, at_result: _written_out(node, at_inputs, at_result[0])
    slope = _KINKS.get(name)
    if slope is None:
        return None

    def with_band(at_inputs: Gradients, at_result: Gradients) -> Gradients | None:
        if at_inputs[0] is None or at_result[0] is None:
            return None
        with torch._C.DisableTorchFunction():
            ramp = slope(node)
            return (at_inputs[0] + at_result[0] * (ramp - ramp.detach()), *at_inputs[1:])

    return with_band


def _of_relu(node: Any) -> Tensor:
    """From the result, so from one side only: changed in place, the other side is gone."""
    result: Tensor = node._saved_result
    width = BAND * 2**0.5 * _size(result)  # half of the values are zero, more or less
    near = (result > 0) & (result < width)
    return result * (near / width).detach()


def _band(values: Tensor, kinks: Sequence[tuple[float, Any]]) -> Tensor:
    """Numbers whose derivative in `values` is that of the slope: `kinks` are places and how much the slope rises."""
    width = BAND * _size(values)
    found = values.new_zeros(())
    for place, rise in kinks:
        near = (values.detach() - place).abs() < width
        found = found + values * (near * rise / (2 * width)).detach()
    return found


def _size(values: Tensor) -> Tensor:
    return values.detach().square().mean().sqrt().clamp(min=torch.finfo(values.dtype).tiny)


def _of_clamp(node: Any) -> Tensor:
    ends = [(node._saved_min, 1.0), (node._saved_max, -1.0)]
    return _band(node._saved_self, [(float(place), rise) for place, rise in ends if place is not None])


_KINKS: dict[str, Callable[[Any], Tensor]] = {
    "ReluBackward0": _of_relu,
    "LeakyReluBackward0": lambda node: _band(node._saved_self, [(0.0, 1 - float(node._saved_negative_slope))]),
    "HardtanhBackward0": lambda node: _band(
        node._saved_self, [(float(node._saved_min_val), 1.0), (float(node._saved_max_val), -1.0)]
    ),
    "ClampBackward1": _of_clamp,
    "ClampMinBackward0": lambda node: _band(node._saved_self, [(float(node._saved_min), 1.0)]),
    "AbsBackward0": lambda node: _band(node._saved_self, [(0.0, 2.0)]),
}


def _written_out(node: Any, at_inputs: Gradients, gradient: Tensor) -> Gradients:
    """The gradients of softmax(query·keyᵀ)·value by products of their own."""
    query, key, value = node._saved_query, node._saved_key, node._saved_value
    mask = getattr(node, "_saved_attn_mask", getattr(node, "_saved_attn_bias", None))
    if node._saved_dropout_p:
        raise WindowError("attention with dropout inside its kernel has no second derivative")
    if query.numel() // query.shape[-1] * key.shape[-2] > MOST_SCORES:
        raise WindowError(f"attention over {key.shape[-2]} positions is too large to be written out")
    wanted = [i for i, one in enumerate((query, key, value)) if one.requires_grad and at_inputs[i] is not None]
    with torch._C.DisableTorchFunction(), sdpa_kernel(SDPBackend.MATH):
        again = F.scaled_dot_product_attention(
            *(query, key, value, mask),
            is_causal=node._saved_is_causal,
            scale=node._saved_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    found = torch.autograd.grad(again, [(query, key, value)[i] for i in wanted], gradient, create_graph=True)
    places = dict(zip(wanted, found, strict=True))
    return tuple(places.get(i, old) for i, old in enumerate(at_inputs))


def _behind(starts: Sequence[Node]) -> Iterator[Node]:
    """Each node of the graph once."""
    seen: set[Node] = set()
    left = list(starts)
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        left += [before for before, _ in node.next_functions if before is not None]
