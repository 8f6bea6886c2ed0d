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
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes import kernels
from probes.apart import Apart
from probes.compacting import Compacted, Compactor
from probes.in_memory import in_memory_order, without_repeats
from probes.layout import (
    BIN_SHIFT,
    BINS,
    EXTREMES,
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
from probes.threads import SMALLEST_SHARE

_SUMS_BYTES, _EXTREMES_BYTES = 8 * SUMS, 4 * EXTREMES

EMPTY_EXTREMES = (0.0, -math.inf, 0.0, 0.0)

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _bin_edges() -> NDArray[np.float64]:
    bits = (np.arange(BINS, dtype=np.uint32) << BIN_SHIFT).astype(np.uint32)
    return np.append(bits.view(np.float32).astype(np.float64), 2.0**128)


BIN_EDGES = _bin_edges()
"""float64 [BINS + 1]: bin b holds magnitudes in [BIN_EDGES[b], BIN_EDGES[b + 1])."""


BYTES_A_SLOT = 8 * SUMS + 4 * EXTREMES
"""What one slot's sketch takes while it is being made."""


class SketchArray:
    """The sketches of one device: `sums` float64 [capacity, SUMS] and `extremes` float32 [capacity, EXTREMES].

    A slot takes 16,400 bytes: 5,000 slots 82 MB. While an array grows there is the old and the new one: together up to
    2.5 times what it held, which is 205 MB at 5,000 slots.
    """

    def __init__(self, slots: int = 64, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.slots = slots
        self.sums = torch.zeros(slots, SUMS, dtype=torch.float64, device=self.device)
        self._nothing = torch.tensor(EMPTY_EXTREMES, dtype=torch.float32, device=self.device)
        self.extremes = self._nothing.repeat(slots, 1)
        self._add = None if self.device.type == "cpu" else _device_kernel(self.device)
        self._compactor = Compactor(Apart())

    @property
    def bytes(self) -> int:
        """Memory on the device; while the array grows, what it held before comes on top."""
        return self.sums.nbytes + self.extremes.nbytes

    def reserve(self, slots: int) -> None:
        """Grow to hold at least this many slots, by half where that is more; what is recorded stays."""
        missing = slots - len(self.sums)
        if missing > 0:
            missing = max(missing, len(self.sums) // 2)
            self.sums = torch.cat([self.sums, self.sums.new_zeros(1, SUMS).expand(missing, SUMS)])
            self.extremes = torch.cat([self.extremes, self._nothing.expand(missing, EXTREMES)])
        self.slots = max(self.slots, slots)

    def add(self, slot: int, values: Tensor) -> None:
        """Add a tensor of any shape and strides to a slot: one read, nothing of the tensor is kept or changed.

        Empty tensors add nothing. On an accelerator nothing waits for it. There, Triton's kernel reads the tensor once
        where Triton is; `add_reference` elsewhere, which takes several temporaries of the tensor's size.
        Raises UnsupportedTensor for a dtype other than float16, bfloat16, float32, float64, and for what has no memory
        of its own on this device; IndexError for a slot that is not reserved.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of an array of {self.slots}: reserve({slot + 1}) comes first")
        if self._add is None:
            sums = self.sums.data_ptr() + slot * _SUMS_BYTES
            kernels.add(sums, self.extremes.data_ptr() + slot * _EXTREMES_BYTES, values)
        elif values.dtype not in FLOATING:
            raise kernels.unsupported(values)
        elif values.numel() > 0:
            self._add(self.sums[slot], self.extremes[slot], values.detach())

    def repeat(self, slot: int, other: int) -> None:
        """Add to a slot what another one holds: the same tensors, without reading them again."""
        self.sums[slot] += self.sums[other]
        torch.maximum(self.extremes[slot], self.extremes[other], out=self.extremes[slot])

    def taken(self, slots: Sequence[int]) -> Compacted:
        """Hand over the contents of these slots of an array on the host, compacted, and empty them."""
        sums, extremes = self.sums.numpy(), self.extremes.numpy()
        return self._compactor.of(sums, extremes, slots, self._nothing.numpy())

    def drain(self) -> tuple[Tensor, Tensor]:
        """Hand over the contents of the reserved slots, on the host, and start again from nothing.

        From CUDA the copy goes to pinned memory and is not waited for: it has come when an event is reached that the
        caller records on the current stream afterwards, and may not be read before. (Pinned memory is allocated once,
        which may wait, and then used again by torch's own cache when a step's tensors are let go.)
        """
        sums, extremes = _on_the_host(self.sums[: self.slots]), _on_the_host(self.extremes[: self.slots])
        self.sums[: self.slots].zero_()
        self.extremes[: self.slots].copy_(self._nothing.expand(self.slots, EXTREMES))
        return sums, extremes

    def merge(self, other: SketchArray) -> None:
        """Add another array's sketches, slot by slot: the SUM and the MAX that ranks do."""
        self.reserve(len(other.sums))
        self.sums[: len(other.sums)] += other.sums.to(self.device)
        head = self.extremes[: len(other.extremes)]
        torch.maximum(head, other.extremes.to(self.device), out=head)


def add(sums: Tensor, extremes: Tensor, values: Tensor) -> None:
    """Add a tensor to one slot's `sums` [SUMS] and `extremes` [EXTREMES], contiguous, which lie on its device."""
    if values.dtype not in FLOATING:
        raise kernels.unsupported(values)
    if values.numel() == 0:
        return
    if values.device.type == "cpu":
        kernels.add(sums.data_ptr(), extremes.data_ptr(), values)
    else:
        _device_kernel(values.device)(sums, extremes, values.detach())


def ready(device: torch.device) -> None:
    """Load the kernels of a device, which takes up to seconds the first time in a process and nothing later."""
    array = SketchArray(1, device)
    for size in (1, 2 * SMALLEST_SHARE):  # in one thread and in several
        array.add(0, torch.ones(size, device=device))


def empty_extremes(slots: int, device: torch.device) -> Tensor:
    """float32 [slots, EXTREMES] of slots that have met nothing."""
    return torch.tensor(EMPTY_EXTREMES, dtype=torch.float32, device=device).repeat(slots, 1)


def _on_the_host(values: Tensor) -> Tensor:
    if values.device.type != "cuda":
        return values.to("cpu", copy=True)
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _device_kernel(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None]:
    if device.type == "cuda" and find_spec("triton") is not None:
        try:
            kernel: Callable[[Tensor, Tensor, Tensor], None] = import_module("probes.sketch_triton").add
        except ImportError:  # a Triton of another time: slower, and the same numbers
            return add_reference
        return kernel
    return add_reference


def add_reference(sums: Tensor, extremes: Tensor, values: Tensor) -> None:
    """The sketch of a tensor, added to one slot's `sums` [SUMS] and `extremes` [EXTREMES]: slow and plain.

    It asks the host nothing (no boolean index, no bincount, no item), so that on an accelerator nothing waits.
    """
    held, times = without_repeats(values)
    x = in_memory_order(held).to(torch.float32)
    if len(x) == 0:
        return
    bits = x.view(torch.int32) & 0x7FFFFFFF
    finite = bits < 0x7F800000
    nonzero = finite & (bits != 0)
    counts = sums.new_zeros(BINS + 1)  # the last for what is in no bin
    bins = torch.where(nonzero, bits >> BIN_SHIFT, BINS)
    counts.index_add_(0, bins, counts.new_ones(1).expand(len(bins)))
    sums[:BINS] += counts[:BINS] * times
    sums[ZEROS] += (bits == 0).sum() * times
    sums[NANS] += torch.isnan(x).sum() * times
    sums[POSITIVE_INFS] += torch.isposinf(x).sum() * times
    sums[NEGATIVE_INFS] += torch.isneginf(x).sum() * times
    sums[SUM_OF_SQUARES] += torch.where(finite, x, 0.0).double().square().sum() * times
    found = torch.stack(
        [
            torch.where(nonzero, x.abs(), 0.0).max(),
            -torch.where(nonzero, x.abs(), math.inf).min(),
            _significant_bits(torch.where(nonzero, bits, 0)),
            _distinct(bits, nonzero),
        ]
    )
    torch.maximum(extremes, found.to(extremes), out=extremes)


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
    sample = bits[::stride].long()
    cells = (sample * 0x9E3779B1 & 0xFFFFFFFF) >> 20  # Fibonacci hashing: the top twelve of 32 bits
    cells = torch.where(nonzero[::stride], cells, HASH_CELLS)
    hits = torch.zeros(HASH_CELLS + 1, device=bits.device).index_add_(0, cells, torch.ones_like(cells).float())
    return linear_count((hits[:HASH_CELLS] > 0).sum())


def linear_count(hit: Tensor) -> Tensor:
    """Distinct values from the number of hash cells hit (Whang et al. 1990), capped at HASH_CELLS."""
    empty = (HASH_CELLS - hit).clamp(min=1).double()
    return (HASH_CELLS * (HASH_CELLS / empty).log()).round().clamp(max=HASH_CELLS)
