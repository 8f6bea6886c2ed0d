"""The curvature backward: one more backward pass from a random vector whose covariance is the loss's Hessian.

When the training's own backward pass reaches the result of a known loss function, the graph below it still stands, and
what the loss counts in the total (c: divided sums, masks, accumulation, auxiliary factors, loss scale) is the gradient
that arrives there. From the loss's input the pass is run to every product; what arrives at a product's result is a
draw of the Gauss-Newton gradient there, in the total's own units. The gradient at each operand follows by the
product's own vector-Jacobian product, so that first layers are included and several consumers of a tensor never mix.
Two sums are kept a slot: Σg², from which any cast is estimated later, and for each candidate cast ½·Σ_samples (g·δ)²
with the cast's real error δ on that step's tensor. The square is taken after summing within a sample, because
neighbouring rounding errors are alike; for a weight a sample's sum is ⟨grad_outputₛᵀ·inputₛ, δ⟩. `samples.py` says what
a sample is; where samples mix the whole batch is one: unbiased still, with a larger spread, so more draws are taken.

A candidate has one scale a tensor or none: scales by row or block would have to run along the inner dimension of each
product, forward and backward, and here a tensor is cast once for all of them. It is called without a state, so a
delayed cast takes its scale from the tensor at hand (times its margin) and not from the steps before: what it loses by
being late is in the sketches' metrics alone.

All draws come from generators of our own, and `torch.autograd.grad` towards the products' results touches no `.grad`,
no parameter's hooks and no bucket of DistributedDataParallel. A tensor hook that the user has put on an activation
does run once more. Nothing is read from the device: sums stay tensors until the window closes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from probes.casts import Cast
from probes.edges import Order, as_the_base, as_the_view, order_behind
from probes.losscall import LossCall
from probes.records import Slot
from probes.samples import by_sample, is_an_experts, sample_dimension
from probes.sites import ProductCall
from probes.vjp import Pullback, matrix_weight, vjp

DRAWS = 2  # a scored step; with 32 samples and 2 scored steps the spread is about 13%
DRAWS_AT_ONCE = 2  # held in memory together: this many times the products' results
DRAWS_WHOLE_BATCH = 8  # a whole-batch draw is a chi-square of one degree of freedom: the spread of 16 is 35%
FEWEST_ROWS = 4  # a sample, from which on its own weight gradient is cheaper than one more product for each cast
SAMPLE_GRADIENTS = 2**24  # numbers: how large samples' weight gradients that are held together may be, 64 MiB


@dataclass
class Met:
    """A product met in a scored step.

    It holds nothing of the graph above its operands: hooks on the result's node hold it, and a node in it would close
    a ring that keeps the step's tensors alive. Where to go back to stands beside it. `arrived`: the training's gradient
    has come; `kept`: it has not, in a backward pass that has been.
    """

    call: ProductCall
    shapes: tuple[torch.Size, ...]  # of the results
    orders: tuple[Order, ...]  # of the results' dimensions where gradients arrive
    keys: list[Key]
    versions: list[int]
    batch: int | None
    whole_batch: bool = False
    arrived: bool = False
    kept: bool = False

    @classmethod
    def of(cls, call: ProductCall, results: Sequence[Tensor], batch: int | None, copies: bool = False) -> Met:
        """`copies`: of the weights, where their memory is given up before the backward pass (FSDP2)."""
        keys = [
            Key(Slot(call.site, role), view_of(operand) if is_weight(role) else object())
            for role, operand in zip(call.roles, call.operands, strict=True)
        ]
        if copies:
            call = replace(call, operands=[_kept(o, role) for o, role in zip(call.operands, call.roles, strict=True)])
        versions = [operand._version for operand in call.operands]
        whole = is_an_experts(call) or not _has_samples(call, batch)
        shapes, orders = tuple(result.shape for result in results), tuple(map(order_behind, results))
        return cls(call, shapes, orders, keys, versions, batch, whole)

    @property
    def intact(self) -> bool:
        """No operand has been changed in place since."""
        return self.versions == [operand._version for operand in self.call.operands]

    def regroup(self, batch: int) -> None:
        """The batch has another size than it was taken for; where samples mix already, they still do."""
        mixed = self.whole_batch and _has_samples(self.call, self.batch)
        self.batch = batch
        self.whole_batch = mixed or is_an_experts(self.call) or not _has_samples(self.call, batch)

    def joined(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """What arrived at the results, as one tensor of the shape that `call.plain` gives; None where nothing did."""
        if all(part is None for part in parts):
            return None
        given = next(part for part in parts if part is not None)
        shaped = [
            given.new_zeros(shape) if part is None else part for part, shape in zip(parts, self.shapes, strict=True)
        ]
        return self.call.joined(shaped)

    def apart(self, joined: Tensor | None) -> list[Tensor | None]:
        """The results that `joined` made one tensor, as their edges have them."""
        if joined is None:
            return [None] * len(self.shapes)
        parts = self.call.apart(joined, self.shapes)
        return [as_the_base(part, order) for part, order in zip(parts, self.orders, strict=True)]

    def arriving(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """What arrived at the results' edges, joined."""
        places = zip(parts, self.shapes, self.orders, strict=True)
        return self.joined([None if part is None else as_the_view(part, shape, order) for part, shape, order in places])


