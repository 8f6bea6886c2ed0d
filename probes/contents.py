"""The numbers that a tensor stores: itself where it is dense, else the dense tensor of its stored values.

A sparse operand is read, cast and given a gradient by its stored values; the zeros that it leaves out are no elements.
A jagged (nested) one is read by the packed values of all its parts. Transforms of `torch.func` wrap tensors,
each once: such a one is read by what it wraps, which under vmap is the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_COMPRESSED_ROWS = frozenset({torch.sparse_csr, torch.sparse_bsr})
_COMPRESSED_COLUMNS = frozenset({torch.sparse_csc, torch.sparse_bsc})
_KNOWN = frozenset({torch.strided, torch.sparse_coo, torch.jagged}) | _COMPRESSED_ROWS | _COMPRESSED_COLUMNS


def is_readable(tensor: Tensor) -> bool:
    """Whether the tensor holds floating numbers in a layout that is known here."""
    return tensor.is_floating_point() and tensor.layout in _KNOWN


def contents(tensor: Tensor) -> Tensor:
    """The stored values: dense, of the tensor's own dtype."""
    while is_wrapped(tensor):
        tensor = functorch.get_unwrapped(tensor)
    if tensor.layout == torch.strided:
        return tensor
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor.values()


def outside_transforms() -> AbstractContextManager[Any]:
    """Work on what `contents` gave: inside a transform of `torch.func`, its result would be wrapped again."""
    if functorch.peek_interpreter_stack() is None:
        return _NOTHING
    cleared: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return cleared


_NOTHING: AbstractContextManager[None] = nullcontext()


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` wraps the tensor: what is made of it cannot be kept."""
    return bool(functorch.is_functorch_wrapped_tensor(tensor))


def is_batch(tensor: Tensor) -> bool:
    """Whether it stands for several tensors, packed or wrapped: a product of what it stores is then another product."""
    return is_wrapped(tensor) or tensor.layout == torch.jagged


def hookable(tensor: Tensor) -> Tensor | None:
    """The outermost wrapped tensor that a gradient will reach: the tensor itself, outside of transforms; else None."""
    while not tensor.requires_grad and is_wrapped(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor if tensor.requires_grad else None


def copies(tensors: Iterable[Tensor]) -> int:
    """How often a product of these tensors is made: 1, or under vmap once for each entry of the batches."""
    sizes = {}
    for tensor in tensors:
        while is_wrapped(tensor):
            inner = functorch.get_unwrapped(tensor)
            if functorch.is_batchedtensor(tensor):
                sizes[functorch.maybe_get_level(tensor)] = inner.shape[functorch.maybe_get_bdim(tensor)]
            tensor = inner
    return prod(sizes.values())


def readable(values: Tensor) -> Tensor:
    """The same numbers in a dtype that every sketch takes: those of 8 bits become 16, which loses nothing."""
    if values.dtype.itemsize > 1:
        return values
    return values.to(torch.bfloat16 if values.dtype == torch.float8_e8m0fnu else torch.float16)


def nonzeros(tensor: Tensor) -> int:
    """How many numbers are stored."""
    return contents(tensor).numel()


def with_contents(tensor: Tensor, values: Tensor) -> Tensor:
    """A tensor of the same layout and places with other values."""
    if tensor.layout == torch.strided:
        return values
    if tensor.layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(
            tensor._indices(), values, tensor.shape, is_coalesced=tensor.is_coalesced(), check_invariants=False
        )
    if tensor.layout == torch.jagged:
        made: Tensor = torch.nested.nested_tensor_from_jagged(values, cast(Any, tensor).offsets())
        return made
    if tensor.layout in _COMPRESSED_ROWS:
        outer, inner = tensor.crow_indices(), tensor.col_indices()
    else:
        outer, inner = tensor.ccol_indices(), tensor.row_indices()
    return torch.sparse_compressed_tensor(
        outer, inner, values, tensor.shape, layout=tensor.layout, check_invariants=False
    )
