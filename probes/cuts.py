"""Which part of a product's gradients is calculated for its noise: enough of it, and each element of that whole.

    weight gradient of a matrix or a convolution   some output channels, whole; and some input channels, whole
    input gradient of either                       some samples and positions, some input channels
    products of two activations, attention         some entries of the batch

An inner sum is never cut: how much rounding noise is left of it depends on its length.

Each operand's part is drawn from the seed and its place alone, and a weight's by the weight's shape: whatever the batch
or the sequences, it is the same part of the weight's gradient, whose errors can be added and multiplied over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probes.contractions.sampling import some
from probes.operation import argument
from probes.sites import ProductCall
from probes.vjp import matrix_weight

CHANNELS = 48  # of a gradient's side. A mean over them of ratios between 0 and 1 has a spread of at most 0.07
ENTRIES = 8  # of a batch of products
SAMPLES = 16  # of an input gradient: entries of its first dimension
ROWS = 512  # of a layer's input gradient, in all

Index = dict[int, Tensor]  # dimension → which of its entries, int64


@dataclass(frozen=True)
class Cut:
    """For the gradients of `targets`, operands by their place: what of each tensor of the product they need.

    `indices`: one an operand, then one for the gradient at the result. `channels`: of the target's gradient, the
    dimensions each of whose entries here is whole, or a fair part.
    """

    targets: tuple[int, ...]
    indices: tuple[Index, ...]
    channels: tuple[int, ...] = (0, 1)

    def of(self, place: int, values: Tensor) -> Tensor:
        """That part of the tensor at this place."""
        for dimension, index in self.indices[place].items():
            values = values.index_select(dimension, index)
        return values

    def of_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """That part of every tensor."""
        return [self.of(place, values) for place, values in enumerate(tensors)]


def cuts_of(call: ProductCall, tensors: Sequence[Tensor], trained: Sequence[int], seed: int) -> list[Cut]:
    """The cuts that together have every trained operand as a target; `tensors`: operands, and the gradient."""
    if not trained:
        return []
    device = tensors[0].device

    def drawing(place: int) -> Chosen:
        generator = np.random.default_rng((seed, place))
        return lambda size, most: None if size <= most else torch.tensor(some(size, most, generator), device=device)

    kind = matrix_weight(call)
    if kind is not None:
        (out, inner), feature = (0, 1) if kind == "rows" else (1, 0), tensors[0].dim() - 1
        return [cut for one in trained for cut in _of_layer(one, tensors, out, inner, feature, drawing(one))]
    if _is_plain_convolution(call, tensors):
        return [cut for one in trained for cut in _of_layer(one, tensors, 0, 1, 1, drawing(one))]
    whole: list[Index] = [{} for _ in tensors]
    entries = drawing(0)(tensors[0].shape[0], ENTRIES) if _is_batched(call, tensors) else None
    if entries is not None:
        whole = [{0: entries} for _ in tensors]
    return [Cut(tuple(trained), tuple(whole))]


Chosen = Callable[[int, int], Tensor | None]


def _of_layer(target: int, tensors: Sequence[Tensor], out: int, inner: int, feature: int, chosen: Chosen) -> list[Cut]:
    """Of an input and a weight: the weight's dimensions of output and input channels, and theirs in the activations.

    A few rows can hold most of a weight gradient's energy (those of the tokens that occur): a column is told by all.
    """
    x, weight, _ = tensors
    columns = chosen(weight.shape[inner], CHANNELS)
    if target == 1:
        rows = chosen(weight.shape[out], CHANNELS)
        by_row = Cut((1,), ({}, _index({out: rows}), _index({feature: rows})), (out,))
        by_column = Cut((1,), (_index({feature: columns}), _index({inner: columns}), {}), (inner,))
        if rows is None and columns is None:
            return [Cut((1,), ({}, {}, {}))]
        return [by_row, by_column]
    places: dict[int, Tensor | None] = {}
    if feature == 1 and x.dim() > 2:
        places[0] = chosen(x.shape[0], SAMPLES)
    elif feature == 1:
        places[0] = chosen(x.shape[0], ROWS)
    else:
        places[0] = chosen(x.shape[0], SAMPLES)
        kept = min(x.shape[0], SAMPLES)
        for dimension in range(1, feature):
            places[dimension] = chosen(x.shape[dimension], max(1, ROWS // kept))
            kept *= min(x.shape[dimension], max(1, ROWS // kept))
    return [Cut((0,), (_index({**places, feature: columns}), _index({inner: columns}), _index(places)))]


def _index(chosen: dict[int, Tensor | None]) -> Index:
    return {dimension: index for dimension, index in chosen.items() if index is not None}


def _is_plain_convolution(call: ProductCall, tensors: Sequence[Tensor]) -> bool:
    """One of a batch, without groups, not transposed."""
    name, (x, weight) = call.operation.name, tensors[:2]
    return name in ("conv1d", "conv2d", "conv3d") and x.dim() == weight.dim() and x.shape[1] == weight.shape[1]


def _is_batched(call: ProductCall, tensors: Sequence[Tensor]) -> bool:
    """Several products side by side, along every tensor's first dimension, that no parameter enters."""
    if call.parameter is not None or call.operation.name not in ("matmul", "bmm", "sdpa"):
        return False
    if any(tensor.dim() < 3 or len(tensor) != len(tensors[0]) for tensor in tensors):
        return False
    if call.operation.name == "sdpa":
        mask = argument(call.args, call.kwargs, 3, "attn_mask")
        return tensors[0].dim() == 4 and (mask is None or mask.dim() < 4 or len(mask) == 1)
    return len({tensor.dim() for tensor in tensors}) == 1
