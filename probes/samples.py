"""Which part of a tensor belongs to which sample of the batch, and where samples mix.

A rounding error's effect on the loss is summed within a sample before it is squared: the losses of different samples
are independent, but for what mixes them. A sample is an entry of the model's input batch. In a tensor it is a
dimension of that size, or the outer part of a flattened first one ([B·T, D]; windows of an image). Where samples mix,
everything before sees the whole batch as one sample; in doubt, too: that is unbiased always, with a larger spread.

    BatchNorm in training, sums by index (message passing, MoE)      everything met so far
    rows picked by index (MoE routing, packed sequences)             what the module does with them from there on;
                                                                     below the root also everything met so far
    products of two activations that are matrices (a·bᵀ of a batch)  everything met so far
    one of several experts' weights, a tensor without a dimension    itself
    for samples
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes.ops import operation_of
from probes.sites import ProductCall


def leading_sizes(*inputs: Any) -> tuple[int | None, int | None]:
    """First two dimensions of the first tensor among a model's inputs, looked for inside of lists and mappings.

    The first is the batch's size, as far as anyone knows; None where there is no such dimension.
    """
    for value in inputs:
        if isinstance(value, Tensor):
            if value.dim():
                return value.shape[0], value.shape[1] if value.dim() > 1 else None
        elif isinstance(value, dict):
            found = leading_sizes(*value.values())
            if found[0] is not None:
                return found
        elif isinstance(value, (list, tuple)):
            found = leading_sizes(*value)
            if found[0] is not None:
                return found
    return None, None


def told_batch(call: ProductCall) -> tuple[int, int] | None:
    """Sizes of the batch and of what comes before it in the model's inputs, told by a call whose layout is known.

    A recurrent layer's with time first, and attention's [B, heads, T, features]; None for any other.
    """
    first = call.operands[0]
    if call.operation.name == "sdpa" and first.dim() == 4:
        return first.shape[0], first.shape[2]
    dimension = call.operation.batch_dimension(0, first, call.args)
    return (first.shape[1], first.shape[0]) if dimension == 1 else None


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


def by_sample(values: Tensor, dimension: int | None, batch: int | None) -> Tensor:
    """The tensor as [batch, …]: one row a sample, flattened from its second dimension on; [1, …] without samples."""
    if dimension is None or not batch:
        return values.reshape(1, -1)
    return values.movedim(dimension, 0).reshape(batch, -1)


def mixes_samples(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call, anything but a product of the model's, lets samples see each other."""
    if function is F.batch_norm:
        return bool(args[5] if len(args) > 5 else kwargs.get("training", False))
    if function in _SUMS_BY_INDEX:
        return any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))
    if function is torch.Tensor.__setitem__:
        return _indexes_rows(args[1]) and isinstance(args[2], Tensor) and args[2].requires_grad
    operation = operation_of(function)
    operands = None if operation is None else operation.read(args, kwargs)
    return operands is not None and operation is not None and crosses_samples(operation.name, operands)


def picks_rows(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None) -> bool:
    """Whether this call picks rows of an activation by index, so that they are no longer in the samples' order.

    One index a sample beside another for the position (`x[arange(B), last]`) leaves them where they are.
    """
    if function not in (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select):
        return False
    source = args[0] if args else kwargs.get("input")
    if not isinstance(source, Tensor) or not source.requires_grad or _is_parameter(source):
        return False
    if function is not torch.Tensor.__getitem__:
        return bool((args[1] if len(args) > 1 else kwargs.get("dim")) in (0, -source.dim()))
    index = args[1]
    several = [i for i in index if isinstance(i, Tensor) and i.dim()] if isinstance(index, tuple) else []
    if len(several) > 1 and several[0].shape == (batch,):
        return False
    return _indexes_rows(index)


def crosses_samples(name: str, operands: Sequence[Tensor]) -> bool:
    """A product of two matrices, the right one an activation: every row of one meets every row of the other."""
    if name not in ("matmul", "mm", "addmm") or len(operands) != 2 or any(o.dim() != 2 for o in operands):
        return False
    return operands[1].requires_grad and not any(map(_is_parameter, operands))


def is_an_experts(call: ProductCall) -> bool:
    """A product with one or all of the matrices that a parameter of three dimensions or more holds."""
    if call.parameter is None or call.operation.name.startswith("conv"):
        return False
    weight = call.operands[call.roles.index("weight")]
    return (weight if weight._base is None else weight._base).dim() > 2


def _indexes_rows(index: Any) -> bool:
    """Whether an index picks along the first dimension by a tensor of numbers or of yes and no."""
    first = next((i for i in index if i is not None), None) if isinstance(index, tuple) else index
    return isinstance(first, (Tensor, list)) and (isinstance(first, list) or first.dim() > 0)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


_SUMS_BY_INDEX: frozenset[Any] = frozenset(
    {
        torch.index_add,
        torch.Tensor.index_add,
        torch.Tensor.index_add_,
        torch.scatter_add,
        torch.Tensor.scatter_add,
        torch.Tensor.scatter_add_,
        torch.scatter_reduce,
        torch.Tensor.scatter_reduce,
        torch.Tensor.scatter_reduce_,
        torch.index_put,
        torch.Tensor.index_put,
        torch.Tensor.index_put_,
        torch.index_reduce,
        torch.Tensor.index_reduce,
        torch.Tensor.index_reduce_,
        torch.segment_reduce,
        torch.sparse.mm,
        torch.cdist,
    }
)