def _kept(operand: Tensor, role: str) -> Tensor:
    return operand.detach().clone().requires_grad_(operand.requires_grad) if is_weight(role) else operand


def is_weight(role: str) -> bool:
    """Whether a tensor in this role is the same for all samples: `weight`, or a recurrent layer's `weight_ih_l0`."""
    return role.startswith("weight")


def _has_samples(call: ProductCall, batch: int | None) -> bool:
    return all(
        _samples_of(call, place, batch) is not None for place, role in enumerate(call.roles) if not is_weight(role)
    )


def _samples_of(call: ProductCall, place: int, batch: int | None) -> int | None:
    """The dimension of an operand that holds the samples."""
    operand = call.operands[place]
    told = call.operation.batch_dimension(place, operand, call.args)
    if told is not None and operand.shape[told] == batch:
        return told
    return sample_dimension(operand, batch, operand)


def view_of(tensor: Tensor) -> object:
    """What tells one view of a living tensor from another, and one state of it from the next."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version


class Reached(NamedTuple):
    """A product met, and where the gradients at its results arrive (`edges.gradient_edge`), one each."""

    product: Met
    edges: tuple[GradientEdge, ...]


class Key(NamedTuple):
    """What has one error: a slot's tensor, or for a weight the same view of it, however many products it enters."""

    slot: Slot
    tensor: object


@dataclass
class Sums:
    """Per slot, float64: Σg², and for each cast (in their order) ½·Σ(g·δ)², with the sum of its terms' squares.

    The squares tell the mean's spread. Each is a mean over draws.
    """

    curvature: Tensor
    directional: Tensor
    squares: Tensor

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(
            self.curvature + other.curvature, self.directional + other.directional, self.squares + other.squares
        )

    def times(self, factor: float) -> Sums:
        """Of a loss that is `factor` times as large."""
        return Sums(factor * self.curvature, factor * self.directional, factor**2 * self.squares)

    def numbers(self) -> Tensor:
        """All in one, [1 + 2·casts]."""
        return torch.cat([self.curvature[None], self.directional, self.squares])


@dataclass
class Part:
    """One tensor's gradients [draws, *shape], and the samples' inner products with the casts' errors [draws, casts, B].

    Where the products were needed sample by sample the gradients' sum is one over samples, all the same.
    """

    gradients: Tensor
    terms: Tensor

    def plus(self, other: Part) -> Part:
        """The same tensor in two products: gradients and inner products add up."""
        one, another = self.terms, other.terms
        if one.shape != another.shape:  # one product could be split into samples and the other not
            one, another = (terms.sum(-1, keepdim=True) for terms in (one, another))
        return Part(self.gradients + other.gradients, one + another)

    def sums(self, draws: int) -> Sums:
        """What the slot's sums grow by; `draws` is how many there are in all."""
        halves = 0.5 * self.terms.double().square()
        return Sums(
            torch.linalg.vector_norm(self.gradients).double().square() / draws,
            halves.sum((0, 2)) / draws,
            halves.square().sum((0, 2)) / draws**2,
        )


