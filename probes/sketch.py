"""The log₂ sketch: what one read of a tensor leaves behind.

A float32 magnitude is its exponent field followed by its mantissa, so its bits, shifted right by twenty, are a
histogram bin: the exponent and three leading mantissa bits, eight bins an octave, no logarithm taken. (In the
subnormal range, below 2^-126, the same shift gives eight linear bins.) fp16 and bf16 values are exact in float32 and
use the same bins; float64 values are rounded to float32 first.

All sketches of a window live in two arrays a device, so that ranks, steps and clients merge with one SUM and one MAX:

    sums      float64 [slots, SUMS]      bin counts, counts of zero, NaN, +Inf and -Inf, and the sum of squares.
                                         float64 holds counts exactly to 9e15, and a square of a float32 exactly.
    extremes  float32 [slots, EXTREMES]  the largest magnitude; minus the smallest non-zero one; how many mantissa bits
                                         any element uses; how many distinct magnitudes a strided sample held.

Two implementations stand side by side: `add_reference` here, which a reader can check by eye, and the compiled
kernel in `kernels.py`. Tests hold them equal, bit for bit in everything but the order in which squares are added.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes import kernels
from probes.errors import UnsupportedTensor
from probes.layout import (
    BIN_SHIFT,
    BINS,
    HASH_CELLS,
    MANTISSA_BITS,
    NANS,
    NEGATIVE_INFS,
    POSITIVE_INFS,
    SAMPLE,
    SUM_OF_SQUARES,
    SUMS,
    ZEROS,
)

EMPTY_EXTREMES = (0.0, -math.inf, 0.0, 0.0)

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _bin_edges() -> NDArray[np.float64]:
    bits = (np.arange(BINS, dtype=np.uint32) << BIN_SHIFT).astype(np.uint32)
    return np.append(bits.view(np.float32).astype(np.float64), 2.0**128)


BIN_EDGES = _bin_edges()
"""float64 [BINS + 1]: bin b holds magnitudes in [BIN_EDGES[b], BIN_EDGES[b + 1])."""


class SketchArray:
    """The sketches of one device: `sums` float64 [slots, SUMS] and `extremes` float32 [slots, EXTREMES]."""

    def __init__(self, slots: int = 64, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.sums = torch.zeros(slots, SUMS, dtype=torch.float64, device=self.device)
        self.extremes = empty_extremes(slots, self.device)

    def reserve(self, slots: int) -> None:
        """Grow to hold at least this many slots; what is recorded stays."""
        missing = slots - len(self.sums)
        if missing > 0:
            missing = max(missing, len(self.sums))
            self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, SUMS)])
            self.extremes = torch.cat([self.extremes, empty_extremes(missing, self.device)])

    def add(self, slot: int, values: Tensor) -> None:
        """Add a tensor of any shape and strides to a slot: one read, nothing of the tensor is kept or changed.

        Empty tensors add nothing. Raises UnsupportedTensor for a dtype other than float16, bfloat16, float32, float64.
        """
        add(self.sums[slot], self.extremes[slot], values)

    def drain(self) -> tuple[Tensor, Tensor]:
        """Hand over the arrays' contents, on the host, and start again from nothing."""
        sums, extremes = self.sums.cpu().clone(), self.extremes.cpu().clone()
        self.sums.zero_()
        self.extremes.copy_(empty_extremes(len(self.extremes), self.device))
        return sums, extremes

    def merge(self, other: SketchArray) -> None:
        """Add another array's sketches, slot by slot: the SUM and the MAX that ranks do."""
        self.reserve(len(other.sums))
        self.sums[: len(other.sums)] += other.sums.to(self.device)
        head = self.extremes[: len(other.extremes)]
        torch.maximum(head, other.extremes.to(self.device), out=head)


def add(sums: Tensor, extremes: Tensor, values: Tensor) -> None:
    """Add a tensor to one slot's `sums` [SUMS] and `extremes` [EXTREMES], which lie on its device."""
    _require_floating(values)
    if values.numel() == 0:
        return
    if values.device.type == "cpu":
        kernels.add(sums.numpy(), extremes.numpy(), values.detach())
    else:
        add_reference(sums, extremes, values.detach())


def add_reference(sums: Tensor, extremes: Tensor, values: Tensor) -> None:
    """The sketch of a tensor, added to one slot's `sums` [SUMS] and `extremes` [EXTREMES]: slow and plain."""
    x = kernels.in_memory_order(values).to(torch.float32)
    bits = x.view(torch.int32) & 0x7FFFFFFF
    finite = torch.isfinite(x)
    nonzero = finite & (x != 0)
    magnitude_bits = bits[nonzero]
    sums[:BINS] += torch.bincount(magnitude_bits >> BIN_SHIFT, minlength=BINS)
    sums[ZEROS] += (x == 0).sum()
    sums[NANS] += torch.isnan(x).sum()
    sums[POSITIVE_INFS] += torch.isposinf(x).sum()
    sums[NEGATIVE_INFS] += torch.isneginf(x).sum()
    sums[SUM_OF_SQUARES] += x[finite].double().square().sum()
    if len(magnitude_bits):
        magnitudes = x[nonzero].abs()
        seen = torch.stack(
            [
                magnitudes.max(),
                -magnitudes.min(),
                _significant_bits(magnitude_bits),
                _distinct(bits, nonzero),
            ]
        )
        torch.maximum(extremes, seen.to(extremes), out=extremes)


def _significant_bits(magnitude_bits: Tensor) -> Tensor:
    """The most mantissa bits after the leading one that any element uses, 0 to 23.

    A subnormal counts from its own leading one, which is where a format with fewer exponent bits would have it.
    """
    fraction = magnitude_bits & 0x7FFFFF
    lowest = (fraction & -fraction).float().log2()  # position of the lowest set bit; -inf where none is
    highest = torch.where(magnitude_bits < (1 << MANTISSA_BITS), fraction.float().log2().floor(), MANTISSA_BITS)
    return torch.where(fraction == 0, 0.0, highest - lowest).max()


def _distinct(bits: Tensor, nonzero: Tensor) -> Tensor:
    """How many distinct magnitudes a strided sample of at most SAMPLE elements holds, by linear counting."""
    stride = max(1, -(-len(bits) // SAMPLE))
    sample = bits[::stride][nonzero[::stride]].long()
    cells = (sample * 0x9E3779B1 & 0xFFFFFFFF) >> 20  # Fibonacci hashing: the top twelve of 32 bits
    hit = torch.zeros(HASH_CELLS, dtype=torch.bool, device=bits.device)
    hit[cells] = True
    return linear_count(hit.sum())


def linear_count(hit: Tensor) -> Tensor:
    """Distinct values from the number of hash cells hit (Whang et al. 1990), capped at HASH_CELLS."""
    empty = (HASH_CELLS - hit).clamp(min=1).double()
    return (HASH_CELLS * (HASH_CELLS / empty).log()).round().clamp(max=HASH_CELLS)


def _require_floating(values: Tensor) -> None:
    if values.dtype not in FLOATING:
        allowed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in FLOATING))
        raise UnsupportedTensor(f"a sketch takes {allowed}; this tensor is {values.dtype}: convert it first")


def empty_extremes(slots: int, device: torch.device) -> Tensor:
    """float32 [slots, EXTREMES] of slots that have met nothing."""
    row: list[Any] = list(EMPTY_EXTREMES)
    return torch.tensor(row, dtype=torch.float32, device=device).repeat(slots, 1)
