"""How a relative sketch is laid out: counts [classes, BINS], sums of R² [classes, BINS], a tail of TAIL numbers."""

from __future__ import annotations

from probes.layout import BIN_SHIFT, MANTISSA_BITS

OCTAVES = 48  # below 2: e5m2 needs 33 below its largest value, fp16 41
BINS = OCTAVES << (MANTISSA_BITS - BIN_SHIFT)  # 384
LOWEST = (128 - OCTAVES) << (MANTISSA_BITS - BIN_SHIFT)  # bin of the tensor-wide sketch that is bin 0 here
MOST_CLASSES = 10
FINE_SHIFT = BIN_SHIFT - 5  # bins of the tiles' largest elements: 256 an octave
FINE_LOWEST = 0x3F400000  # the float32 bits of 0.75, where they begin; the end, 2, is BINS of them further

FOURTHS, TILES, EXTREME = range(3)  # Σ R⁴ over elements; tiles that hold anything; elements of extreme tiles
TAIL = 4

VERY_SMALL, VERY_LARGE = 2.0**-100, 2.0**126  # of a tile's largest magnitude: beyond, limits of scales may be met
NVFP4_STEPS = 448.0  # e4m3fn's largest value, to which nvfp4 scales the block of the largest magnitude
