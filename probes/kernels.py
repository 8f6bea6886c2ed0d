"""The sketch's CPU kernel: one compiled pass over the bits of the floats.

The tensor is taken in chunks that stay in the first-level cache. Over each chunk run the reductions that a compiler
turns into vector code (largest, smallest, mantissa bits in use, squares) and then the histogram, which no vector
instruction helps: it counts into two tables in turn, because neighbours often share a bin and an increment that waits
for the one before it would halve the speed. A chunk whose largest bit pattern is Inf's or above is gone over again,
element by element, so that the common chunk pays nothing for Inf and NaN.

A bf16 tensor is widened chunk by chunk, so it costs half the memory traffic of a float32 one.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from probes.layout import (
    AMAX,
    BIN_SHIFT,
    BINS,
    DISTINCT,
    HASH_CELLS,
    MINUS_AMIN,
    NANS,
    NEGATIVE_INFS,
    POSITIVE_INFS,
    SAMPLE,
    SIGNIFICANT_BITS,
    SUM_OF_SQUARES,
    ZEROS,
)

_INF_BITS = 0x7F800000
_CHUNK = 4096


def add(sums: NDArray[np.float64], extremes: NDArray[np.float32], values: Tensor) -> None:
    """Add a CPU tensor to one slot: `sums` [SUMS] and `extremes` [EXTREMES], as laid out in `sketch.py`."""
    flat = in_memory_order(values)
    if flat.dtype == torch.bfloat16:
        _add(sums, extremes, _array(flat, np.int16), 16)
    else:
        single = flat.float()
        _add(sums, extremes, _array(single, np.int32), 0)


def _array(flat: Tensor, dtype: type[np.int16] | type[np.int32]) -> NDArray[Any]:
    """The memory of a contiguous tensor, which must be kept while the array is used.

    Not `Tensor.numpy`: it marks the storage as one that cannot be resized (torch 2.9 to 2.13), and FSDP2 then fails to
    free the parameters that it gathered.
    """
    memory = (ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr())
    return np.frombuffer(memoryview(memory), np.dtype(dtype))


def in_memory_order(values: Tensor) -> Tensor:
    """Every element in one contiguous row; a dense tensor is not copied, however its dimensions are permuted."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    dense = values.permute(order)
    return dense.view(-1) if dense.is_contiguous() else values.reshape(-1)


@njit(cache=True, nogil=True)
def _add(sums, extremes, source, widen):  # type: ignore[no-untyped-def]
    histogram = np.zeros((2, 2048), dtype=np.int64)
    chunk = np.empty(_CHUNK, dtype=np.int32)
    for start in range(0, source.size, _CHUNK):
        size = min(_CHUNK, source.size - start)
        for i in range(size):
            chunk[i] = np.int32(source[start + i]) << widen
        _add_chunk(sums, extremes, histogram, chunk[:size])
    for b in range(BINS):
        sums[b] += histogram[0, b] + histogram[1, b]
    hit = _cells_hit(source, widen)
    if hit > 0:
        distinct = round(HASH_CELLS * np.log(HASH_CELLS / max(HASH_CELLS - hit, 1)))
        extremes[DISTINCT] = max(extremes[DISTINCT], np.float32(min(distinct, HASH_CELLS)))


