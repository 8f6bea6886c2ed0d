"""The letters of the products of two tensors: linear, matmul and its kin, tensordot, einsum of two operands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from probes.contractions.contraction import Contraction, Lettered
from probes.errors import WindowError
from probes.sites import ProductCall

_MATMULS = frozenset({"linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "inner"})
BILINEAR = _MATMULS | {"einsum", "tensordot"}


class Spelling(NamedTuple):
    """Letters of the left operand's dimensions, of the right one's, and of the result's."""

    left: list[str]
    right: list[str]
    out: list[str]


def bilinear_products(
    call: ProductCall, operands: Sequence[Tensor], gradient: Tensor | None, wanted: set[str]
) -> Iterator[Contraction]:
    """The forward product, and of its two gradients those whose names are wanted.

    Addends and the factor alpha of addmm stay out: neither changes an error relative to the product's magnitudes. The
    gradient at an operand that was broadcast sums over what it was broadcast to, too.
    """
    first, second = operands
    spelling = spelling_of(call, first, second)
    left, right = _without_broadcast(first, second, spelling)
    out = tuple(spelling.out)
    yield Contraction("forward", left, right, out)
    if gradient is None or not wanted:
        return
    arrived = _lettered(gradient, out)
    if f"{call.roles[0]}_grad" in wanted:
        yield Contraction(f"{call.roles[0]}_grad", arrived, right, left.letters)
    if f"{call.roles[1]}_grad" in wanted:
        yield Contraction(f"{call.roles[1]}_grad", left, arrived, right.letters)


def spelling_of(call: ProductCall, first: Tensor, second: Tensor) -> Spelling:
    """The letters of a call of `BILINEAR` with two operands. Raises WindowError for one that is not followed."""
    match call.operation.name:
        case "einsum":
            equation = call.args[0] if call.args else call.kwargs.get("equation")
            if not isinstance(equation, str):
                raise WindowError("einsum with lists of indices in place of an equation is not followed")
            return einsum_letters(equation, first.dim(), second.dim())
        case "tensordot":
            given = call.args[2] if len(call.args) > 2 else call.kwargs.get("dims", 2)
            return tensordot_letters(given, first.dim(), second.dim())
        case "inner":
            rows, columns = (
                [f"{side}{n}" for n in range(one.dim() - 1)] for side, one in zip("rc", (first, second), strict=True)
            )
            return Spelling([*rows, "inner"], [*columns, "inner"], [*rows, *columns])
    left, right, out = matmul_letters(first.dim(), second.dim())
    if call.operation.name == "linear":
        right.reverse()  # [columns, inner], or [inner] alone
    if call.operation.name == "addbmm":
        out.remove("batch1")  # summed over
    return Spelling(left, right, out)


def matmul_letters(first: int, second: int) -> Spelling:
    """As torch.matmul takes operands of these numbers of dimensions, one at least."""
    rows, columns = ["rows"][: first - 1], ["columns"][: second - 1]
    leading = [f"batch{place}" for place in range(max(first, second) - 2, 0, -1)]
    left, right = (leading[len(leading) - max(dimensions - 2, 0) :] for dimensions in (first, second))
    return Spelling([*left, *rows, "inner"], [*right, "inner", *columns], [*leading, *rows, *columns])


def einsum_letters(equation: str, first: int, second: int) -> Spelling:
    """As torch.einsum reads an equation of two operands. Raises WindowError for a diagonal."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")

    def spelled(term: str, covered: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(f"...{place}" for place in range(covered if dots else 0, 0, -1)), *after]

    terms = inputs.split(",")
    covered = [n - len(term.replace("...", "")) for term, n in zip(terms, (first, second), strict=True)]
    left, right = (spelled(term, n) for term, n in zip(terms, covered, strict=True))
    if any(len(set(letters)) < len(letters) for letters in (left, right)):
        raise WindowError(f"einsum {equation!r} takes a diagonal, which is no matrix product")
    if not arrow:
        once = {letter for letter in {*left, *right} if (letter in left) != (letter in right)}
        result = "..." + "".join(sorted(letter for letter in once if not letter.startswith("...")))
    return Spelling(left, right, spelled(result, max(covered)))


def tensordot_letters(dims: Any, first: int, second: int) -> Spelling:
    """As torch.tensordot pairs dimensions: so many last with first ones, or those of two lists."""
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = range(first - dims, first), range(dims)
    left, right = ([f"{side}{n}" for n in range(size)] for side, size in zip("lr", (first, second), strict=True))
    for one, other in zip(*dims, strict=True):
        left[one] = right[other] = f"inner{one % first}"
    return Spelling(left, right, [letter for letter in (*left, *right) if not letter.startswith("inner")])


def _without_broadcast(first: Tensor, second: Tensor, spelling: Spelling) -> tuple[Lettered, Lettered]:
    """Both operands, without the dimensions of one element that the other tensor fills."""
    both = _lettered(first, spelling.left), _lettered(second, spelling.right)
    sizes = [dict(zip(one.letters, one.values.shape, strict=True)) for one in both]
    for letter in sizes[0].keys() & sizes[1].keys():
        if sizes[0][letter] != sizes[1][letter] and 1 not in (sizes[0][letter], sizes[1][letter]):
            raise WindowError(f"shapes {list(first.shape)} and {list(second.shape)} are of no product that is followed")

    def filled(one: Lettered, other: dict[str, int]) -> Lettered:
        alone = [
            n
            for n, (letter, size) in enumerate(zip(one.letters, one.values.shape, strict=True))
            if size == 1 and other.get(letter, 1) > 1
        ]
        letters = [letter for n, letter in enumerate(one.letters) if n not in alone]
        return one.seen_as(one.values.squeeze(alone), letters)

    return filled(both[0], sizes[1]), filled(both[1], sizes[0])


def _lettered(values: Tensor, letters: Sequence[str]) -> Lettered:
    if values.dim() != len(letters):
        raise WindowError(f"a tensor of shape {list(values.shape)} is not followed: {len(letters)} dimensions expected")
    return Lettered.of(values, letters)
