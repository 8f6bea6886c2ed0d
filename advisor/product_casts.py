"""Products whose operands have a scale for every row, column or block: each of the three casts its operands anew.

Such scales run along a product's inner dimensions, which differ from product to product: for y = x·wᵀ they are the
features of x and w in the forward product, the features of y in the input's gradient, and the samples in the weight's.
So an operand is cast once for each product that it enters, from its own values:

    y       = Q(x, features)·Q(w, features)ᵀ
    grad_x  = Q(g, outputs)·Q(w, outputs)
    grad_w  = Q(g, samples)ᵀ·Q(x, samples)

Which dimensions these are is `probes/tiles.py`'s to say for linear layers, matmul and its kin, convolutions and
attention, and the letters' of the equation for einsum, tensordot and the like. A tensor of the same site that has one
scale, or none, is cast once and enters both its products as it is then.

The call itself runs on the cast operands, in the user's function, and gives a bias, an addend or a mask its gradient:
from g as it was cast for the first of its two products. `_Product` then takes the place of the operands' gradients,
with the operands themselves saved; its backward pass cannot be differentiated again, which torch says.

Attention has six products, and P = softmax(scale·Q·Kᵀ + mask) and the gradient at the scores are no slots: they are not
cast, but calculated from what was, in float32 (float64 of float64). With dropout the forward pass is calculated here
too, because a kernel's draws cannot be known; where the kernel does not draw as `torch.dropout` does (CUDA's fused
ones), they are others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advisor.errors import InvalidPlan
from probes.casts import Cast, CastState
from probes.contents import is_batch
from probes.contractions.bilinear import BILINEAR, spelling_of
from probes.contractions.convolution import CONVOLUTIONS
from probes.edges import await_gradient
from probes.errors import WindowError
from probes.operation import argument
from probes.records import GRADIENT
from probes.sites import ProductCall
from probes.tiles import Axis, axes_of
from probes.vjp import vjp

Dimensions = tuple[int, ...]
RoleCast = Callable[[str, Tensor, Dimensions], Tensor]
"""Role, values, and the dimensions that scales run along → the values as they are cast."""

FOLLOWED = BILINEAR | CONVOLUTIONS | {"sdpa"}
"""Operations whose products can be cast one by one, einsum with two operands."""

_BY_LETTERS = frozenset({"einsum", "tensordot", "inner", "addmv", "addbmm"})


def cast_along(cast: Cast, values: Tensor, dimensions: Dimensions, state: CastState | None = None) -> Tensor:
    """The cast of a tensor with its scales along these dimensions, flattened in their order."""
    if cast.has_one_scale or values.dim() < 2:
        return cast(values, state)
    if len(dimensions) == 1:
        return cast(values, state, dimensions[0])
    inner = [dimension % values.dim() for dimension in dimensions]
    order = [dimension for dimension in range(values.dim()) if dimension not in inner] + inner
    moved = values.permute(order)
    matrix = moved.reshape(math.prod(moved.shape[: values.dim() - len(inner)]), -1)
    back = [order.index(dimension) for dimension in range(values.dim())]
    return cast(matrix, state).view(moved.shape).permute(back).contiguous()


def run_by_product(call: ProductCall, cast: RoleCast, once: frozenset[str]) -> Any:
    """The call's result, its operands and its gradient cast for each product by itself.

    once  the roles whose cast is one for all products: one scale, or none

    Raises InvalidPlan, naming the site, for a call that cannot be followed: in place or into a given tensor, of sparse,
    nested or vmapped operands, of attention's own kernels, of another einsum than one of two different operands.
    """
    _require_followed(call)
    casts = _Casts(call.roles, cast, once)
    operands = call.operands
    if call.operation.name == "sdpa":
        return _Attention.run(call, casts)
    inner = inner_dimensions(call)
    main = call.run([casts.of(n, operands[n], inner.forward[n]) for n in (0, 1)])
    if not torch.is_grad_enabled() or not any(operand.requires_grad for operand in operands):
        return _with_bias_gradient(main, casts, inner.gradient[0])
    kept = [casts.done.get(n, operand.detach()) for n, operand in enumerate(operands)]
    result: Tensor = _Product.apply(_Bilinear(_without(call), casts, inner), main, *operands, *kept)
    return result


class Inner(NamedTuple):
    """Inner dimensions of each operand in each product it enters.

    forward   of the left and of the right operand
    backward  of the left one in the right one's gradient, and of the right one in the left one's
    gradient  of the gradient at the result: in the left operand's, and in the right one's
    """

    forward: tuple[Dimensions, Dimensions]
    backward: tuple[Dimensions, Dimensions]
    gradient: tuple[Dimensions, Dimensions]


def inner_dimensions(call: ProductCall) -> Inner:
    """Of a product of two operands. Raises InvalidPlan for an equation that is not followed."""
    left, right = call.operands
    if call.operation.name in _BY_LETTERS:
        return _by_letters(call)
    op, roles = _tiled_name(call), call.roles
    found = []
    for role, operand in zip(roles, (left, right), strict=True):
        axes = axes_of(op, roles, role, operand.dim())
        found.append((_dimensions(axes[0], operand.dim()), _dimensions(axes[-1], operand.dim())))
    rank = _rank_of_result(call)
    axes = axes_of(op, roles, GRADIENT, rank)
    arrived = _dimensions(axes[0], rank), _dimensions(axes[-1], rank)
    if roles[0] == "weight" and op not in CONVOLUTIONS:  # the first is the input's, which is the right operand
        arrived = arrived[::-1]
    return Inner((found[0][0], found[1][0]), (found[0][1], found[1][1]), arrived)


def _dimensions(axis: Axis, dimensions: int) -> Dimensions:
    if not axis.across:
        return (axis.dimension,)
    return tuple(d for d in range(dimensions) if d != axis.dimension % dimensions)


def _by_letters(call: ProductCall) -> Inner:
    try:
        spelling = spelling_of(call, *call.operands)
    except WindowError as error:
        raise InvalidPlan(f"{call.site} is to be cast with scales by row or block: {error}") from error

    def within(one: Sequence[str], other: Sequence[str], result: Sequence[str]) -> Dimensions:
        inner = tuple(n for n, letter in enumerate(one) if letter in other and letter not in result)
        return inner or (len(one) - 1,)

    left, right, out = spelling
    return Inner(
        (within(left, right, out), within(right, left, out)),
        (within(left, out, right), within(right, out, left)),
        (within(out, right, left), within(out, left, right)),
    )


def _tiled_name(call: ProductCall) -> str:
    """The operation as `axes_of` knows it: aten's one convolution is all of them."""
    if call.operation.name != "convolution":
        return call.operation.name
    transposed = argument(call.args, call.kwargs, 6, "transposed")
    return f"conv{'_transpose' if transposed else ''}{call.operands[1].dim() - 2}d"


