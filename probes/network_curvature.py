"""What a cast costs beyond Gauss-Newton: the second derivative of the network itself.

The loss's Hessian at a product's result is JᵀHJ, which `curvature.py` draws, and R = Σ λₖ·∇²zₖ, where z is what the
loss function takes and λ the loss's gradient there. R is no smaller where a network is far from fitting its data:
behind normalisation, which turns noise into smaller logits, it was 3 to 40 times JᵀHJ.

One backward pass from λ with a graph of its own gives the gradients at all products' results, as functions of them.
With s = Σᵢ ±sᵢ, sᵢ the change of result i by its slot's rounding error, the gradient of ⟨gradients, s⟩ is R·s at every
result at once, and ±⟨sᵢ, (R·s)ᵢ⟩ is an unbiased estimate of sᵢᵀ·R·sᵢ for every slot. The other slots' part is noise
around zero: errors of different tensors have little to do with each other (a correlation of 0.05, so 0.2 of a slot's
damage from one draw with 24 slots). So that large slots do not drown small ones, each enters divided by the root of
the damage that it is known to have already.

R treats different casts alike, per square of their error: over casts from int4 to e4m3fn the exact ratio varied by 8%
on a ConvNet and by 18% on a GPT. So each draw takes a mixture of all casts' errors in every slot, and what is found is
shared among them in proportion to ‖δ‖². An error of the size of the tensor itself, all flushed to zero, is beyond any
second order and is left out of the mixture.

Costs one backward pass with a graph and, a draw, one pass back through that graph and one product an operand; memory
as if the forward pass were kept twice more. Nothing of it changes the graph that the training goes back through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from probes.casts import Cast
from probes.curvature import Key, Met, Reached, Sums, by_product
from probes.records import Slot
from probes.second_derivatives import require_whole, second_derivatives

DRAWS = 2  # a scored step and loss call; at least two, from which the spread is taken
FLUSHED = 0.5  # an error's norm over its tensor's, from which on it is no small one


@dataclass
class Beyond:
    """Per slot, float64: ½·eᵀRe for an error e of length one, that mean's variance over draws, ‖δ‖² [casts]."""

    unit: Tensor
    variance: Tensor
    energy: Tensor

    def plus(self, other: Beyond) -> Beyond:
        """Both together: the damages of each cast, unit · energy, add up."""
        energy = self.energy + other.energy
        mine = (self.energy.sum() / energy.sum()).nan_to_num(0.0)
        unit = mine * self.unit + (1 - mine) * other.unit
        return Beyond(unit, mine**2 * self.variance + (1 - mine) ** 2 * other.variance, energy)

    def times(self, factor: float) -> Beyond:
        """Of a loss that is `factor` times as large."""
        return Beyond(factor * self.unit, factor**2 * self.variance, self.energy)

    def numbers(self) -> Tensor:
        """All in one, [2 + casts]."""
        return torch.cat([self.unit[None], self.variance[None], self.energy])


def network_curvature(
    outputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    met: Sequence[Reached],
    casts: Sequence[Cast],
    known: Mapping[Slot, Sums],
    seed: int,
) -> dict[Slot, Beyond]:
    """½·δᵀRδ of every slot, for what the loss takes (`outputs`) and its gradient there (`slopes`).

    `known`: the Gauss-Newton sums, which say how large each slot is to be taken; a slot without gets nothing. Raises
    whatever autograd does where something on the way has no second derivative. Call it in `undisturbed()`.
    """
    edges = [edge for one in met for edge in one.edges]
    with torch.enable_grad(), second_derivatives([get_gradient_edge(output) for output in outputs]):
        gradients = torch.autograd.grad(outputs, edges, slopes, create_graph=True, allow_unused=True)
    require_whole(gradients)
    generator = torch.Generator().manual_seed(seed)
    moved = _Moved(casts, generator)
    for one, arrived in zip(met, by_product(gradients, met), strict=True):
        moved.add(one.product, arrived if all(key.slot in known for key in one.product.keys) else None)
    energies = moved.by_slot(moved.energies)
    unit = {slot: share(known[slot].directional, energy) for slot, energy in energies.items()}
    size = dict(unit)
    drawn: dict[Slot, list[Tensor]] = {slot: [] for slot in unit}
    for _ in range(DRAWS):
        roots = {key: size[key.slot].sqrt() * _sign(generator) for key in moved.energies}
        curves = _curves(gradients, edges, moved.sums(roots))
        for slot, found in moved.by_slot(moved.damage(roots, by_product(curves, met))).items():
            drawn[slot].append(share(found, energies[slot]))
            size[slot] = unit[slot] + torch.stack(drawn[slot]).mean().clamp(min=0)
    units = {slot: torch.stack(several) for slot, several in drawn.items()}
    return {slot: Beyond(each.mean(), each.var() / DRAWS, energies[slot]) for slot, each in units.items()}


class _Change(NamedTuple):
    """What an operand's error of length one changes in the result of a product, the `product`-th of those met."""

    key: Key
    product: int
    result: Tensor


