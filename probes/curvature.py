"""What a few scored steps measure beside the sketches: curvature, the directional products, and gradient noise.

Curvature. When the loss function is called, the graph from its input back to every product stands. From there one
more backward pass is run from a random vector whose covariance is the loss's Hessian (`losses.py`); what arrives at a
product's result is a draw of the Gauss-Newton gradient there. The gradient at each operand follows by the product's
own vector-Jacobian product, so that first layers are included and several consumers of a tensor never mix. Two sums
are kept a slot: Σg², from which any cast is estimated later, and for each candidate cast ½·Σ_samples (g·δ)² with the
cast's real error δ on that step's tensor. The square is taken after summing within a sample, because neighbouring
rounding errors are alike; for a weight a sample's sum is ⟨grad_output_s, input_s·δᵀ⟩. Where samples mix (BatchNorm
downstream) the whole batch is one sample: unbiased still, with a larger spread, so more draws are taken.

Gradient noise. In the training backward of the same steps, each candidate cast's error is put into the products that
make the gradients, and its energy is compared with theirs: over the whole gradient where the optimizer takes it as it
is (SGD), and channel by channel, then averaged, where it divides each element by its own size (Adam and its kin),
because there a channel whose small gradients are flushed to zero loses as much as any other.

A candidate has one scale a tensor or none: scales by row or block would have to run along the inner dimension of each
product, forward and backward, and here a tensor is cast once for all of them. It is called without a state, so a
delayed cast takes its scale from the tensor at hand (times its margin) and not from the steps before: what it loses by
being late is in the sketches' metrics alone.

All draws come from generators of our own, and `torch.autograd.grad` towards the products' results touches no `.grad`
and no parameter's hooks. A tensor hook that the user has put on an activation does run once more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import _disable_current_modes

from probes.casts import Cast
from probes.losses import LossCall
from probes.records import GRADIENT, Slot
from probes.sites import ProductCall

DRAWS = 2  # a scored step; with 32 samples and 2 scored steps the spread is about 13%
DRAWS_AT_ONCE = 2  # held in memory together: this many times the products' results
DRAWS_WHOLE_BATCH = 8  # a whole-batch draw is a chi-square of one degree of freedom: the spread of 16 is 35%


@dataclass
class Met:
    """A product met in a scored step, with what is needed to go back to it."""

    call: ProductCall
    edge: GradientEdge
    keys: list[Key]
    versions: list[int]
    batch: int | None
    whole_batch: bool = False

    @classmethod
    def of(cls, call: ProductCall, result: Tensor, batch: int | None) -> Met:
        keys = [
            Key(Slot(call.site, role), view_of(operand) if role == "weight" else object())
            for role, operand in zip(call.roles, call.operands, strict=True)
        ]
        return cls(call, get_gradient_edge(result), keys, [operand._version for operand in call.operands], batch)

    @property
    def intact(self) -> bool:
        """No operand has been changed in place since."""
        return self.versions == [operand._version for operand in self.call.operands]


def view_of(tensor: Tensor) -> object:
    """What tells one view of a living tensor from another, and one state of it from the next."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version


class Key(NamedTuple):
    """What has one error: a slot's tensor, or for a weight the same view of it, however many products it enters."""

    slot: Slot
    tensor: object


@dataclass
class Part:
    """One tensor's gradients [draws, *shape] and, per cast, the samples' inner products with its error [draws, B]."""

    gradients: Tensor
    terms: dict[str, Tensor]

    def plus(self, other: Part) -> Part:
        """The same tensor in two products: gradients and inner products add up."""
        terms = {}
        for cast, one in self.terms.items():
            another = other.terms[cast]
            if one.shape != another.shape:  # one product could be split into samples and the other not
                one, another = (values.sum(1, keepdim=True) for values in (one, another))
            terms[cast] = one + another
        return Part(self.gradients + other.gradients, terms)

    def sums(self) -> Sums:
        """What the slot's sums grow by."""
        found = Sums(curvature=_energy(self.gradients))
        for cast, terms in self.terms.items():
            halves = 0.5 * terms.square()
            found.directional[cast] = float(halves.sum())
            found.squares[cast] = float(halves.square().sum())
        return found