def _rank_of_result(call: ProductCall) -> int:
    left, right = (operand.dim() for operand in call.operands)
    if call.operation.name == "linear":
        return left + right - 2
    if call.operation.name in CONVOLUTIONS:
        return left
    return max(left, right) - (left == 1) - (right == 1)


class _Casts:
    """The casts of one call: those that are one for all products are carried out once."""

    def __init__(self, roles: Sequence[str], cast: RoleCast, once: frozenset[str]) -> None:
        self.roles, self.cast, self.once = roles, cast, once
        self.done: dict[int, Tensor] = {}

    def of(self, place: int, operand: Tensor, dimensions: Dimensions) -> Tensor:
        """An operand for the forward product; detached."""
        found = self.cast(self.roles[place], operand.detach(), dimensions)
        if self.roles[place] in self.once:
            self.done[place] = found
        return found

    def again(self, place: int, kept: Tensor, dimensions: Dimensions) -> Tensor:
        """A kept operand for a product of the backward pass."""
        return kept if self.roles[place] in self.once else self.cast(self.roles[place], kept, dimensions)

    def arrived(self, gradient: Tensor, first: Dimensions, second: Dimensions) -> tuple[Callable[[], Tensor], ...]:
        """The gradient for each of its products, cast when it is asked for and once for each."""
        done: dict[Any, Tensor] = {}

        def of(dimensions: Dimensions) -> Tensor:
            key = () if GRADIENT in self.once else dimensions
            if key not in done:
                done[key] = self.cast(GRADIENT, gradient, dimensions)
            return done[key]

        return (lambda: of(first)), (lambda: of(second))


