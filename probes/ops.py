"""The matrix products that torch offers, as data: where their operands stand, what they are called, what they cost.

One row a torch function. A row names the positions of the operands, so that roles are explicit; everything else that
the hook needs (FLOPs, the backward products) follows from the operation's kind. What is not in the table is not a
site; `coverage.py` counts what passes beneath it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probes.records import GRADIENT, Product

_SDPA_DROPOUT = 4  # position of dropout_p

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Operation:
    """One torch function that multiplies matrices.

    `operands`: (position, keyword) of each; `named` when a position decides the roles (input and weight, or query,
    key, value), otherwise an operand that is a parameter is the weight and two others are lhs and rhs.
    """

    name: str
    operands: tuple[tuple[int, str], ...]
    roles: tuple[str, ...] | None = None
    swapped: bool = False  # __rmatmul__: the second argument is the left operand

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The operands, left to right; None where this call is no product of tensors (an einsum of three, say)."""
        if self.name == "einsum":
            found = _einsum_operands(args)
        else:
            found = [args[at] if at < len(args) else kwargs.get(keyword) for at, keyword in self.operands]
        if len(found) != max(len(self.operands), 2) or not all(isinstance(t, Tensor) for t in found):
            return None
        return found[::-1] if self.swapped else found

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]) -> Arguments:
        """The same call with other operands."""
        new = list(operands)[::-1] if self.swapped else list(operands)
        if self.name == "einsum":
            return (args[0], new), kwargs
        changed, keywords = list(args), dict(kwargs)
        for (at, keyword), operand in zip(self.operands, new, strict=True):
            if at < len(changed):
                changed[at] = operand
            else:
                keywords[keyword] = operand
        return tuple(changed), keywords

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        """The product of these operands alone: no bias, no addend, no dropout. Bilinear, but for attention."""
        first, second = operands[0], operands[1]
        match self.name:
            case "linear":
                return F.linear(first, second)
            case "addmm" | "baddbmm":
                return torch.matmul(first, second) * kwargs.get("alpha", 1)
            case "sdpa":
                changed, keywords = self.replace(args, kwargs, operands)
                if len(changed) > _SDPA_DROPOUT:
                    changed = (*changed[:_SDPA_DROPOUT], 0.0, *changed[_SDPA_DROPOUT + 1 :])
                result: Tensor = function(
                    *changed, **{**keywords, **({"dropout_p": 0.0} if "dropout_p" in keywords else {})}
                )
                return result
            case "einsum" | "matmul" | "mm" | "bmm" | "mv":
                changed, keywords = self.replace(args, kwargs, operands)
            case _:  # convolutions: the third argument is the bias
                changed, keywords = self.replace(args, kwargs, operands)
                changed = (*changed[:2], *((None, *changed[3:]) if len(changed) > 2 else ()))
                keywords = {name: value for name, value in keywords.items() if name != "bias"}
        return function(*changed, **keywords)

    def flops(self, operands: Sequence[Tensor], result: Tensor, args: tuple[Any, ...]) -> float:
        """FLOPs of the forward product; for attention of its first product, query·key."""
        first, second = operands[0], operands[1]
        match self.name:
            case "sdpa":
                return 2.0 * prod(first.shape[:-1]) * second.shape[-2] * first.shape[-1]
            case "conv1d" | "conv2d" | "conv3d":
                return 2.0 * result.numel() * second.numel() / max(second.shape[0], 1)
            case "conv_transpose1d" | "conv_transpose2d" | "conv_transpose3d":
                return 2.0 * first.numel() * second.numel() / max(second.shape[0], 1)
            case "einsum":
                return 2.0 * _einsum_points(args, operands)
            case _:
                return 2.0 * result.numel() * first.shape[-1]

    def products(
        self, roles: Sequence[str], operands: Sequence[Tensor], result: Tensor, args: tuple[Any, ...]
    ) -> list[Product]:
        """The forward product and those backward products that autograd will ask for."""
        flops = self.flops(operands, result, args)
        if self.name == "sdpa":
            return _attention_products(operands, flops)
        first, second = roles[0], roles[1]
        found = [Product("forward", (first, second), flops)]
        if operands[0].requires_grad:
            found.append(Product(f"{first}_grad", (GRADIENT, second), flops))
        if operands[1].requires_grad:
            found.append(Product(f"{second}_grad", (first, GRADIENT), flops))
        return found


