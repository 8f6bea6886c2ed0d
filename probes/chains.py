"""Products of more than two tensors in one call: chains, multi-operand einsum, bilinear forms; and einsum of two.

Torch splits such a call into products of two, in an order of its own. What lies between them is nobody's operand
("partial"). The FLOPs are torch's own, counted once for each arrangement of shapes by running the call on the meta
device, where nothing is calculated: the forward ones product by product, the backward ones shared evenly by the
operands that have gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from probes.operation import Arguments, Operation, argument
from probes.records import GRADIENT, Product

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # as torch.einsum writes lists of indices


@dataclass(frozen=True)
class Chain(Operation):
    """`chain_matmul`, `linalg.multi_dot`: the operands are all the call's, one by one or in one list."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        found = list(self._given(args, kwargs))
        if len(found) < 2 or not all(isinstance(operand, Tensor) for operand in found):
            return None
        return found

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]) -> Arguments:
        if args and isinstance(args[0], Tensor):
            return tuple(operands), kwargs
        return ((list(operands), *args[1:]), kwargs) if args else ((), {**kwargs, "tensors": list(operands)})

    def products(
        self,
        roles: Sequence[str],
        operands: Sequence[Tensor],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Product]:
        """Left to right: (first, second), then ("partial", the next) and so on."""
        equation = str(argument(args, kwargs, 0, "equation")) if self.name == "einsum" else self.name
        key = tuple((tuple(operand.shape), operand.requires_grad) for operand in operands)
        forward, backward = _counted(equation, key)
        found = []
        for place, flops in enumerate(forward, 1):
            last = min(place, len(roles) - 1)
            name = "forward" if place == 1 else f"forward{place}"
            found.append(Product(name, (roles[0] if place == 1 else "partial", roles[last]), flops))
        trained = [role for role, operand in zip(roles, operands, strict=True) if operand.requires_grad]
        for role in trained:
            other = next(one for one in roles if one != role)
            found.append(Product(f"{role}_grad", (GRADIENT, other), backward / len(trained)))
        return found

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        first = argument(args, kwargs, 0, "tensors")
        return first if isinstance(first, (list, tuple)) else args


@dataclass(frozen=True)
class Bilinear(Operation):
    """`F.bilinear`: x₁·W_o·x₂ for each output o. Torch has no matrix product for it; its FLOPs are those of one."""

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        result: Tensor = function(*operands)
        return result

    def products(
        self,
        roles: Sequence[str],
        operands: Sequence[Tensor],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Product]:
        first, _, weight = operands
        rows = first.numel() / max(first.shape[-1], 1)
        inner, outer = 2.0 * rows * weight.numel(), 2.0 * rows * weight.shape[0] * weight.shape[2]
        found = [Product("forward", (roles[0], roles[2]), inner), Product("forward2", ("partial", roles[1]), outer)]
        for i, other in ((0, 2), (1, 2), (2, 0)):
            if operands[i].requires_grad:
                found.append(Product(f"{roles[i]}_grad", (GRADIENT, roles[other]), inner + outer))
        return found


class Spelled(NamedTuple):
    """An einsum's operands and its equation, whichever way it was called."""

    equation: str
    operands: list[Any]