def curvature_sums(
    loss: LossCall, counts: Tensor, met: Sequence[Reached], casts: Sequence[Cast], seed: int
) -> dict[Slot, Sums]:
    """Sums over the products behind one loss call, mean a draw; `counts` is what each of its items counts (≥ 0).

    A weight that enters several products of a slot has one error in all of them: their parts add up before the square.
    Call it in `undisturbed()`.
    """
    intact = [one for one in met if one.product.intact]
    if not intact:
        return {}
    draws = DRAWS_WHOLE_BATCH if any(one.product.whole_batch for one in intact) else DRAWS
    edges = [edge for one in intact for edge in one.edges]
    generator = torch.Generator(loss.outputs[0].device).manual_seed(seed)
    sums: dict[Slot, Sums] = {}
    uses = Counter(key for one in intact for key in one.product.keys)
    wanted = [i for i, output in enumerate(loss.outputs) if output.requires_grad]
    for start in range(0, draws, DRAWS_AT_ONCE):
        # Each draw's gradients at the products' results, so that a cast's error is computed once for all of them.
        drawn = []
        for _ in range(min(DRAWS_AT_ONCE, draws - start)):
            vectors = loss.vectors(generator, counts)
            outputs, starts = [loss.outputs[i] for i in wanted], [vectors[i] for i in wanted]
            found = torch.autograd.grad(outputs, edges, starts, retain_graph=True, allow_unused=True)
            drawn.append(by_product(found, intact))
        parts: dict[Key, Part] = {}
        left = uses.copy()
        for one, *gradients in zip(intact, *drawn, strict=True):
            arrived = [gradient for gradient in gradients if gradient is not None]
            found_parts = parts_of(one.product, arrived, casts) if arrived else []
            for key, part in zip(one.product.keys, found_parts, strict=False):
                parts[key] = part if key not in parts else parts[key].plus(part)
            for key in one.product.keys:
                left[key] -= 1
                if not left[key] and key in parts:
                    grown = parts.pop(key).sums(draws)
                    sums[key.slot] = sums[key.slot].plus(grown) if key.slot in sums else grown
    return sums


def by_product(parts: Sequence[Tensor | None], met: Sequence[Reached]) -> list[Tensor | None]:
    """Of each product what arrived at its edges, as one tensor; None where nothing did."""
    left = iter(parts)
    return [one.product.arriving([next(left) for _ in one.edges]) for one in met]


def parts_of(product: Met, gradients: Sequence[Tensor], casts: Sequence[Cast]) -> list[Part]:
    """Each operand's part in one product, for some draws, given each draw's gradient at the product's result."""
    call, batch = product.call, None if product.whole_batch else product.batch
    operands = [operand.detach().float() for operand in call.operands]
    gradients = [gradient.float() for gradient in gradients]
    apart = [i for i, role in enumerate(call.roles) if is_weight(role) and batch is not None]
    together = [i for i in range(len(operands)) if i not in apart]
    found: dict[int, Part] = {}
    # What is calculated forward for it, as a recurrent layer is, is so once for all draws and operands.
    wanted = together if call.operation.multilinear else range(len(operands))
    pullback = Pullback(call, operands, wanted)
    at_operands = [dict(zip(wanted, pullback.of(gradient), strict=True)) for gradient in gradients]
    for i in together:
        dimension = _samples_of(call, i, batch)
        drawn = torch.stack([at_operand[i] for at_operand in at_operands])
        rows = torch.stack([by_sample(gradient, dimension, batch) for gradient in drawn], dim=1)  # [B, draws, n]
        terms = []
        for cast in casts:
            error = by_sample(cast(operands[i]) - operands[i], dimension, batch)
            terms.append((rows @ error.unsqueeze(-1)).squeeze(-1).T)  # [draws, B]
        found[i] = Part(drawn, _stacked(terms, drawn))
    for i in apart:
        whole = torch.stack([at_operand[i] for at_operand in at_operands]) if i in wanted else None
        found[i] = _weight_part(call, operands, i, gradients, casts, batch, whole)
    return [found[i] for i in range(len(operands))]


