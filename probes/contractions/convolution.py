"""Convolutions as matrix products, by a view of their padded input: [sample, group, channel, place.., offset..].

Of the two tensors that a kernel W connects, call the one that a convolution reads D (the larger) and the one that it
writes Y (the smaller); W is [Y's channels, D's channels of a group, offset..]. A convolution makes Y of D's patches.
Its input gradient makes D's side of patches of Y's gradient, which is spread out by the stride, with the kernel turned
around. A transposed convolution is the same two with their parts exchanged. The weight gradient of either multiplies
D's patches by Y.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from probes.contractions.contraction import Contraction, Lettered
from probes.contractions.sampling import ENTRIES, some
from probes.sites import ProductCall

CONVOLUTIONS = frozenset({"convolution", *(f"conv{sort}{n}d" for n in (1, 2, 3) for sort in ("", "_transpose"))})


def convolution_products(
    call: ProductCall,
    operands: Sequence[Tensor],
    gradient: Tensor | None,
    wanted: set[str],
    generator: np.random.Generator,
) -> Iterator[Contraction]:
    """The forward product, and of its two gradients those whose names are wanted.

    The forward product and the input gradient are of a few samples of the batch, so that little is padded and spread
    out; the weight gradient sums over all of them.
    """
    window, spatial = _Window.of(call, operands[1]), operands[1].dim() - 2
    transposed = window.transposed
    weight = Lettered.of(operands[1], ())
    x = _batched(operands[0], spatial)
    chosen = some(len(x.values), ENTRIES, generator)
    few = x.seen_as(x.values[chosen], ())
    forward, backward = (_to_larger, _to_smaller) if transposed else (_to_smaller, _to_larger)
    yield forward("forward", few, weight, window, window.result(x.values.shape[2:]))
    if gradient is None or not wanted:
        return
    arrived = _batched(gradient, spatial)
    input_grad, weight_grad = (f"{role}_grad" for role in call.roles)
    if input_grad in wanted:
        yield backward(
            input_grad, arrived.seen_as(arrived.values[chosen], ()), weight, window, tuple(x.values.shape[2:])
        )
    if weight_grad in wanted:
        larger, smaller = (arrived, x) if transposed else (x, arrived)
        patches = _patches(larger, window, tuple(smaller.values.shape[2:]), "in")
        grouped = smaller.seen_as(_grouped(smaller.values, window.groups), ("sample", "group", "out", *window.places))
        left, right = (grouped, patches) if transposed else (patches, grouped)
        yield Contraction(weight_grad, left, right, ("group", "out", "in", *window.offsets))


def convolution_gradients(
    call: ProductCall, operands: Sequence[Tensor], gradient: Tensor, wanted: Sequence[int]
) -> list[Tensor] | None:
    """The gradients at the wanted operands, by the operator that autograd calls, without the forward product first.

    None where the zeros around the input differ at its two ends, which that operator does not know.
    """
    window, x = _Window.of(call, operands[1]), operands[0]
    if window.before != window.after:
        return None
    single = x.dim() < operands[1].dim()
    found = torch.ops.aten.convolution_backward(
        gradient[None] if single else gradient,
        x[None] if single else x,
        operands[1],
        None,
        window.stride,
        window.before,
        window.dilation,
        window.transposed,
        window.output_padding,
        window.groups,
        [0 in wanted, 1 in wanted, False],
    )
    return [found[place][0] if single and place == 0 else found[place] for place in wanted]


@dataclass(frozen=True)
class _Window:
    """How a kernel moves; tuples have an entry for every spatial dimension.

    before, after   zeros that are put at the ends of D
    output_padding  of a transposed convolution: places at the end of D that no window need reach
    """

    transposed: bool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, call: ProductCall, weight: Tensor) -> _Window:
        name, spatial = call.operation.name, weight.dim() - 2
        order: tuple[str, ...]
        if name == "convolution":  # aten's, of which there is one for all
            order = ("dilation", "transposed", "output_padding", "groups")
        else:
            order = ("output_padding", "groups", "dilation") if "transpose" in name else ("dilation", "groups")
        given: dict[str, Any] = {**dict(zip(("stride", "padding", *order), call.args[3:], strict=False)), **call.kwargs}
        transposed = "transpose" in name or bool(given.get("transposed", False))

        def each(name: str, default: int) -> tuple[int, ...]:
            value = given.get(name, default)
            sizes = (value,) if isinstance(value, int) else tuple(value) or (default,)
            return sizes * spatial if len(sizes) == 1 else sizes

        kernel, dilation = tuple(weight.shape[2:]), each("dilation", 1)
        if given.get("padding") == "same":
            around = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
            before = tuple(total // 2 for total in around)  # the odd zero comes last
            after = tuple(total - first for total, first in zip(around, before, strict=True))
        elif given.get("padding") == "valid":
            before = after = (0,) * spatial
        else:
            before = after = each("padding", 0)
        output_padding = each("output_padding", 0)
        groups = int(given.get("groups", 1))
        return cls(transposed, kernel, each("stride", 1), before, after, dilation, output_padding, groups)

    @property
    def places(self) -> list[str]:
        return [f"place{n}" for n in range(len(self.kernel))]

    @property
    def offsets(self) -> list[str]:
        return [f"offset{n}" for n in range(len(self.kernel))]

    @property
    def reach(self) -> list[int]:
        """From a window's first place to its last."""
        return [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]

    def result(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Places of the forward product's result."""
        found = []
        for n, size in enumerate(sizes):
            around = self.before[n] + self.after[n]
            if self.transposed:
                found.append((size - 1) * self.stride[n] - around + self.reach[n] + self.output_padding[n] + 1)
            else:
                found.append((size + around - self.reach[n] - 1) // self.stride[n] + 1)
        return tuple(found)


def _to_smaller(name: str, larger: Lettered, weight: Lettered, window: _Window, size: tuple[int, ...]) -> Contraction:
    """Y, with so many places, of D and the kernel."""
    kernel = weight.seen_as(weight.values.unflatten(0, (window.groups, -1)), ("group", "out", "in", *window.offsets))
    patches = _patches(larger, window, size, "in")
    return Contraction(name, patches, kernel, ("sample", "group", "out", *window.places))


def _to_larger(name: str, smaller: Lettered, weight: Lettered, window: _Window, size: tuple[int, ...]) -> Contraction:
    """D's side, with so many places, of Y: the kernel turned around moves by one over Y, spread out by the stride."""
    values, spatial, reach = smaller.values, len(window.kernel), window.reach
    shape = [(n - 1) * step + 1 for n, step in zip(values.shape[2:], window.stride, strict=True)]
    spread = values.new_zeros(*values.shape[:2], *shape)
    places: list[slice] = [slice(None, None, step) for step in window.stride]
    spread[(slice(None), slice(None), *places)] = values
    before = tuple(r - p for r, p in zip(reach, window.before, strict=True))
    moved = replace(window, stride=(1,) * spatial, before=before)
    turned = weight.values.flip(tuple(range(2, 2 + spatial))).unflatten(0, (window.groups, -1))
    patches = _patches(smaller.seen_as(spread, ()), moved, size, "out")
    kernel = weight.seen_as(turned, ("group", "out", "in", *window.offsets))
    return Contraction(name, patches, kernel, ("sample", "group", "in", *window.places))


def _patches(values: Lettered, window: _Window, size: tuple[int, ...], channel: str) -> Lettered:
    """[sample, group, channel, place.., offset..] of [sample, channels, place..]: a view of the padded tensor.

    What lies behind the last window is left out, and zeros are put where the tensor ends before it does.
    """
    margins: list[int] = []
    for n, places in enumerate(values.values.shape[2:]):
        needed = (size[n] - 1) * window.stride[n] + window.reach[n] + 1
        margins[:0] = [window.before[n], needed - places - window.before[n]]
    padded = _grouped(F.pad(values.values, margins) if any(margins) else values.values, window.groups)
    steps = padded.stride()[3:]
    view = padded.as_strided(
        (*padded.shape[:3], *size, *window.kernel),
        (
            *padded.stride()[:3],
            *(step * by for step, by in zip(steps, window.stride, strict=True)),
            *(step * by for step, by in zip(steps, window.dilation, strict=True)),
        ),
        padded.storage_offset(),
    )
    return values.seen_as(view, ("sample", "group", channel, *window.places, *window.offsets))


def _batched(values: Tensor, spatial: int) -> Lettered:
    """[sample, channels, place..], with one sample where there is no such dimension."""
    return Lettered.of(values if values.dim() == spatial + 2 else values[None], ())


def _grouped(values: Tensor, groups: int) -> Tensor:
    """[sample, group, channel, place..]."""
    return values.unflatten(1, (groups, -1))