def _attention_products(operands: Sequence[Tensor], scores: float) -> list[Product]:
    """The two products of softmax(query·keyᵀ)·value and their four gradients.

    "probabilities" and "scores_grad" live inside the kernel: no slot holds them.
    """
    query, key, value = operands
    values = scores * value.shape[-1] / max(query.shape[-1], 1)
    found = [
        Product("scores", ("query", "key"), scores),
        Product("values", ("probabilities", "value"), values),
    ]
    if query.requires_grad or key.requires_grad:
        found.append(Product("probabilities_grad", (GRADIENT, "value"), values))
    if query.requires_grad:
        found.append(Product("query_grad", ("scores_grad", "key"), scores))
    if key.requires_grad:
        found.append(Product("key_grad", ("scores_grad", "query"), scores))
    if value.requires_grad:
        found.append(Product("value_grad", ("probabilities", GRADIENT), values))
    return found


def _einsum_operands(args: tuple[Any, ...]) -> list[Any]:
    if not args or not isinstance(args[0], str):
        return []
    return list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])


def _einsum_points(args: tuple[Any, ...], operands: Sequence[Tensor]) -> float:
    """Multiply-adds of an einsum of two operands: the product of all its index sizes."""
    terms = str(args[0]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        before, _, after = term.partition("...")
        batch = operand.dim() - len(before) - len(after)
        if "..." not in term:
            batch = 0
        for letter, size in zip(before, operand.shape, strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
        for i in range(batch):
            place = f"...{batch - i}"
            sizes[place] = max(operand.shape[len(before) + i], sizes.get(place, 1))
        for letter, size in zip(after, operand.shape[len(before) + batch :], strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return float(prod(sizes.values()))


_ADDMM = Operation("addmm", ((1, "mat1"), (2, "mat2")))
_BADDBMM = Operation("baddbmm", ((1, "batch1"), (2, "batch2")))
_EINSUM = Operation("einsum", ())
_SDPA = Operation("sdpa", ((0, "query"), (1, "key"), (2, "value")), ("query", "key", "value"))


def _layer(name: str) -> Operation:
    return Operation(name, ((0, "input"), (1, "weight")), ("input", "weight"))


def _pair(name: str, second: str, swapped: bool = False) -> Operation:
    return Operation(name, ((0, "input"), (1, second)), swapped=swapped)


def _table() -> dict[Callable[..., Any], Operation]:
    aten = torch.ops.aten
    rows: dict[Callable[..., Any], Operation] = {
        F.linear: _layer("linear"),
        torch.matmul: _pair("matmul", "other"),
        torch.Tensor.matmul: _pair("matmul", "other"),
        torch.Tensor.__matmul__: _pair("matmul", "other"),
        torch.Tensor.__rmatmul__: _pair("matmul", "other", swapped=True),
        torch.mm: _pair("mm", "mat2"),
        torch.Tensor.mm: _pair("mm", "mat2"),
        torch.bmm: _pair("bmm", "mat2"),
        torch.Tensor.bmm: _pair("bmm", "mat2"),
        torch.mv: _pair("mv", "vec"),
        torch.Tensor.mv: _pair("mv", "vec"),
        torch.addmm: _ADDMM,
        torch.Tensor.addmm: _ADDMM,
        torch.baddbmm: _BADDBMM,
        torch.Tensor.baddbmm: _BADDBMM,
        torch.einsum: _EINSUM,
        F.scaled_dot_product_attention: _SDPA,
        # What a torch.export program calls after unflatten.
        aten.linear.default: _layer("linear"),
        aten.matmul.default: _pair("matmul", "other"),
        aten.mm.default: _pair("mm", "mat2"),
        aten.bmm.default: _pair("bmm", "mat2"),
        aten.addmm.default: _ADDMM,
        aten.baddbmm.default: _BADDBMM,
        aten.einsum.default: _EINSUM,
        aten.scaled_dot_product_attention.default: _SDPA,
        aten.conv1d.default: _layer("conv1d"),
        aten.conv2d.default: _layer("conv2d"),
        aten.conv3d.default: _layer("conv3d"),
    }
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        rows[getattr(F, name)] = _layer(name)
    return rows


OPERATIONS = _table()
