"""Parameters whose rows a forward looks up: embeddings. No matrix product, so no site; a tied head is told by both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probes.operation import argument

_TABLE_AT: dict[Callable[..., Any], tuple[int, str]] = {
    F.embedding: (1, "weight"),
    F.embedding_bag: (1, "weight"),
    torch.embedding: (0, "weight"),
    torch.index_select: (0, "input"),
    Tensor.index_select: (0, "self"),
    Tensor.__getitem__: (0, "self"),
}

FUNCTIONS = frozenset(_TABLE_AT)
"""Those that `table_looked_up` asks about."""


def table_looked_up(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The table whose rows this call picks by a tensor of indices, None where it is no such call.

    A table has two dimensions: what is picked from a stack of matrices is an expert.
    """
    place = _TABLE_AT.get(function)
    if place is None:
        return None
    table = argument(args, kwargs, *place)
    if function is Tensor.__getitem__ and not (len(args) > 1 and isinstance(args[1], Tensor)):
        return None
    return table if isinstance(table, Tensor) and table.dim() == 2 and table.is_floating_point() else None