class _Product(torch.autograd.Function):
    """What was calculated, with gradients of its own for the operands; those of the rest of the call go on into it."""

    @staticmethod
    def forward(ctx: Any, work: Any, main: Tensor, *operands: Tensor) -> Tensor:
        half = len(operands) // 2
        ctx.work, ctx.dtypes = work, [operand.dtype for operand in operands[:half]]
        ctx.save_for_backward(*operands[half:])
        # A copy: what the model does to the result in place would otherwise be refused.
        return main.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        needs = ctx.needs_input_grad[2 : 2 + len(ctx.dtypes)]
        saved = ctx.saved_tensors  # activation checkpointing recomputes here, and the site hook is to meet that
        with torch._C.DisableTorchFunction(), torch.no_grad():
            rest, *found = ctx.work.gradients(gradient, saved, ctx.needs_input_grad[1], needs)
            given = [None if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)]
        return None, rest, *given, *(None for _ in saved)


@dataclass(frozen=True)
class _Bilinear:
    """The gradients of a product of two operands."""

    call: ProductCall  # without its operands
    casts: _Casts
    inner: Inner

    def gradients(
        self, gradient: Tensor, kept: Sequence[Tensor], bias: bool, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        inner, found = self.inner, list[Tensor | None]((None, None))
        arrived = self.casts.arrived(gradient, *inner.gradient)
        for place in (0, 1):
            if needs[place]:
                other = 1 - place
                operands = list(kept)
                operands[other] = self.casts.again(other, kept[other], inner.backward[other])
                found[place] = self._gradient(operands, arrived[place](), place)
        return arrived[0]() if bias else None, *found

    def _gradient(self, operands: list[Tensor], gradient: Tensor, place: int) -> Tensor:
        operands = [operand.to(gradient.dtype) for operand in operands]  # which is autocast's, where it multiplied
        args, kwargs = self.call.operation.replace(self.call.args, self.call.kwargs, operands)
        call = replace(self.call, args=args, kwargs=kwargs, operands=operands, given=operands)
        with torch.autocast(gradient.device.type, enabled=False):
            return vjp(call, operands, gradient, [place])[0]


def _without(call: ProductCall) -> ProductCall:
    """The call without its operands, which only the graph is to keep alive."""
    empty: list[Any] = [torch.empty(0)] * len(call.operands)
    args, kwargs = call.operation.replace(call.args, call.kwargs, empty)
    return replace(call, args=args, kwargs=kwargs, operands=empty, given=empty)


def _with_bias_gradient(main: Tensor, casts: _Casts, dimensions: Dimensions) -> Tensor:
    """Where no operand asks for a gradient, a bias may."""
    if main.requires_grad:
        await_gradient(main, lambda gradient: casts.cast(GRADIENT, gradient, dimensions))
    return main


@dataclass(frozen=True)
class _Attention:
    """The six products of scaled_dot_product_attention.

    shared  heads of queries to one of keys
    """

    casts: _Casts
    mask: Tensor | None
    causal: bool
    scale: float
    shared: int

    @classmethod
    def run(cls, call: ProductCall, casts: _Casts) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        query, key, value = call.operands
        scale, mask = given.get("scale"), given.get("attn_mask")
        work = cls(
            casts,
            None if mask is None else mask.detach(),
            bool(given.get("is_causal", False)),
            1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale),
            query.shape[-3] // key.shape[-3] if given.get("enable_gqa") else 1,
        )
        forward = [
            casts.of(place, operand, (dimension,))
            for place, (operand, dimension) in enumerate(zip(call.operands, (-1, -1, -2), strict=True))
        ]
        dropout = float(given.get("dropout_p") or 0.0)
        drops: list[Tensor] = []
        if dropout:
            drops = [F.dropout(query.new_ones(*query.shape[:-1], key.shape[-2]), dropout)]
            work_with_mask = replace(work, mask=mask)  # whose gradient is autograd's
            weights = work_with_mask.probabilities(forward[0], forward[1]) * drops[0]
            main = (weights @ _wide(work.spread(forward[2]))).to(forward[2].dtype)
        else:
            main = call.run(forward)
        if not torch.is_grad_enabled() or not any(operand.requires_grad for operand in call.operands):
            return _with_bias_gradient(main, casts, (-1,))
        kept = [casts.done.get(n, operand.detach()) for n, operand in enumerate(call.operands)]
        extra = [forward[0], forward[1], *drops]
        # `_Product` takes as many operands as it saves; what is beyond the three has no gradient.
        result: Tensor = _Product.apply(work, main, query, key, value, *extra, *kept, *extra)
        return result

    def probabilities(self, query: Tensor, key: Tensor) -> Tensor:
        """float32 or float64 [.., query, key]; 0 for a query that may look at no key."""
        scores = (_wide(query) @ _wide(self.spread(key)).transpose(-1, -2)) * self.scale
        if self.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        if self.mask is not None:
            given = self.mask
            scores = scores.masked_fill(~given, -math.inf) if given.dtype == torch.bool else scores + given
        blind = scores.amax(-1, keepdim=True) == -math.inf
        return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)

    def spread(self, of_keys: Tensor) -> Tensor:
        """Keys or values as each head of queries sees them."""
        return of_keys if self.shared == 1 else of_keys.repeat_interleave(self.shared, -3)

    def gathered(self, gradient: Tensor, like: Tensor) -> Tensor:
        """A gradient at what `spread` gave, summed over the heads that share it and over what was broadcast."""
        if self.shared > 1:
            gradient = gradient.unflatten(-3, (-1, self.shared)).sum(-3)
        return gradient.sum_to_size(like.shape)

    def gradients(
        self, gradient: Tensor, kept: Sequence[Tensor], mask: bool, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        query, key, value, forward_query, forward_key, *drops = kept
        along, across = self.casts.arrived(gradient, (-1,), (-2,))
        weights = self.probabilities(forward_query, forward_key)
        dropped = weights * drops[0] if drops else weights
        found: list[Tensor | None] = [None] * len(needs)
        if needs[0] or needs[1]:
            values = _wide(self.spread(self.casts.again(2, value, (-1,))))
            at_weights = _wide(along()) @ values.transpose(-1, -2)
            if drops:
                at_weights = at_weights * drops[0]
            at_scores = weights * (at_weights - (weights * at_weights).sum(-1, keepdim=True)) * self.scale
            if needs[0]:
                keys = _wide(self.spread(self.casts.again(1, key, (-2,))))
                found[0] = (at_scores @ keys).sum_to_size(query.shape)
            if needs[1]:
                queries = _wide(self.casts.again(0, query, (-2,)))
                found[1] = self.gathered(at_scores.transpose(-1, -2) @ queries, key)
        if needs[2]:
            found[2] = self.gathered(dropped.transpose(-1, -2) @ _wide(across()), value)
        return along() if mask else None, *found


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _require_followed(call: ProductCall) -> None:
    name = getattr(call.function, "__name__", str(call.function)).partition(".")[0]
    why = None
    if call.operation.name not in FOLLOWED or len(call.operands) != (3 if call.operation.name == "sdpa" else 2):
        why = f"{call.operation.name} of {len(call.operands)} operands is not followed product by product"
    elif (name.endswith("_") and not name.startswith("__")) or name in _IN_PLACE or call.kwargs.get("out") is not None:
        why = f"{name} writes into a tensor that it was given"
    elif any(map(is_batch, call.given)) or any(given.layout != torch.strided for given in call.given):
        why = "an operand is sparse, nested, or of several tensors (vmap)"
    elif call.operation.name == "sdpa" and call.function is not F.scaled_dot_product_attention:
        why = f"{name} is a kernel of attention's, and only scaled_dot_product_attention itself is followed"
    if why is not None:
        raise InvalidPlan(f"{call.site} is to be cast with scales by row or block, which cannot be done here: {why}")


_IN_PLACE = frozenset({"__imatmul__"})