@dataclass
class Sums:
    """Per slot: Σg², and per cast ½·Σ(g·δ)² with the sum of its terms' squares, for its spread."""

    curvature: float = 0.0
    directional: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    squares: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: Sums, scale: float) -> None:
        self.curvature += scale * other.curvature
        for cast, value in other.directional.items():
            self.directional[cast] += scale * value
            self.squares[cast] += scale**2 * other.squares[cast]


def curvature_sums(loss: LossCall, met: Sequence[Met], casts: Sequence[Cast], seed: int) -> dict[Slot, Sums]:
    """Sums over the products behind one loss call, mean a draw, for the summed loss (still to be scaled by c).

    A weight that enters several products of a slot has one error in all of them: their parts add up before the square.
    """
    draws = DRAWS_WHOLE_BATCH if any(product.whole_batch for product in met) else DRAWS
    generator = torch.Generator(loss.outputs.device).manual_seed(seed)
    sums: dict[Slot, Sums] = defaultdict(Sums)
    reached = [product for product in met if product.intact]
    if not reached:
        return sums
    edges = [product.edge for product in reached]
    uses = Counter(key for product in reached for key in product.keys)
    with undisturbed():
        for start in range(0, draws, DRAWS_AT_ONCE):
            count = min(DRAWS_AT_ONCE, draws - start)
            # Each draw's gradients at the products' results, so that a cast's error is computed once for all of them.
            drawn = [
                torch.autograd.grad(loss.outputs, edges, loss.draw(generator), retain_graph=True, allow_unused=True)
                for _ in range(count)
            ]
            parts: dict[Key, Part] = {}
            left = uses.copy()
            for product, *gradients in zip(reached, *drawn, strict=True):
                found = [] if gradients[0] is None else _parts(product, gradients, casts)
                for key, part in zip(product.keys, found, strict=False):
                    parts[key] = part if key not in parts else parts[key].plus(part)
                for key in product.keys:
                    left[key] -= 1
                    if not left[key] and key in parts:
                        sums[key.slot].add(parts.pop(key).sums(), 1 / draws)
    return sums


def _parts(product: Met, gradients: Sequence[Tensor], casts: Sequence[Cast]) -> list[Part]:
    """Each operand's part in one product, for some draws, given each draw's gradient at the product's result."""
    call = product.call
    operands = [operand.detach().float() for operand in call.operands]
    gradients = [gradient.float() for gradient in gradients]
    at_operands = [vjp(call, operands, gradient, range(len(operands))) for gradient in gradients]
    activation = next((o for o, role in zip(call.operands, call.roles, strict=True) if role != "weight"), None)
    batch = None if product.whole_batch else product.batch
    parts = []
    for i, (role, operand) in enumerate(zip(call.roles, operands, strict=True)):
        terms = {}
        for cast in casts:
            error = cast(operand) - operand
            if role == "weight" and batch is not None:
                moved = call.plain([error if j == i else other for j, other in enumerate(operands)])
                dimension = sample_dimension(gradients[0], batch, activation)
                pairs = [(gradient, moved) for gradient in gradients]
            else:
                dimension = sample_dimension(operand, batch, call.operands[i])
                pairs = [(found[i], error) for found in at_operands]
            terms[str(cast)] = torch.stack([sample_sums(g, e, dimension, batch) for g, e in pairs])
        parts.append(Part(torch.stack([found[i] for found in at_operands]), terms))
    return parts


def sample_dimension(values: Tensor, batch: int | None, like: Tensor | None) -> int | None:
    """The dimension of a tensor that holds the samples, alone or as the outer part of a flattened one; None: none does.

    Of several that fit, the one that is outermost in the memory of `like`, a tensor with the same leading dimensions:
    [T, B, D] that was transposed from [B, T, D] is told from a flattened [B·T, D] so.
    """
    if not batch or values.dim() == 0:
        return None
    fits = [d for d in range(values.dim()) if values.shape[d] == batch or (d == 0 and values.shape[0] % batch == 0)]
    if like is None or like.dim() != values.dim():
        return fits[0] if fits else None
    return max(fits, key=lambda d: (like.stride(d), -d), default=None)


def sample_sums(a: Tensor, b: Tensor, dimension: int | None, batch: int | None) -> Tensor:
    """Inner products of two tensors of one shape within each sample, float64 [batch]; [1] without such a dimension."""
    rows = 1
    if dimension is not None and batch:
        a, b = a.movedim(dimension, 0), b.movedim(dimension, 0)
        rows = batch
    return torch.bmm(a.reshape(rows, 1, -1), b.reshape(rows, -1, 1)).flatten().double()


