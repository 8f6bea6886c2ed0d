"""Under torch.autocast the tensors that enter a product are not those that it is called with.

Autocast rounds the operands within the call, where no hook sees it: what is multiplied, and so what is recorded, is the
rounded tensor. (The gradient at the result has autocast's dtype by itself.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOWERED = frozenset(
    {
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "einsum",
        "tensordot",
        "inner",
        "convolution",
        "sdpa",
    }
    | {f"conv{sort}{n}d" for sort in ("", "_transpose") for n in (1, 2, 3)}
)  # by the name of the operation; those that call others of them included (autocast's lists, torch 2.13)


def multiplied_dtype(operation: str, operand: Tensor) -> torch.dtype:
    """The dtype in which this operand is multiplied by a product of this name, called here and now."""
    if not torch._C._is_any_autocast_enabled() or operation not in _LOWERED or operand.dtype == torch.float64:
        return operand.dtype
    device = operand.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return operand.dtype
    return torch.get_autocast_dtype(device)
