"""One torch function that multiplies matrices: where its operands stand, what they are called, what it costs.

`Operation` is the common case, a product of two tensors. The kinds that differ have modules of their own and override
what differs: convolutions, attention, einsum and chains, grouped products, fused recurrent layers. The table is in
`ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from probes.contents import nonzeros
from probes.records import GRADIENT, Product

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Operation:
    """A product of two tensors, or of more.

    name       what a site without a parameter is called after
    operands   (position, keyword) of each, left to right
    roles      theirs, where positions decide them (input and weight, say); otherwise an operand that is a parameter is
               the weight, and two others are lhs and rhs
    swapped    the second argument is the left operand (__rmatmul__)

    multilinear   the result is linear in each operand; attention's is not
    replayable    it can be calculated again in float32 (`plain`), for the measurements of scored steps
    """

    name: str
    operands: tuple[tuple[int, str], ...]
    roles: tuple[str, ...] | None = None
    swapped: bool = False
    multilinear: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The operands, left to right; None where this call is no matrix product (of two vectors, say)."""
        found = [argument(args, kwargs, at, keyword) for at, keyword in self.operands]
        if not all(isinstance(operand, Tensor) for operand in found):
            return None
        if all(operand.dim() < 2 for operand in found) and self.name in _RANK_ONE:
            return None
        return found[::-1] if self.swapped else found

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]) -> Arguments:
        """The same call with other operands."""
        new = list(operands)[::-1] if self.swapped else list(operands)
        return replaced(args, kwargs, dict(zip(self.operands, new, strict=True)))

    def fixed_roles(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...] | None:
        """The operands' roles where positions decide them."""
        return self.roles

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        """The product of these operands alone, in their dtype: no bias, no addend, no dropout."""
        first, second = operands[0], operands[1]
        match self.name:
            case "linear":
                result: Tensor = F.linear(first, second)
            case "addmm" | "baddbmm" | "addmv":
                result = torch.matmul(first, second) * kwargs.get("alpha", 1)
            case "addbmm":
                result = torch.bmm(first, second).sum(0) * kwargs.get("alpha", 1)
            case "mm" | "bmm" | "mv" | "matmul":
                result = torch.matmul(first, second)
            case _:
                changed, keywords = self.replace(args, kwargs, operands)
                result = function(*changed, **keywords)
        return result

    def results(self, result: Any) -> list[Tensor]:
        """The tensors of the result whose gradients are the site's grad_output."""
        return [result[0] if isinstance(result, tuple) else result]

    def can_replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call can be calculated again."""
        return self.replayable

    def batch_dimension(self, place: int, values: Tensor, args: tuple[Any, ...]) -> int | None:
        """The dimension of an operand that holds the samples, where the operation decides it."""
        return None

    def joined(self, results: Sequence[Tensor], args: tuple[Any, ...]) -> Tensor:
        """The results, or what arrives at them, as one tensor of the shape that `plain` gives."""
        return results[0]

    def apart(self, joined: Tensor, shapes: Sequence[torch.Size], args: tuple[Any, ...]) -> list[Tensor]:
        """The results of these shapes that `joined` made one tensor."""
        return [joined.reshape(shapes[0])]

    def flops(self, operands: Sequence[Tensor], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """FLOPs of the forward product, a multiply-add counted as two; those of zeros that are not stored are none."""
        first, second = operands[0], operands[1]
        match self.name:
            case "addbmm" | "bmm" | "baddbmm":
                dense = 2.0 * prod(first.shape) * second.shape[-1]
            case "mm" | "addmm":
                dense = 2.0 * prod(first.shape) * second.shape[-1]
            case "tensordot":
                dense = 2.0 * (first.numel() * second.numel() * prod(result.shape)) ** 0.5
            case _:
                dense = 2.0 * (result.numel() if result.layout == torch.strided else nonzeros(result)) * first.shape[-1]
        for operand in (first, second):
            if operand.layout not in (torch.strided, torch.jagged):
                dense *= nonzeros(operand) / max(operand.numel(), 1)
        return dense

    def products(
        self,
        roles: Sequence[str],
        operands: Sequence[Tensor],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Product]:
        """The forward product and those backward products that autograd will ask for."""
        flops = self.flops(operands, result, args, kwargs)
        first, second = roles[0], roles[1]
        found = [Product("forward", (first, second), flops)]
        if operands[0].requires_grad:
            found.append(Product(f"{first}_grad", (GRADIENT, second), flops))
        if operands[1].requires_grad:
            found.append(Product(f"{second}_grad", (first, GRADIENT), flops))
        return found


_RANK_ONE = frozenset({"matmul", "inner"})  # of two vectors they are a dot product, which no matrix unit runs


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, keyword: str, default: Any = None) -> Any:
    """An argument that may stand at a position or under a keyword."""
    return args[at] if at < len(args) else kwargs.get(keyword, default)


def replaced(args: tuple[Any, ...], kwargs: dict[str, Any], new: dict[tuple[int, str], Any]) -> Arguments:
    """The same arguments with some in other values, each where it stood."""
    changed, keywords = list(args), dict(kwargs)
    for (at, keyword), value in new.items():
        if at < len(changed):
            changed[at] = value
        else:
            keywords[keyword] = value
    return tuple(changed), keywords
