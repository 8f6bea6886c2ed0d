"""The gradients at a product's operands, given one at its result: by the product itself, in float32, without a graph.

So a first layer's input has one too, and what other consumers of a tensor send back never mixes in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.contractions.convolution import CONVOLUTIONS, convolution_gradients
from probes.sites import ProductCall


def vjp(call: ProductCall, operands: Sequence[Tensor], gradient: Tensor, wanted: Sequence[int]) -> list[Tensor]:
    """Gradients at the wanted operands of one product, given the gradient at its result. Float32 throughout."""
    return Pullback(call, operands, wanted).of(gradient, again=False)


class Pullback:
    """The same for several gradients at the result of one product, which is calculated once where it has to be.

    It holds the product's graph, then, as long as it lives.
    """

    def __init__(self, call: ProductCall, operands: Sequence[Tensor], wanted: Sequence[int]) -> None:
        self._call, self._operands, self._wanted = call, operands, wanted
        self._graph: tuple[Tensor, list[Tensor]] | None = None

    def of(self, gradient: Tensor, again: bool = True) -> list[Tensor]:
        """Gradients at the wanted operands; `again`: another gradient may follow."""
        call, operands, wanted = self._call, self._operands, self._wanted
        if not wanted:
            return []
        weight = matrix_weight(call)
        if weight is not None:
            x, matrix = operands
            factor = call.kwargs.get("alpha", 1)
            found = []
            for i in wanted:
                if i == 0:
                    found.append(gradient @ (matrix if weight == "rows" else matrix.T))
                else:
                    left, right = gradient.flatten(0, -2), x.flatten(0, -2)
                    found.append(left.T @ right if weight == "rows" else right.T @ left)
            return found if factor == 1 else [factor * each for each in found]
        if call.operation.name in CONVOLUTIONS and all(given.layout == torch.strided for given in call.given):
            quick = convolution_gradients(call, operands, gradient, wanted)
            if quick is not None:
                return quick
        with torch.enable_grad():
            if self._graph is None:
                leaves = [operand.detach().requires_grad_(i in wanted) for i, operand in enumerate(operands)]
                self._graph = call.plain(leaves), [leaves[i] for i in wanted]
            result, goals = self._graph
            return list(torch.autograd.grad(result, goals, gradient, retain_graph=again))


def matrix_weight(call: ProductCall) -> str | None:
    """Of input [..., I] times a matrix: "rows" if it is [O, I] (linear), "columns" if it is [I, O]; None for others."""
    x, matrix = call.operands[0], call.operands[1]
    if matrix.dim() != 2 or x.dim() < 2 or any(given.layout != torch.strided for given in call.given):
        return None
    if call.operation.name == "linear":
        return "rows"
    return "columns" if call.operation.name in ("addmm", "mm", "matmul") else None
