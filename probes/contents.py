"""The numbers that a tensor stores: itself where it is dense, else the dense tensor of its stored values.

A sparse operand is read, cast and given a gradient by its stored values; the zeros that it leaves out are no elements.
A jagged (nested) one is read by the packed values of all its parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COMPRESSED_ROWS = frozenset({torch.sparse_csr, torch.sparse_bsr})
_COMPRESSED_COLUMNS = frozenset({torch.sparse_csc, torch.sparse_bsc})
_KNOWN = frozenset({torch.strided, torch.sparse_coo, torch.jagged}) | _COMPRESSED_ROWS | _COMPRESSED_COLUMNS


def is_readable(tensor: Tensor) -> bool:
    """Whether the tensor holds floating numbers in a layout that is known here."""
    return tensor.is_floating_point() and tensor.layout in _KNOWN


def contents(tensor: Tensor) -> Tensor:
    """The stored values: dense, of the tensor's own dtype."""
    if tensor.layout == torch.strided:
        return tensor
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor.values()


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
        made: Tensor = torch.nested.nested_tensor_from_jagged(values, tensor.offsets())
        return made
    if tensor.layout in _COMPRESSED_ROWS:
        outer, inner = tensor.crow_indices(), tensor.col_indices()
    else:
        outer, inner = tensor.ccol_indices(), tensor.row_indices()
    return torch.sparse_compressed_tensor(outer, inner, values, tensor.shape, layout=tensor.layout)
