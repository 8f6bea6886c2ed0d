"""Products inside custom autograd functions: which product of the backward belongs to which of the forward.

Between a function's `forward` and `backward` there is no graph, and its result need not be a product's. What they share
is the node of the graph, known by its sequence number, and tensors: a backward product with an operand of a forward
product (its weight, or the input that was saved) has the gradient at that product's result as its other operand.
Known by storage: only addresses are kept, for the nodes of the latest forward passes.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probes.contents import contents
from probes.records import GRADIENT, Product

if TYPE_CHECKING:
    from probes.sites import ProductCall

NODES = 4096  # how many are remembered


@dataclass
class FunctionProduct:
    """A product of two tensors in a custom function's forward. Only its operands' addresses are kept."""

    site: str
    roles: tuple[str, ...]
    flops: float
    places: list[int]
    _given: set[tuple[int, int]] = field(default_factory=set)

    def gradient_of(self, role: str) -> Product:
        """The backward product that makes the gradient of an operand."""
        first, second = self.roles
        return Product(f"{role}_grad", (GRADIENT, second) if role == first else (first, GRADIENT), self.flops)

    def first_time(self, gradient: Tensor) -> bool:
        """Whether this gradient has not been given before: two backward products share it."""
        key = (_place(gradient), gradient.numel())
        new = key not in self._given
        self._given.add(key)
        return new


class CustomFunctions:
    """The products met in forwards of custom functions, by the node that their backward will run in."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[int, list[FunctionProduct]] = OrderedDict()

    def remember(self, call: ProductCall, result: Any) -> None:
        """A product of the forward that is running now; those of more than two operands cannot be told apart later."""
        if len(call.operands) != 2:
            return
        flops = sum(product.flops for product in call.products(result) if not product.backward)
        found = FunctionProduct(call.site, call.roles, flops, [_place(operand) for operand in call.operands])
        self._nodes.setdefault(_forward_node(), []).append(found)
        while len(self._nodes) > NODES:
            self._nodes.popitem(last=False)

    def find(self, operands: Sequence[Tensor]) -> tuple[FunctionProduct, str, Tensor] | None:
        """For a product of the backward that is running now: the forward product, the role whose gradient this makes,
        and the gradient at the forward product's result."""
        node = torch._C._current_autograd_node()
        if len(operands) != 2 or node is None:
            return None
        for one in self._nodes.get(node._sequence_nr(), ()):
            for operand, gradient in (operands, operands[::-1]):
                if _place(operand) in one.places and _place(gradient) not in one.places:
                    return one, one.roles[1 - one.places.index(_place(operand))], contents(gradient)
        return None

    def forget(self) -> None:
        """Let go of everything."""
        self._nodes.clear()


def in_custom_forward() -> bool:
    """Whether the forward of a custom autograd function is running. To be asked where gradients are disabled."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _forward_node() -> int:
    """The sequence number of the node whose forward is running: it was made last (torch 2.9 to 2.13)."""
    number: int = torch._C._autograd._get_sequence_nr() - 1
    return number


def _place(tensor: Tensor) -> int:
    return contents(tensor).untyped_storage().data_ptr()