class _Moved:
    """The operands' errors, mixed over the casts, and what they change in the products' results.

    `energies`: each operand's ‖δ‖² for each cast, float64 [casts]. `own`: where a product is not linear in an operand,
    what its own second derivative adds to the damage of an error of length one.
    """

    def __init__(self, casts: Sequence[Cast], generator: torch.Generator) -> None:
        self.energies: dict[Key, Tensor] = {}
        self.own: dict[Key, Tensor] = {}
        self._casts, self._generator = casts, generator
        self._changes: list[_Change] = []
        self._products: list[Met] = []
        self._mixtures: dict[Key, list[int]] = {}

    def add(self, product: Met, arrived: Tensor | None) -> None:
        """The next product, with the gradient at its result; None: the loss does not reach it."""
        place = len(self._products)
        self._products.append(product)
        if arrived is None:
            return
        call = product.call
        operands = [operand.detach().float() for operand in call.operands]
        here = None if call.operation.multilinear else call.plain(operands)
        for i, key in enumerate(product.keys):
            mixed, length = self._mixed(key, operands[i])
            if here is None:
                change = call.plain([mixed if j == i else other for j, other in enumerate(operands)]) / length
            else:
                ahead, back = (
                    call.plain([one + sign * mixed if j == i else one for j, one in enumerate(operands)])
                    for sign in (1, -1)
                )
                change = (ahead - back) / (2 * length)
                bent = (arrived.detach().float() * (ahead + back - 2 * here)).sum().double() / (2 * length.square())
                self.own[key] = self.own[key] + bent if key in self.own else bent
            self._changes.append(_Change(key, place, change))

    def _mixed(self, key: Key, operand: Tensor) -> tuple[Tensor, Tensor]:
        """The casts' errors, each of the length that is theirs on average, with random signs; and the sum's length."""
        signs = self._mixtures.get(key)
        if signs is None:
            signs = (1 - 2 * torch.randint(2, (len(self._casts),), generator=self._generator)).tolist()
            self._mixtures[key] = signs
        whole = torch.linalg.vector_norm(operand).double()
        total, lengths = torch.zeros_like(operand), []
        for cast, sign in zip(self._casts, signs, strict=True):
            error = cast(operand) - operand
            lengths.append(torch.linalg.vector_norm(error).double())
            small = lengths[-1] < FLUSHED * whole
            total += error * (sign / lengths[-1]).where(small & (lengths[-1] > 0), 0.0).float()
        found = torch.stack(lengths)
        self.energies[key] = found.square()
        mean = found.where(found < FLUSHED * whole, 0.0).square().mean().sqrt()
        length = torch.linalg.vector_norm(total).double()
        scaled = total * (mean / length).where(length > 0, 0.0).float()
        return scaled, mean.float().clamp(min=torch.finfo(torch.float32).tiny)

    def sums(self, roots: Mapping[Key, Tensor]) -> list[Tensor | None]:
        """Of each result of each product: all that changes it together, every operand's divided by its root."""
        found: list[Tensor | None] = [None] * len(self._products)
        for change in self._changes:
            root = roots[change.key]
            part = change.result * (1 / root).where(root != 0, 0.0).float()
            before = found[change.product]
            found[change.product] = part if before is None else before + part
        return [part for product, one in zip(self._products, found, strict=True) for part in product.apart(one)]

    def damage(self, roots: Mapping[Key, Tensor], curves: Sequence[Tensor | None]) -> dict[Key, Tensor]:
        """½·δᵀRδ of each operand for each cast [casts], given R times `sums` at each product's result; None is zero."""
        inner = {key: self.own.get(key, torch.zeros_like(energy[0])) for key, energy in self.energies.items()}
        for change in self._changes:
            curve = curves[change.product]
            if curve is not None:
                inner[change.key] = inner[change.key] + 0.5 * roots[change.key] * _inner(change.result, curve)
        return {key: inner[key] * energy for key, energy in self.energies.items()}

    @staticmethod
    def by_slot(values: Mapping[Key, Tensor]) -> dict[Slot, Tensor]:
        """Summed over the tensors that a slot has had in the step."""
        found: dict[Slot, Tensor] = {}
        for key, value in values.items():
            found[key.slot] = found[key.slot] + value if key.slot in found else value
        return found


def _curves(
    gradients: Sequence[Tensor | None], edges: Sequence[GradientEdge], sums: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """R times the sums at every edge; None where it is zero. Those that cannot be gone back through are constant."""
    pairs = [
        (gradient, one.reshape(gradient.shape).to(gradient.dtype))
        for gradient, one in zip(gradients, sums, strict=True)
        if gradient is not None and gradient.requires_grad and one is not None
    ]
    if not pairs:
        return [None] * len(edges)
    return list(
        torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            edges,
            [one for _, one in pairs],
            retain_graph=True,
            allow_unused=True,
        )
    )


def share(damages: Tensor, energy: Tensor) -> Tensor:
    """The mean over casts of what an error of length one does, a number; casts that change nothing do not count."""
    return (damages / energy).where(energy > 0, torch.nan).nanmean().nan_to_num(0.0)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other.float()).sum().double()


def _sign(generator: torch.Generator) -> int:
    return 1 - 2 * int(torch.randint(2, (), generator=generator))