def _weight_part(
    call: ProductCall,
    operands: list[Tensor],
    i: int,
    gradients: list[Tensor],
    casts: Sequence[Cast],
    batch: int | None,
    whole: Tensor | None,
) -> Part:
    """A weight's part, sample by sample: ⟨Gₛ, δ⟩, Gₛ the sample's own weight gradient, or ⟨gradientₛ, inputₛ·δᵀ⟩.

    `whole`: its gradients, a draw each, where they are known.
    """
    assert batch is not None
    activation = next(o for o, role in zip(call.operands, call.roles, strict=True) if not is_weight(role))
    errors = (cast(operands[i]) - operands[i] for cast in casts)
    kind = matrix_weight(call) if i == 1 else None
    dimension = sample_dimension(activation, batch, activation)
    if kind is not None and dimension is not None and dimension < activation.dim() - 1 and "alpha" not in call.kwargs:
        x = _rows_by_sample(operands[0], dimension, batch)
        if x.shape[1] >= FEWEST_ROWS:
            flat = torch.stack([error.flatten() for error in errors], dim=1) if casts else None  # [n, casts]
            drawn = [
                _sample_gradients(_rows_by_sample(gradient, dimension, batch), x, flat, kind) for gradient in gradients
            ]
            terms = torch.stack([terms for _, terms in drawn])
            return Part(torch.stack([gradient for gradient, _ in drawn]), terms)
    linear = call.operation.multilinear
    dimension = sample_dimension(gradients[0], batch, activation) if linear else 0
    here = None if linear else call.plain(operands)
    found = []
    for error in errors:
        if here is None:
            moved = call.plain([error if j == i else other for j, other in enumerate(operands)])
        else:
            moved = call.plain([other + error if j == i else other for j, other in enumerate(operands)]) - here
        moved = by_sample(moved, dimension, batch).unsqueeze(-1)
        rows = torch.stack([by_sample(gradient, dimension, batch) for gradient in gradients], dim=1)
        found.append((rows @ moved).squeeze(-1).T)
    if whole is None:
        whole = torch.stack([vjp(call, operands, gradient, [i])[0] for gradient in gradients])
    return Part(whole, _stacked(found, whole))


def _sample_gradients(g: Tensor, x: Tensor, errors: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """The weight's gradient, and its samples' inner products with `errors` [n, casts]: [casts, B].

    g [B, rows, O] and x [B, rows, I], a few samples at a time.
    """
    left, right = (g, x) if kind == "rows" else (x, g)
    size = left.shape[-1] * right.shape[-1]
    at_once = max(1, SAMPLE_GRADIENTS // max(size, 1))
    total, terms = None, []
    for a, b in zip(left.split(at_once), right.split(at_once), strict=True):
        gradients = a.transpose(1, 2) @ b
        total = gradients.sum(0) if total is None else total + gradients.sum(0)
        terms.append(gradients.new_zeros(len(a), 0) if errors is None else gradients.flatten(1) @ errors)
    assert total is not None
    return total, torch.cat(terms).T


def _rows_by_sample(values: Tensor, dimension: int, batch: int) -> Tensor:
    """[B, rows, features]."""
    return values.movedim(dimension, 0).reshape(batch, -1, values.shape[-1])


def _stacked(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """[draws, casts, B] of each cast's [draws, B]."""
    return torch.stack(list(terms), dim=1) if terms else like.new_zeros(len(like), 0, 1)


def total_of(parts: Sequence[dict[Slot, Sums]]) -> dict[Slot, Sums]:
    """The sums of several loss calls together."""
    found: dict[Slot, Sums] = {}
    by_slot: dict[Slot, list[Sums]] = defaultdict(list)
    for part in parts:
        for slot, sums in part.items():
            by_slot[slot].append(sums)
    for slot, several in by_slot.items():
        found[slot] = several[0]
        for sums in several[1:]:
            found[slot] = found[slot].plus(sums)
    return found
