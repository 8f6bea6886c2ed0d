"""The letters of the bilinear products: linear, matmul and its kin, einsum of two operands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from probes.contractions import Contraction, Lettered
from probes.errors import WindowError
from probes.sites import ProductCall

MATMULS = frozenset({"linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm"})


class Spelling(NamedTuple):
    """Letters of the left operand's dimensions, of the right one's, and of the result's."""

    left: list[str]
    right: list[str]
    out: list[str]


def bilinear_products(
    call: ProductCall, operands: Sequence[Tensor], gradient: Tensor | None, wanted: set[str]
) -> Iterator[Contraction]:
    """The forward product, and of its two gradients those whose names are wanted.

    Addends and the factor alpha of addmm stay out: neither changes an error relative to the product's magnitudes.
    """
    first, second = operands
    if call.operation.name == "einsum":
        spelling = einsum_letters(str(call.args[0]), first.dim(), second.dim())
    else:
        spelling = matmul_letters(first.dim(), second.dim())
    if call.operation.name == "linear":
        spelling.right.reverse()  # [columns, inner], or [inner] alone
    left, right = _without_broadcast(first, second, spelling)
    out = tuple(spelling.out)
    yield Contraction("forward", left, right, out)
    if gradient is None or not wanted:
        return
    arrived = Lettered.of(gradient, out)
    if f"{call.roles[0]}_grad" in wanted:
        yield Contraction(f"{call.roles[0]}_grad", arrived, right, left.letters)
    if f"{call.roles[1]}_grad" in wanted:
        yield Contraction(f"{call.roles[1]}_grad", left, arrived, right.letters)


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


def _without_broadcast(first: Tensor, second: Tensor, spelling: Spelling) -> tuple[Lettered, Lettered]:
    """Both operands, without the dimensions of one element that the other tensor fills."""
    sizes = dict(zip(spelling.left, first.shape, strict=True)), dict(zip(spelling.right, second.shape, strict=True))

    def lettered(values: Tensor, own: dict[str, int], other: dict[str, int]) -> Lettered:
        filled = [place for place, letter in enumerate(own) if own[letter] == 1 and other.get(letter, 1) > 1]
        letters = [letter for place, letter in enumerate(own) if place not in filled]
        return Lettered.of(values, ()).seen_as(values.squeeze(filled), letters)

    return lettered(first, *sizes), lettered(second, *sizes[::-1])