def noise_ratios(
    call: ProductCall, gradient: Tensor, casts: Sequence[Cast], adaptive: bool
) -> dict[Slot, dict[str, float]]:
    """For each role and cast: the energy of the cast's error in the gradients it enters, over those gradients' energy.

    `adaptive`: the optimizer divides each element by its own size. `grad_output` enters the weight gradient (both
    gradients where neither operand is a parameter); an operand enters the other's gradient. Attention is not bilinear:
    there the error is the difference of two backward passes.
    """
    operands = [operand.detach().float() for operand in call.operands]
    gradient = gradient.detach().float()
    trained = [i for i, operand in enumerate(call.operands) if operand.requires_grad]
    ratios: dict[Slot, dict[str, float]] = defaultdict(dict)
    with undisturbed():
        exact = dict(zip(trained, vjp(call, operands, gradient, trained), strict=True))
        for cast in casts:
            for i, role in enumerate([*call.roles, GRADIENT]):
                wanted = _enters(call, i, trained)
                if not any(bool(exact[j].any()) for j in wanted):
                    continue
                if i == len(operands):
                    errors = vjp(call, operands, cast(gradient) - gradient, wanted)
                elif not call.operation.multilinear:
                    changed = [cast(operand) if j == i else operand for j, operand in enumerate(operands)]
                    errors = [
                        new - exact[j] for j, new in zip(wanted, vjp(call, changed, gradient, wanted), strict=True)
                    ]
                else:
                    changed = [cast(operand) - operand if j == i else operand for j, operand in enumerate(operands)]
                    errors = vjp(call, changed, gradient, wanted)
                pairs = [(error, exact[j]) for j, error in zip(wanted, errors, strict=True)]
                ratios[Slot(call.site, role)][str(cast)] = _relative(pairs, adaptive and call.parameter is not None)
    return ratios


def _enters(call: ProductCall, i: int, trained: Sequence[int]) -> list[int]:
    """The operands whose gradients the tensor in role i enters; i == len(operands) is grad_output."""
    if i == len(call.operands):
        weights = [j for j in trained if call.roles[j] == "weight"]
        return weights or list(trained)
    if not call.operation.multilinear:
        return list(trained)
    return [j for j in trained if j != i]


def vjp(call: ProductCall, operands: Sequence[Tensor], gradient: Tensor, wanted: Sequence[int]) -> list[Tensor]:
    """Gradients at the wanted operands of one product, given the gradient at its result. Float32 throughout."""
    if call.operation.name == "linear":
        x, weight = operands
        found = []
        for i in wanted:
            if i == 0:
                found.append(gradient @ weight)
            else:
                found.append(gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1]))
        return found
    if not wanted:
        return []
    with torch.enable_grad():
        leaves = [operand.detach().requires_grad_(i in wanted) for i, operand in enumerate(operands)]
        result = call.plain(leaves)
        return list(torch.autograd.grad(result, [leaves[i] for i in wanted], gradient))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers back: what checkpointing recomputes updates BatchNorm's running statistics again.

    Through `.data`, whose version autograd does not watch, and only where something changed.
    """
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if buffer.layout == torch.strided]
    try:
        yield
    finally:
        for buffer, kept in before:
            if not torch.equal(buffer, kept):
                buffer.data.copy_(kept)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Work of our own inside the user's step: no modes, no autocast, no graph, and the random streams put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.no_grad(),
    ):
        yield


def _relative(pairs: Sequence[tuple[Tensor, Tensor]], by_channel: bool) -> float:
    """Energy of errors over that of exact values; by channel, the larger mean over the first two dimensions."""
    if not by_channel:
        return sum(_energy(error) for error, _ in pairs) / sum(_energy(exact) for _, exact in pairs)
    found = []
    for error, exact in pairs:
        for dimension in range(min(exact.dim(), 2)):
            noise, signal = (_channel_energy(values, dimension) for values in (error, exact))
            found.append(float((noise[signal > 0] / signal[signal > 0]).mean()) if bool((signal > 0).any()) else 0.0)
    return max(found)


def _channel_energy(values: Tensor, dimension: int) -> Tensor:
    return torch.linalg.vector_norm(values.movedim(dimension, 0).flatten(1), dim=1).double().square()


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