@dataclass(frozen=True)
class Einsum(Chain):
    """`einsum`, with an equation or with lists of indices, its operands one by one or in one list."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        found = spelled(args, kwargs)
        if found is None or len(found.operands) < 2:
            return None
        if not all(isinstance(operand, Tensor) for operand in found.operands):
            return None
        if len(found.operands) == 2 and not _contracts(found):
            return None  # elementwise or an outer product: nothing is summed, and torch multiplies no matrices
        return found.operands

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]) -> Arguments:
        found = spelled(args, kwargs)
        assert found is not None, "read() gave the operands"
        if len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], (list, tuple)):
            return (args[0], list(operands), *args[2:]), kwargs
        return (found.equation, *operands), {}

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        found = spelled(args, kwargs)
        assert found is not None, "read() gave the operands"
        return torch.einsum(found.equation, *operands)

    def products(
        self,
        roles: Sequence[str],
        operands: Sequence[Tensor],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Product]:
        if len(operands) == 2:
            return Operation.products(self, roles, operands, result, args, kwargs)
        found = spelled(args, kwargs)
        assert found is not None, "read() gave the operands"
        return super().products(roles, operands, result, (found.equation, *operands), {})

    def flops(self, operands: Sequence[Tensor], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """The product of all its index sizes, but for an index of one operand that is summed by itself."""
        found = spelled(args, kwargs)
        assert found is not None, "read() gave the operands"
        terms, out = _terms(found)
        sizes: dict[str, int] = {}
        for letters, operand in zip(terms, operands, strict=True):
            for letter, size in zip(letters, operand.shape, strict=True):
                sizes[letter] = max(size, sizes.get(letter, 1))
        lone = {letter for letter in sizes if letter not in out and not all(letter in term for term in terms)}
        lone |= {letter for letter in sizes if letter not in out and _is_broadcast(letter, terms, operands)}
        return 2.0 * prod(size for letter, size in sizes.items() if letter not in lone)


def spelled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelled | None:
    """The call with an equation of letters; None for a call that is none."""
    first = argument(args, kwargs, 0, "equation")
    if isinstance(first, str):
        rest = args[1:] or (kwargs.get("operands", kwargs.get("tensors", ())),)
        listed = len(rest) == 1 and isinstance(rest[0], (list, tuple))
        return Spelled(first.replace(" ", ""), list(rest[0] if listed else rest))
    if not isinstance(first, Tensor):
        return None
    operands, lists = list(args[0::2]), list(args[1::2])
    if len(args) % 2:  # the last stands alone: the indices of the result
        lists.append(operands.pop())
    terms = ["".join("..." if index is Ellipsis else _LETTERS[index] for index in indices) for indices in lists]
    arrow = "->" + terms.pop() if len(args) % 2 else ""
    return Spelled(",".join(terms) + arrow, operands)


def _terms(found: Spelled) -> tuple[list[list[str]], set[str]]:
    """Each operand's letters, dimension by dimension, and the letters of the result."""
    inputs, arrow, result = found.equation.partition("->")
    terms = []
    for term, operand in zip(inputs.split(","), found.operands, strict=True):
        before, dots, after = term.partition("...")
        covered = operand.dim() - len(before) - len(after) if dots else 0
        terms.append([*before, *(f"...{covered - place}" for place in range(covered)), *after])
    every = Counter(letter for term in terms for letter in term)
    out = set(result.replace("...", "")) if arrow else {letter for letter, times in every.items() if times == 1}
    if "..." in result or not arrow:
        out |= {letter for letter in every if letter.startswith("...")}
    return terms, out


def _contracts(found: Spelled) -> bool:
    """Whether an index of both operands is summed over."""
    (first, second), out = _terms(found)
    return any(letter in second and letter not in out for letter in first)


def _is_broadcast(letter: str, terms: Sequence[Sequence[str]], operands: Sequence[Tensor]) -> bool:
    return any(
        operand.shape[term.index(letter)] == 1 for term, operand in zip(terms, operands, strict=True) if letter in term
    )


class _Counter(TorchDispatchMode):
    """FLOPs of each product, in the order in which torch makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.found.append(float(count(*args, **(kwargs or {}), out_val=result)))
        return result


@lru_cache(maxsize=1024)
def _counted(equation: str, operands: tuple[tuple[tuple[int, ...], bool], ...]) -> tuple[tuple[float, ...], float]:
    """FLOPs of the forward products, one by one, and of all the backward ones together."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.enable_grad():
        made = [torch.empty(shape, device="meta", requires_grad=wanted) for shape, wanted in operands]
        with _Counter() as forward:
            if equation in ("multi_dot", "chain_matmul"):
                result = torch.linalg.multi_dot(made)
            else:
                result = torch.einsum(equation, *made)
        with _Counter() as backward:
            if result.requires_grad:
                torch.autograd.grad(result, [one for one in made if one.requires_grad], torch.empty_like(result))
    return tuple(forward.found), sum(backward.found)