@njit(cache=True, nogil=True, inline="always")
def _add_chunk(sums, extremes, histogram, signed):  # type: ignore[no-untyped-def]
    largest, smallest, mantissas, zeros = _reduce(signed)
    sums[ZEROS] += zeros
    histogram[0, 0] -= zeros  # zero shares bin 0 with the smallest subnormals
    if largest >= _INF_BITS:
        largest, mantissas = _without_nonfinite(sums, histogram, signed)
    else:
        sums[SUM_OF_SQUARES] += _squares(signed.view(np.float32))
    for i in range(0, signed.size - 1, 2):
        histogram[0, (signed[i] & 0x7FFFFFFF) >> BIN_SHIFT] += 1
        histogram[1, (signed[i + 1] & 0x7FFFFFFF) >> BIN_SHIFT] += 1
    if signed.size % 2:
        histogram[0, (signed[signed.size - 1] & 0x7FFFFFFF) >> BIN_SHIFT] += 1
    if largest == 0:
        return
    magnitudes = np.array([largest, smallest], dtype=np.int32).view(np.float32)
    extremes[AMAX] = max(extremes[AMAX], magnitudes[0])
    extremes[MINUS_AMIN] = max(extremes[MINUS_AMIN], -magnitudes[1])
    if smallest < 1 << 23:
        extremes[SIGNIFICANT_BITS] = max(extremes[SIGNIFICANT_BITS], np.float32(_significant_subnormal(signed)))
    extremes[SIGNIFICANT_BITS] = max(extremes[SIGNIFICANT_BITS], np.float32(_significant(mantissas)))


@njit(cache=True, nogil=True)
def _reduce(signed):  # type: ignore[no-untyped-def]
    """Bit patterns of the largest and smallest non-zero magnitude, the mantissa bits of normals, and zeros."""
    largest, smallest, mantissas, zeros = np.int32(0), np.int32(0x7FFFFFFF), np.int32(0), 0
    for i in range(signed.size):
        bits = signed[i] & np.int32(0x7FFFFFFF)
        largest = max(largest, bits)
        smallest = min(smallest, bits if bits != 0 else np.int32(0x7FFFFFFF))
        mantissas |= bits & np.int32(0x7FFFFF) if bits >= np.int32(0x800000) else np.int32(0)
        zeros += bits == 0
    return largest, smallest, mantissas, zeros


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _squares(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += value * value
    return total


@njit(cache=True, nogil=True)
def _without_nonfinite(sums, histogram, signed):  # type: ignore[no-untyped-def]
    """The rare chunk with Inf or NaN: count those, and reduce over the rest."""
    largest, mantissas = 0, 0
    values = signed.view(np.float32)
    for i in range(signed.size):
        bits = signed[i] & 0x7FFFFFFF
        if bits < _INF_BITS:
            largest = max(largest, bits)
            mantissas |= bits & 0x7FFFFF if bits >= 0x800000 else 0
            sums[SUM_OF_SQUARES] += np.float64(values[i]) * np.float64(values[i])
        elif bits > _INF_BITS:
            sums[NANS] += 1
        elif signed[i] > 0:
            sums[POSITIVE_INFS] += 1
        else:
            sums[NEGATIVE_INFS] += 1
    return largest, mantissas


@njit(cache=True, nogil=True)
def _significant(mantissas):  # type: ignore[no-untyped-def]
    """Mantissa bits in use after the leading one: the lowest bit set in any decides."""
    for unused in range(23):
        if mantissas >> unused & 1:
            return 23 - unused
    return 0


@njit(cache=True, nogil=True)
def _significant_subnormal(signed):  # type: ignore[no-untyped-def]
    """The same for the subnormals of a chunk, each counted from its own leading one."""
    most = 0
    for i in range(signed.size):
        bits = signed[i] & 0x7FFFFFFF
        if 0 < bits < 1 << 23:
            highest, lowest = 0, 22
            for position in range(23):
                if bits >> position & 1:
                    highest = max(highest, position)
                    lowest = min(lowest, position)
            most = max(most, highest - lowest)
    return most


@njit(cache=True, nogil=True)
def _cells_hit(source, widen):  # type: ignore[no-untyped-def]
    """Hash cells hit by a strided sample of the finite, non-zero magnitudes (linear counting)."""
    cells = np.zeros(HASH_CELLS, dtype=np.uint8)
    stride = max(1, -(-source.size // SAMPLE))
    for i in range(0, source.size, stride):
        bits = np.int64(np.int32(source[i]) << widen) & 0x7FFFFFFF
        if 0 < bits < _INF_BITS:
            cells[(bits * 0x9E3779B1 & 0xFFFFFFFF) >> 20] = 1
    return cells.sum()
