"""A CPU tensor's memory as an array, without `Tensor.numpy()`.

That call makes the tensor's storage unable to change its size for ever after (torch 2.13), and what is read is a
user's: FSDP2, for one, frees a gathered parameter by giving its storage the size of zero.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
}


def memory_of(values: Tensor) -> NDArray[Any]:
    """The elements of a contiguous tensor, in one row of its dtype. It must be kept alive as long as the array is used.

    Raises KeyError for a dtype that numpy lacks.
    """
    assert values.is_contiguous()
    dtype = np.dtype(_DTYPES[values.dtype])
    if not values.numel():
        return np.empty(0, dtype)
    held: Any = (ctypes.c_char * (values.numel() * dtype.itemsize)).from_address(values.data_ptr())
    return np.frombuffer(held, dtype)
