"""Fused attention, softmax(query·keyᵀ)·value: two products with something between them that nobody outside sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from probes.operation import Operation, argument, replaced
from probes.records import GRADIENT, Product


@dataclass(frozen=True)
class Attention(Operation):
    """`scaled_dot_product_attention`, with grouped heads, masks and dropout, and the fused kernels behind it."""

    dropout: tuple[int, str] = (4, "dropout_p")
    multilinear: ClassVar[bool] = False

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        """Attention to these operands, without dropout."""
        changed, keywords = self.replace(args, kwargs, operands)
        if argument(args, kwargs, *self.dropout):
            changed, keywords = replaced(changed, keywords, {self.dropout: 0.0})
        return self.results(function(*changed, **keywords))[0]

    def products(
        self,
        roles: Sequence[str],
        operands: Sequence[Tensor],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Product]:
        """The two products, and the gradients that autograd will ask for.

        "probabilities" and "scores_grad" live inside the kernel: no slot holds them. A fused kernel multiplies query
        and key once more in the backward pass, instead of keeping the probabilities. A causal mask saves nothing here,
        as in torch's own count.
        """
        query, key, value = operands
        out = self.results(result)[0]
        rows = prod(out.shape[:-1])
        scores = 2.0 * rows * key.shape[-2] * query.shape[-1]
        values = 2.0 * rows * key.shape[-2] * value.shape[-1]
        found = [
            Product("scores", ("query", "key"), scores),
            Product("values", ("probabilities", "value"), values),
        ]
        if any(operand.requires_grad for operand in operands) and _is_fused(out):
            found.append(Product("scores_again_grad", ("query", "key"), scores))
        if query.requires_grad or key.requires_grad:
            found.append(Product("probabilities_grad", (GRADIENT, "value"), values))
        if query.requires_grad:
            found.append(Product("query_grad", ("scores_grad", "key"), scores))
        if key.requires_grad:
            found.append(Product("key_grad", ("scores_grad", "query"), scores))
        if value.requires_grad:
            found.append(Product("value_grad", ("probabilities", GRADIENT), values))
        return found


@dataclass(frozen=True)
class FlexAttention(Attention):
    """`flex_attention`, run eagerly. A block mask saves nothing here, as in torch's own count."""

    replayable: ClassVar[bool] = False  # its scores are changed by code of the user's


def _is_fused(result: Tensor) -> bool:
    node = result.grad_fn
    return node is not None and any(name in node.name() for name in ("ScaledDotProduct", "FlexAttention"))
